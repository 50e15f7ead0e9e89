"""From runs to what can be said about them. Pure.

AUC: mean over all evaluations of the share of held-out replies that follow the rule. Final: the
last evaluation, which asks more. Standard errors are those of the held-out replies (a share of n
replies has variance p (1 - p) / n); with one seed they do not cover how much a whole run would
differ if it were made again.

At lag 0 with one pass over each batch p = q, so that all methods take the same step: one run stands
for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean

from benchmarks.real.train import Cell, Config, Evaluation, Trace

DEFAULT = "dppo_kl"
NOISE = 2.0
"""Standard errors: smaller differences are called none."""


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.error:.2f}"

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.value - other.value, (self.error**2 + other.error**2) ** 0.5)

    @property
    def signed(self) -> str:
        return f"{self.value:+.2f} ± {self.error:.2f}"

    @property
    def is_noise(self) -> bool:
        return abs(self.value) <= NOISE * self.error

    @classmethod
    def of_share(cls, share: float, replies: int) -> Estimate:
        # Laplace: a share of 0 or 1 out of few is not certain.
        smoothed = (share * replies + 1.0) / (replies + 2.0)
        return cls(share, (smoothed * (1.0 - smoothed) / replies) ** 0.5)

    @classmethod
    def mean_of(cls, estimates: Iterable[Estimate]) -> Estimate:
        """Of independent ones."""
        found = list(estimates)
        error = sum(one.error**2 for one in found) ** 0.5 / len(found)
        return cls(mean(one.value for one in found), error)


def auc(evaluations: Iterable[Evaluation]) -> Estimate:
    return Estimate.mean_of(Estimate.of_share(one.share, one.replies) for one in evaluations)


def final(evaluations: Iterable[Evaluation]) -> Estimate:
    last = list(evaluations)[-1]
    return Estimate.of_share(last.share, last.replies)


def best_rate(traces: Iterable[Trace]) -> float:
    """The learning rate of the run with the best AUC."""
    return max(traces, key=lambda trace: auc(trace.evaluations).value).cell.rate


def rate_cells(config: Config) -> list[Cell]:
    """The runs that choose the learning rate."""
    if len(config.rates) == 1:
        return []
    lag = max(config.lags)
    return [Cell(config.rules[0], lag, config.rate_method, rate) for rate in config.rates]


def cells(config: Config, rate: float) -> list[Cell]:
    """The runs of the comparison: the largest lag first, then the others from 0 up."""
    return [
        Cell(rule, lag, method, rate)
        for lag in sorted(config.lags, key=lambda lag: (lag != max(config.lags), lag))
        for rule in config.rules
        for method in (config.methods if lag else config.methods[:1])
    ]


@dataclass(frozen=True)
class Score:
    """One run, in a few numbers."""

    trace: Trace
    auc: Estimate
    final: Estimate
    kl_nats: float
    perplexity_rise: float
    """A share: perplexity of held-out text at the end over that of the base, minus 1."""

    @classmethod
    def of(cls, trace: Trace) -> Score:
        first, last = trace.side_effects[0], trace.side_effects[-1]
        return cls(
            trace,
            auc(trace.evaluations),
            final(trace.evaluations),
            last.kl_nats,
            last.perplexity / first.perplexity - 1.0,
        )


@dataclass(frozen=True)
class Comparison:
    """The default against one rival at one lag; positive: the default has more."""

    rival: str
    lag: int
    auc: dict[str, Estimate]
    """By rule."""
    final: dict[str, Estimate]
    kl_nats: dict[str, float]

    @property
    def mean_auc(self) -> Estimate:
        return Estimate.mean_of(self.auc.values())

    @property
    def mean_final(self) -> Estimate:
        return Estimate.mean_of(self.final.values())


@dataclass(frozen=True)
class Claim:
    """What the experiment was meant to show, and whether it did."""

    text: str
    evidence: str
    holds: bool


@dataclass(frozen=True)
class Summary:
    """All runs of the comparison."""

    config: Config
    scores: tuple[Score, ...]

    @classmethod
    def of(cls, traces: Iterable[Trace], config: Config) -> Summary:
        return cls(config, tuple(Score.of(trace) for trace in traces))

    def methods(self, lag: int) -> tuple[str, ...]:
        return self.config.methods if lag else self.config.methods[:1]

    def score(self, rule: str, lag: int, method: str) -> Score:
        """The run of a method, or the one that stands for all at lag 0."""
        wanted = (rule, lag, method if lag else self.config.methods[0])
        return next(
            one
            for one in self.scores
            if (one.trace.cell.rule, one.trace.cell.lag, one.trace.cell.method) == wanted
        )

    def scores_of(self, rule: str) -> list[Score]:
        return [one for one in self.scores if one.trace.cell.rule == rule]

    def comparison(self, rival: str, lag: int) -> Comparison:
        pairs = {
            rule: (self.score(rule, lag, DEFAULT), self.score(rule, lag, rival))
            for rule in self.config.rules
        }
        return Comparison(
            rival,
            lag,
            {rule: ours.auc - theirs.auc for rule, (ours, theirs) in pairs.items()},
            {rule: ours.final - theirs.final for rule, (ours, theirs) in pairs.items()},
            {rule: ours.kl_nats - theirs.kl_nats for rule, (ours, theirs) in pairs.items()},
        )

    def comparisons(self) -> list[Comparison]:
        """Against every rival at every lag above 0, the largest lag first."""
        return [
            self.comparison(rival, lag)
            for lag in sorted(self.config.lags, reverse=True)
            if lag
            for rival in self.config.methods
            if rival != DEFAULT
        ]

    def claims(self, perplexity_limit: float) -> list[Claim]:
        """The claims that these runs can decide.

        Args:
            perplexity_limit: rise that the product's gate allows, a share.
        """
        found = [self._learns(lag) for lag in sorted(self.config.lags)]
        for one in self.comparisons():
            for what, difference in (("AUC", one.mean_auc), ("final reward", one.mean_final)):
                found.append(
                    Claim(
                        f"lag {one.lag}: {what} of {DEFAULT} above that of {one.rival}, "
                        "mean over rules",
                        difference.signed + (", inside noise" if difference.is_noise else ""),
                        difference.value > 0.0 and not difference.is_noise,
                    )
                )
        worst = max(
            (one for one in self.scores if one.trace.cell.method == DEFAULT),
            key=lambda one: one.perplexity_rise,
        )
        found.append(
            Claim(
                f"{DEFAULT}: perplexity of held-out text stays inside the gate's limit "
                f"(+{perplexity_limit:.0%}) on every rule and lag",
                f"worst {worst.perplexity_rise:+.1%} "
                f"({worst.trace.cell.rule}, lag {worst.trace.cell.lag})",
                worst.perplexity_rise <= perplexity_limit,
            )
        )
        return found

    def _learns(self, lag: int) -> Claim:
        gains = {}
        for rule in self.config.rules:
            score = self.score(rule, lag, DEFAULT)
            start = score.trace.evaluations[0]
            gains[rule] = score.final - Estimate.of_share(start.share, start.replies)
        return Claim(
            f"lag {lag}: {DEFAULT} ends above the base policy on every rule",
            ", ".join(f"{rule} {gain.signed}" for rule, gain in gains.items()),
            all(gain.value > 0.0 and not gain.is_noise for gain in gains.values()),
        )
