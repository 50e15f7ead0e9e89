"""The picture: held-out reward for each rule and lag, and what it did to everything else."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from benchmarks.real.rules import RULES
from benchmarks.real.summary import OURS, Estimate, Score, Summary
from benchmarks.real.train import PRODUCT

# Okabe-Ito, told apart by colour-blind readers too; as in the staleness figure.
COLOURS = {"dppo_kl": "#0072B2", "ppo_clip": "#D55E00", "pg_is": "#8B5E3C", PRODUCT: "#009E73"}
LINES = {"dppo_kl": "-", "ppo_clip": "-", "pg_is": "--", PRODUCT: "-"}
ONE_FOR_ALL = "#555555"
KL_SHOWN_NATS = 1.0
RISE_SHOWN = 0.5
"""Longer bars are cut, and their value is written beside them: one collapsed run would make the
others invisible."""
LABEL_LETTERS = 24
TOO_LARGE = 1000.0
"""From here on a power of ten says enough."""


def draw(summary: Summary, path: Path) -> None:
    """Write the figure. Bands: one standard error of the held-out replies."""
    rules, lags = summary.config.rules, sorted(summary.config.lags)
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, grid = plt.subplots(
        len(rules),
        len(lags) + 2,
        figsize=(2.6 * (len(lags) + 2) + 0.4, 2.3 * len(rules) + 1.2),
        layout="constrained",
        squeeze=False,
    )
    for row, rule in zip(grid, rules, strict=True):
        for axes, lag in zip(row, lags, strict=False):
            _curves(axes, summary, rule, lag)
            axes.sharey(row[0])
        row[0].set_ylabel(textwrap.fill(f"{rule}: {RULES[rule].about}", LABEL_LETTERS))
        _bars(row[-2], summary, rule, lambda score: score.kl_nats, KL_SHOWN_NATS, "{:.1f}")
        _bars(row[-1], summary, rule, lambda score: score.perplexity_rise, RISE_SHOWN, "+{:.0%}")
        row[-1].yaxis.set_major_formatter(PercentFormatter(1.0))
    for axes, lag in zip(grid[0], lags, strict=False):
        axes.set_title("fresh data (lag 0)" if lag == 0 else f"lag {lag} updates")
    grid[0][-2].set_title("KL from base, nats\n(unrelated prompts, at the end)")
    grid[0][-1].set_title("perplexity of held-out text\n(rise over base, at the end)")
    for axes in grid[-1][: len(lags)]:
        axes.set_xlabel("update")
    for axes in grid[-1][len(lags) :]:
        axes.set_xlabel("lag (updates)")
    handles = [
        plt.Line2D(
            [], [], color=COLOURS[method], linestyle=LINES[method], linewidth=2, label=method
        )
        for method in summary.config.methods
    ]
    if 0 in lags:
        handles.append(
            plt.Line2D([], [], color=ONE_FOR_ALL, linewidth=2, label="lag 0: all methods are one")
        )
    handles.append(
        plt.Line2D(
            [], [], color="#999999", linestyle=":", label="before: replies of the base policy only"
        )
    )
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.suptitle(
        "SmolLM2-135M learns from thumbs on stale replies\n"
        "left: share of replies to held-out questions that follow the rule "
        "(band: standard error)\none seed, each method at its best learning rate",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _curves(axes: Axes, summary: Summary, rule: str, lag: int) -> None:
    for method in summary.methods(lag):
        trace = summary.score(rule, lag, method).trace
        updates = [one.update for one in trace.evaluations]
        shares = [Estimate.of_share(one.share, one.replies) for one in trace.evaluations]
        colour = COLOURS[method] if lag else ONE_FOR_ALL
        axes.plot(
            updates,
            [share.value for share in shares],
            color=colour,
            linestyle=LINES[method],
            linewidth=2.2 if method in OURS else 1.6,
            marker="o",
            markersize=3,
            zorder=4 if method in OURS else 3,
        )
        axes.fill_between(
            updates,
            [max(0.0, share.value - share.error) for share in shares],
            [min(1.0, share.value + share.error) for share in shares],
            color=colour,
            alpha=0.12,
            linewidth=0,
        )
    if lag > 0:
        axes.axvline(lag, color="#999999", linewidth=0.8, linestyle=":")
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlim(0, 1.03 * summary.config.updates(lag))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.25, linewidth=0.6)


def _bars(
    axes: Axes,
    summary: Summary,
    rule: str,
    value: Callable[[Score], float],
    shown: float,
    words: str,
) -> None:
    lags = sorted(summary.config.lags)
    width = 0.8 / len(summary.config.methods)
    for place, lag in enumerate(lags):
        methods = summary.methods(lag)
        for number, method in enumerate(methods):
            height = value(summary.score(rule, lag, method))
            at = place + (number - (len(methods) - 1) / 2) * width
            axes.bar(
                at,
                min(height, shown),
                width * 0.92,
                color=COLOURS[method] if lag else ONE_FOR_ALL,
            )
            if height > shown:
                text = words.format(height) if height < TOO_LARGE else f"{height:.0e}"
                axes.text(at, shown, f"{text} ", rotation=90, ha="center", va="top", color="white")
    axes.axhline(0.0, color="#444444", linewidth=0.8)
    axes.set_xticks(range(len(lags)), [str(lag) for lag in lags])
    axes.set_xlim(-0.6, len(lags) - 0.4)
    axes.grid(alpha=0.25, linewidth=0.6, axis="y")
