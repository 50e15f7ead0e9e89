"""The bound on a release: how far the policy itself moved, and the largest step that is inside.

Objectives bound tokens of the batch; this bounds the policy. On held-out recent traffic and on the
probes, with full-vocabulary distributions, in nats per token (RL's Razor, arXiv 2509.04259:
forward KL from the start predicts forgetting):

    KL(live || candidate)   <= live_kl_nats      one release must not jump
    KL(anchor || candidate) <= anchor_kl_nats    many small steps must not add up unseen

A proposal outside is shrunk along the line from live to proposed until it is inside both, or
refused. Where the live policy itself is outside on the traffic of today, the line from the anchor
to the proposal is searched instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from moorline.events import Divergence, Release
from moorline.settings import BoundSettings
from updater.learning.divergence import exact_kl
from updater.learning.policy import AdapterState, Policy, interpolate
from updater.values import TokenSequence

_EXHAUSTED = 0.5  # of the anchor's limit: below, it is the proposal that is far, not the line
_AIM = 0.97  # of the limit, when the size of a step is guessed: measuring noise must not decide


@dataclass(frozen=True)
class BoundedStep:
    """The part of a proposal that may become a candidate."""

    scale: float
    """Share of the way from live policy to proposal; from the anchor where that was searched."""
    adapter: AdapterState
    divergences: tuple[Divergence, ...]
    probe_logprobs: list[Tensor]
    """Under the candidate, one [completion tokens, V] per probe."""


@dataclass(frozen=True)
class Refused:
    """No step of useful size is inside the bound."""

    divergences: tuple[Divergence, ...]
    """Those of the whole proposal."""
    anchor_exhausted: bool
    """The smallest step is too far from the anchor: no other batch would fare better."""


class TrustRegion:
    """Measures proposals against the live policy and the anchor."""

    def __init__(
        self,
        policy: Policy,
        probes: Sequence[TokenSequence],
        bound: BoundSettings,
        micro_batch_tokens: int,
    ) -> None:
        self._policy = policy
        self._bound = bound
        self._micro_batch_tokens = micro_batch_tokens
        self.probes = list(probes)
        self._base = policy.state()
        self.set_anchor(None)
        self._live: tuple[AdapterState, list[Tensor]] | None = None

    def set_anchor(self, anchor: AdapterState | None, version: int = 0) -> None:
        """Measure from this version's policy from now on (None: the base model)."""
        self._anchor, self._anchor_version = anchor, version
        self.anchor_probe_logprobs = self.logprobs(anchor, self.probes)

    def logprobs(
        self, adapter: AdapterState | None, sequences: Sequence[TokenSequence]
    ) -> list[Tensor]:
        """Full-vocabulary log-probabilities under an adapter (None: the base model)."""
        with self._policy.using(adapter):
            return self._policy.full_logprobs(sequences, self._micro_batch_tokens)

    def live_probe_logprobs(self, live: AdapterState) -> list[Tensor]:
        """The live policy's answers to the probes; computed once for each live policy."""
        if self._live is None or self._live[0] is not live:
            self._live = (live, self.logprobs(live, self.probes))
        return self._live[1]

    def largest_step(
        self,
        live: AdapterState,
        proposed: AdapterState,
        traffic: Sequence[TokenSequence],
        whole: float = 1.0,
    ) -> BoundedStep | Refused:
        """Search for the largest scale in [min_step_scale, whole] that is inside every limit.

        Args:
            traffic: recent replies that the batch at hand does not contain.
            whole: share of the proposal to begin with, in (0, 1].
        """
        whole = max(whole, self._bound.min_step_scale)
        origins = [
            _Origin("live", "probes", self.live_probe_logprobs(live)),
            _Origin("anchor", "probes", self.anchor_probe_logprobs),
        ]
        if traffic:
            origins += [
                _Origin("live", "traffic", self.logprobs(live, traffic)),
                _Origin("anchor", "traffic", self.logprobs(self._anchor, traffic)),
            ]
        tried: dict[float, BoundedStep] = {}

        def used_at(start: AdapterState) -> Callable[[float], float]:
            def used(scale: float) -> float:
                tried[scale] = self._measure(
                    interpolate(start, proposed, scale), scale, traffic, origins
                )
                return self._used(tried[scale].divergences)

            return used

        steps, min_scale = self._bound.search_steps, self._bound.min_step_scale
        scale = largest_inside(used_at(live), steps, min_scale, whole)
        if scale is not None:
            return tried[scale]
        spent = self._used(self._measure(live, 0.0, traffic, origins).divergences, "anchor")
        refused = self._refused(tried[whole], tried[min(tried)], spent)
        if spent <= 1.0:
            return refused
        back = self._base if self._anchor is None else self._anchor
        scale = largest_inside(used_at(back), steps, min_scale)
        return refused if scale is None else tried[scale]

    def _measure(
        self,
        adapter: AdapterState,
        scale: float,
        traffic: Sequence[TokenSequence],
        origins: Sequence[_Origin],
    ) -> BoundedStep:
        on_probes = self.logprobs(adapter, self.probes)
        on_traffic = self.logprobs(adapter, traffic) if traffic else []
        measured = tuple(
            origin.divergence(on_probes if origin.tokens_from == "probes" else on_traffic)
            for origin in origins
        )
        return BoundedStep(scale, adapter, measured, on_probes)

    def _refused(self, whole: BoundedStep, smallest: BoundedStep, spent: float) -> Refused:
        """``spent``: the share of its limit that the live policy's distance from the anchor is."""
        too_far = spent > _EXHAUSTED and self._used(smallest.divergences, "anchor") > 1.0
        jumps = self._used(smallest.divergences, "live") > 1.0
        return Refused(whole.divergences, anchor_exhausted=too_far and not jumps)

    def _used(self, divergences: Sequence[Divergence], measured_from: str | None = None) -> float:
        """The largest share of its limit that any of these uses; NaN where one is NaN."""
        shares = [
            one.mean_kl_nats / self._limit(one)
            for one in divergences
            if measured_from in (None, one.measured_from)
        ]
        return _largest(shares)

    def anchor_budget_left_nats(self, divergences: Sequence[Divergence]) -> float:
        """What the lineage may still move away from the anchor, nats per token."""
        spent = _largest([one.mean_kl_nats for one in divergences if one.measured_from == "anchor"])
        return self._bound.anchor_kl_nats - spent

    def budget_left_nats(self, live: Release) -> float | None:
        """The same after the live release.

        None: another anchor was chosen since it was measured; the next release will tell.
        """
        if live.version == self._anchor_version or not live.divergences:
            return self._bound.anchor_kl_nats
        if live.anchor != self._anchor_version:
            return None
        return self.anchor_budget_left_nats(live.divergences)

    def _limit(self, divergence: Divergence) -> float:
        if divergence.measured_from == "live":
            return self._bound.live_kl_nats
        return self._bound.anchor_kl_nats


@dataclass(frozen=True)
class _Origin:
    measured_from: Literal["live", "anchor"]
    tokens_from: Literal["traffic", "probes"]
    logprobs: list[Tensor]

    def divergence(self, candidate: Sequence[Tensor]) -> Divergence:
        return measure_divergence(self.logprobs, candidate, self.measured_from, self.tokens_from)


def measure_divergence(
    reference_logprobs: Sequence[Tensor],  # one [completion tokens, V] per sequence
    candidate_logprobs: Sequence[Tensor],  # likewise
    measured_from: Literal["live", "anchor"],
    tokens_from: Literal["traffic", "probes"],
) -> Divergence:
    """KL(measured_from || candidate): mean over all tokens, and largest mean of one sequence."""
    per_sequence = [
        exact_kl(log_q, log_p)
        for log_q, log_p in zip(reference_logprobs, candidate_logprobs, strict=True)
    ]
    tokens = sum(kl.numel() for kl in per_sequence)
    return Divergence(
        measured_from=measured_from,
        tokens_from=tokens_from,
        mean_kl_nats=sum(float(kl.sum()) for kl in per_sequence) / max(1, tokens),
        max_prompt_kl_nats=_largest([float(kl.mean()) for kl in per_sequence] or [0.0]),
        tokens=tokens,
    )


def moved_from_live_nats(divergences: Sequence[Divergence]) -> float:
    """KL(live || candidate) of a release, nats per token: the larger one; 0 before the first."""
    moved = [one.mean_kl_nats for one in divergences if one.measured_from == "live"]
    return _largest(moved or [0.0])


def _largest(measured: Sequence[float]) -> float:
    """NaN where one is: ``max`` would pass over it."""
    return math.nan if any(map(math.isnan, measured)) else max(measured)


def largest_inside(
    measure: Callable[[float], float], steps: int, min_scale: float, whole: float = 1.0
) -> float | None:
    """The largest scale found whose ``measure`` (share of the limit used) is at most 1.

    Tries the ``whole`` step first. Then, because a divergence grows about with the square of a
    small step, guesses from the last measurement and falls back to bisection where the guess leaves
    the bracket. ``None`` when nothing of at least ``min_scale`` was inside within ``steps`` tries
    after the first, or when a measurement is NaN (never taken for being inside).
    """
    used = measure(whole)
    if used <= 1.0:
        return whole
    inside, outside = 0.0, whole
    scale = whole
    for _ in range(steps):
        guess = scale * (_AIM / used) ** 0.5 if used > 0.0 else 1.0
        if not inside < guess < outside:
            guess = (inside + outside) / 2
        scale = guess
        if scale < min_scale:
            scale = min_scale
            if outside <= min_scale:
                break
        used = measure(scale)
        if used <= 1.0:
            inside = scale
            if used >= _AIM - 0.07:
                break
        else:
            outside = scale
    return inside if inside >= min_scale else None
