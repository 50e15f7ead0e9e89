"""Runs all groups on a few processes, keeps each as it finishes, and continues where it stopped."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict
from multiprocessing.queues import Queue
from pathlib import Path

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from benchmarks.staleness import methods, task, train
from benchmarks.staleness.methods import Kind
from benchmarks.staleness.train import Config, Trace, train_group
from updater import divergence, objectives

POLL_SECONDS = 0.5
Group = tuple[str, int]  # method, lag


class WorkerDied(RuntimeError):
    """A process of the study ended without its result (killed, or out of memory)."""


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
    with _progress() as progress:
        bar = progress.add_task("groups", total=len(groups), completed=len(groups) - len(todo))
        steps = progress.add_task("updates", total=max(1, len(todo)) * config.updates)
        for event in _work(config, todo, workers):
            if isinstance(event, int):
                progress.advance(steps, event)
            else:
                store.save(*event)
                progress.advance(bar)
    return [trace for group in groups for trace in store.load(group) or []]


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )


Event = int | tuple[Group, list[Trace]]


def _work(config: Config, todo: list[Group], workers: int) -> Iterator[Event]:
    """Updates made, and finished groups, as they come from the worker processes."""
    context = multiprocessing.get_context("spawn")
    tasks: Queue[Group | None] = context.Queue()
    events: Queue[Event] = context.Queue()
    for group in todo:
        tasks.put(group)
    processes = [
        context.Process(target=_worker, args=(config, tasks, events, os.getpid()), daemon=True)
        for _ in range(min(workers, len(todo)))
    ]
    for process in processes:
        tasks.put(None)
        process.start()
    left = len(todo)
    try:
        while left:
            try:
                event = events.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if any(process.exitcode for process in processes):
                    raise WorkerDied(
                        "a worker process ended early (killed, or out of memory): "
                        "run again to go on, perhaps with --workers 1"
                    ) from None
                continue
            left -= not isinstance(event, int)
            yield event
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _worker(config: Config, tasks: Queue[Group | None], events: Queue[Event], parent: int) -> None:
    """Trains groups until there are none. One thread: the processes are the parallelism."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # Adam's moments of what is not used any more, and slow

    def tick(updates: int) -> None:
        if os.getppid() != parent:  # it was killed: nobody wants the result
            raise SystemExit(1)
        events.put(updates)

    while (group := tasks.get()) is not None:
        events.put((group, train_group(*group, config, tick)))


def machine() -> dict[str, str | int | float]:
    """Where and when it ran, for the report; nothing that names the host."""
    return {
        "cpus": os.cpu_count() or 1,
        "torch": torch.__version__,
        "finished_at": time.strftime("%Y-%m-%d", time.gmtime()),
        "parameters": task.parameter_count(),
    }
