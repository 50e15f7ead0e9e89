"""Ends the connection of a client that takes nothing of its reply for too long.

A reply that nobody reads is generated to its end all the same, and what was not sent yet waits in
this process's memory, until somebody hangs up. Only a send that is blocked counts: the kernel's
buffers, on both sides, are full before it is. A client that reads slowly but steadily is not ended:
any byte that its side takes is a sign of life.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import struct
import termios
from collections.abc import Callable
from functools import partial
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from moorline import metrics

logger = logging.getLogger("moorline.serving.stalled_clients")

CHECKS = 10
"""Looks within the limit. They are counted, so that time in which this process did not run (a
frozen container, a paused machine) is nobody's stall."""


def ending_stalled_clients(stall_seconds: float) -> Callable[..., asyncio.Protocol]:
    """What uvicorn makes its connections with (``Config(http=...)``)."""
    return partial(StallEndingProtocol, stall_seconds=stall_seconds)


class StallEndingProtocol(AutoHTTPProtocol):  # type: ignore[misc,valid-type]
    """One connection: uvicorn's, which watches its client while a send is blocked."""

    def __init__(self, *arguments: Any, stall_seconds: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._stall_seconds = stall_seconds
        self._look_again: asyncio.TimerHandle | None = None

    def pause_writing(self) -> None:
        super().pause_writing()
        self._look(bytes_before=None, looks_in_vain=0)

    def resume_writing(self) -> None:
        self._stop_looking()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_looking()
        super().connection_lost(exc)

    def _stop_looking(self) -> None:
        if self._look_again is not None:
            self._look_again.cancel()
            self._look_again = None

    def _look(self, bytes_before: int | None, looks_in_vain: int) -> None:
        bytes_now = _bytes_not_taken(self.transport)
        looks_in_vain = looks_in_vain + 1 if bytes_now == bytes_before else 0
        if looks_in_vain < CHECKS:
            self._look_again = asyncio.get_running_loop().call_later(
                self._stall_seconds / CHECKS, self._look, bytes_now, looks_in_vain
            )
            return
        metrics.STALLED_CLIENTS.inc()
        logger.warning(
            "a client took nothing of its reply for %g s: its connection is closed",
            self._stall_seconds,
            extra={
                "event": "stalled_client_ended",
                "seconds": self._stall_seconds,
                "bytes": bytes_now,
                "setting": "serving.stream_stall_seconds",
            },
        )
        self.transport.abort()


def _bytes_not_taken(transport: asyncio.Transport) -> int:
    """What waits in this process and in its kernel until the client's kernel takes it."""
    waiting = transport.get_write_buffer_size()
    connection = transport.get_extra_info("socket")
    (in_kernel,) = struct.unpack("i", fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4)))
    return waiting + int(in_kernel)
