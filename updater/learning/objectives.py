"""What a token of experience teaches: every objective behind one signature and one registry.

Notation (../docs/concepts.md):

    q   probability of the sampled token under the behaviour policy mu; recorded, never recomputed
    p   under the policy pi that is being trained
    r   = p / q, the importance ratio
    A   advantage
    sg  stop-gradient

    output = OBJECTIVES["dppo_kl"](log_p, log_q, advantage, mask, divergence_limit=0.05)
    token_mean(output.loss, mask).backward()

Tensors are ``[..., batch, time]``, padded; ``mask`` marks the completion tokens that count. Leading
dimensions are independent batches. Whatever stands on padding is ignored, NaN included.

At r = 1 every objective's gradient is that of ``-A log p``. They differ in what they do when the
policy has moved away from the one that wrote the reply:

* ``dppo_kl``, ``dppo_tv``: drop a token once the *distribution* moved by more than delta at it
  and would be pushed further (arXiv 2602.04879). A rare token may move by a large ratio, a
  confident one may not.
* ``drpo``: pull it back smoothly instead (arXiv 2606.09821).
* ``m2po``: drop the fewest tokens that bring the second moment of log r down (arXiv 2510.01161).
* ``tapered``: push a disliked reply, as a whole, ever more gently the further the policy has left
  it behind (after TOPR, arXiv 2503.14286).
* ``ppo_clip``, ``gspo``, ``cispo``, ``icepop``, ``pg_is``, ``topr``, ``vespo``,
  ``ppo_clip_masked_negatives``, ``prime_rl``, ``pg``: rivals.

The formulas are in ``token_losses.py``. A weight that falls with r where A < 0 is never dropped
(except by ``pg``, to show why): it is what tapers the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from updater.learning import divergence, token_losses

RARE_PROBABILITY = 0.1
"""Diagnostics are split at this q: rare tokens must be found, the others must not break."""


@dataclass(frozen=True)
class ObjectiveOutput:
    """An objective's answer for each token."""

    loss: Tensor
    """[..., batch, time]; 0 on padding. Its *gradient* is the objective; not all are comparable
    in value, because a surrogate such as -sg(r) A log p has no meaning as a number."""
    kept: Tensor
    """[..., batch, time] bool: tokens that may move the policy (not padding, not masked out)."""
    log_p: Tensor
    log_q: Tensor
    advantage: Tensor
    mask: Tensor

    @cached_property
    def stats(self) -> dict[str, float]:
        """``measure`` of this batch."""
        return measure(self.log_p, self.log_q, self.advantage, self.mask, self.kept)


TokenLoss = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Objective:
    """A named loss with its limits. Calling it with an unknown limit raises TypeError."""

    name: str
    token_loss: TokenLoss
    limits: Mapping[str, float]
    """Every limit that it knows, with the default of its source."""
    source: str
    measures: Literal["kl", "tv"] | None = None
    """The divergence of mu and pi at a token that its mask looks at, if any: KL(mu || pi) or total
    variation. Binary unless a better measurement is given."""

    def __call__(
        self,
        log_p: Tensor,  # [..., batch, time], requires grad
        log_q: Tensor,  # [..., batch, time]
        advantage: Tensor,  # [..., batch, time] or [..., batch, 1]
        mask: Tensor,  # [..., batch, time] bool
        *,
        moved: Tensor | None = None,  # [..., batch, time], of the kind that it ``measures``
        **limits: float,
    ) -> ObjectiveOutput:
        if moved is not None and self.measures is None:
            raise TypeError(f"objective {self.name} measures no divergence")
        unknown = sorted(limits.keys() - self.limits.keys())
        if unknown:
            allowed = ", ".join(self.limits) or "none"
            raise TypeError(f"objective {self.name} has no limit {unknown[0]!r}; it has: {allowed}")
        # Padding becomes r = 1, A = 0: harmless in every formula, in sums and in gradients.
        zero = log_p.new_zeros(())
        log_p = torch.where(mask, log_p, zero)
        log_q = torch.where(mask, log_q, zero).detach()
        advantage = torch.where(mask, advantage, zero).detach()
        options: dict[str, Any] = {**self.limits, **limits}
        if self.measures is not None:
            options["moved"] = moved
        loss, kept = self.token_loss(log_p, log_q, advantage, mask, **options)
        loss = torch.where(mask, loss, zero)
        return ObjectiveOutput(loss, kept & mask, log_p.detach(), log_q, advantage, mask)


def token_mean(
    loss: Tensor,  # [..., batch, time]
    mask: Tensor,  # [..., batch, time] bool
    total_tokens: float | Tensor | None = None,
) -> Tensor:  # [...]
    """The one reduction: the sum over counted tokens divided by their number.

    Give ``total_tokens`` (of the whole batch) when ``loss`` is one micro-batch of several, so that
    accumulated gradients equal those of one large batch.
    """
    if total_tokens is None:
        total_tokens = mask.sum(dim=(-2, -1)).clamp_min(1)
    return (loss * mask).sum(dim=(-2, -1)) / total_tokens


# --- the registry ---


def _registry(*objectives: Objective) -> Mapping[str, Objective]:
    return MappingProxyType({objective.name: objective for objective in objectives})


OBJECTIVES: Mapping[str, Objective] = _registry(
    Objective(
        "dppo_kl",
        token_losses.dppo_kl,
        {"divergence_limit": 0.05, "ratio_cap": 20.0},
        "arXiv 2602.04879",
        "kl",
    ),
    Objective(
        "dppo_tv",
        token_losses.dppo_tv,
        {"divergence_limit": 0.15, "ratio_cap": 20.0},
        "arXiv 2602.04879",
        "tv",
    ),
    Objective("tapered", token_losses.tapered, {"taper_tokens": 16.0}, "after arXiv 2503.14286"),
    # The paper's 12.5 never binds, since |p - q| <= 1.
    Objective("drpo", token_losses.drpo, {"divergence_limit": 0.5}, "arXiv 2606.09821"),
    Objective("m2po", token_losses.m2po, {"second_moment_limit": 0.04}, "arXiv 2510.01161"),
    Objective(
        "ppo_clip",
        token_losses.ppo_clip,
        {"clip_low": 0.2, "clip_high": 0.28},
        "arXiv 1707.06347, 2503.14476",
    ),
    Objective("gspo", token_losses.gspo, {"clip_low": 3e-4, "clip_high": 4e-4}, "arXiv 2507.18071"),
    Objective(
        "cispo", token_losses.cispo, {"clip_low": 1.0, "clip_high": 0.28}, "arXiv 2506.13585"
    ),
    Objective(
        "icepop", token_losses.icepop, {"ratio_min": 0.5, "ratio_max": 5.0}, "arXiv 2510.18855"
    ),
    Objective("pg_is", token_losses.pg_is, {"ratio_cap": 20.0}, "arXiv 1802.01561"),
    Objective("topr", token_losses.tapered, {"taper_tokens": math.inf}, "arXiv 2503.14286"),
    # The limits of the authors' code.
    Objective(
        "vespo",
        token_losses.vespo,
        {
            "k_positive": 2.0,
            "lambda_positive": 3.0,
            "k_negative": 3.0,
            "lambda_negative": 2.0,
        },
        "arXiv 2602.10693",
    ),
    # The paper names no drift limit; half a nat is what TRL's documentation starts from.
    Objective(
        "ppo_clip_masked_negatives",
        token_losses.ppo_clip_masked_negatives,
        {"clip_low": 0.2, "clip_high": 0.28, "drift_limit": 0.5},
        "DeepSeek-V3.2, arXiv 2512.02556",
    ),
    Objective(
        "prime_rl",
        token_losses.prime_rl,
        {"divergence_limit": 0.2, "pull": 1e-3},
        "prime-rl's default loss",
    ),
    Objective("pg", token_losses.pg, {}, "Williams 1992"),
)


# --- regularisers: per-token losses, to be added before ``token_mean`` ---


def log_ratio_penalty(
    log_p: Tensor,  # [..., batch, time]
    log_q: Tensor,  # [..., batch, time]
    mask: Tensor,  # [..., batch, time] bool
    weight: float = 1e-3,
) -> Tensor:  # [..., batch, time]
    """tau * (log r)^2: a spring toward the behaviour policy, felt on masked tokens as well."""
    log_r = divergence.log_ratio(log_q.detach(), log_p)
    return torch.where(mask, weight * log_r.square(), log_p.new_zeros(()))


def kl_penalty(
    log_p: Tensor,  # [..., batch, time, vocabulary]
    log_reference: Tensor,  # [..., batch, time, vocabulary]
    mask: Tensor,  # [..., batch, time] bool
    weight: float,
) -> Tensor:  # [..., batch, time]
    """beta * KL(pi || reference), full vocabulary; reference: the live policy or the anchor."""
    kl = divergence.exact_kl(log_p, log_reference.detach())
    return torch.where(mask, weight * kl, kl.new_zeros(()))


def sampled_kl_penalty(
    log_p: Tensor,  # [..., batch, time]
    log_q: Tensor,  # [..., batch, time]
    log_reference: Tensor,  # [..., batch, time]
    mask: Tensor,  # [..., batch, time] bool
    weight: float,
    ratio_cap: float = 20.0,
) -> Tensor:  # [..., batch, time]
    """beta * sg(min(r, C) * log(p / reference)) * log p.

    Its gradient is that of beta * KL(pi || reference), estimated from the behaviour's tokens: for
    when the vocabulary is too large to hold two distributions. More variance than ``kl_penalty``.
    """
    r = divergence.log_ratio(log_q, log_p).exp().clamp_max(ratio_cap)
    gap = divergence.log_ratio(log_reference, log_p)
    return torch.where(mask, weight * (r * gap).detach() * log_p, log_p.new_zeros(()))


# --- what is refused, and what is measured ---


class BatchFault(StrEnum):
    """What is wrong with a batch that no gradient may be computed from."""

    SHAPES_DIFFER = "shapes_differ"
    """Tensors disagree about batch or time."""
    NO_TOKENS = "no_tokens"
    """The mask selects nothing."""
    NOT_FINITE = "not_finite"
    """A logprob or an advantage is NaN or infinite."""
    POSITIVE_LOGPROB = "positive_logprob"
    """A logprob is above 0 by more than rounding."""
    NO_SIGNAL = "no_signal"
    """Every advantage is 0: an update would only be noise."""


POSITIVE_LOGPROB_TOLERANCE_NATS = 1e-4


def find_batch_fault(
    log_p: Tensor, log_q: Tensor, advantage: Tensor, mask: Tensor
) -> BatchFault | None:
    """The first fault of this batch; None when it has none. Same shapes as an objective."""
    if not log_p.shape == log_q.shape == mask.shape or (
        advantage.shape[:-1] != mask.shape[:-1] or advantage.shape[-1] not in (1, mask.shape[-1])
    ):
        return BatchFault.SHAPES_DIFFER
    if not bool(mask.any()):
        return BatchFault.NO_TOKENS
    counted = advantage.expand_as(mask)[mask]
    if not all(bool(t.isfinite().all()) for t in (log_p[mask], log_q[mask], counted)):
        return BatchFault.NOT_FINITE
    if any(bool((t[mask] > POSITIVE_LOGPROB_TOLERANCE_NATS).any()) for t in (log_p, log_q)):
        return BatchFault.POSITIVE_LOGPROB
    if not bool(counted.any()):
        return BatchFault.NO_SIGNAL
    return None


@torch.no_grad()
def measure_batches(
    log_p: Tensor,  # [..., batch, time]
    log_q: Tensor,  # [..., batch, time]
    advantage: Tensor,  # [..., batch, time] or [..., batch, 1]
    mask: Tensor,  # [..., batch, time] bool
    kept: Tensor,  # [..., batch, time] bool
) -> dict[str, Tensor]:  # each [...]
    """Each batch's distance from the policies that wrote it; nats where the name says so.

    ``masked_share_*``: share of the tokens of that kind that the objective dropped, 0 where there
    are none of that kind.
    """
    q, p = (torch.where(mask, t, t.new_zeros(())).double() for t in (log_q, log_p))
    ratio = divergence.log_ratio(q, p).exp()
    rare, advantage = q.exp() < RARE_PROBABILITY, advantage.expand_as(mask)

    def mean(values: Tensor, of: Tensor) -> Tensor:
        counted = torch.where(of, values, values.new_zeros(()))
        return counted.sum(dim=(-2, -1)) / of.sum(dim=(-2, -1)).clamp_min(1)

    def dropped(of: Tensor) -> Tensor:
        return mean((~kept).double(), of & mask)

    return {
        "k1_nats": mean(divergence.k1(q, p), mask),
        "k3_nats": mean(divergence.k3(q, p), mask),
        "binary_kl_nats": mean(divergence.binary_kl(q, p), mask),
        "chi2": mean(divergence.sampled_chi2(q, p), mask),
        "tv": mean(divergence.sampled_tv(q, p), mask),
        "ess_share": divergence.ess_share(q.flatten(-2), p.flatten(-2), mask.flatten(-2)),
        "mean_ratio": mean(ratio, mask),
        "max_ratio": (ratio * mask).amax(dim=(-2, -1)),
        "masked_share": dropped(mask),
        "masked_share_rare": dropped(rare),
        "masked_share_common": dropped(~rare),
        "masked_share_positive": dropped(advantage > 0),
        "masked_share_negative": dropped(advantage < 0),
    }


def measure(
    log_p: Tensor,  # [batch, time]
    log_q: Tensor,  # [batch, time]
    advantage: Tensor,  # [batch, time] or [batch, 1]
    mask: Tensor,  # [batch, time] bool
    kept: Tensor,  # [batch, time] bool
) -> dict[str, float]:
    """``measure_batches`` of one batch, as numbers."""
    batches = measure_batches(log_p, log_q, advantage, mask, kept)
    return {name: float(value) for name, value in batches.items()}
