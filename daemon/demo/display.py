"""What a person watches while the demo runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from daemon.demo.crowd import Tally
from daemon.demo.report import Evaluation

_BARS = "▁▂▃▄▅▆▇█"


class Display:
    """A live panel: reward, policy, learning, people."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        self._batch = int(settings["learning.batch_examples"])
        self._anchor_limit_nats = float(settings["bound.anchor_kl_nats"])
        self._note = ""
        self._seconds = 0.0
        self._server: Mapping[str, Any] = {}
        self._updater: Mapping[str, Any] = {}
        self._tally = Tally()
        self._evaluations: Sequence[Evaluation] = ()

    def set_note(self, note: str) -> None:
        """Show one line at the bottom."""
        self._note = note

    def update(
        self,
        seconds: float,
        status: Mapping[str, Any],
        tally: Tally,
        evaluations: Sequence[Evaluation],
    ) -> None:
        self._seconds = seconds
        self._server, self._updater = status["server"], status["updater"]
        self._tally, self._evaluations = tally, evaluations

    def __rich__(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column()
        grid.add_row("reward", self._reward())
        grid.add_row("serving", self._serving())
        grid.add_row("learning", self._learning())
        grid.add_row("distance", self._distance())
        grid.add_row("people", self._people())
        note = Text(self._note, style="dim")
        minutes, seconds = divmod(int(self._seconds), 60)
        return Panel(Group(grid, note), title=f"moorline demo {minutes}:{seconds:02d}", width=100)

    def _reward(self) -> RenderableType:
        if not self._evaluations:
            return Text("not asked yet", style="dim")
        rewards = [evaluation.reward for evaluation in self._evaluations]
        spark = "".join(_BARS[min(7, int(reward * 8))] for reward in rewards)
        last = self._evaluations[-1]
        return Text.assemble(
            (spark, "cyan"),
            f"  {rewards[0]:.2f} -> ",
            (f"{rewards[-1]:.2f}", "bold green"),
            f"  good replies to {last.replies} held-out questions (v{last.version})",
        )

    def _serving(self) -> RenderableType:
        swaps = [swap for swap in self._server.get("swaps", []) if swap.get("outcome") == "swapped"]
        pauses = [swap["pause_seconds"] for swap in swaps]
        told = f"last pause {pauses[-1]:.2f} s" if pauses else "no swap yet"
        return Text(
            f"{self._server.get('policy_name', '-')}   {len(swaps)} swaps by "
            f"{self._server.get('swap_mode', '-')}, {told}"
        )

    def _learning(self) -> RenderableType:
        ready = min(self._batch, int(self._updater.get("ready_examples", 0)))
        updates = self._updater.get("updates", {})
        line = Table.grid(padding=(0, 1))
        line.add_row(
            ProgressBar(total=self._batch, completed=ready, width=24),
            Text(
                f"{ready}/{self._batch} ratings   {self._updater.get('phase', '-')}   "
                f"{updates.get('released', 0)} released, {updates.get('rejected', 0)} rejected"
            ),
        )
        return line

    def _distance(self) -> RenderableType:
        anchor = self._updater.get("kl_anchor_nats")
        if anchor is None:
            return Text("the base model itself", style="dim")
        line = Table.grid(padding=(0, 1))
        line.add_row(
            ProgressBar(total=self._anchor_limit_nats, completed=anchor, width=24),
            Text(
                f"{anchor:.3f} of {self._anchor_limit_nats:.2f} nats a token from the base; "
                f"last step {self._updater.get('kl_live_nats', 0.0):.3f}"
            ),
        )
        return line

    def _people(self) -> RenderableType:
        tally = self._tally
        style = "bold red" if tally.failed_requests else ""
        return Text.assemble(
            f"{tally.requests} requests, ",
            (f"{tally.failed_requests} failed", style),
            f"; {tally.rated} ratings, {tally.rated_late} late, {tally.rated_twice} repeated",
        )
