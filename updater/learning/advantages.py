"""From feedback to advantages, corrections and preferences. Pure.

Notation: r in [-1, 1] is the reward of an example, u = (r + 1) / 2 in [0, 1] the same as a share, v
its baseline as a share (``updater.learning.baselines``), w in (0, 1] a weight.

What one piece of feedback weighs is a product: 1, or SIGNAL_WEIGHT for a signal; the trust in its
rater (``Baselines.trust``); the caps on its rater and tenant (``influence.py``). The reward of
an example is the weighted mean of its ratings and signals, and its own weight what they weigh
together, at most 1:

    A = w * (r - b) / max(std(r - b), STD_FLOOR)     over the batch,     b = 2 * ess_share * v - 1

On stale data the baseline is biased low, as in AsymRE (arXiv 2506.20520): what was good then is
still worth learning, while pushing away from what the policy has long left teaches nothing and does
harm. How stale a batch is is measured, by its effective sample size: 1 when fresh.

The memory is read before the batch is added to it. Corrections and preferences have no reward: they
go on with their weight.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moorline.events import Feedback, FeedbackKind, Reason
from updater.learning.baselines import Baselines, cell_name, rater_name
from updater.learning.influence import (
    MAX_RATER_SHARE,
    MAX_TENANT_SHARE,
    RaterKey,
    largest_share,
    rater_caps,
)
from updater.values import Correction, CreditedExample, Example, Preference

SIGNAL_WEIGHT = 0.25
"""A signal's share of an explicit rating's weight: what somebody did only hints at their opinion
(people also copy an answer to complain of it), so four signals weigh as much as one word."""
STD_FLOOR = 0.5
"""Least standard deviation that advantages are divided by: a batch of nearly equal ratings is not
blown up to full size."""

EXPLICIT = frozenset({FeedbackKind.THUMBS, FeedbackKind.SCORE})
"""Kinds that say what the reply is worth."""


@dataclass(frozen=True)
class CreditStats:
    """How the credit of one batch came about; every field is a number for the diagnostics."""

    examples: int
    ratings: int
    """Thumbs and scores."""
    signals: int
    corrections: int
    preferences: int
    raters: int
    capped_raters: int
    """Raters whose influence was cut, by their own cap or their tenant's."""
    largest_rater_share: float
    """Share of all weight, before the caps."""
    largest_rater_share_capped: float
    """The same after them."""
    tenants: int
    largest_tenant_share: float
    largest_tenant_share_capped: float
    distrusted_raters: int
    """Raters who count less because hardly anybody agrees with them."""
    smallest_trust: float
    """In a rater of this batch; 1 when nobody is distrusted."""
    disputed_examples: int
    """Examples whose raters disagree on the sign."""
    mean_reward: float
    reward_std: float
    """The standard deviation of reward minus baseline, before the floor."""
    mean_baseline: float
    """In the units of the reward, as it was used."""
    ess_share: float
    """What the baseline was multiplied by, as a share."""
    zero_advantages: int
    """Rated examples that their rating says nothing of."""

    def as_dict(self) -> dict[str, float]:
        """For metrics and manifests."""
        return {name: float(value) for name, value in asdict(self).items()}


def why_no_credit(feedback: Feedback, signals: Mapping[str, float]) -> Reason | None:
    """Why nothing can be learned from this feedback, or None.

    Args:
        signals: name -> reward, ``learning.signals``.
    """
    if feedback.kind is FeedbackKind.SIGNAL and feedback.signal not in signals:
        return Reason.UNKNOWN_SIGNAL
    return None


def overridden_signals(feedback: Collection[Feedback]) -> list[Feedback]:
    """Signals beside an explicit rating of the same reply: mere hints, where somebody rated it."""
    if not any(one.kind in EXPLICIT for one in feedback):
        return []
    return [one for one in feedback if one.kind is FeedbackKind.SIGNAL]


def reward(feedback: Feedback, signals: Mapping[str, float]) -> float | None:
    """What a rating or signal is worth, in [-1, 1]; None for the kinds without reward.

    Thumbs as they are, scores linearly over their range, signals as ``signals`` says (None where it
    does not know the name).
    """
    match feedback.kind:
        case FeedbackKind.THUMBS:
            return feedback.value
        case FeedbackKind.SCORE:
            low, high, value = feedback.score_min, feedback.score_max, feedback.value
            if low is None or high is None or value is None:
                return None  # a retraction
            if math.isinf(high - low):  # too wide a range; half of a tiny one would be nothing
                low, high, value = low / 2, high / 2, value / 2
            share = (value - low) / (high - low)
            return min(1.0, max(-1.0, 2.0 * share - 1.0))
        case FeedbackKind.SIGNAL if feedback.signal is not None:
            return signals.get(feedback.signal)
    return None


def assign_credit(
    examples: Sequence[Example],
    baselines: Baselines,
    *,
    signals: Mapping[str, float],
    moved_nats: float = 0.0,
    ess_share: float = 1.0,
    max_rater_share: float = MAX_RATER_SHARE,
    max_tenant_share: float = MAX_TENANT_SHARE,
) -> tuple[tuple[CreditedExample, ...], Baselines, CreditStats]:
    """What each example of a batch teaches, and the baselines after it.

    Args:
        signals: name -> reward, ``learning.signals``.
        moved_nats: measured mean KL between the live policy and its parent, per token.
        ess_share: effective sample size of the batch under the live policy, as a share of its
            size, in (0, 1].
        max_rater_share: the largest share of a tenant's weight that one rater may have.
        max_tenant_share: the largest share of the batch's weight that one tenant may have.

    Returns:
        The examples in their order; the baselines to commit with the outcome; how it came about.

    Raises:
        ValueError: an example without feedback, or an ``ess_share`` outside its range.
    """
    if any(not example.feedback for example in examples):
        raise ValueError("an example without feedback teaches nothing")
    if not 0.0 < ess_share <= 1.0:
        raise ValueError(f"ess_share is {ess_share}, it must be in (0, 1]")
    rater_weights = RaterWeights(examples, baselines, signals, max_rater_share, max_tenant_share)
    weighted = [
        (one, *found) for one in examples if (found := rater_weights.reward(one)) is not None
    ]
    rewards = [r for _, r, _ in weighted]
    weights = [w for _, _, w in weighted]
    names = [cell_name(one.interaction.tenant, one.interaction.task) for one, _, _ in weighted]
    shares = [(r + 1.0) / 2.0 for r in rewards]
    expected = [
        2.0 * ess_share * share - 1.0 for share in baselines.expected_shares(names, shares, weights)
    ]
    surprises = [r - b for r, b in zip(rewards, expected, strict=True)]
    deviation = _std(surprises, weights)
    scale = max(deviation, STD_FLOOR)
    taught: dict[str, tuple[float | None, float]] = {
        one.example_id: (r, w * surprise / scale)
        for (one, r, w), surprise in zip(weighted, surprises, strict=True)
    }
    credited = tuple(
        rater_weights.credited(one, *taught.get(one.example_id, (None, 0.0))) for one in examples
    )
    after = baselines.after(names, shares, weights, _agreements(examples, signals), moved_nats)
    stats = CreditStats(
        **rater_weights.stats(),
        examples=len(examples),
        disputed_examples=sum(_is_disputed(example, signals) for example in examples),
        mean_reward=_mean(rewards),
        reward_std=deviation,
        mean_baseline=_mean(expected),
        ess_share=ess_share,
        zero_advantages=sum(advantage == 0.0 for _, advantage in taught.values()),
    )
    return credited, after, stats


class RaterWeights:
    """How much each piece of a batch's feedback weighs."""

    def __init__(
        self,
        examples: Sequence[Example],
        baselines: Baselines,
        signals: Mapping[str, float],
        max_rater_share: float,
        max_tenant_share: float,
    ) -> None:
        self._signals = signals
        self._feedback = [one for example in examples for one in example.feedback]
        raters = {_rater_key(example, one) for example in examples for one in example.feedback}
        self._trust = {rater_key: baselines.trust(rater_name(*rater_key)) for rater_key in raters}
        pieces: defaultdict[RaterKey, list[float]] = defaultdict(list)
        for example in examples:
            for one in example.feedback:
                rater_key = _rater_key(example, one)
                pieces[rater_key].append(_weight_of_kind(one) * self._trust[rater_key])
        self._amounts = {rater_key: math.fsum(weights) for rater_key, weights in pieces.items()}
        self._caps = rater_caps(self._amounts, self._trust, max_rater_share, max_tenant_share)

    def weight(self, example: Example, feedback: Feedback) -> float:
        """In (0, 1]."""
        rater_key = _rater_key(example, feedback)
        return _weight_of_kind(feedback) * self._trust[rater_key] * self._caps[rater_key]

    def reward(self, example: Example) -> tuple[float, float] | None:
        """Its reward and what that weighs; None where nobody rated it."""
        values, weights = [], []
        for one in example.feedback:
            value = reward(one, self._signals)
            if value is not None:
                values.append(value)
                weights.append(self.weight(example, one))
        if not values:
            return None
        mean = _mean(values, weights)
        return min(1.0, max(-1.0, mean)), min(1.0, math.fsum(weights))

    def credited(self, example: Example, reward: float | None, advantage: float) -> CreditedExample:
        """With the corrections and preferences of it."""
        corrections = tuple(
            Correction(one.feedback_id, one.rater, one.text, self.weight(example, one))
            for one in example.feedback
            if one.kind is FeedbackKind.CORRECTION and one.text is not None
        )
        preferences = tuple(
            Preference(
                one.feedback_id,
                one.rater,
                example.rejected[one.over_key],
                self.weight(example, one),
            )
            for one in example.feedback
            if one.over_key is not None
        )
        return CreditedExample(example, reward, advantage, corrections, preferences)

    def stats(self) -> dict[str, Any]:
        """The part of ``CreditStats`` about raters and their weights."""
        kinds = Counter(one.kind for one in self._feedback)
        capped = {
            rater_key: amount * self._caps[rater_key] for rater_key, amount in self._amounts.items()
        }
        return {
            "ratings": sum(kinds[kind] for kind in EXPLICIT),
            "signals": kinds[FeedbackKind.SIGNAL],
            "corrections": kinds[FeedbackKind.CORRECTION],
            "preferences": kinds[FeedbackKind.PREFERENCE],
            "raters": len(self._amounts),
            "capped_raters": sum(cap < 1.0 for cap in self._caps.values()),
            "largest_rater_share": largest_share(self._amounts, of_tenants=False),
            "largest_rater_share_capped": largest_share(capped, of_tenants=False),
            "tenants": len({rater_key.tenant for rater_key in self._amounts}),
            "largest_tenant_share": largest_share(self._amounts, of_tenants=True),
            "largest_tenant_share_capped": largest_share(capped, of_tenants=True),
            "distrusted_raters": sum(trust < 1.0 for trust in self._trust.values()),
            "smallest_trust": min(self._trust.values(), default=1.0),
        }


def _rater_key(example: Example, feedback: Feedback) -> RaterKey:
    return RaterKey(example.interaction.tenant, feedback.rater)


def _weight_of_kind(feedback: Feedback) -> float:
    return SIGNAL_WEIGHT if feedback.kind is FeedbackKind.SIGNAL else 1.0


def _opinions(example: Example, signals: Mapping[str, float]) -> list[tuple[str, float]]:
    """(rater, reward) of everybody who rated it explicitly and not neutrally."""
    return [
        (one.rater, value)
        for one in example.feedback
        if one.kind in EXPLICIT and (value := reward(one, signals))
    ]


def _agreements(
    examples: Sequence[Example], signals: Mapping[str, float]
) -> list[tuple[str, bool]]:
    """A rater, and whether the others who rated the same reply in this batch agree on the sign."""
    found = []
    for example in examples:
        opinions = _opinions(example, signals)
        for rater, value in opinions:
            others = math.fsum(other for name, other in opinions if name != rater)
            if others:
                name = rater_name(example.interaction.tenant, rater)
                found.append((name, (others > 0.0) == (value > 0.0)))
    return found


def _is_disputed(example: Example, signals: Mapping[str, float]) -> bool:
    values = [value for _, value in _opinions(example, signals)]
    return bool(values) and min(values) < 0.0 < max(values)


def _mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    weights = [1.0] * len(values) if weights is None else weights
    total = math.fsum(weights)
    return math.fsum(w * v for w, v in zip(weights, values, strict=True)) / total if total else 0.0


def _std(values: Sequence[float], weights: Sequence[float]) -> float:
    """Weighted standard deviation, around the weighted mean."""
    mean = _mean(values, weights)
    return math.sqrt(_mean([(v - mean) ** 2 for v in values], weights))
