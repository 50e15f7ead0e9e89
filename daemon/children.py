"""One supervised process: started in a group of its own, watched, logged, and stopped.

All limits are measured by `running_seconds`: while the watcher was suspended, nobody was silent.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from moorline.clock import running_seconds
from moorline.process_groups import group_exists, stop_groups
from moorline.systemd import without_notification

logger = logging.getLogger("moorline.supervise")

_ANY_CERTIFICATE = ssl._create_unverified_context()
_PROBE_TIMEOUT_SECONDS = 5.0
_PROBE_MAX_BYTES = 65_536
_PROBE_INTERVAL_SECONDS = 0.2
_ALIVE_INTERVAL_SECONDS = 5.0
_LEFTOVERS_GRACE_SECONDS = 2.0
_LONGEST_LINE_BYTES = 65_536
_LOG_MAX_BYTES = 20 * 2**20
_LOG_BACKUPS = 3


@dataclass(frozen=True)
class Child:
    """What to run, and how to know that it works."""

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    ready_url: str | None = None
    """``http(s)://...`` (200 is ready) or ``tcp://host:port`` (accepts is ready); None: at once."""
    alive_url: str | None = None
    """Polled; a ready child that has not answered 200 for ``hang_seconds`` has crashed."""
    grace_seconds: float = 10.0
    """From SIGTERM to SIGKILL."""
    ready_timeout_seconds: float = 900.0
    hang_seconds: float = 120.0
    may_wait: bool = False
    """Not being ready is no crash while it is alive: it waits for something elsewhere."""
    essential: bool = True
    """Whether all must stop when this one cannot run; replies go on without the updater."""


class ChildProcess:
    """A running ``Child``. Only the main thread may start one (see ``die_with_parent``)."""

    def __init__(
        self, child: Child, log_path: Path, echo: Callable[[str, str], None] | None = None
    ) -> None:
        self.child = child
        self.log_path = log_path
        self.started_at = running_seconds()
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
        """The process id, which is that of its group too."""
        return self._process.pid

    @property
    def age_seconds(self) -> float:
        return running_seconds() - self.started_at

    def poll(self) -> int | None:
        """The exit code (negative: the signal), or None while it runs."""
        return self._process.poll()

    @property
    def silent_seconds(self) -> float:
        """Time since it last answered a probe, or was started."""
        return running_seconds() - self.heard_at

    @property
    def hung(self) -> bool:
        """Whether it was ready and has not answered for too long."""
        watched = self.ready and self.child.alive_url is not None
        return watched and self.silent_seconds > self.child.hang_seconds

    @property
    def stuck(self) -> bool:
        """Whether it should have got ready by now."""
        waited = self.silent_seconds if self.child.may_wait else self.age_seconds
        return not self.ready and waited > self.child.ready_timeout_seconds

    def last_line(self) -> str:
        """The last line of its output that is not blank."""
        self._pump.join(timeout=1.0)
        return next((line for line in reversed(self._last_lines) if line.strip()), "").strip()

    def terminate(self) -> None:
        """Send SIGTERM to its main process, which stops its own workers in its own order."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def finish(self) -> int:
        """Kill what is left of the process and of its group; returns the exit code."""
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
        with contextlib.suppress(OSError):  # then each line says that it is lost
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
        log = OutputFile(self.log_path)
        with output:
            for raw in iter(lambda: output.readline(_LONGEST_LINE_BYTES), b""):
                line = raw.decode(errors="replace").rstrip("\n")
                log.add(line)
                self._last_lines.append(line)
                with contextlib.suppress(OSError, ValueError):  # nobody listens: keep reading,
                    echo(self.child.name, line)  # or the child would block on a full pipe
        with contextlib.suppress(OSError):
            log.close()

    def _watch_ready(self, url: str) -> None:
        while not self.ready and not self._ended.wait(_PROBE_INTERVAL_SECONDS):
            if answers(url):
                self.heard_at = running_seconds()
                self.ready = True

    def _watch_alive(self, url: str) -> None:
        while not self._ended.wait(_ALIVE_INTERVAL_SECONDS):
            if answers(url):
                self.heard_at = running_seconds()


def answers(url: str) -> bool:
    """Whether ``http(s)://...`` says 200, or ``tcp://host:port`` accepts a connection.

    The certificate is not looked at, as no orchestrator's probe does: nothing secret is said, and a
    server must not be killed because its certificate was renewed on disk.
    """
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    try:
        if parts.scheme == "tcp":
            with socket.create_connection((host, port), _PROBE_TIMEOUT_SECONDS):
                return True
        connection = http.client.HTTPConnection(host, port, timeout=_PROBE_TIMEOUT_SECONDS)
        if parts.scheme == "https":
            connection = http.client.HTTPSConnection(
                host, port, timeout=_PROBE_TIMEOUT_SECONDS, context=_ANY_CERTIFICATE
            )
        with contextlib.closing(connection):
            connection.request("GET", parts.path or "/", headers={"Connection": "close"})
            response = connection.getresponse()
            response.read(_PROBE_MAX_BYTES)  # closing on unread bytes would reset the connection
            return response.status == 200
    except (OSError, http.client.HTTPException):
        return False


class OutputFile(RotatingFileHandler):
    """The output of one child, of bounded size; a full disk costs lines, never the process."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            path,
            maxBytes=_LOG_MAX_BYTES,
            backupCount=_LOG_BACKUPS,
            encoding="utf-8",
            errors="replace",
            delay=True,
        )
        self._lost_lines = 0

    def add(self, line: str) -> None:
        lost_before = self._lost_lines
        self.handle(logging.makeLogRecord({"msg": line}))
        if lost_before and self._lost_lines == lost_before:
            self._lost_lines = 0
            logger.warning(
                "child output is written to its log file again",
                extra={
                    "event": "child_output_kept_again",
                    "path": self.baseFilename,
                    "count": lost_before,
                },
            )

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Called by ``emit`` for whatever it raised."""
        del record
        self._lost_lines += 1
        if self._lost_lines == 1:
            logger.warning(
                "cannot write child output to its log file, lines are lost",
                extra={
                    "event": "child_output_lost",
                    "path": self.baseFilename,
                    "error": str(sys.exc_info()[1]),
                },
            )
