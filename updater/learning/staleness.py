"""Measures how far the policies that wrote a batch are from the live one, before any learning.

Replies that the live policy wrote need no measuring at lag 0: their ratio is 1. For the others one
forward pass without gradient says what their tokens weigh, from which follow the effective sample
size (credit and learning-rate scale use it) and what is off-policy; where the behaviour policy's
whole distribution is needed, it is run again here, once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moorline.events import FeedbackKind, Interaction, Reason
from moorline.settings import LearningSettings
from updater.learning import off_policy
from updater.learning.behaviour import Behaviour, BehaviourPolicies
from updater.learning.diagnostics import is_fresh
from updater.learning.objectives import OBJECTIVES
from updater.learning.policy import AdapterState, Policy, micro_batches
from updater.learning.sampling import processed_logprobs
from updater.values import Example, as_sequence


@dataclass(frozen=True)
class StalenessReport:
    """What was measured. As it is by default: nothing was stale."""

    ess_share: float = 1.0
    """Effective sample size of what is left of the batch, as a share of its tokens."""
    set_aside: Mapping[str, Reason] = field(default_factory=dict)
    """By example id: what must not be trained on."""
    behaviours: Mapping[str, Behaviour] = field(default_factory=dict)
    """By interaction key: the behaviour policies that were run again."""
    diagnostics: Mapping[str, float] = field(default_factory=dict)


def needs_distribution(interaction: Interaction, settings: LearningSettings) -> bool:
    """Whether the recorded logprob of the sampled token is not all that an update needs."""
    measures = OBJECTIVES[settings.objective].measures is not None
    return interaction.sampling.truncated or (
        measures and settings.divergence_estimator != "binary"
    )


@torch.no_grad()
def measure_staleness(
    policy: Policy,
    behaviours: BehaviourPolicies,
    examples: Sequence[Example],
    *,
    live_version: int,
    live: AdapterState,
    settings: LearningSettings,
) -> StalenessReport:
    """Measure a batch against the live policy, as which ``policy`` must compute now."""
    # After a first step also the live policy is a behaviour policy that is no longer there.
    several_steps = settings.passes > 1 or len(examples) > settings.minibatch_examples
    replies = {
        interaction.key: interaction
        for example in examples
        for interaction in (example.interaction, *example.rejected.values())
        if not is_fresh(interaction, live_version)
        or (several_steps and needs_distribution(interaction, settings))
    }
    if not replies:
        return StalenessReport()
    wanted = list(replies.values())
    found: dict[str, Behaviour] = {}
    log_p: dict[str, Tensor] = {}
    top_k = settings.divergence_top_k if settings.divergence_estimator == "topk" else None
    sequences = [as_sequence(interaction) for interaction in wanted]
    for group in micro_batches(sequences, settings.micro_batch_tokens):
        again = [wanted[i] for i in group if needs_distribution(wanted[i], settings)]
        for interaction, rerun in zip(
            again, behaviours.rerun(again, live_version, live), strict=True
        ):
            found[interaction.key] = Behaviour.from_rerun(rerun, interaction, top_k)
        logits, sampled = policy.completion_logits([sequences[i] for i in group])
        sizes = [sequences[i].tokens for i in group]
        for index, rows, tokens in zip(
            group, torch.split(logits, sizes), torch.split(sampled, sizes), strict=True
        ):
            sampling, key = wanted[index].sampling, wanted[index].key
            possible = found[key].possible(rows, sampling) if key in found else None
            log_p[key] = processed_logprobs(rows, tokens, sampling, possible)
    return _judged(examples, found, log_p, settings)


def _judged(
    examples: Sequence[Example],
    behaviours: Mapping[str, Behaviour],
    log_p: Mapping[str, Tensor],
    settings: LearningSettings,
) -> StalenessReport:
    set_aside: dict[str, Reason] = {}
    mismatches: list[float] = []
    tokens_q, tokens_p = [], []
    for example in examples:
        interaction = example.interaction
        recorded = torch.tensor(interaction.completion_logprobs, dtype=torch.float32)
        now = log_p[interaction.key].cpu() if interaction.key in log_p else recorded
        behaviour = behaviours.get(interaction.key)
        mismatch = behaviour.mismatch_nats(interaction) if behaviour is not None else None
        if mismatch is not None:
            mismatches.append(mismatch)
        if mismatch is not None and not mismatch <= settings.mismatch_limit_nats:
            set_aside[example.example_id] = Reason.MISMATCH
        elif _only_rated(example) and off_policy.is_off_policy(
            recorded, now, settings.max_off_policy_kl_nats
        ):
            set_aside[example.example_id] = Reason.OFF_POLICY
        else:
            tokens_q.append(recorded)
            tokens_p.append(now)
    reasons = list(set_aside.values())
    diagnostics = {
        "set_aside_off_policy": float(reasons.count(Reason.OFF_POLICY)),
        "set_aside_mismatch": float(reasons.count(Reason.MISMATCH)),
    }
    if mismatches:
        diagnostics["behaviour_mismatch_nats"] = sum(mismatches) / len(mismatches)
    share = (
        off_policy.batch_ess_share(torch.cat(tokens_q), torch.cat(tokens_p)) if tokens_q else 1.0
    )
    return StalenessReport(share, set_aside, behaviours, diagnostics)


def _only_rated(example: Example) -> bool:
    """Corrections and preferences are not weighted by a ratio: they are never too far."""
    taught = (FeedbackKind.CORRECTION, FeedbackKind.PREFERENCE)
    return not any(feedback.kind in taught for feedback in example.feedback)
