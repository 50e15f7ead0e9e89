"""The picture: reward curves at each lag, and AUC and final reward against the lag."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from benchmarks.staleness.methods import METHODS, Kind
from benchmarks.staleness.summary import DEFAULT, RIVAL, UNCORRECTED, WITH_RECIPE, Summary

# Okabe-Ito, told apart by colour-blind readers too; the default is thick.
STYLES: dict[str, tuple[str, str]] = {
    "dppo_kl": ("#0072B2", "-"),
    "dppo_kl + recipe": ("#004C78", "--"),
    "dppo_tv": ("#56B4E9", "-"),
    "drpo": ("#009E73", "-"),
    "m2po": ("#CC79A7", "-"),
    "ppo_clip": ("#D55E00", "-"),
    "gspo": ("#E69F00", "-"),
    "cispo": ("#999999", "--"),
    "icepop": ("#999999", ":"),
    "pg_is": ("#8B5E3C", "--"),
    "pg": ("#000000", ":"),
}


def draw(summary: Summary, path: Path) -> None:
    """Write the figure. Bands: lowest to highest seed."""
    lags = summary.config.lags
    methods = [
        name
        for name in summary.config.methods
        if METHODS[name].kind is Kind.OBJECTIVE or name == WITH_RECIPE
    ]
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure = plt.figure(figsize=(3.1 * max(len(lags), 3), 7.4), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.0, 1.0])
    panels = upper.subplots(1, len(lags), sharey=True, squeeze=False)[0]
    for axes, lag in zip(panels, lags, strict=True):
        _curves(axes, summary, methods, lag)
    panels[0].set_ylabel("P(right reply)")
    left, right = lower.subplots(1, 2, sharey=True)
    _against_lag(left, summary, methods, "AUC (mean reward over all updates)", summary.auc)
    _against_lag(right, summary, methods, "final reward", summary.final)
    handles, labels = panels[-1].get_legend_handles_labels()
    lower.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(
        "Learning from stale data: each method at its best learning rate, "
        f"{len(summary.config.seeds)} seeds (band: lowest to highest)"
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _look(method: str) -> dict[str, Any]:
    colour, line = STYLES[method]
    prominent = method in (DEFAULT, RIVAL)
    return {
        "color": colour,
        "linestyle": line,
        "linewidth": 2.4 if method == DEFAULT else 1.8 if prominent else 1.2,
        "zorder": 5 if method == DEFAULT else 4 if prominent else 3,
    }


def _curves(axes: Axes, summary: Summary, methods: list[str], lag: int) -> None:
    for method in summary.measured(methods, lag):
        runs = np.array([run.trace.rewards for run in summary.best[method, lag]])
        updates = np.minimum(
            np.arange(runs.shape[1]) * summary.config.evaluate_every, summary.config.updates
        )
        look = _look(method)
        axes.plot(updates, runs.mean(axis=0), label=method, **look)
        axes.fill_between(
            updates,
            runs.min(axis=0),
            runs.max(axis=0),
            color=look["color"],
            alpha=0.15 if method in (DEFAULT, RIVAL, UNCORRECTED) else 0.05,
            linewidth=0,
        )
    axes.set_title("fresh data (lag 0)" if lag == 0 else f"lag {lag} updates")
    aucs = [summary.auc(method, lag) for method in summary.measured(methods, lag)]
    if max(aucs) - min(aucs) < 1e-3:
        axes.text(0.97, 0.05, "all methods: one curve", ha="right", transform=axes.transAxes)
    axes.set_xlabel("update")
    axes.set_ylim(-0.02, 1.04)
    axes.set_xlim(0, summary.config.updates)
    axes.set_xticks([summary.config.updates * quarter // 4 for quarter in range(4)])
    axes.grid(alpha=0.25, linewidth=0.6)


def _against_lag(
    axes: Axes,
    summary: Summary,
    methods: list[str],
    title: str,
    value: Callable[[str, int], float],
) -> None:
    lags = summary.config.lags
    for method in methods:
        points = {
            i: value(method, lag) for i, lag in enumerate(lags) if (method, lag) in summary.best
        }
        axes.plot(list(points), list(points.values()), marker="o", markersize=4, **_look(method))
    axes.set_xticks(range(len(lags)), [str(lag) for lag in lags])
    axes.set_xlabel("lag (updates)")
    axes.set_title(title)
    axes.set_ylim(-0.02, 1.04)
    axes.grid(alpha=0.25, linewidth=0.6)
