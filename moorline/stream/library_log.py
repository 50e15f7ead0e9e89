"""What of kafka-python's own log reaches ours: little, and nothing twice.

While a broker is away the library logs several lines a second, at ERROR. Our own line says the
same once, with the cause and the remedy (``link.py``, the updater's ``progress.py``), and another
one says when it is over. So what the library says of connections comes out at DEBUG, and whatever
else it says, seldom.
"""

from __future__ import annotations

import copy
import logging
import time

REPEATED_SECONDS = 600.0
"""Before the same thing is said again, by the library or by ourselves."""
SAID_BY_OURSELVES = {
    "kafka.net.manager": ("",),
    "kafka.net.transport": ("",),
    "kafka.net.connection": ("%s: Connection lost", "%s: Request timed out"),
    "kafka.cluster": ("",),
    "kafka.consumer.fetcher": ("Fetch to node %s failed", "Attempt to fetch offsets"),
    # and sends it again
    "kafka.producer.sender": (
        "%s: Error sending produce request",
        "%s: Got error produce response",
    ),
}
"""Logger -> how its lines on a broker that is away begin; ``""``: all of them."""


class _LibraryLog(logging.Handler):
    """Passes the library's records on to ours."""

    def __init__(self) -> None:
        super().__init__(level=logging.INFO)  # DEBUG prints keys and values of records
        self._said_at: dict[tuple[str, int], float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        ours = logging.getLogger("moorline.kafka")
        if str(record.msg).startswith(SAID_BY_OURSELVES.get(record.name, ())):
            record = copy.copy(record)
            record.levelno, record.levelname = logging.DEBUG, "DEBUG"
        if not ours.isEnabledFor(record.levelno):
            return
        said, now = (record.pathname, record.lineno), time.monotonic()
        if now - self._said_at.get(said, -REPEATED_SECONDS) < REPEATED_SECONDS:
            return
        self._said_at[said] = now
        ours.handle(record)


def quiet_library_loggers() -> None:
    """Cap ``kafka.*`` loggers: DEBUG would print prompts and replies. Idempotent."""
    library = logging.getLogger("kafka")
    if not any(isinstance(handler, _LibraryLog) for handler in library.handlers):
        library.addHandler(_LibraryLog())
        library.propagate = False
    if library.getEffectiveLevel() < logging.WARNING:
        library.setLevel(logging.WARNING)
