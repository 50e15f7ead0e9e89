"""vLLM's executor, without the core that it burns while it waits for a step on CPU.

The engine's process polls shared memory for the worker's answer in a busy loop, for up to a second
after the last one: with a request running, always. On GPU that hides microseconds; on a small CPU
machine it takes a whole core from the updater. vLLM has the quiet way too (it waits for a message
when idle); here it is used after half a millisecond instead of a second.

The message alone is not enough: the worker's socket drops a second one within about a millisecond
(its queue holds one, and it learns only now and then that it was emptied). Two answers of a step
come that close with a small model, and the engine would sleep until vLLM polls again by itself,
five seconds later. So it polls again after a millisecond.

vLLM gives a step five minutes by the clock, and ends the engine after that. A machine that was
suspended during a step would lose its engine when it wakes; here only running time counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from moorline.clock import running_seconds
from serving.vllm.private_names import require

BUSY_SECONDS = 0.0005
"""A step on CPU takes tens of milliseconds; waking up from the wait about a tenth of one."""
MAX_WAIT_MS = 1
LEAST_LIMIT_SECONDS = 60.0
"""vLLM hands on what is left of a limit by the clock: after a suspension, nothing."""

require("serving.vllm.executor")  # were a name gone, vLLM's busy loop would be back unnoticed


class QuietExecutor(MultiprocExecutor):  # type: ignore[misc]  # vLLM is not typed for us
    """Runs in the engine's process."""

    def _init_executor(self) -> None:
        super()._init_executor()
        for queue in self.response_mqs:
            if queue._spin_condition is not None:
                queue._spin_condition.busy_loop_s = BUSY_SECONDS
                AnswerWait(queue)


class AnswerWait:
    """Takes over how one queue waits for a worker's answer."""

    def __init__(self, queue: Any) -> None:
        self._deadline = math.inf
        self._dequeue, queue.dequeue = queue.dequeue, self.dequeue
        condition = queue._spin_condition
        self._wait, condition.wait = condition.wait, self.wait

    def dequeue(self, timeout: float | None = None, indefinite: bool = False) -> Any:
        """The next answer.

        Raises:
            TimeoutError: none came in ``timeout`` seconds (and ``LEAST_LIMIT_SECONDS``) of running.
        """
        limit = math.inf if timeout is None else max(timeout, LEAST_LIMIT_SECONDS)
        self._deadline = running_seconds() + limit
        return self._dequeue(None, indefinite)

    def wait(self, timeout_ms: int | None = None) -> None:
        if running_seconds() > self._deadline:
            raise TimeoutError
        wait_briefly(self._wait, timeout_ms)


def wait_briefly(wait: Callable[..., None], timeout_ms: int | None = None) -> None:
    """Call ``wait`` for a millisecond at most; its caller polls and waits again."""
    wait(timeout_ms=MAX_WAIT_MS if timeout_ms is None else min(timeout_ms, MAX_WAIT_MS))
