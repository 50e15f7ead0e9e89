"""Runs all groups on a few processes, keeps each as it finishes, and continues where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from benchmarks.jobs import Tick, progress_bars, work
from benchmarks.staleness import methods, task, train
from benchmarks.staleness.methods import Kind
from benchmarks.staleness.train import Config, Trace, train_group
from updater.learning import divergence, objectives

Group = tuple[str, int]  # method, lag


class Store:
    """One JSON file for each finished group, valid for exactly this configuration and code."""

    def __init__(self, root: Path, config: Config) -> None:
        shaping = asdict(config)
        # Which groups there are does not shape any of them.
        del shaping["methods"], shaping["lags"]
        shaping["torch"] = torch.__version__
        digest = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode())
        for module in (task, train, methods, objectives, divergence):
            digest.update(Path(str(module.__file__)).read_bytes())
        self._dir = root / digest.hexdigest()[:16]

    def _path(self, group: Group) -> Path:
        name = "".join(letter if letter.isalnum() else "_" for letter in group[0])
        return self._dir / f"{name}-{group[1]}.json"

    def load(self, group: Group) -> list[Trace] | None:
        """The group's runs, or None when it is not finished."""
        try:
            return [Trace.from_json(run) for run in json.loads(self._path(group).read_text())]
        except FileNotFoundError:
            return None

    def save(self, group: Group, traces: list[Trace]) -> None:
        self._dir.mkdir(parents=True, exist_ok=True)
        temporary = self._path(group).with_suffix(".tmp")
        temporary.write_text(json.dumps([trace.to_json() for trace in traces]))
        os.replace(temporary, self._path(group))

    def clear(self) -> None:
        for path in self._dir.glob("*.json"):
            path.unlink()


def run_study(config: Config, store: Store, workers: int) -> list[Trace]:
    """Every group, finished ones from the store.

    Raises:
        KeyboardInterrupt: what was finished is in the store.
        WorkerDied: likewise.
    """
    groups = config.groups
    todo = [group for group in groups if store.load(group) is None]
    # Objectives before their ablations; long ones first: large lags fill a queue before they start.
    todo.sort(key=lambda group: (methods.METHODS[group[0]].kind is not Kind.OBJECTIVE, -group[1]))
    with progress_bars() as progress:
        bar = progress.add_task("groups", total=len(groups), completed=len(groups) - len(todo))
        steps = progress.add_task("updates", total=max(1, len(todo)) * config.updates)
        for event in work(partial(_do, config), todo, workers):
            if isinstance(event, int):
                progress.advance(steps, event)
            else:
                store.save(*event)
                progress.advance(bar)
    return [trace for group in groups for trace in store.load(group) or []]


def _do(config: Config, group: Group, tick: Tick) -> list[Trace]:
    """Trains one group, in a process of its own."""
    torch.set_flush_denormal(True)  # Adam's moments of what is not used any more, and slow
    return train_group(*group, config, tick)


def machine() -> dict[str, str | int | float]:
    """Where and when it ran, for the report; nothing that names the host."""
    return {
        "cpus": os.cpu_count() or 1,
        "torch": torch.__version__,
        "finished_at": time.strftime("%Y-%m-%d", time.gmtime()),
        "parameters": task.parameter_count(),
    }
