"""One supervised process: started in its own group, watched, its output kept, stopped for good."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from moorline.process_groups import group_exists, stop_groups
from moorline.systemd import without_notification

logger = logging.getLogger("moorline.supervise")

_PROBE_TIMEOUT_SECONDS = 5.0
_PROBE_MAX_BYTES = 65_536
_PROBE_INTERVAL_SECONDS = 0.2
_ALIVE_INTERVAL_SECONDS = 5.0
_LEFTOVERS_GRACE_SECONDS = 2.0
_LONGEST_LINE_BYTES = 65_536


@dataclass(frozen=True)
class Child:
    """What to run, and how to know that it works."""

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    ready_url: str | None = None
    """``http://...`` (200 is ready) or ``tcp://host:port`` (accepts is ready); None: at once."""
    alive_url: str | None = None
    """Polled; once ready, anything but 200 for ``hang_seconds`` is a crash."""
    grace_seconds: float = 10.0
    """From SIGTERM to SIGKILL."""
    ready_timeout_seconds: float = 900.0
    hang_seconds: float = 120.0
    may_wait: bool = False
    """Alive, it may be not ready for as long as it likes: what it waits for is elsewhere."""
    essential: bool = True
    """Whether the others must stop when this one cannot run. Learning is not: replies go on."""


class ChildProcess:
    """A running ``Child``. Only the main thread may start one (see ``die_with_parent``)."""

    def __init__(
        self, child: Child, log_path: Path, echo: Callable[[str, str], None] | None = None
    ) -> None:
        self.child = child
        self.log_path = log_path
        self.started_at = time.monotonic()
        self.ready = child.ready_url is None
        self.heard_at = self.started_at
        self._ended = threading.Event()
        self._last_lines: deque[str] = deque(maxlen=20)
        launcher = [sys.executable, "-m", "moorline.process_groups"]
        self._process = subprocess.Popen(
            [*launcher, "child", str(os.getpid()), "--", *child.argv],
            env={"PYTHONUNBUFFERED": "1"} | without_notification(dict(child.environment)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        assert self._process.stdout is not None
        self._pump = threading.Thread(
            target=self._keep_output,
            args=(self._process.stdout, echo or (lambda _name, _line: None)),
            name=f"{child.name}-output",
            daemon=True,
        )
        self._pump.start()
        for watch, url in (
            (self._watch_ready, child.ready_url),
            (self._watch_alive, child.alive_url),
        ):
            if url is not None:
                name = f"{child.name}{watch.__name__}"
                threading.Thread(target=watch, args=(url,), name=name, daemon=True).start()

    @property
    def pid(self) -> int:
        """Also the process group."""
        return self._process.pid

    @property
    def age_seconds(self) -> float:
        return time.monotonic() - self.started_at

    def poll(self) -> int | None:
        """The exit code (negative: the signal), or None while it runs."""
        return self._process.poll()

    @property
    def silent_seconds(self) -> float:
        """Since it last said that it is alive (or ready), or was started."""
        return time.monotonic() - self.heard_at

    @property
    def hung(self) -> bool:
        """Whether it was ready and has not been heard of for too long."""
        watched = self.ready and self.child.alive_url is not None
        return watched and self.silent_seconds > self.child.hang_seconds

    @property
    def stuck(self) -> bool:
        """Whether it should have got ready by now."""
        waited = self.silent_seconds if self.child.may_wait else self.age_seconds
        return not self.ready and waited > self.child.ready_timeout_seconds

    def last_words(self) -> str:
        """The last line that it wrote, for a person to read."""
        self._pump.join(timeout=1.0)
        return next((line for line in reversed(self._last_lines) if line.strip()), "").strip()

    def terminate(self) -> None:
        """Ask it to end. Only its main process: that one stops its own workers in its own order."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def finish(self) -> int:
        """End whatever is left of the process (at once) and of its group; the exit code."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        code = self._process.wait()
        self._ended.set()
        if group_exists(self.pid):
            stop_groups({self.pid}, _LEFTOVERS_GRACE_SECONDS)
        self._pump.join(timeout=1.0)
        return code

    def _keep_output(self, output: BinaryIO, echo: Callable[[str, str], None]) -> None:
        log = RotatedFile(self.log_path)
        with output:
            for raw in iter(lambda: output.readline(_LONGEST_LINE_BYTES), b""):
                log.write(raw)
                line = raw.decode(errors="replace").rstrip("\n")
                self._last_lines.append(line)
                with contextlib.suppress(OSError, ValueError):  # nobody listens: keep reading,
                    echo(self.child.name, line)  # or the child would block on a full pipe
        log.close()

    def _watch_ready(self, url: str) -> None:
        while not self.ready and not self._ended.wait(_PROBE_INTERVAL_SECONDS):
            if answers(url):
                self.heard_at = time.monotonic()
                self.ready = True

    def _watch_alive(self, url: str) -> None:
        while not self._ended.wait(_ALIVE_INTERVAL_SECONDS):
            if answers(url):
                self.heard_at = time.monotonic()


def answers(url: str) -> bool:
    """Whether ``http://...`` says 200, or ``tcp://host:port`` accepts a connection."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    try:
        if parts.scheme == "tcp":
            with socket.create_connection((host, port), _PROBE_TIMEOUT_SECONDS):
                return True
        connection = http.client.HTTPConnection(host, port, timeout=_PROBE_TIMEOUT_SECONDS)
        with contextlib.closing(connection):
            connection.request("GET", parts.path or "/", headers={"Connection": "close"})
            response = connection.getresponse()
            response.read(_PROBE_MAX_BYTES)  # closing on unread bytes would reset the connection
            return response.status == 200
    except (OSError, http.client.HTTPException):
        return False


class RotatedFile:
    """An append-only log of bounded size; a full disk costs log lines, never the process."""

    def __init__(self, path: Path, max_bytes: int = 20 * 2**20, backups: int = 3) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._backups = backups
        self._file: BinaryIO | None = None

    def write(self, line: bytes) -> None:
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("ab", buffering=0)
            elif self._file.tell() > self._max_bytes:
                self._rotate()
            if self._file is not None:
                self._file.write(line)
        except OSError as error:
            logger.warning("log line lost", extra={"path": str(self._path), "error": str(error)})

    def _rotate(self) -> None:
        self.close()
        for number in range(self._backups, 0, -1):
            source = self._numbered(number - 1)
            if source.exists():
                source.replace(self._numbered(number))
        self._file = self._path.open("ab", buffering=0)

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}") if number else self._path

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
