"""A clock for limits on other people's silence: it stands still while this process does not run.

A process is suspended with its container or its machine, or by SIGSTOP. By the system's clocks
everybody was silent all that time, and whoever is judged by them is killed for nothing. So limits
whose end does harm are measured by ``running_seconds``; what is only shown or retried need not be.
"""

from __future__ import annotations

import threading
import time

_TICK_SECONDS = 0.5
_LONGEST_TICK_SECONDS = 2.0
"""A longer gap between two ticks counts as this much: a busy machine delays a tick, too."""


class _RunningTime:
    """Adds up short gaps between ticks. Everybody who reads it ticks; so does a thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = 0.0
        self._ticked_at = time.monotonic()
        self._ticker: threading.Thread | None = None

    def seconds(self) -> float:
        with self._lock:
            now = time.monotonic()
            self._seconds += min(now - self._ticked_at, _LONGEST_TICK_SECONDS)
            self._ticked_at = now
            if self._ticker is None:
                self._ticker = threading.Thread(
                    target=self._tick, name="moorline-clock", daemon=True
                )
                self._ticker.start()
            return self._seconds

    def _tick(self) -> None:
        while True:
            time.sleep(_TICK_SECONDS)
            self.seconds()


_running_time = _RunningTime()


def running_seconds() -> float:
    """As ``time.monotonic()``, but a suspension of this process counts as two seconds at most."""
    return _running_time.seconds()
