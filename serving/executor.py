"""vLLM's executor, without the core that it burns while it waits for a step on CPU.

The engine's process polls shared memory for the worker's answer in a busy loop, for up to a second
after the last one: with a request running, always. On GPU that hides microseconds; on a small CPU
machine it takes a whole core from the updater. vLLM has the quiet way too (it waits for a message
when idle); here it is used after half a millisecond instead of a second.
"""

from __future__ import annotations

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

BUSY_SECONDS = 0.0005
"""A step on CPU takes tens of milliseconds; waking up from the wait about a tenth of one."""


class QuietExecutor(MultiprocExecutor):  # type: ignore[misc]  # vLLM is not typed for us
    """Runs in the engine's process."""

    def _init_executor(self) -> None:
        super()._init_executor()
        for queue in self.response_mqs:
            condition = getattr(queue, "_spin_condition", None)
            if condition is not None:
                condition.busy_loop_s = BUSY_SECONDS
