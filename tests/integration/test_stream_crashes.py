"""kill -9 at every failpoint of publisher, spool, dead letters, reader and releases topic, on real
Kafka: nothing that was acknowledged is lost, and nothing counts twice.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
from kafka import KafkaProducer

from daemon.broker import free_port
from moorline import failpoints
from moorline.events import Fate, Feedback
from moorline.settings import StreamSettings
from moorline.stream import (
    DeadLetters,
    Publisher,
    Reader,
    Topic,
    dlq_name,
    ensure_topics,
    publish_release,
    topic_name,
)
from moorline.stream.scan import Scanner
from tests.integration.streams import announced
from tests.kafka_fixtures import wait_until
from tests.updater.ledger.fixtures import VOCABULARY, rating, release
from updater.ingest import Ingest
from updater.ledger import BatchDecision, Ledger

pytest_plugins = ("tests.kafka_fixtures",)

TOPICS = (Topic.INTERACTIONS, Topic.FEEDBACK)
Run = Callable[..., int]


@pytest.fixture
def settings(apache_kafka: str, topic_prefix: str) -> StreamSettings:
    """One partition, so that records have one order."""
    return StreamSettings(bootstrap=apache_kafka, topic_prefix=topic_prefix, partitions=1)


@pytest.fixture(scope="module")
def run() -> Run:
    """``run(life, armed, *arguments)`` in a process of its own; its exit code."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])

    def start(life: Callable[..., None], armed: str, *arguments: Any) -> int:
        process = processes.Process(target=alive, args=(life, armed, arguments))
        process.start()
        process.join(120)
        assert process.exitcode is not None, "it hangs"
        return process.exitcode

    return start


def alive(life: Callable[..., None], armed: str, arguments: tuple[Any, ...]) -> None:
    os.environ[failpoints.FAILPOINTS_VARIABLE] = armed
    life(*arguments)


# --- what three processes do, from wherever their state stands ----------------------------------


def publish(settings: StreamSettings, directory: Path, numbers: range) -> None:
    """A server's way out; what was said to be safe is noted."""
    publisher = Publisher(settings, directory / "spool")
    publisher.start()
    with (directory / "safe").open("a", buffering=1) as safe:
        for number in numbers:
            event = rating(f"r{number}", at=1_750_000_000.0)
            if publisher.publish_durably(Topic.FEEDBACK, event.key, event.to_bytes()).result(60):
                safe.write(f"{event.feedback_id}\n")
    if settings.connect_timeout_seconds > 1:  # there is a broker
        assert publisher.flush(60)
    publisher.close(1)


def take_in(settings: StreamSettings, path: Path, total: int) -> None:
    """An updater's intake, until so many events have a fate."""
    letters, reader = DeadLetters(settings), Reader(settings, TOPICS)
    with Ledger(path, horizon_seconds=1e9) as ledger:
        reader.seek({(Topic(name), part): at for (name, part), at in ledger.offsets().items()})
        ingest = Ingest(
            reader,
            letters,
            ledger,
            alias="assistant",
            vocab_size=VOCABULARY,
            max_tokens=100,
            signals={},
            max_event_bytes=settings.max_event_bytes,
            max_records=2,
        )

        def all_read() -> bool:
            ingest.step(0.2)
            return ledger.accounting().total >= total

        wait_until(all_read)
    reader.close()
    letters.close()


def announce(settings: StreamSettings, path: Path) -> None:
    """An updater's outbox, with one release in it."""
    with Ledger(path) as ledger:
        if ledger.live_version() == 0:
            ledger.commit_release(release(ledger), BatchDecision([]))
        for made in ledger.unpublished():
            publish_release(settings, made)
            ledger.mark_published(made.version)


# --- what must hold -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("point", "strikes"),  # on which pass it dies in each life; 0: it lives
    [
        ("spool.before_append", (3, 2, 0, 0, 0)),
        ("publisher.before_spool_sync", (3, 2, 0, 0, 0)),
        ("publisher.before_send", (0, 0, 3, 5, 0)),
        ("spool.before_cursor_rename", (0, 0, 1, 1, 0)),
    ],
)
def test_what_a_publisher_said_is_safe_counts_once_however_often_it_dies(
    run: Run, settings: StreamSettings, tmp_path: Path, point: str, strikes: tuple[int, ...]
) -> None:
    away = StreamSettings(
        bootstrap=f"127.0.0.1:{free_port('127.0.0.1')}",
        topic_prefix=settings.topic_prefix,
        partitions=1,
        connect_timeout_seconds=0.5,
    )
    ensure_topics(settings)
    for life, strike in enumerate(strikes):
        broker, numbers = away if life < 2 else settings, range(10 * life, 10 * life + 10)
        armed = f"{point}=kill@{strike}" if strike else ""
        assert run(publish, armed, broker, tmp_path, numbers) == (-SIGKILL if strike else 0)

    sent = [Feedback.model_validate_json(value) for value in values(settings, Topic.FEEDBACK)]
    ids = list(dict.fromkeys(event.feedback_id for event in sent))
    safe = (tmp_path / "safe").read_text().split()
    assert set(safe) <= set(ids)
    numbers = [int(name.split("-")[1][1:]) for name in ids]
    assert numbers == sorted(numbers), "the order of what was published"
    path = tmp_path / "ledger.sqlite"
    take_in(settings, path, len(sent))
    with Ledger.open_readonly(path) as ledger:
        assert ledger.audit() == []
        fates = ledger.accounting().fates[Topic.FEEDBACK]
    assert fates[Fate.PENDING] == len(ids)
    assert fates.get(Fate.DUPLICATE, 0) == len(sent) - len(ids)


@pytest.mark.parametrize(
    "point",
    ["dead_letters.before_send", "dead_letters.after_acknowledgement", "reader.after_fetch"],
)
def test_intake_that_dies_skips_nothing_and_takes_nothing_twice(
    run: Run, settings: StreamSettings, tmp_path: Path, point: str
) -> None:
    ensure_topics(settings)
    producer = KafkaProducer(bootstrap_servers=settings.bootstrap)
    for number in range(3):
        for value in (b"unreadable %d" % number, rating(f"r{number}", at=time.time()).to_bytes()):
            producer.send(topic_name(settings, Topic.FEEDBACK), value).get(30)
    producer.close()
    path = tmp_path / "ledger.sqlite"
    for strike in (2, 1):
        assert run(take_in, f"{point}=kill@{strike}", settings, path, 6) == -SIGKILL
    assert run(take_in, "", settings, path, 6) == 0
    with Ledger.open_readonly(path) as ledger:
        assert ledger.audit() == []
        assert ledger.accounting().total == 6
        assert ledger.accounting().fates[Topic.FEEDBACK] == {
            Fate.PENDING: 3,
            Fate.DEAD_LETTERED: 3,
        }
    letters = records(settings, dlq_name(settings, Topic.FEEDBACK))
    origins = {dict(letter.headers)["moorline_origin_offset"]: letter.value for letter in letters}
    assert origins == {b"0": b"unreadable 0", b"2": b"unreadable 1", b"4": b"unreadable 2"}


@pytest.mark.parametrize("point", ["releases.before_send", "releases.after_acknowledgement"])
def test_a_release_whose_announcement_is_killed_is_announced_once_in_effect(
    run: Run, settings: StreamSettings, tmp_path: Path, point: str
) -> None:
    path = tmp_path / "ledger.sqlite"
    for _ in range(2):
        assert run(announce, f"{point}=kill@1", settings, path) == -SIGKILL
    with Ledger.open_readonly(path) as ledger:
        assert [made.version for made in ledger.unpublished()] == [1]
    assert run(announce, "", settings, path) == 0
    with Ledger.open_readonly(path) as ledger:
        assert ledger.unpublished() == []
        (made,) = ledger.releases()
    times = 1 if point.endswith("before_send") else 3
    assert announced(settings) == [made] * times, "announced again, it is the same release"


def records(settings: StreamSettings, name: str) -> list[Any]:
    with Scanner(settings, "test") as scanner:
        return [one for some in scanner.read(name, 0, scanner.beginning(name, 0)) for one in some]


def values(settings: StreamSettings, topic: Topic) -> list[bytes]:
    return [record.value for record in records(settings, topic_name(settings, topic))]
