"""Runs everything on a few processes, keeps each result, and continues where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import Progress, TaskID
from transformers.utils import logging as transformers_logging

from benchmarks.jobs import Tick, progress_bars, work
from benchmarks.real import rules, train
from benchmarks.real.summary import cells
from benchmarks.real.train import Cell, Config, Reply, Trace
from updater.learning import (
    advantages,
    baselines,
    objectives,
    off_policy,
    policy,
    sampling,
    staleness,
    trainer,
)
from updater.safety import trust_region

BASE_PART_BATCHES = 8
HELD_OUT = "held-out"


@dataclass(frozen=True)
class Base:
    """A part of what the base policy has to say: some batches, or the held-out replies."""

    part: str
    """HELD_OUT, or the number of the part."""

    @property
    def key(self) -> str:
        return f"base-{self.part}"

    @staticmethod
    def all_for(config: Config) -> list[Base]:
        parts = -(-max(config.lags) // BASE_PART_BATCHES)
        return [Base(HELD_OUT), *(Base(str(number)) for number in range(parts))]


Job = Base | Cell


class Store:
    """One JSON file for each finished job, valid for exactly this configuration and code."""

    def __init__(self, root: Path, config: Config) -> None:
        shaping = asdict(config)
        # Which runs there are does not shape any of them.
        for name in ("rules", "lags", "methods", "rates"):
            del shaping[name]
        digest = hashlib.sha256(json.dumps(shaping, sort_keys=True).encode())
        for module in (
            *(train, rules, trainer, baselines, advantages, objectives, policy, sampling),
            *(staleness, off_policy, trust_region),
        ):
            digest.update(Path(str(module.__file__)).read_bytes())
        self._dir = root / digest.hexdigest()[:16]

    def _path(self, job: Job) -> Path:
        return self._dir / f"{job.key}.json"

    def load(self, job: Job) -> Any | None:
        """A job's result, or None when it is not finished."""
        try:
            return json.loads(self._path(job).read_text())
        except FileNotFoundError:
            return None

    def save(self, job: Job, result: Any) -> None:
        self._dir.mkdir(parents=True, exist_ok=True)
        temporary = self._path(job).with_suffix(".tmp")
        temporary.write_text(json.dumps(result))
        os.replace(temporary, self._path(job))

    def clear(self) -> None:
        for path in self._dir.glob("*.json"):
            path.unlink()

    def trace(self, cell: Cell) -> Trace:
        return Trace.from_json(self.load(cell))  # type: ignore[arg-type]

    def base_replies(self, base: Base) -> list[list[Reply]]:
        """Batch by batch; the held-out replies are one batch."""
        batches = self.load(base)
        assert batches is not None, f"{base.key} comes before every run"
        return [[Reply.from_json(fields) for fields in batch] for batch in batches]

    def base_batches(self, config: Config) -> list[list[Reply]]:
        parts = [base for base in Base.all_for(config) if base.part != HELD_OUT]
        return [batch for part in parts for batch in self.base_replies(part)]


@dataclass(frozen=True)
class Study:
    """Everything that was found."""

    config: Config
    traces: tuple[Trace, ...]
    base_replies: tuple[Reply, ...]
    """The base policy's answers to training questions."""


def run_study(model_dir: Path, config: Config, store: Store, workers: int) -> Study:
    """Every job, finished ones from the store.

    Raises:
        KeyboardInterrupt: what was finished is in the store.
        WorkerDied: likewise.
    """
    with progress_bars() as progress:
        bar = progress.add_task("runs")
        steps = progress.add_task("steps")

        def finish(jobs: Sequence[Job]) -> None:
            todo = [job for job in jobs if store.load(job) is None]
            progress.update(bar, total=len(jobs), completed=len(jobs) - len(todo))
            progress.reset(steps, total=max(1, sum(_steps(config, job) for job in todo)))
            _run(todo, model_dir, config, store, workers, progress, bar, steps)

        finish(Base.all_for(config))
        finish(cells(config))
    return Study(
        config,
        tuple(store.trace(cell) for cell in cells(config)),
        tuple(reply for batch in store.base_batches(config) for reply in batch),
    )


def _steps(config: Config, job: Job) -> int:
    if isinstance(job, Cell):
        return config.updates(job.lag)
    return 0 if job.part == HELD_OUT else BASE_PART_BATCHES


def _run(
    todo: Sequence[Job],
    model_dir: Path,
    config: Config,
    store: Store,
    workers: int,
    progress: Progress,
    bar: TaskID,
    steps: TaskID,
) -> None:
    for event in work(partial(_do, model_dir, config, store), todo, workers):
        if isinstance(event, int):
            progress.advance(steps, event)
        else:
            store.save(*event)
            progress.advance(bar)


def _do(model_dir: Path, config: Config, store: Store, job: Job, tick: Tick) -> Any:
    """A job's result, ready for JSON; in a process of its own."""
    transformers_logging.disable_progress_bar()

    def step() -> None:
        tick(1)

    match job:
        case Base(part) if part == HELD_OUT:
            return [[asdict(reply) for reply in train.base_held_out(model_dir, config)]]
        case Base(part):
            first = int(part) * BASE_PART_BATCHES
            numbers = range(first, first + BASE_PART_BATCHES)
            batches = train.base_batches(model_dir, config, numbers, step)
            return [[asdict(reply) for reply in batch] for batch in batches]
        case Cell():
            start = store.base_replies(Base(HELD_OUT))[0]
            base = store.base_batches(config)
            return train.learn_cell(model_dir, config, job, base, start, step).to_json()


def _revision() -> str:
    """The code's revision, as git names it."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, str | int]:
    """Where and when it ran, for the report; nothing that names the host."""
    return {
        "revision": _revision(),
        "cpus": os.cpu_count() or 1,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "finished_at": time.strftime("%Y-%m-%d", time.gmtime()),
    }
