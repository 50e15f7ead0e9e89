"""A broker that is away is a line or two in an operator's log, whatever the library says of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from daemon.broker import free_port
from moorline.settings import StreamSettings
from moorline.stream import Reader, StreamUnavailable, Topic, link
from tests.integration.streams import BOTH, Start
from tests.kafka_fixtures import ApacheKafka, wait_until
from updater.progress import Phase, Progress

pytest_plugins = ("tests.kafka_fixtures",)

ENOUGH = 50
"""Lines of the library, at warning or above: hours of an outage are as these seconds."""


class Count(logging.Handler):
    """Counts what the library says."""

    lines = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += record.levelno >= logging.WARNING


@pytest.fixture
def library() -> Iterator[Count]:
    counter = Count()
    logging.getLogger("kafka").addHandler(counter)
    yield counter
    logging.getLogger("kafka").removeHandler(counter)


class Said(logging.Handler):
    """Keys of the lines of an operator's log; the library's own have none."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(str(vars(record).get("event", record.getMessage())))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Said]:
    monkeypatch.setattr(link, "RETRY_SECONDS", (0.05, 0.05))  # more attempts in less time
    ours, said = logging.getLogger("moorline"), Said()
    level = ours.level
    ours.setLevel(logging.INFO)
    ours.addHandler(said)
    yield said
    ours.removeHandler(said)
    ours.setLevel(level)


class Intake:
    """Reads as the updater's loop does, and says so."""

    def __init__(self, settings: StreamSettings) -> None:
        self._reader = Reader(settings, BOTH)
        self._progress = Progress()
        self.connected = False

    def cycle(self) -> None:
        try:
            self._reader.poll(100, 0.1)
            self.connected = True
        except StreamUnavailable as error:
            self._progress.wait(Phase.STREAM_UNAVAILABLE, error)
            self.connected = False
        self._progress.end_cycle()

    def close(self) -> None:
        self._reader.close()


def test_a_port_that_refuses_is_said_once(start: Start, library: Count, log: Said) -> None:
    refused = f"127.0.0.1:{free_port('127.0.0.1')}"
    settings = StreamSettings(bootstrap=refused, connect_timeout_seconds=0.3)
    publisher, intake = start(settings), Intake(settings)

    def noisy() -> bool:
        publisher.publish(Topic.FEEDBACK, "chatcmpl-1", b"{}")
        intake.cycle()
        return library.lines > ENOUGH

    wait_until(noisy)
    intake.close()
    assert sorted(log.lines) == ["kafka_unavailable", "updater_waits"]


def test_a_broker_that_goes_away_and_comes_back_is_said_once_each(
    stoppable_apache_kafka: ApacheKafka,
    topic_prefix: str,
    start: Start,
    library: Count,
    log: Said,
) -> None:
    settings = StreamSettings(
        bootstrap=stoppable_apache_kafka.bootstrap,
        topic_prefix=topic_prefix,
        connect_timeout_seconds=2,
    )
    publisher, intake = start(settings), Intake(settings)

    def through() -> bool:
        publisher.publish(Topic.FEEDBACK, "chatcmpl-1", b"{}")
        intake.cycle()
        return publisher.flush(0.5) and intake.connected

    wait_until(through)
    log.lines.clear()
    stoppable_apache_kafka.kill()
    before = library.lines

    def noticed() -> bool:
        publisher.publish(Topic.FEEDBACK, "chatcmpl-1", b"{}")
        intake.cycle()
        loud = library.lines - before > ENOUGH
        return loud and {"kafka_unavailable", "updater_waits"} <= {*log.lines}

    wait_until(noticed)
    stoppable_apache_kafka.start()
    wait_until(through)
    wait_until(lambda: not publisher.stats.last_error)
    intake.cycle()
    intake.close()
    assert sorted(log.lines) == [
        "kafka_available",
        "kafka_unavailable",
        "updater_goes_on",
        "updater_waits",
    ]
