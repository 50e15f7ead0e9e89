"""The little of systemd's notification protocol that a daemon needs (``man sd_notify``)."""

from __future__ import annotations

import contextlib
import os
import socket
import time


class Notifier:
    """Speaks to the service manager that started us; silent when there is none."""

    def __init__(self) -> None:
        self._address = os.environ.get("NOTIFY_SOCKET", "")
        watchdog_microseconds = int(os.environ.get("WATCHDOG_USEC", "0") or 0)
        # Twice per deadline, as systemd advises.
        self._ping_seconds = watchdog_microseconds / 2e6 or None
        self._pinged_at = float("-inf")
        self._status = ""

    def ready(self, status: str) -> None:
        self._status = status
        self._send(f"READY=1\nSTATUS={status}")

    def status(self, text: str) -> None:
        """What `systemctl status` shows; call often, it sends only what is new."""
        if text != self._status:
            self._status = text
            self._send(f"STATUS={text}")

    def stopping(self) -> None:
        self._send("STOPPING=1\nSTATUS=stopping")

    def ping(self) -> None:
        """Tell the watchdog that we live; call often, it sends only when due."""
        now = time.monotonic()
        if self._ping_seconds is not None and now - self._pinged_at >= self._ping_seconds:
            self._pinged_at = now
            self._send("WATCHDOG=1")

    def _send(self, message: str) -> None:
        if not self._address:
            return
        address = self._address
        if address.startswith("@"):  # Linux's abstract namespace
            address = "\0" + address[1:]
        # A service manager that does not listen is no reason to stop serving.
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel,
        ):
            channel.sendto(message.encode(), address)


def without_notification(environment: dict[str, str]) -> dict[str, str]:
    """An environment for children: only the supervisor may speak to the service manager."""
    private = {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}
    return {name: value for name, value in environment.items() if name not in private}
