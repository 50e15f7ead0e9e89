"""Whether the engine still works: replies' next tokens are waited for, and some come.

A device that hangs raises nothing: its process lives, and every reply waits. So the time is added
up in which somebody waited for an output of the engine and none came, for anybody. What does not
count: time in which nobody waits (an idle server, a client that does not read), in which requests
are held back on purpose (weights are being exchanged), and in which this process did not run.
Who gives up at once says nothing of the engine.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Callable
from typing import TypeVar

from moorline import metrics
from moorline.clock import running_seconds

logger = logging.getLogger("moorline.serving")

T = TypeVar("T")

_UNBROKEN_SHARE = 0.1
"""Share of the limit for which somebody must wait without a break: a short wait proves nothing."""


class EngineWatch:
    """Adds up how long all have waited in vain. Owned by the event loop's thread."""

    def __init__(
        self,
        stall_seconds: float,
        held_back: Callable[[], bool],
        now: Callable[[], float] = running_seconds,
    ) -> None:
        """Start with an engine that works.

        Args:
            stall_seconds: who has waited longer waits for an engine that hangs.
            held_back: whether replies wait on purpose now.
            now: seconds of a clock that stands still while this process does not run.
        """
        self._stall_seconds = stall_seconds
        self._held_back = held_back
        self._now = now
        self._waiting = 0
        self._seconds = 0.0
        """Time in which anybody waited since the last output."""
        self._unbroken_seconds = 0.0
        """The last part of that time, in which somebody waited at every moment."""
        self._at = now()
        self._hung = self._said = False

    async def next_output(self, outputs: AsyncGenerator[T, None]) -> T | None:
        """Wait for the engine's next output for one request; None: the last one has been."""
        self._advance()
        if self._waiting == 0:
            self._unbroken_seconds = 0.0
        self._waiting += 1
        try:
            output = await anext(outputs, None)
        finally:
            self._advance()
            self._waiting -= 1
        self._seconds = self._unbroken_seconds = 0.0
        self._hung = False
        return output

    def why_hung(self) -> str | None:
        """None: it works, or nobody has waited for it long enough to tell."""
        self._advance()
        if not self._hung:
            return None
        return f"nothing came out of the engine for {self._seconds:.0f} s in which replies waited"

    def report(self) -> None:
        """Set the metric, and say once that the engine hangs, and once that it works again."""
        why = self.why_hung()
        metrics.ENGINE_WAIT_SECONDS.set(self._seconds)
        if self._said == self._hung:
            return
        self._said = self._hung
        if why is not None:
            logger.error(
                "the engine hangs: %s; /healthz says so, and restarting is the remedy",
                why,
                extra={"event": "engine_hung", "seconds": round(self._seconds)},
            )
        else:
            logger.warning("the engine works again", extra={"event": "engine_works_again"})

    def _advance(self) -> None:
        now = self._now()
        if self._waiting and not self._held_back():
            self._seconds += now - self._at
            self._unbroken_seconds += now - self._at
        self._at = now
        long_enough = self._unbroken_seconds > self._stall_seconds * _UNBROKEN_SHARE
        self._hung = self._hung or (self._seconds > self._stall_seconds and long_enough)
