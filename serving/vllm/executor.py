"""vLLM's executor, without the core that it burns while it waits for a step on CPU.

The engine's process polls shared memory for the worker's answer in a busy loop, for up to a second
after the last one: with a request running, always. On GPU that hides microseconds; on a small CPU
machine it takes a whole core from the updater. vLLM has the quiet way too (it waits for a message
when idle); here it is used after half a millisecond instead of a second.

The message alone is not enough: the worker's socket drops a second one within about a millisecond
(its queue holds one, and it learns only now and then that it was emptied). Two answers of a step
come that close with a small model, and the engine would sleep until vLLM polls again by itself,
five seconds later. So it polls again after a millisecond.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from serving.vllm.private_names import require

BUSY_SECONDS = 0.0005
"""A step on CPU takes tens of milliseconds; waking up from the wait about a tenth of one."""
MAX_WAIT_MS = 1

require("serving.vllm.executor")  # were a name gone, vLLM's busy loop would be back unnoticed


class QuietExecutor(MultiprocExecutor):  # type: ignore[misc]  # vLLM is not typed for us
    """Runs in the engine's process."""

    def _init_executor(self) -> None:
        super()._init_executor()
        for queue in self.response_mqs:
            condition = queue._spin_condition
            if condition is not None:
                condition.busy_loop_s = BUSY_SECONDS
                condition.wait = partial(wait_briefly, condition.wait)


def wait_briefly(wait: Callable[..., None], timeout_ms: int | None = None) -> None:
    """Call ``wait`` for a millisecond at most; its caller polls and waits again."""
    wait(timeout_ms=MAX_WAIT_MS if timeout_ms is None else min(timeout_ms, MAX_WAIT_MS))
