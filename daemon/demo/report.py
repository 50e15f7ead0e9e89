"""What the demo leaves behind: report.json, report.md and learning.png."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Evaluation:
    """The held-out questions, asked of one policy version."""

    version: int
    at_seconds: float
    """Since the demo's start."""
    reward: float
    """Share of good replies."""
    replies: int
    samples: tuple[tuple[str, str, bool], ...]
    """(question, reply, good) for the same few questions every time."""


def write_report(
    directory: Path, facts: dict[str, Any], evaluations: list[Evaluation]
) -> tuple[Path, Path, Path]:
    """Write the three files; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    as_json, as_text = directory / "report.json", directory / "report.md"
    picture = directory / "learning.png"
    rewards = [
        {"version": e.version, "at_seconds": e.at_seconds, "reward": e.reward, "replies": e.replies}
        for e in evaluations
    ]
    as_json.write_text(json.dumps({**facts, "evaluations": rewards}, indent=2) + "\n")
    as_text.write_text(_markdown(facts, evaluations))
    _draw(picture, facts, evaluations)
    return as_json, as_text, picture


def _markdown(facts: dict[str, Any], evaluations: list[Evaluation]) -> str:
    lines = [
        "# What the model learned",
        "",
        f"People rated replies with a thumb: up for *{facts['rule']}*. "
        f"On {facts['held_out_questions']} questions about topics that nobody asked or rated, the "
        f"share of good replies went from **{facts['reward_before']:.2f}** to "
        f"**{facts['reward_after']:.2f}** over {facts['releases']} releases "
        f"in {facts['wall_seconds'] / 60:.1f} minutes.",
        "",
        f"- requests: {facts['requests']}, failed: {facts['failed_requests']}, replies without a "
        f"policy version: {facts['unattributed_replies']}",
        f"- swaps: {len(facts['swap_pause_seconds'])} ({facts['swap_mode']}), longest pause "
        f"{max(facts['swap_pause_seconds'], default=0.0):.2f} s, longest gap that a stream felt "
        f"{facts['max_stream_gap_seconds']:.2f} s",
        f"- rejected candidates: {facts['rejected']}",
        f"- distance from the base model on held-out traffic: "
        f"{facts['kl_anchor_nats'][-1] if facts['kl_anchor_nats'] else 0.0:.3f} nats a token",
        "",
        "![learning](learning.png)",
        "",
        "## The releases",
        "",
        "| version | held-out reward | KL from live (nats/token) | KL from base | step | gate |",
        "|---|---|---|---|---|---|",
    ]
    by_version = {evaluation.version: evaluation for evaluation in evaluations}
    for row in facts["release_table"]:
        evaluation = by_version.get(row["version"])
        reward = f"{evaluation.reward:.2f}" if evaluation else ""
        lines.append(
            f"| {row['name']} | {reward} | {row['kl_live_nats']:.3f} | {row['kl_anchor_nats']:.3f} "
            f"| {row['step_scale']:.2f} | {row['checks_passed']} checks passed |"
        )
    lines += ["", "## The same questions, release by release", ""]
    for index, (question, _, _) in enumerate(evaluations[0].samples):
        lines += [f"**{question}**", ""]
        for evaluation in evaluations:
            _, reply, good = evaluation.samples[index]
            shown = " ".join(reply.split()) or "(nothing)"
            lines.append(f"- v{evaluation.version} {'👍' if good else '👎'} {shown}")
        lines.append("")
    lines += [
        "## Where every event ended",
        "",
        "```json",
        json.dumps(facts["accounting"], indent=2),
        "```",
        "",
    ]
    return "\n".join(lines)


def _draw(path: Path, facts: dict[str, Any], evaluations: list[Evaluation]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(
        2, 1, figsize=(9, 6.5), sharex=True, height_ratios=(3, 2), layout="constrained"
    )
    minutes = [evaluation.at_seconds / 60 for evaluation in evaluations]
    top.plot(minutes, [e.reward for e in evaluations], "o-", color="#1f6f8b", lw=2)
    for evaluation, minute in zip(evaluations, minutes, strict=True):
        top.annotate(
            f"v{evaluation.version}",
            (minute, evaluation.reward),
            textcoords="offset points",
            xytext=(0, 8),
            ha="center",
            fontsize=8,
        )
    top.set_ylim(-0.03, 1.08)
    top.set_ylabel("good replies, held-out topics")
    top.set_title("A served model learning from thumbs, one gated release at a time")
    rows = facts["release_table"]
    at = [row["at_seconds"] / 60 for row in rows]
    bottom.plot(
        at, [row["kl_anchor_nats"] for row in rows], "s-", color="#b5452c", label="from the base"
    )
    bottom.plot(
        at, [row["kl_live_nats"] for row in rows], "^-", color="#7a8b1f", label="from the live one"
    )
    bottom.axhline(facts["kl_anchor_limit_nats"], color="#b5452c", ls="--", lw=1)
    bottom.annotate(
        "limit",
        (1.0, facts["kl_anchor_limit_nats"]),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color="#b5452c",
    )
    bottom.set_ylim(0, facts["kl_anchor_limit_nats"] * 1.2)
    bottom.set_ylabel("KL on traffic, nats per token")
    bottom.set_xlabel("minutes")
    bottom.legend(loc="upper left", fontsize=8, frameon=False)
    for axes in (top, bottom):
        for moment in facts["swap_at_seconds"]:
            axes.axvline(moment / 60, color="#999999", lw=0.8, ls=":")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    top.plot([], [], color="#999999", lw=0.8, ls=":", label="swap")
    top.legend(loc="lower right", fontsize=8, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
