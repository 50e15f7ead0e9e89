"""Long lists of jobs on a few processes; results are handed over as they come."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.queues import Queue
from typing import TypeVar

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

POLL_SECONDS = 0.5

Job = TypeVar("Job")
Result = TypeVar("Result")
Tick = Callable[[int], None]
"""Says that so many steps of a job were made."""
Do = Callable[[Job, Tick], Result]
"""Does one job. It is sent to the processes: a function of a module, or a partial of one."""


class WorkerDied(RuntimeError):
    """A process ended without its result (killed, or out of memory)."""


def work(
    do: Do[Job, Result], todo: Sequence[Job], workers: int
) -> Iterator[int | tuple[Job, Result]]:
    """Steps made, and finished jobs with their results, in no order.

    Each process has one thread: the processes are the parallelism. They end with this one.

    Raises:
        WorkerDied: what was handed over before stays done.
    """
    context = multiprocessing.get_context("spawn")
    tasks: Queue[Job | None] = context.Queue()
    events: Queue[int | tuple[Job, Result]] = context.Queue()
    for job in todo:
        tasks.put(job)
    processes = [
        context.Process(target=_worker, args=(do, tasks, events, os.getpid()), daemon=True)
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
                        "a worker process ended early (killed, or out of memory): run again to go "
                        "on, perhaps with --workers 1; what was finished is kept"
                    ) from None
                continue
            left -= not isinstance(event, int)
            yield event
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _worker(
    do: Do[Job, Result],
    tasks: Queue[Job | None],
    events: Queue[int | tuple[Job, Result]],
    parent: int,
) -> None:
    """Does jobs until there are none."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    torch.set_num_threads(1)

    def tick(steps: int) -> None:
        if os.getppid() != parent:  # it was killed: nobody wants the result
            raise SystemExit(1)
        events.put(steps)

    while (job := tasks.get()) is not None:
        events.put((job, do(job, tick)))


def progress_bars() -> Progress:
    """Progress bars of jobs and of their steps."""
    return Progress(
        TextColumn("{task.description:>8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
