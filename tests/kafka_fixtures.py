"""Real brokers for tests: the embedded one, and Apache Kafka.

Use them with ``pytest_plugins = ("tests.kafka_fixtures",)``. Apache Kafka comes from a folder
``shared/kafka`` beside the repository (its ``broker`` program), or from ``MOORLINE_TEST_KAFKA``:
``host:port`` of a running one, which tests that stop or pause a broker then skip.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from daemon.broker import EmbeddedBroker
from moorline.settings import StreamSettings
from moorline.stream import Publisher

TEST_KAFKA_VARIABLE = "MOORLINE_TEST_KAFKA"
REQUIRE_KAFKA_VARIABLE = "MOORLINE_TEST_REQUIRE_KAFKA"
"""Set in CI: a missing Apache Kafka fails instead of skipping."""
SKIPPED = "no Apache Kafka: no ../shared/kafka/broker, no java, or no MOORLINE_TEST_KAFKA=host:port"


def find_broker_program() -> Path | None:
    """``shared/kafka/broker`` beside the repository (also from a work tree inside one).

    None where it could not run.
    """
    if shutil.which("java") is None:
        return None
    for parent in Path(__file__).resolve().parents[1:5]:
        for candidate in (parent / "shared/kafka/broker", parent.parent / "shared/kafka/broker"):
            if candidate.is_file():
                return candidate
    return None


@dataclass
class ApacheKafka:
    """One broker, in its own directory; data and port stay from start to start."""

    program: Path
    directory: Path
    options: list[str] = field(default_factory=list)
    bootstrap: str = ""
    secure: dict[str, str] | None = None
    running: bool = False

    def start(self) -> ApacheKafka:
        """Start it, unless it runs."""
        if self.running:
            return self
        done = self._call("start", *self.options)
        answer = json.loads(done.stdout)
        self.bootstrap, self.secure = answer["bootstrap"], answer["secure"]
        self.running = True
        wait_until(self._answers, 30)
        return self

    def stop(self) -> None:
        self._call("stop")
        self.running = False

    def kill(self) -> None:
        self._call("kill")
        self.running = False

    def pause(self) -> None:
        self._call("pause")

    def resume(self) -> None:
        if self.running:
            self._call("resume")

    def admin(self) -> Any:
        """An admin client on the plaintext listener, where everything is allowed."""
        from kafka import KafkaAdminClient

        return KafkaAdminClient(bootstrap_servers=self.bootstrap, bootstrap_timeout_ms=10_000)

    def _answers(self) -> bool:
        try:
            admin = self.admin()
        except Exception:
            return False
        try:
            return bool(admin.describe_cluster()["brokers"])
        finally:
            admin.close()

    def _call(self, action: str, *options: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(self.program), action, str(self.directory), "--timeout", "200", *options],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done


def wait_until(condition: Callable[[], bool], timeout_seconds: float = 60.0) -> None:
    """Poll until true; fails the test when time runs out."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not true after {timeout_seconds} s"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def tansu() -> Iterator[str]:
    """``host:port`` of an embedded broker for the whole session; use your own topic prefix."""
    with EmbeddedBroker() as broker:
        yield broker.bootstrap


@pytest.fixture
def own_tansu() -> Iterator[EmbeddedBroker]:
    """An embedded broker of this test's own, to stop and start again."""
    broker = EmbeddedBroker()
    broker.start()
    yield broker
    broker.stop()


@pytest.fixture
def topic_prefix() -> str:
    """Unique per test."""
    return f"t{uuid.uuid4().hex[:10]}."


@pytest.fixture
def stream_settings(tansu: str, topic_prefix: str) -> StreamSettings:
    """The embedded broker, under this test's own topics."""
    return StreamSettings(bootstrap=tansu, topic_prefix=topic_prefix, connect_timeout_seconds=5)


@pytest.fixture(scope="session")
def make_apache_kafka() -> Iterator[Callable[..., ApacheKafka]]:
    """Starts brokers of one's own; all are stopped at the end of the session."""
    program = find_broker_program()
    if program is None:
        if os.environ.get(REQUIRE_KAFKA_VARIABLE):
            pytest.fail(f"{SKIPPED}; and {REQUIRE_KAFKA_VARIABLE} is set")
        pytest.skip(SKIPPED)
    root = Path(tempfile.mkdtemp(prefix="moorline-kafka-"))
    made: list[ApacheKafka] = []

    def make(*options: str) -> ApacheKafka:
        broker = ApacheKafka(program, root / f"broker-{len(made)}", list(options))
        made.append(broker)
        return broker.start()

    yield make
    for broker in made:
        broker.kill()
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def started_apache_kafka(make_apache_kafka: Callable[..., ApacheKafka]) -> ApacheKafka:
    """One broker for the session (starting one takes seconds), with Kafka's own default of making
    a topic for whoever asks about it.
    """
    return make_apache_kafka("--set", "auto.create.topics.enable=true")


@pytest.fixture
def apache_kafka(request: pytest.FixtureRequest) -> str:
    """``host:port`` of a real Apache Kafka, to use under one's own topic prefix."""
    given = os.environ.get(TEST_KAFKA_VARIABLE)
    return given or str(request.getfixturevalue("started_apache_kafka").bootstrap)


@pytest.fixture(params=["tansu", "apache_kafka"])
def broker(request: pytest.FixtureRequest) -> str:
    """``host:port`` of both kinds of broker, one after the other."""
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Publisher]]:
    """Starts publishers, each with a spool of its own; closes them in the end."""
    made: list[Publisher] = []

    def begin(settings: StreamSettings, spool: Path | None = None) -> Publisher:
        publisher = Publisher(settings, spool or tmp_path / f"spool-{len(made)}")
        publisher.start()
        made.append(publisher)
        return publisher

    yield begin
    for publisher in made:
        publisher.close(0.1)


@pytest.fixture
def stoppable_apache_kafka(started_apache_kafka: ApacheKafka) -> Iterator[ApacheKafka]:
    """The session's broker, to kill, pause and start again; it runs again after the test."""
    yield started_apache_kafka
    started_apache_kafka.resume()
    started_apache_kafka.start()


@pytest.fixture(scope="session")
def secure_apache_kafka(make_apache_kafka: Callable[..., ApacheKafka]) -> ApacheKafka:
    """With a SASL_SSL listener (user ``moor``) that denies what no ACL allows."""
    return make_apache_kafka("--secure", "moor:right-password", "--acl")
