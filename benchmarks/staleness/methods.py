"""What is compared: the registry's objectives, ablations made of them, and whole recipes.

Every loss here is a call of ``updater.learning.objectives.OBJECTIVES``, or two joined token by
token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from torch import Tensor

from updater.learning.objectives import OBJECTIVES, RARE_PROBABILITY, ObjectiveOutput


class Kind(StrEnum):
    """What a method is in the comparison for."""

    OBJECTIVE = "objective"
    """A row of the registry, with its source's limits, under the same credit as all others."""
    ABLATION = "ablation"
    """One piece of an objective taken away."""
    RECIPE = "recipe"
    """An objective with what the updater has around it: low-biased baseline, paced steps."""


@dataclass(frozen=True)
class Tokens:
    """What an objective may look at; all [R, B, T]."""

    log_p: Tensor
    log_q: Tensor
    log_anchor: Tensor
    """Under a recent policy instead of the behaviour policy; only the ablation uses it."""
    advantage: Tensor
    mask: Tensor


Loss = Callable[[Tokens], ObjectiveOutput]


@dataclass(frozen=True)
class Recipe:
    """What surrounds an objective."""

    baseline_follows_ess: bool = False
    """Multiply the baseline by the batch's effective-sample-size share: the staler, the lower."""
    log_ratio_weight: float = 0.0
    """tau of the spring toward the behaviour policy."""
    scale_lr_by_ess: bool = False
    """Multiply the step by the effective-sample-size share."""


PLAIN = Recipe()
UPDATER = Recipe(baseline_follows_ess=True, scale_lr_by_ess=True)
"""Moorline's defaults: `updater/learning/advantages.py`, `learning.scale_lr_by_ess`."""
SPRUNG = replace(UPDATER, log_ratio_weight=1e-3)


@dataclass(frozen=True)
class Method:
    name: str
    kind: Kind
    about: str
    loss: Loss
    recipe: Recipe = PLAIN
    recomputes_anchor: bool = False


def _objective(name: str) -> Loss:
    def loss(tokens: Tokens) -> ObjectiveOutput:
        return OBJECTIVES[name](tokens.log_p, tokens.log_q, tokens.advantage, tokens.mask)

    return loss


def _ppo_unclipped(tokens: Tokens) -> ObjectiveOutput:
    return OBJECTIVES["ppo_clip"](
        tokens.log_p, tokens.log_q, tokens.advantage, tokens.mask, clip_low=1.0, clip_high=1e9
    )


def _ppo_unclipped_where(rare: bool) -> Loss:
    """PPO's clip lifted for q < 0.1 (rare) or for q >= 0.1."""
    clipped = _objective("ppo_clip")

    def loss(tokens: Tokens) -> ObjectiveOutput:
        lift = (tokens.log_q.exp() < RARE_PROBABILITY) == rare
        return _join(lift, _ppo_unclipped(tokens), clipped(tokens))

    return loss


def _dppo_without_r(tokens: Tokens) -> ObjectiveOutput:
    """-A M log p: dppo_kl's mask, and no importance weight."""
    kept = _objective("dppo_kl")(tokens).kept
    fresh = _objective("pg")(tokens)
    return ObjectiveOutput(
        fresh.loss * kept, kept, fresh.log_p, fresh.log_q, fresh.advantage, fresh.mask
    )


def _dppo_recomputed_anchor(tokens: Tokens) -> ObjectiveOutput:
    """dppo_kl with a recent policy in the place of the one that wrote the reply."""
    return OBJECTIVES["dppo_kl"](tokens.log_p, tokens.log_anchor, tokens.advantage, tokens.mask)


def _join(choose: Tensor, yes: ObjectiveOutput, no: ObjectiveOutput) -> ObjectiveOutput:
    return ObjectiveOutput(
        torch.where(choose, yes.loss, no.loss),
        torch.where(choose, yes.kept, no.kept),
        no.log_p,
        no.log_q,
        no.advantage,
        no.mask,
    )


_ABOUT = {
    "dppo_kl": "the default: mask by binary KL",
    "dppo_tv": "mask by total variation",
    "drpo": "quadratic pull in total variation",
    "m2po": "mask by second moment of log r",
    "ppo_clip": "clip of the ratio, 0.8..1.28",
    "gspo": "clip of the sequence's ratio",
    "cispo": "weight clipped at 1.28, no mask",
    "icepop": "mask by ratio, 0.5..5, both sides",
    "pg_is": "importance weight capped at 20",
    "tapered": "disliked replies tapered, 16 tokens",
    "topr": "disliked replies tapered by their ratio",
    "vespo": "reply's ratio in a gamma kernel",
    "ppo_clip_masked_negatives": "PPO clip, drifted negatives dropped",
    "prime_rl": "mask by total variation 0.2, with a pull",
    "pg": "no correction",
}

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *(Method(name, Kind.OBJECTIVE, _ABOUT[name], _objective(name)) for name in OBJECTIVES),
        Method(
            "ppo_clip, rare free",
            Kind.ABLATION,
            "PPO clip lifted for q < 0.1 only",
            _ppo_unclipped_where(rare=True),
        ),
        Method(
            "ppo_clip, common free",
            Kind.ABLATION,
            "PPO clip lifted for q >= 0.1 only",
            _ppo_unclipped_where(rare=False),
        ),
        Method("dppo_kl, no r", Kind.ABLATION, "multiplier r dropped", _dppo_without_r),
        Method(
            "dppo_kl, recomputed",
            Kind.ABLATION,
            "anchored to a policy at most 8 updates old, not to the recorded one",
            _dppo_recomputed_anchor,
            recomputes_anchor=True,
        ),
        *(
            Method(
                f"{name} + recipe",
                Kind.RECIPE,
                f"{name} in the updater's recipe",
                _objective(name),
                UPDATER,
            )
            for name in ("dppo_kl", "dppo_tv", "drpo", "gspo", "ppo_clip")
        ),
        Method(
            "dppo_kl + recipe + spring",
            Kind.RECIPE,
            "and 1e-3 log^2 r toward the behaviour policy",
            _objective("dppo_kl"),
            SPRUNG,
        ),
    )
}
