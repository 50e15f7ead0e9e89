"""Reads the release store beside the event loop, so that a volume that blocks delays no reply.

A read of a shared volume can block for as long as the volume likes, and nothing can interrupt it.
So each read has a daemon thread of its own, which a stop of the process does not wait for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import ParamSpec, TypeVar

from moorline import metrics
from moorline.clock import running_seconds

logger = logging.getLogger("moorline.serving.store")

SLOW_READ_SECONDS = 5.0
"""A read that takes longer than this is logged."""

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


class StoreReader:
    """Runs one read at a time in a thread. Only one task may use an instance."""

    def __init__(self) -> None:
        self._since: float | None = None
        metrics.STORE_WAIT_SECONDS.set_function(self.waiting_seconds)

    def waiting_seconds(self) -> float:
        """How long the running read has been waiting; 0 when there is none."""
        since = self._since
        return 0.0 if since is None else running_seconds() - since

    async def read(
        self,
        work: Callable[Arguments, Result],
        *arguments: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Result:
        """Return or raise what ``work`` does, however long it takes; a long wait is logged."""
        outcome: Future[Result] = Future()

        def run() -> None:
            with contextlib.suppress(InvalidStateError):  # nobody waits any more: we are stopping
                try:
                    result = work(*arguments, **options)
                except Exception as error:
                    self._since = None
                    outcome.set_exception(error)
                else:
                    self._since = None
                    outcome.set_result(result)

        self._since = running_seconds()
        threading.Thread(target=run, name="moorline-store", daemon=True).start()
        answer = asyncio.wrap_future(outcome)
        done, _ = await asyncio.wait({answer}, timeout=SLOW_READ_SECONDS)
        if not done:
            started = time.monotonic() - SLOW_READ_SECONDS
            logger.error(
                "the release store does not answer: replies go on, no swap or rollback until it "
                "does",
                extra={"event": "store_not_answering", "phase": work.__name__},
            )
            await asyncio.wait({answer})
            logger.warning(
                "the release store answers again",
                extra={
                    "event": "store_answers_again",
                    "phase": work.__name__,
                    "seconds": round(time.monotonic() - started, 1),
                },
            )
        return answer.result()
