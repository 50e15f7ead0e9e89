"""The releases topic wakes the swap loop early. Without Kafka the store is still polled."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator

from moorline.settings import Settings
from moorline.stream import ReleaseFollower

POLL_SECONDS = 1.0


@contextlib.contextmanager
def announcements(settings: Settings, wake: Callable[[], None]) -> Iterator[None]:
    """Call ``wake`` on this event loop whenever a release of our alias is announced."""
    if settings.stream.bootstrap is None:
        yield
        return
    loop = asyncio.get_running_loop()
    follower = ReleaseFollower(settings.stream, settings.alias)
    stopping = threading.Event()

    def follow() -> None:
        while not stopping.is_set():
            if follower.poll(POLL_SECONDS):
                with contextlib.suppress(RuntimeError):  # the loop is closed: we are stopping
                    loop.call_soon_threadsafe(wake)
        follower.close()

    threading.Thread(target=follow, name="moorline-announcements", daemon=True).start()
    try:
        yield
    finally:
        stopping.set()
