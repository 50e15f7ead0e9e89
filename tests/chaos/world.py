"""The real parts under test, and how each fault is done to them.

One server (``python -m serving``), one updater (``updater.__main__.main``), one broker, a proxy
between them and the broker, and one state directory, on a small file system of its own where that
may be mounted. The updater's processes come from a fork server that has its imports ready, so that
the time goes into the updater and not into ``import torch``.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from daemon.broker import EmbeddedBroker, free_port
from moorline.events import Release
from moorline.failpoints import FAILPOINTS_VARIABLE
from moorline.http import base_url
from moorline.settings import Settings, StreamSettings, load_settings
from moorline.store import ArtifactStore
from tests.kafka_fixtures import ApacheKafka, find_broker_program
from tests.proxy import Proxy
from tests.serving.server_process import ServerProcess

ALIAS = "assistant"
BATCH_EXAMPLES = 4
STATE_BYTES = 256 * 2**20
PROBES = (
    {"prompt": "What is a glacier?", "reply": "A river of ice."},
    {"prompt": "Count to three.", "reply": "One, two, three."},
    {"text": "The sea was calm that morning, and nobody on the pier said a word."},
)
"""Few: every start of the updater computes them, and there are hundreds of starts."""
UPDATER_SETTINGS = {
    # An update starts when a batch is full and never because time has passed.
    "LEARNING__BATCH_EXAMPLES": str(BATCH_EXAMPLES),
    "LEARNING__MIN_BATCH_EXAMPLES": str(BATCH_EXAMPLES),
    "LEARNING__MAX_WAIT_SECONDS": "1e9",
    # Slow, so that hundreds of releases stay inside the anchor's budget: once that is used up,
    # ratings wait for a person.
    "LEARNING__LEARNING_RATE": "1e-4",
    "LEARNING__THREADS": "1",
    "BOUND__TRAFFIC_EXAMPLES": "4",
    # Here the process is killed all the time, and no reply is the cause.
    "UPDATER__SUSPECT_AFTER_CRASHES": "1000000",
    "UPDATER__POLL_SECONDS": "0.1",
    "UPDATER__NICENESS": "0",
}
STREAM_SETTINGS = {
    "STREAM__PARTITIONS": "2",
    "STREAM__CONNECT_TIMEOUT_SECONDS": "3",
    "STREAM__SPOOL_MAX_BYTES": str(8 * 2**20),
}


def run_updater(variables: dict[str, str], log: Path) -> None:
    """Be an updater process; never returns."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(variables)
    from updater.__main__ import main

    sys.exit(main())


@dataclass
class Counts:
    """How often which fault was done."""

    kills: int = 0
    kills_at_failpoints: int = 0
    rollback_seconds: list[float] = field(default_factory=list)
    """How long each rollback took that clients who do not read were in the way of."""
    faults: dict[str, int] = field(default_factory=dict)

    def add_fault(self, kind: str) -> None:
        self.faults[kind] = self.faults.get(kind, 0) + 1


class World:
    """All processes of one run. Methods block; ``Chaos`` calls them from threads."""

    def __init__(self, root: Path, model_dir: Path, *, apache: bool) -> None:
        self.root = root
        self.model_dir = model_dir
        self.state_dir = root / "state"
        self.state_dir.mkdir(parents=True)
        self.counts = Counts()
        self._mounted = _mount(self.state_dir, STATE_BYTES)
        self._proxy: Proxy | None = None
        self._apache: ApacheKafka | None = None
        self._embedded: EmbeddedBroker | None = None
        if apache:
            self._start_apache()
        else:
            self._embedded = EmbeddedBroker(log=root / "broker.log")
            self.bootstrap = self._embedded.start()
        probes = root / "probes.jsonl"
        probes.write_text("".join(json.dumps(row) + "\n" for row in PROBES))
        self.variables = {
            f"MOORLINE_{name}": value
            for name, value in {
                "ALIAS": ALIAS,
                "STATE_DIR": str(self.state_dir),
                "MODEL__PATH": str(model_dir),
                "STREAM__BOOTSTRAP": self.bootstrap,
                "GATE__PROBES": str(probes),
                "UPDATER__PORT": str(free_port("127.0.0.1")),
                **STREAM_SETTINGS,
                **UPDATER_SETTINGS,
            }.items()
        }
        self._server_port = free_port("127.0.0.1")
        self.server = ServerProcess(
            root / "server",
            model_dir,
            {
                **self.variables,
                "MOORLINE_SERVING__PORT": str(self._server_port),
                "MOORLINE_SERVING__DRAIN_SECONDS": "10",
            },
        )
        self.store = ArtifactStore(self.state_dir / "store")
        self._fork = multiprocessing.get_context("forkserver")
        self._fork.set_forkserver_preload(["updater.process", "tests.chaos.world"])
        self._updater: BaseProcess | None = None
        self.updater_log = root / "updater.log"

    def _start_apache(self) -> None:
        program = find_broker_program()
        assert program is not None
        port = free_port("127.0.0.1")
        self._proxy = Proxy(f"127.0.0.1:{port}").start()
        self._apache = ApacheKafka(
            program,
            self.root / "kafka",
            [
                *("--port", str(port)),
                *("--set", f"advertised.listeners=PLAINTEXT://{self._proxy.address}"),
            ],
        )
        self._apache.start()
        self.bootstrap = self._proxy.address

    @property
    def has(self) -> frozenset[str]:
        """What faults can be done here; names as in ``schedule.Kind.needs``."""
        found = set()
        if self._apache is not None:
            found |= {"durable broker", "proxy"}
        if self._mounted:
            found.add("mount")
        return frozenset(found)

    @property
    def settings(self) -> Settings:
        """The settings that the processes have."""
        return load_settings(environment=self.variables)

    @property
    def stream(self) -> StreamSettings:
        return self.settings.stream

    # --- the server ---------------------------------------------------------------------

    def start_server(self, failpoints: str = "", **changes: str) -> None:
        self.server.launch(failpoints, **changes)
        self.server.wait_listening()

    @property
    def server_url(self) -> str:
        """Where it listens, whoever starts it."""
        return base_url("127.0.0.1", self._server_port)

    def server_is_alive(self) -> bool:
        return self.server.process is not None and self.server.process.poll() is None

    def kill_server(self) -> None:
        process = self.server.process
        assert process is not None
        process.kill()
        process.wait()
        self.counts.kills += 1

    # --- the updater --------------------------------------------------------------------

    def start_updater(self, failpoints: str = "", **changes: str) -> None:
        """``changes``: variables of the environment, for this life only."""
        variables = {**self.variables, FAILPOINTS_VARIABLE: failpoints, **changes}
        self._updater = self._fork.Process(
            target=run_updater, args=(variables, self.updater_log), daemon=True
        )
        self._updater.start()

    def updater_exit(self, timeout_seconds: float) -> int | None:
        """Its exit code, as soon as it has ended; None when it still runs after the time-out."""
        assert self._updater is not None
        self._updater.join(timeout_seconds)
        return self._updater.exitcode

    def signal_updater(self, number: signal.Signals) -> None:
        assert self._updater is not None
        if self._updater.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._updater.pid, number)

    # --- the broker and the way to it ---------------------------------------------------

    def kill_broker(self) -> None:
        assert self._apache is not None
        self._apache.kill()
        self.counts.kills += 1

    def start_broker(self) -> None:
        assert self._apache is not None
        # Not by `start`, which waits for the broker through the proxy: that may be at fault too.
        if not self._apache.running:
            self._apache._call("start", *self._apache.options)
            self._apache.running = True

    def silence_broker(self, *, silent: bool) -> None:
        if self._apache is not None:
            if self._apache.running:
                self._apache.pause() if silent else self._apache.resume()
        elif self._embedded is not None and self._embedded.pid is not None:
            os.kill(self._embedded.pid, signal.SIGSTOP if silent else signal.SIGCONT)

    @property
    def proxy(self) -> Proxy:
        assert self._proxy is not None
        return self._proxy

    # --- the disk -----------------------------------------------------------------------

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        """Fill the disk of ledger, store and spool to the last byte."""
        ballast = self.state_dir / "ballast"
        try:
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                for size in (2**20, 4096, 1):
                    with contextlib.suppress(OSError):
                        while True:
                            file.write(b"\0" * size)
            yield
        finally:
            ballast.unlink(missing_ok=True)

    @contextlib.contextmanager
    def flipped_bit(self) -> Iterator[None]:
        """Damage the newest release's adapter, and repair it at the end."""
        versions = self.store.versions(ALIAS)
        release = self.store.release(ALIAS, versions[-1]) if versions else None
        with damaged(self.store, release):
            yield

    # --- the end ------------------------------------------------------------------------

    def close(self) -> None:
        """Stop every process that still runs."""
        if self._updater is not None and self._updater.is_alive():
            self._updater.kill()
            self._updater.join()
        if self.server.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.server.process.pid, signal.SIGKILL)
            self.server.process.wait()
        if self._apache is not None:
            self.silence_broker(silent=False)
            self._apache.kill()
        if self._embedded is not None:
            self.silence_broker(silent=False)
            self._embedded.stop()
        if self._proxy is not None:
            self._proxy.close()

    def unmount(self) -> None:
        """Unmount the state directory's file system; what is on it is lost."""
        if self._mounted:
            subprocess.run(["umount", "-l", str(self.state_dir)], check=False, capture_output=True)


@contextlib.contextmanager
def damaged(store: ArtifactStore, release: Release | None) -> Iterator[None]:
    """Flip one bit of a release's adapter; a release without one stays as it is."""
    files = [] if release is None else release.files
    names = [file.name for file in files if file.name.endswith(".safetensors")]
    if release is None or release.artifact_digest is None or not names:
        yield
        return
    path = store.open(release.artifact_digest, release.files) / names[0]
    content = path.read_bytes()
    mode = path.stat().st_mode
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(len(content) // 2)
        file.write(bytes([content[len(content) // 2] ^ 0x10]))
    try:
        yield
    finally:
        if path.exists():  # garbage collection may have taken it
            path.write_bytes(content)
            path.chmod(mode)


def _mount(directory: Path, size: int) -> bool:
    """Mount a file system in memory there, where that is allowed."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    try:
        return subprocess.run(command, check=False, capture_output=True).returncode == 0
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], timeout_seconds: float) -> bool:
    """Whether it became true in time."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False
