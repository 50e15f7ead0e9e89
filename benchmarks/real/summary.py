"""From runs to what can be said about them. Pure.

AUC: mean over all evaluations of the share of held-out replies that follow the rule. Final: the
last evaluation, which asks more. Standard errors are those of the held-out replies (a share of n
replies has variance p (1 - p) / n); with one seed they do not cover how much a whole run would
differ if it were made again.

A method's learning rate at a lag is the one with the best AUC, mean over rules: one rule and one
grid for all methods.

At lag 0 with one pass over each batch p = q, so that all objectives take the same step: one run
stands for all of them. The product, which differs by what it does about stale data and costs twice
as much to run, is run at the largest lag only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean

from benchmarks.real.train import PRODUCT, Cell, Config, Evaluation, Trace

DEFAULT = "dppo_kl"
OURS = (DEFAULT, PRODUCT)
NOISE = 2.0
"""Standard errors: smaller differences are called none."""
KEPT_SHARE = 0.8
"""Share of its peak; a run that ends lower has broken something."""


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
        """The mean of independent estimates."""
        found = list(estimates)
        error = sum(one.error**2 for one in found) ** 0.5 / len(found)
        return cls(mean(one.value for one in found), error)


def auc(evaluations: Iterable[Evaluation]) -> Estimate:
    return Estimate.mean_of(Estimate.of_share(one.share, one.replies) for one in evaluations)


def final(evaluations: Iterable[Evaluation]) -> Estimate:
    last = list(evaluations)[-1]
    return Estimate.of_share(last.share, last.replies)


def methods_at(config: Config, lag: int) -> tuple[str, ...]:
    """At lag 0 the first stands for all; the product is run at the largest lag only."""
    if lag == 0:
        return config.methods[:1]
    if lag == max(config.lags):
        return config.methods
    return tuple(method for method in config.methods if method != PRODUCT)


def cells(config: Config) -> list[Cell]:
    """All runs: the largest lag first, then from 0 up; the product's, which are slow, last."""
    found = [
        Cell(rule, lag, method, rate)
        for lag in sorted(config.lags, key=lambda lag: (lag != max(config.lags), lag))
        for rate in config.rates
        for rule in config.rules
        for method in methods_at(config, lag)
    ]
    return sorted(found, key=lambda cell: cell.method == PRODUCT)


@dataclass(frozen=True)
class Score:
    """One run, in a few numbers."""

    trace: Trace
    auc: Estimate
    peak: float
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
            max(one.share for one in trace.evaluations),
            final(trace.evaluations),
            last.kl_nats,
            last.perplexity / first.perplexity - 1.0,
        )


@dataclass(frozen=True)
class Comparison:
    """A method of ours against a rival at one lag; positive: ours has more."""

    ours: str
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
    """All runs, and for each method and lag its best learning rate."""

    config: Config
    scores: dict[Cell, Score]
    rates: dict[tuple[str, int], float]
    """(method, lag) -> learning rate."""

    @classmethod
    def of(cls, traces: Iterable[Trace], config: Config) -> Summary:
        scores = {trace.cell: Score.of(trace) for trace in traces}

        def mean_auc(method: str, lag: int, rate: float) -> float:
            return mean(scores[Cell(rule, lag, method, rate)].auc.value for rule in config.rules)

        rates = {
            (method, lag): max(config.rates, key=lambda rate: mean_auc(method, lag, rate))
            for lag in config.lags
            for method in methods_at(config, lag)
        }
        return cls(config, scores, rates)

    def methods(self, lag: int) -> tuple[str, ...]:
        return methods_at(self.config, lag)

    def score(self, rule: str, lag: int, method: str, rate: float | None = None) -> Score:
        """The run of a method at its best rate, or at another."""
        if rate is None:
            rate = self.rates[method, lag]
        return self.scores[Cell(rule, lag, method, rate)]

    def start(self, rule: str) -> Evaluation:
        """The base policy on held-out questions, from where every run starts."""
        return self.score(rule, self.config.lags[0], self.config.methods[0]).trace.evaluations[0]

    def comparison(self, ours: str, rival: str, lag: int) -> Comparison:
        pairs = {
            rule: (self.score(rule, lag, ours), self.score(rule, lag, rival))
            for rule in self.config.rules
        }
        return Comparison(
            ours,
            rival,
            lag,
            {rule: mine.auc - theirs.auc for rule, (mine, theirs) in pairs.items()},
            {rule: mine.final - theirs.final for rule, (mine, theirs) in pairs.items()},
            {rule: mine.kl_nats - theirs.kl_nats for rule, (mine, theirs) in pairs.items()},
        )

    def comparisons(self) -> list[Comparison]:
        """Each of ours against every rival at every lag above 0, the largest lag first."""
        return [
            self.comparison(ours, rival, lag)
            for lag in sorted(self.config.lags, reverse=True)
            if lag
            for ours in self.ours(lag)
            for rival in self.config.methods
            if rival not in OURS
        ]

    def ours(self, lag: int) -> tuple[str, ...]:
        """Which methods at a lag are Moorline's."""
        return tuple(method for method in self.methods(lag) if method in OURS)

    def claims(self, perplexity_limit: float) -> list[Claim]:
        """The claims that these runs can decide.

        Args:
            perplexity_limit: rise that the product's gate allows, a share.
        """
        lags = sorted(self.config.lags)
        found = [
            claim
            for lag in lags
            for ours in self.ours(lag)
            for claim in (self._learns(ours, lag), self._keeps(ours, lag))
        ]
        for one in self.comparisons():
            for what, difference in (("AUC", one.mean_auc), ("final reward", one.mean_final)):
                found.append(
                    Claim(
                        f"lag {one.lag}: {what} of {one.ours} above that of {one.rival}, "
                        "mean over rules",
                        difference.signed + (", inside noise" if difference.is_noise else ""),
                        difference.value > 0.0 and not difference.is_noise,
                    )
                )
        return [*found, *(self._fluent(ours, perplexity_limit) for ours in self.ours(lags[-1]))]

    def _fluent(self, ours: str, perplexity_limit: float) -> Claim:
        worst = max(
            (
                self.score(rule, lag, ours)
                for rule in self.config.rules
                for lag in self.config.lags
                if ours in self.methods(lag)
            ),
            key=lambda one: one.perplexity_rise,
        )
        return Claim(
            f"{ours}: perplexity of held-out text stays inside the gate's limit "
            f"(+{perplexity_limit:.0%}) on every rule and lag",
            f"worst {worst.perplexity_rise:+.1%} "
            f"({worst.trace.cell.rule}, lag {worst.trace.cell.lag})",
            worst.perplexity_rise <= perplexity_limit,
        )

    def _keeps(self, ours: str, lag: int) -> Claim:
        scores = [self.score(rule, lag, ours) for rule in self.config.rules]
        return Claim(
            f"lag {lag}: {ours} keeps what it learned: final at least {KEPT_SHARE} x peak, "
            "every rule",
            ", ".join(
                f"{one.trace.cell.rule} {one.final.value:.2f} / {one.peak:.2f}" for one in scores
            ),
            all(one.final.value >= KEPT_SHARE * one.peak for one in scores),
        )

    def _learns(self, ours: str, lag: int) -> Claim:
        gains = {}
        for rule in self.config.rules:
            score = self.score(rule, lag, ours)
            start = self.start(rule)
            gains[rule] = score.final - Estimate.of_share(start.share, start.replies)
        return Claim(
            f"lag {lag}: {ours} ends above the base policy on every rule",
            ", ".join(f"{rule} {gain.signed}" for rule, gain in gains.items()),
            all(gain.value > 0.0 and not gain.is_noise for gain in gains.values()),
        )
