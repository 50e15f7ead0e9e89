"""From ratings to advantages. Pure.

Notation: r in [-1, 1] is the reward of an example, u = (r + 1) / 2 in [0, 1] the same as a share, v
the baseline, w in (0, 1] the weight of a rater in this batch.

There is one sample for a prompt and so no group to compare with. The baseline is a Beta tracker as
in SPO (arXiv 2509.13232): a cell per (tenant, task key) with pseudo-counts alpha (good) and beta
(bad), which forget faster the further the policy has moved since:

    keep  = clip(2^(-moved_nats / HALF_LIFE_NATS), KEEP_LEAST, KEEP_MOST)
    alpha <- keep * alpha + sum w u          beta <- keep * beta + sum w (1 - u)

Cells with few counts lean on the whole, and the whole on the batch (PRIOR_COUNT pseudo-ratings):

    v_all  = (alpha_all + PRIOR * mean(u)) / (alpha_all + beta_all + PRIOR)
    v_cell = (alpha + PRIOR * v_all) / (alpha + beta + PRIOR)

    A = w * (r - (2 v_cell - 1)) / max(std(r - v), STD_FLOOR)     over the batch

The baseline is read before the batch is added to it. Left out: task keys (all examples have the key
"all"), and credit for corrections, preferences and signals (``why_no_credit``).
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from daemon.events import Feedback, FeedbackKind, Reason
from updater.values import CreditedExample, Example

HALF_LIFE_NATS = 0.06
KEEP_LEAST = 0.3
KEEP_MOST = 0.6
"""Of the counts, from batch to batch. A policy that learns leaves an older mean behind: a baseline
that lags praises everything, which moves the policy and teaches nothing."""
PRIOR_COUNT = 8.0
STD_FLOOR = 0.5
"""Of rewards in [-1, 1]: a batch of nearly equal ratings is not blown up to full size."""
MAX_RATER_SHARE = 0.25
"""Of a batch's weight, where there are at least four raters; with fewer, an equal share."""

TASK_KEY = "all"
_ALL = ""  # the cell of everything; no tenant's cell has this name
_FORGOTTEN_COUNT = 0.05


@dataclass(frozen=True)
class Cell:
    """A decayed Beta tracker."""

    good: float = 0.0
    bad: float = 0.0

    @property
    def ratings(self) -> float:
        """Effective number of ratings in memory."""
        return self.good + self.bad

    def leaning_on(self, prior: float) -> float:
        """The expected share of good, with PRIOR_COUNT pseudo-ratings at ``prior``."""
        return (self.good + PRIOR_COUNT * prior) / (self.ratings + PRIOR_COUNT)

    def after(self, keep: float, good: float, bad: float) -> Cell:
        return Cell(keep * self.good + good, keep * self.bad + bad)


@dataclass(frozen=True)
class Baselines:
    """What rewards to expect; committed in the same transaction as the release they made."""

    cells: Mapping[str, Cell] = field(default_factory=dict)

    def to_json(self) -> str:
        """As the ledger keeps it."""
        return json.dumps({name: [cell.good, cell.bad] for name, cell in self.cells.items()})

    @classmethod
    def from_json(cls, text: str) -> Baselines:
        """The inverse of ``to_json``.

        Raises:
            ValueError: not made by it.
        """
        return cls({name: Cell(float(g), float(b)) for name, (g, b) in json.loads(text).items()})

    def cell(self, name: str) -> Cell:
        return self.cells.get(name, Cell())


@dataclass(frozen=True)
class CreditStats:
    """How the credit of one batch came about; every field is a number for the diagnostics."""

    examples: int
    ratings: int
    raters: int
    capped_raters: int
    """Raters whose influence was cut."""
    largest_rater_share: float
    """Of all ratings, before the cut."""
    largest_rater_share_capped: float
    """Of the weight, after it."""
    disputed_examples: int
    """Examples whose raters disagree on the sign."""
    mean_reward: float
    reward_std: float
    """Of reward minus baseline, before the floor."""
    mean_baseline: float
    """In the units of the reward."""
    zero_advantages: int

    def as_dict(self) -> dict[str, float]:
        """For metrics and manifests."""
        return {name: float(value) for name, value in asdict(self).items()}


def why_no_credit(feedback: Feedback) -> Reason | None:
    """Why no reward follows from this feedback, or None."""
    if feedback.kind in (FeedbackKind.THUMBS, FeedbackKind.SCORE):
        return None
    return Reason.UNSUPPORTED_KIND


def reward(feedback: Feedback) -> float:
    """What one rating is worth, in [-1, 1]: thumbs as they are, scores linearly over their range.

    Raises:
        ValueError: the kind has no reward (``why_no_credit``).
    """
    if why_no_credit(feedback) is not None or feedback.value is None:
        raise ValueError(f"{feedback.kind} feedback has no reward")
    if feedback.kind is FeedbackKind.THUMBS:
        return float(feedback.value)
    # Halves first: the width of a huge range would overflow.
    width = feedback.score_max / 2 - feedback.score_min / 2
    share = (feedback.value / 2 - feedback.score_min / 2) / width
    return min(1.0, max(-1.0, 2.0 * share - 1.0))


def rater_weights(
    ratings: Mapping[str, int],  # rater -> ratings in this batch, each > 0
    max_share: float = MAX_RATER_SHARE,
) -> dict[str, float]:
    """A weight in (0, 1] for each rater, so that none has more than a share of all weight.

    The share is ``max_share``, or an equal one where there are too few raters for that: a single
    person's own assistant learns from that person.
    """
    share = max(max_share, 1.0 / len(ratings)) if ratings else 1.0
    heaviest_first = sorted(ratings, key=lambda rater: (-ratings[rater], rater))
    free = float(sum(ratings.values()))
    limit = math.inf
    for capped, rater in enumerate(heaviest_first):
        # With `capped` raters at the limit L and the rest free: L = share * (capped * L + free).
        left = 1.0 - share * capped
        if left <= 1e-9:
            limit = float(ratings[rater])  # all capped: everybody counts as the lightest of them
            continue
        limit = share * free / left
        if ratings[rater] <= limit * (1 + 1e-9):
            break
        free -= ratings[rater]
    return {rater: min(1.0, limit / n) for rater, n in ratings.items()}


def assign_credit(
    examples: Sequence[Example],
    baselines: Baselines,
    *,
    moved_nats: float = 0.0,
    max_rater_share: float = MAX_RATER_SHARE,
) -> tuple[tuple[CreditedExample, ...], Baselines, CreditStats]:
    """Rewards and advantages of a batch, and the baselines after it.

    Args:
        moved_nats: measured mean KL between the live policy and its parent, per token.
        max_rater_share: the largest share of the batch's weight that one rater may have.

    Returns:
        The examples in their order; the baselines to commit with the outcome; how it came about.

    Raises:
        ValueError: an example without ratings, or with a kind that has no reward.
    """
    if any(not example.feedback for example in examples):
        raise ValueError("an example without feedback has no reward")
    ratings = Counter(rating.rater for example in examples for rating in example.feedback)
    by_rater = rater_weights(ratings, max_rater_share)
    rewards, weights = [], []
    for example in examples:
        shares = [by_rater[rating.rater] for rating in example.feedback]
        total = sum(shares)
        values = [reward(rating) for rating in example.feedback]
        mean = sum(s * value for s, value in zip(shares, values, strict=True)) / total
        rewards.append(min(1.0, max(-1.0, mean)))
        weights.append(min(1.0, total))

    names = [cell_name(example.interaction.tenant) for example in examples]
    expected = _expectations(names, rewards, weights, baselines)
    surprises = [r - e for r, e in zip(rewards, expected, strict=True)]
    deviation = _std(surprises, weights)
    scale = max(deviation, STD_FLOOR)
    credited = tuple(
        CreditedExample(example, reward=r, advantage=w * surprise / scale)
        for example, r, w, surprise in zip(examples, rewards, weights, surprises, strict=True)
    )
    stats = CreditStats(
        examples=len(examples),
        ratings=ratings.total(),
        raters=len(ratings),
        capped_raters=sum(weight < 1.0 for weight in by_rater.values()),
        largest_rater_share=max(ratings.values(), default=0) / max(1, ratings.total()),
        largest_rater_share_capped=_largest_share(ratings, by_rater),
        disputed_examples=sum(_is_disputed(example) for example in examples),
        mean_reward=_mean(rewards),
        reward_std=deviation,
        mean_baseline=_mean(expected),
        zero_advantages=sum(one.advantage == 0.0 for one in credited),
    )
    return credited, _learned(names, rewards, weights, baselines, moved_nats), stats


def cell_name(tenant: str, task_key: str = TASK_KEY) -> str:
    """The name of a (tenant, task key) cell."""
    return json.dumps([tenant, task_key])


def _expectations(
    names: Sequence[str],
    rewards: Sequence[float],
    weights: Sequence[float],
    baselines: Baselines,
) -> list[float]:
    """The baseline of each example, in the units of the reward."""
    total = sum(weights)
    if not total:
        return []
    batch = sum(w * _share(r) for w, r in zip(weights, rewards, strict=True)) / total
    overall = baselines.cell(_ALL).leaning_on(batch)
    return [2.0 * baselines.cell(name).leaning_on(overall) - 1.0 for name in names]


def _learned(
    names: Sequence[str],
    rewards: Sequence[float],
    weights: Sequence[float],
    baselines: Baselines,
    moved_nats: float,
) -> Baselines:
    keep = min(KEEP_MOST, max(KEEP_LEAST, 2.0 ** (-max(0.0, moved_nats) / HALF_LIFE_NATS)))
    good: defaultdict[str, float] = defaultdict(float)
    bad: defaultdict[str, float] = defaultdict(float)
    for name, r, w in zip(names, rewards, weights, strict=True):
        for cell in (name, _ALL):
            good[cell] += w * _share(r)
            bad[cell] += w * (1.0 - _share(r))
    after = {
        name: baselines.cell(name).after(keep, good[name], bad[name])
        for name in sorted(baselines.cells.keys() | good.keys())
    }
    return Baselines({n: cell for n, cell in after.items() if cell.ratings >= _FORGOTTEN_COUNT})


def _share(r: float) -> float:
    return (r + 1.0) / 2.0


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _std(values: Sequence[float], weights: Sequence[float]) -> float:
    """Weighted standard deviation, around the weighted mean."""
    total = math.fsum(weights)
    if not total:
        return 0.0
    mean = math.fsum(w * v for w, v in zip(weights, values, strict=True)) / total
    spread = math.fsum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True))
    return math.sqrt(spread / total)


def _largest_share(ratings: Mapping[str, int], weights: Mapping[str, float]) -> float:
    influence = [n * weights[rater] for rater, n in ratings.items()]
    return max(influence) / math.fsum(influence) if influence else 0.0


def _is_disputed(example: Example) -> bool:
    values = [reward(rating) for rating in example.feedback]
    return min(values) < 0.0 < max(values)
