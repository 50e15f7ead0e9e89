"""From runs to what can be said about them. Pure.

AUC: mean over all evaluations of the policy's probability of a right reply. Peak: the largest.
Final: mean of the last 5 % of the evaluations. Updates to half: the first evaluation at >= 0.5.
A method's learning rate at a lag is the one with the best mean AUC over seeds: one rule and one
grid for all.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from statistics import mean, stdev
from typing import Any

from benchmarks.staleness.methods import METHODS, Kind
from benchmarks.staleness.train import STALE_FROM, Config, Trace

FINAL_SHARE = 0.05
DEFAULT = "dppo_kl"
WITH_RECIPE = "dppo_kl + recipe"
SAME_FAMILY = "dppo_tv"
"""It comes from the same paper as the default: no rival."""
TIE = 0.005
"""AUC or reward: smaller differences are called equal."""
RIVAL = "ppo_clip"
UNCORRECTED = "pg"


@dataclass(frozen=True)
class Score:
    """One run, in four numbers."""

    trace: Trace
    auc: float
    peak: float
    final: float
    updates_to_half: int | None


def score(trace: Trace, config: Config) -> Score:
    rewards = trace.rewards
    tail = rewards[-max(1, round(len(rewards) * FINAL_SHARE)) :]
    half = next((i for i, reward in enumerate(rewards) if reward >= 0.5), None)
    return Score(
        trace,
        auc=mean(rewards),
        peak=max(rewards),
        final=mean(tail),
        updates_to_half=None if half is None else min(half * config.evaluate_every, config.updates),
    )


@dataclass(frozen=True)
class Summary:
    """All runs, and for each method and lag the runs at its best learning rate, by seed."""

    config: Config
    scores: tuple[Score, ...]
    best: dict[tuple[str, int], tuple[Score, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, traces: Iterable[Trace], config: Config) -> Summary:
        scores = tuple(score(trace, config) for trace in traces)
        groups: dict[tuple[str, int], dict[float, list[Score]]] = {}
        for one in scores:
            cell = groups.setdefault((one.trace.method, one.trace.lag), {})
            cell.setdefault(one.trace.learning_rate, []).append(one)
        best = {
            key: tuple(max(cell.values(), key=lambda runs: mean(run.auc for run in runs)))
            for key, cell in groups.items()
        }
        return cls(config, scores, best)

    def until(self, updates: int) -> Summary:
        """As if every run had been stopped then; rates are chosen anew."""
        count = updates // self.config.evaluate_every + 1
        shorter = (replace(s.trace, rewards=s.trace.rewards[:count]) for s in self.scores)
        return Summary.of(shorter, replace(self.config, updates=updates))

    def measured(self, methods: Iterable[str], lag: int) -> list[str]:
        """Those of the methods that have runs at this lag."""
        return [method for method in methods if (method, lag) in self.best]

    def rivals(self, lag: int) -> list[str]:
        """The published objectives, as they are, that the default is compared with."""
        objectives = (name for name, method in METHODS.items() if method.kind is Kind.OBJECTIVE)
        return [
            name for name in self.measured(objectives, lag) if name not in (DEFAULT, SAME_FAMILY)
        ]

    def auc(self, method: str, lag: int) -> float:
        return mean(run.auc for run in self.best[method, lag])

    def final(self, method: str, lag: int) -> float:
        return mean(run.final for run in self.best[method, lag])

    def rate(self, method: str, lag: int) -> float:
        return self.best[method, lag][0].trace.learning_rate

    def diagnostics(self, method: str, lag: int) -> dict[str, float]:
        runs = [run.trace.diagnostics for run in self.best[method, lag]]
        return {name: mean(run[name] for run in runs) for name in runs[0]}

    def run_rows(self) -> list[dict[str, Any]]:
        """`runs` of the JSON: every run that was made."""
        return [
            {
                "method": one.trace.method,
                "lag": one.trace.lag,
                "seed": one.trace.seed,
                "lr": one.trace.learning_rate,
                "best_lr": one.trace.learning_rate == self.rate(one.trace.method, one.trace.lag),
                "auc": round(one.auc, 5),
                "peak": round(one.peak, 5),
                "final": round(one.final, 5),
                "updates_to_half": one.updates_to_half,
            }
            for one in self.scores
        ]


@dataclass(frozen=True)
class Paired:
    """One method against another, seed by seed, at one lag."""

    ours: str
    other: str
    lag: int
    auc_differences: tuple[float, ...]
    final_differences: tuple[float, ...]

    @staticmethod
    def interval(differences: tuple[float, ...]) -> str:
        """Mean +- standard error."""
        if len(differences) < 2:
            return f"{differences[0]:+.3f}"
        error = stdev(differences) / len(differences) ** 0.5
        return f"{mean(differences):+.3f} ± {error:.3f}"

    @property
    def auc_wins(self) -> str:
        return f"{sum(d > 0 for d in self.auc_differences)}/{len(self.auc_differences)}"

    @property
    def final_wins(self) -> str:
        return f"{sum(d > 0 for d in self.final_differences)}/{len(self.final_differences)}"


def paired(summary: Summary, ours: str, other: str, lag: int) -> Paired:
    mine = {run.trace.seed: run for run in summary.best[ours, lag]}
    theirs = {run.trace.seed: run for run in summary.best[other, lag]}
    return Paired(
        ours,
        other,
        lag,
        tuple(mine[seed].auc - theirs[seed].auc for seed in mine),
        tuple(mine[seed].final - theirs[seed].final for seed in mine),
    )


@dataclass(frozen=True)
class Claim:
    """What the experiment was meant to show, and whether it did."""

    text: str
    evidence: str
    holds: bool


def claims(summary: Summary) -> list[Claim]:
    """The claims that these runs can decide."""
    lags = summary.config.lags
    stale = [lag for lag in lags if lag >= STALE_FROM]
    found: list[Claim] = []
    if 0 in lags:
        found.append(_fresh_data_makes_no_difference(summary))
    if stale and (RIVAL, max(stale)) in summary.best:
        for ours in summary.measured((DEFAULT, WITH_RECIPE), max(stale)):
            found.extend(_beats_the_clip(summary, ours, max(stale)))
    for lag in stale:
        if {(DEFAULT, lag), (UNCORRECTED, lag)} <= summary.best.keys():
            found.extend(_no_correction_collapses(summary, lag))
    for lag in stale:
        for ours in summary.measured((DEFAULT, WITH_RECIPE), lag):
            found.append(_beats_every_rival(summary, ours, lag))
    return found


def _fresh_data_makes_no_difference(summary: Summary) -> Claim:
    aucs = [
        summary.auc(method, 0)
        for method in (DEFAULT, SAME_FAMILY, *summary.rivals(0))
        if method != UNCORRECTED and (method, 0) in summary.best
    ]
    spread = max(aucs) - min(aucs)
    return Claim(
        "S = 0: all behaviour-anchored objectives within 0.02 of AUC",
        f"spread {spread:.4f} over {len(aucs)} objectives",
        spread <= 0.02,
    )


def _beats_every_rival(summary: Summary, ours: str, lag: int) -> Claim:
    rivals = summary.rivals(lag)
    by_auc = max(rivals, key=lambda method: summary.auc(method, lag))
    by_final = max(rivals, key=lambda method: summary.final(method, lag))
    auc, best_auc = summary.auc(ours, lag), summary.auc(by_auc, lag)
    final, best_final = summary.final(ours, lag), summary.final(by_final, lag)
    return Claim(
        f"S = {lag}: {ours} ahead of every rival in mean AUC, and behind none in mean final",
        f"AUC {auc:.3f}, best rival {best_auc:.3f} ({by_auc}); "
        f"final {final:.3f}, best rival {best_final:.3f} ({by_final}; within {TIE} is equal)",
        auc > best_auc + TIE and final >= best_final - TIE,
    )


def _beats_the_clip(summary: Summary, method: str, lag: int) -> list[Claim]:
    ours, theirs = summary.best[method, lag], summary.best[RIVAL, lag]
    by_seed = {run.trace.seed: run for run in theirs}
    ratios = [run.auc / by_seed[run.trace.seed].auc for run in ours]
    never = summary.config.updates
    speed = [
        _or(run.updates_to_half, never) / _or(by_seed[run.trace.seed].updates_to_half, never)
        for run in ours
    ]
    finals = [run.final for run in ours]
    kept = [run.final / run.peak for run in ours]
    return [
        Claim(
            f"S = {lag}: AUC of {method} at least 1.25 x that of {RIVAL} on every seed",
            "ratios " + _list(ratios),
            min(ratios) >= 1.25,
        ),
        Claim(
            f"S = {lag}: {method} at 50 % after at most 0.7 x the updates of {RIVAL}, every seed",
            "ratios " + _list(speed),
            max(speed) <= 0.7,
        ),
        Claim(
            f"S = {lag}: {method} ends at 0.9 or more, and at 0.95 x its peak or more, every seed",
            f"final {_list(finals)}; final/peak {_list(kept)}",
            min(finals) >= 0.9 and min(kept) >= 0.95,
        ),
    ]


def _no_correction_collapses(summary: Summary, lag: int) -> list[Claim]:
    at_best = summary.best[UNCORRECTED, lag]
    rate = summary.rate(DEFAULT, lag)
    at_ours = [
        one
        for one in summary.scores
        if (one.trace.method, one.trace.lag, one.trace.learning_rate) == (UNCORRECTED, lag, rate)
    ]

    def claim(runs: Iterable[Score], where: str) -> Claim:
        kept = [run.final / run.peak for run in runs]
        return Claim(
            f"S = {lag}: without correction the end is at most half the peak, every seed, {where}",
            "final/peak " + _list(kept),
            max(kept) <= 0.5,
        )

    return [
        claim(at_best, f"at its own best rate ({summary.rate(UNCORRECTED, lag):g})"),
        claim(at_ours, f"at the rate that is best for {DEFAULT} ({rate:g})"),
    ]


def _or(value: int | None, never: int) -> int:
    """An update count that is at least 1, for ratios."""
    return max(1, never if value is None else value)


def _list(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
