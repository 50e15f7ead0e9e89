"""One update: from a credited batch to a proposed adapter, with everything measured on the way.

The trainer holds the live policy's adapter and optimiser state. ``propose`` moves away from them;
``accept`` makes the result the new live state and ``restore`` goes back, so that a rejected
candidate leaves no trace, not even in the optimiser's moments.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moorline.errors import MoorlineError
from moorline.settings import LearningSettings
from updater.learning import divergence
from updater.learning.behaviour import Archive, BehaviourPolicies, Rerun, token_divergence
from updater.learning.chat_template import ChatTemplate
from updater.learning.diagnostics import Observation
from updater.learning.feedback_losses import FeedbackLosses, ReplyLosses
from updater.learning.objectives import OBJECTIVES, BatchFault, find_batch_fault, token_mean
from updater.learning.policy import AdapterState, Policy, micro_batches
from updater.learning.sampling import processed_distribution, processed_logprobs
from updater.learning.staleness import StalenessReport, measure_staleness
from updater.values import Batch, CreditedExample, Example, TokenSequence, as_sequence

OptimizerState = dict[str, Tensor]


class ObjectiveInvalid(MoorlineError):
    """`learning.objective` names no objective."""


class NonFiniteUpdate(MoorlineError):
    """A number of the batch, its loss or its gradient is no number to learn from; the policy was
    left as it was."""


class NothingToLearn(MoorlineError):
    """Nothing in the batch would move the policy: not a rating, a correction or a preference."""


@dataclass(frozen=True)
class Proposal:
    """Where the gradient wants to go, before any bound."""

    adapter: AdapterState
    optimizer: OptimizerState
    diagnostics: dict[str, float]


class Trainer:
    """Makes proposals from the live policy."""

    def __init__(
        self,
        policy: Policy,
        settings: LearningSettings,
        archive: Archive | None = None,
        chat: ChatTemplate | None = None,
    ) -> None:
        """Start from the anchor; ``resume`` continues from a release.

        Args:
            archive: where earlier policies are; None: only the live one and the anchor are known.
            chat: puts corrections into tokens; None: they teach nothing.

        Raises:
            ObjectiveInvalid: it is not in the registry.
        """
        if settings.objective not in OBJECTIVES:
            raise ObjectiveInvalid(
                f"learning.objective {settings.objective!r} is unknown: "
                f"use one of {', '.join(sorted(OBJECTIVES))}"
            )
        self._policy = policy
        self._settings = settings
        self._objective = OBJECTIVES[settings.objective]
        self._limits: dict[str, Any] = (
            {"divergence_limit": settings.divergence_limit}
            if settings.divergence_limit is not None
            else {}
        )
        self._behaviours = BehaviourPolicies(policy, archive)
        self._feedback_losses = FeedbackLosses(policy, chat, settings)
        self._optimizer = torch.optim.AdamW(
            [parameter for _, parameter in policy.parameters],
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )
        self.live_adapter = policy.state()
        self._live_optimizer: OptimizerState = {}
        self._anchor: AdapterState | None = None

    # --- live state -------------------------------------------------------------------------

    def resume(self, adapter: AdapterState, optimizer: bytes | None) -> None:
        """Continue from a release: its adapter and, if kept, its optimiser state."""
        self.accept(adapter, safetensors_load(optimizer) if optimizer else {})

    def accept(self, adapter: AdapterState, optimizer: OptimizerState) -> None:
        """The candidate (as far as the bound let it go) is the live policy now."""
        self.live_adapter = adapter
        self._live_optimizer = optimizer
        self.restore()

    def set_anchor(self, anchor: AdapterState | None) -> None:
        """Pull updates toward this policy from now on (None: the base model)."""
        self._anchor = anchor

    def restore(self) -> None:
        """Back to the live policy, as if nothing had been tried."""
        self._policy.load_state(self.live_adapter)
        self._optimizer.state.clear()
        for name, parameter in self._policy.parameters:
            if f"{name}.step" in self._live_optimizer:
                self._optimizer.state[parameter] = {
                    key: self._live_optimizer[f"{name}.{key}"].clone()
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }

    def _optimizer_state(self) -> OptimizerState:
        return {
            f"{name}.{key}": value.clone()
            for name, parameter in self._policy.parameters
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }

    # --- the update -------------------------------------------------------------------------

    def measure_staleness(self, examples: Sequence[Example], live_version: int) -> StalenessReport:
        """How far the live policy is from those that wrote these replies; free at lag 0."""
        return measure_staleness(
            self._policy,
            self._behaviours,
            examples,
            live_version=live_version,
            live=self.live_adapter,
            settings=self._settings,
        )

    def propose(
        self, batch: Batch, staleness: StalenessReport | None = None, *, now: float | None = None
    ) -> Proposal:
        """Take the optimiser steps of one batch from the live policy.

        The trainer's policy stands at the proposal afterwards: call ``accept`` or ``restore``.

        Args:
            staleness: what ``measure_staleness`` found at these examples; None: it is measured now.
            now: Unix seconds; the clock if None.

        Raises:
            NothingToLearn, NonFiniteUpdate: nothing changed.
        """
        if staleness is None:
            staleness = self.measure_staleness(
                [one.example for one in batch.examples], batch.live_version
            )
        reply_losses = self._feedback_losses.prepare(batch.examples)
        if not any(
            one.advantage != 0.0 or reply_losses[one.example.example_id].has_signal
            for one in batch.examples
        ):
            raise NothingToLearn("every advantage is zero, and no correction or preference is left")
        update = _Update(
            batch, staleness, reply_losses, Observation(batch, time.time() if now is None else now)
        )
        ess_lr_scale = staleness.ess_share if self._settings.scale_lr_by_ess else 1.0
        gradient_norms: list[float] = []
        try:
            for number in range(self._settings.passes):
                update.observed = number == 0
                for minibatch in _chunks(batch.examples, self._settings.minibatch_examples):
                    gradient_norms.append(self._step(minibatch, update, ess_lr_scale))
                    update.observation.from_live = False
        except NonFiniteUpdate:
            self.restore()
            raise
        adapter = self._policy.state()
        diagnostics = {
            **update.observation.diagnostics(),
            **staleness.diagnostics,
            **self._feedback_losses.diagnostics,
            **{f"credit_{name}": value for name, value in batch.credit.items()},
            "ess_lr_scale": ess_lr_scale,
            "gradient_norm": max(gradient_norms),
            "step_norm_share": _relative_change(self.live_adapter, adapter),
        }
        return Proposal(adapter, self._optimizer_state(), diagnostics)

    def _step(
        self, examples: Sequence[CreditedExample], update: _Update, ess_lr_scale: float
    ) -> float:
        """One optimiser step on one minibatch; returns the gradient norm before clipping."""
        self._optimizer.zero_grad(set_to_none=True)
        for loss in self._losses(examples, update):
            if not torch.isfinite(loss):
                raise NonFiniteUpdate("the loss is not finite")
            loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(
            [parameter for _, parameter in self._policy.parameters], self._settings.gradient_clip
        ).item()
        if not math.isfinite(norm):
            raise NonFiniteUpdate("the gradient is not finite")
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.learning_rate * ess_lr_scale
        self._optimizer.step()
        return norm

    def _losses(self, examples: Sequence[CreditedExample], update: _Update) -> Iterator[Tensor]:
        """What one minibatch teaches: ratings and tellings, corrected texts, preferences."""
        sequences = [as_sequence(one.example.interaction) for one in examples]
        total_tokens = sum(sequence.tokens for sequence in sequences)
        for group in micro_batches(sequences, self._settings.micro_batch_tokens):
            replies = [examples[index] for index in group]
            yield self._objective_loss(
                replies, [sequences[index] for index in group], total_tokens, update
            )
        reply_losses = [update.reply_losses[one.example.example_id] for one in examples]
        behaviours = update.staleness.behaviours
        yield from self._feedback_losses.losses(reply_losses, total_tokens, behaviours)

    def _objective_loss(
        self,
        examples: Sequence[CreditedExample],
        sequences: Sequence[TokenSequence],
        total_tokens: int,
        update: _Update,
    ) -> Tensor:
        """The objective plus ``anchor_weight * KL(policy || anchor)`` over the vocabulary."""
        reruns = self._reruns(examples, update)  # first: it computes as other policies
        anchor = self._anchor_logprobs(sequences) if self._settings.anchor_weight > 0.0 else None
        sizes = [sequence.tokens for sequence in sequences]
        logits, sampled = self._policy.completion_logits(sequences)
        replies = [
            self._reply(one, rows, tokens, update, rerun)
            for one, rows, tokens, rerun in zip(
                examples,
                torch.split(logits, sizes),
                torch.split(sampled, sizes),
                reruns,
                strict=True,
            )
        ]
        log_p, log_q, advantage, mask, moved = (
            pad_sequence([getattr(reply, name) for reply in replies], True)
            for name in ("log_p", "log_q", "advantage", "mask", "moved")
        )
        why = find_batch_fault(log_p.detach(), log_q, advantage, mask)
        if why is not None and why is not BatchFault.NO_SIGNAL:  # the batch as a whole has some
            raise NonFiniteUpdate(f"a micro-batch was refused: {why}")
        output = self._objective(
            log_p,
            log_q,
            advantage,
            mask,
            moved=moved if self._objective.measures else None,
            **self._limits,
        )
        loss = token_mean(output.loss, output.mask, total_tokens)
        if anchor is not None:
            logprobs = logits.log_softmax(dim=-1)
            moved_nats = (logprobs.exp() * (logprobs - anchor)).sum()
            loss = loss + self._settings.anchor_weight * moved_nats / total_tokens
        if update.observed:
            update.observation.add_tokens(output, logits)
        return loss

    @torch.no_grad()
    def _anchor_logprobs(self, sequences: Sequence[TokenSequence]) -> Tensor:  # [N, V]
        with self._policy.using(self._anchor):
            return self._policy.completion_logits(sequences)[0].log_softmax(dim=-1)

    def _reply(
        self,
        credited: CreditedExample,
        logits: Tensor,  # [tokens, V]
        sampled: Tensor,  # [tokens]
        update: _Update,
        rerun: Rerun | None,
    ) -> _Reply:
        """What the objective needs to know of one reply."""
        interaction = credited.example.interaction
        behaviour = update.staleness.behaviours.get(interaction.key)
        sampling = interaction.sampling
        possible = behaviour.possible(logits, sampling) if behaviour is not None else None
        log_p = processed_logprobs(logits, sampled, sampling, possible)
        log_q = torch.tensor(interaction.completion_logprobs, device=log_p.device)
        binary = divergence.binary_tv if self._objective.measures == "tv" else divergence.binary_kl
        moved = binary(log_q, log_p.detach())
        if behaviour is not None and (rerun is not None or behaviour.bins is not None):
            now = processed_distribution(logits.detach(), sampled, sampling, possible)
            better = token_divergence(self._objective.measures or "kl", now, behaviour, rerun)
            moved = torch.where(behaviour.known, better, moved)
        advantage = torch.full_like(log_q, credited.advantage)
        distilled = update.reply_losses[credited.example.example_id].advantage
        if distilled is not None:
            advantage = advantage + distilled
        if update.observed:
            update.observation.add_reply(interaction, log_p, log_q, behaviour)
        return _Reply(log_p, log_q, advantage, torch.ones_like(log_q, dtype=torch.bool), moved)

    def _reruns(self, examples: Sequence[CreditedExample], update: _Update) -> list[Rerun | None]:
        """The full distributions of a micro-batch's behaviour policies, where they are compared."""
        found: list[Rerun | None] = [None] * len(examples)
        if self._settings.divergence_estimator != "exact" or self._objective.measures is None:
            return found
        wanted = [
            index
            for index, one in enumerate(examples)
            if one.example.interaction.key in update.staleness.behaviours
        ]
        reruns = self._behaviours.rerun(
            [examples[index].example.interaction for index in wanted],
            update.batch.live_version,
            self.live_adapter,
        )
        for index, rerun in zip(wanted, reruns, strict=True):
            found[index] = rerun
        return found


@dataclass
class _Update:
    """One update while it is being made."""

    batch: Batch
    staleness: StalenessReport
    reply_losses: Mapping[str, ReplyLosses]
    observation: Observation
    observed: bool = True
    """Whether this pass is the first."""


@dataclass(frozen=True)
class _Reply:
    """One reply's tokens, each [tokens]."""

    log_p: Tensor
    log_q: Tensor
    advantage: Tensor
    mask: Tensor
    moved: Tensor


def optimizer_bytes(state: OptimizerState) -> bytes:
    """An optimiser state as one safetensors file."""
    content: bytes = safetensors_save({name: state[name].contiguous() for name in sorted(state)})
    return content


def _chunks(examples: Sequence[CreditedExample], size: int) -> list[Sequence[CreditedExample]]:
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def _relative_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """||after - before|| / ||before||, over all adapter tensors."""
    moved = sum(float((after[name] - before[name]).square().sum()) for name in before)
    size = sum(float(tensor.square().sum()) for tensor in before.values())
    return math.sqrt(moved / size) if size else math.inf
