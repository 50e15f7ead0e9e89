"""Faults of what the updater reads: records that nobody can read, dead letters that nobody takes,
events that are gone, and a second updater. Real brokers, real processes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from kafka.admin import ConfigResource, ConfigResourceType

from moorline import metrics
from moorline.events import Fate, Reason
from moorline.settings import StreamSettings
from moorline.stream import (
    DeadLetters,
    GapCause,
    Reader,
    StreamInvalid,
    Topic,
    dlq_name,
    ensure_topics,
    topic_name,
)
from moorline.stream.dead_letters import KEPT_BYTES
from moorline.stream.scan import Scanner
from tests.kafka_fixtures import wait_until
from tests.updater.ledger.fixtures import VOCABULARY, interaction, rating
from updater.audit import audit_stream
from updater.ingest import Ingest
from updater.ledger import Ledger
from updater.ledger.inspection import LedgerInspector

pytest_plugins = ("tests.kafka_fixtures",)

REPLIES, RATINGS = Topic.INTERACTIONS, Topic.FEEDBACK
DAY = 86_400


@pytest.fixture
def settings(broker: str, topic_prefix: str) -> StreamSettings:
    """Both kinds of broker; one partition, so that records have one order."""
    return StreamSettings(bootstrap=broker, topic_prefix=topic_prefix, partitions=1)


@pytest.fixture
def apache(apache_kafka: str, topic_prefix: str) -> StreamSettings:
    return StreamSettings(bootstrap=apache_kafka, topic_prefix=topic_prefix, partitions=1)


@contextmanager
def intake(settings: StreamSettings, path: Path) -> Iterator[tuple[Ingest, Ledger]]:
    """An updater's intake, from its start to its end."""
    letters, reader = DeadLetters(settings), Reader(settings, (REPLIES, RATINGS))
    try:
        with Ledger(path) as ledger:
            reader.seek(ledger.offsets())
            yield (
                Ingest(
                    reader,
                    letters,
                    ledger,
                    alias="assistant",
                    vocab_size=VOCABULARY,
                    max_tokens=100,
                    max_event_bytes=settings.max_event_bytes,
                    signals={},
                ),
                ledger,
            )
    finally:
        reader.close()
        letters.close()


def step_until(ingest: Ingest, condition: Callable[[], bool]) -> None:
    def reached() -> bool:
        ingest.step(0.2)
        return condition()

    wait_until(reached)


def send(settings: StreamSettings, topic: Topic, *values: bytes | None) -> None:
    producer = KafkaProducer(bootstrap_servers=settings.bootstrap, max_request_size=12 * 2**20)
    for value in values:
        producer.send(topic_name(settings, topic), value, b"k", partition=0).get(30)
    producer.close()


def administer(settings: StreamSettings, work: Callable[[KafkaAdminClient], Any]) -> None:
    admin = KafkaAdminClient(bootstrap_servers=settings.bootstrap)
    try:
        work(admin)
    finally:
        admin.close()


def configure(settings: StreamSettings, name: str, **configs: str) -> None:
    named = {key.replace("_", "."): value for key, value in configs.items()}
    resource = ConfigResource(ConfigResourceType.TOPIC, name, configs=named)
    administer(settings, lambda admin: admin.alter_configs([resource]))


def letters_of(settings: StreamSettings, topic: Topic) -> list[Any]:
    with Scanner(settings, "test") as scanner:
        name = dlq_name(settings, topic)
        return [one for some in scanner.read(name, 0, scanner.beginning(name, 0)) for one in some]


def altered(event: Any, **fields: object) -> bytes:
    return json.dumps(json.loads(event.to_bytes()) | fields).encode()


def balanced(settings: StreamSettings, path: Path) -> bool:
    """Recount, and compare with the stream."""
    with LedgerInspector(path) as inspector:
        return not (inspector.audit() or audit_stream(settings, inspector).differences)


# --- row 9: what nobody can read ----------------------------------------------------------------

UNREADABLE: tuple[tuple[str, Topic, bytes | None, Reason], ...] = (
    ("malformed", RATINGS, b"{", Reason.MALFORMED_JSON),
    ("not text", RATINGS, b"\xff\xfe\x00", Reason.MALFORMED_JSON),
    ("empty", RATINGS, b"", Reason.EMPTY_VALUE),
    ("tombstone", REPLIES, None, Reason.EMPTY_VALUE),
    ("10 MB", REPLIES, b"[" + b"0," * 5 * 2**20 + b"0]", Reason.TOO_LARGE),
    (
        "wrong schema major",
        RATINGS,
        altered(rating("a"), schema_version="2.0"),
        Reason.UNSUPPORTED_SCHEMA_VERSION,
    ),
    ("wrong type", REPLIES, b'"a string"', Reason.SCHEMA_MISMATCH),
    ("wrong type inside", RATINGS, altered(rating("a"), value=[1]), Reason.SCHEMA_MISMATCH),
    ("NaN", RATINGS, altered(rating("a"), value=float("nan")), Reason.SCHEMA_MISMATCH),
    ("negative time", RATINGS, altered(rating("a"), created_at=-1), Reason.SCHEMA_MISMATCH),
    (
        "negative latency",
        REPLIES,
        altered(interaction("a"), latency_seconds=-1),
        Reason.SCHEMA_MISMATCH,
    ),
)


def test_what_nobody_can_read_is_dead_lettered_with_its_origin_and_stops_nothing(
    apache: StreamSettings, tmp_path: Path
) -> None:
    ensure_topics(apache)
    for topic in (REPLIES, RATINGS):
        configure(apache, topic_name(apache, topic), max_message_bytes=str(12 * 2**20))
    path, now = tmp_path / "ledger.sqlite", time.time()
    for _, topic, value, _ in UNREADABLE:
        send(apache, topic, value)
    send(apache, REPLIES, interaction("r", at=now).to_bytes())
    send(apache, RATINGS, rating("r", at=now).to_bytes())
    with intake(apache, path) as (ingest, ledger):
        step_until(ingest, lambda: ledger.accounting().total == len(UNREADABLE) + 2)
        assert ledger.count_ready() == 1, "what came after them is read and joined"
        for topic in (REPLIES, RATINGS):
            sent = [one for one in UNREADABLE if one[1] is topic]
            assert ledger.offsets()[topic, 0][1] == len(sent) + 1
            letters = letters_of(apache, topic)
            assert len(letters) == len(sent)
            for offset, (letter, (_, _, sent_value, reason)) in enumerate(
                zip(letters, sent, strict=True)
            ):
                about = dict(letter.headers)
                assert about["moorline_reason"] == reason.value.encode()
                assert about["moorline_origin_topic"] == topic_name(apache, topic).encode()
                assert about["moorline_origin_partition"] == b"0"
                assert about["moorline_origin_offset"] == str(offset).encode()
                value = sent_value
                if reason is Reason.TOO_LARGE:
                    assert value is not None
                    assert about["moorline_truncated_from_bytes"] == str(len(value)).encode()
                    value = value[:KEPT_BYTES]
                assert letter.value == value
        fates = ledger.accounting().fates
    dead = sum(counts.get(Fate.DEAD_LETTERED, 0) for counts in fates.values())
    assert dead == len(UNREADABLE)
    assert balanced(apache, path)


def test_times_in_the_future_are_cut_at_arrival(settings: StreamSettings, tmp_path: Path) -> None:
    ensure_topics(settings)
    now = time.time()
    ahead = now + 30 * DAY
    producer = KafkaProducer(bootstrap_servers=settings.bootstrap)
    for topic, event in ((REPLIES, interaction("r", at=ahead)), (RATINGS, rating("r", at=ahead))):
        name = topic_name(settings, topic)
        producer.send(name, event.to_bytes(), timestamp_ms=int((now + 1800) * 1000)).get(10)
    producer.close()
    path = tmp_path / "ledger.sqlite"
    with intake(settings, path) as (ingest, ledger):
        step_until(ingest, lambda: ledger.accounting().total == 2)
        assert ledger.count_ready() == 1
        (example,) = ledger.ready_examples(1)
    assert example.interaction.created_at <= time.time()
    assert example.feedback[0].created_at <= time.time()
    assert balanced(settings, path)


# --- row 10: dead letters that nobody takes -----------------------------------------------------


def test_intake_stops_while_dead_letters_are_refused_and_skips_nothing(
    apache: StreamSettings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ensure_topics(apache)
    configure(apache, dlq_name(apache, RATINGS), max_message_bytes="100")
    path, now = tmp_path / "ledger.sqlite", time.time()
    first, last = rating("r", rater="first", at=now), rating("r", rater="last", at=now)
    send(apache, RATINGS, first.to_bytes(), b"poison", last.to_bytes())
    with intake(apache, path) as (ingest, ledger):
        step_until(ingest, lambda: ledger.accounting().total == 1)
        for _ in range(3):
            assert ingest.step(0.2).stalled
        assert ledger.accounting().total == 1, "nothing behind it is read"
        assert ledger.offsets()[RATINGS, 0][1] == 1
    told = [r for r in caplog.records if vars(r).get("event") == "dead_letters_unavailable"]
    assert len(told) == 1, "once, not at every attempt"
    assert "max.message.bytes" in vars(told[0])["error"], "with the remedy"
    with intake(apache, path) as (ingest, ledger):  # a restart changes nothing
        step_until(ingest, lambda: ingest.step(0.2).stalled)
        configure(apache, dlq_name(apache, RATINGS), max_message_bytes="1048588")
        step_until(ingest, lambda: ledger.accounting().total == 3)
        assert ledger.accounting().fates[RATINGS] == {Fate.PENDING: 2, Fate.DEAD_LETTERED: 1}
    (letter,) = letters_of(apache, RATINGS)
    assert letter.value == b"poison"
    assert balanced(apache, path)


# --- row 13: events that are gone ---------------------------------------------------------------


def test_events_that_retention_took_are_a_counted_gap(
    apache: StreamSettings, tmp_path: Path
) -> None:
    ensure_topics(apache)
    path, now = tmp_path / "ledger.sqlite", time.time()
    send(apache, RATINGS, *(rating("r", rater=f"a{i}", at=now).to_bytes() for i in range(10)))
    with intake(apache, path) as (ingest, ledger):
        step_until(ingest, lambda: ledger.accounting().total == 10)
    send(apache, RATINGS, *(rating("r", rater=f"b{i}", at=now).to_bytes() for i in range(10)))
    gone = {TopicPartition(topic_name(apache, RATINGS), 0): 17}
    administer(apache, lambda admin: admin.delete_records(gone))
    counter = metrics.GAPS.labels(RATINGS.value, GapCause.RETENTION.value)
    before = counter._value.get()
    for _ in range(2):  # the second start meets no gap again
        with intake(apache, path) as (ingest, ledger):
            step_until(ingest, lambda: ledger.accounting().total == 13)
            assert ledger.accounting().missed == {RATINGS: 7}
            assert ledger.offsets()[RATINGS, 0][1] == 20
    assert counter._value.get() == before + 1
    assert balanced(apache, path)


def test_a_topic_made_again_is_not_read_until_the_operator_says_so(
    settings: StreamSettings, tmp_path: Path
) -> None:
    ensure_topics(settings)
    path, now = tmp_path / "ledger.sqlite", time.time()
    send(settings, RATINGS, *(rating("r", rater=f"a{i}", at=now).to_bytes() for i in range(5)))
    with intake(settings, path) as (ingest, ledger):
        step_until(ingest, lambda: ledger.accounting().total == 5)
    name = topic_name(settings, RATINGS)
    administer(settings, lambda admin: admin.delete_topics([name]))
    wait_until(lambda: ensure_topics(settings))
    send(settings, RATINGS, *(rating("r", rater=f"b{i}", at=now).to_bytes() for i in range(8)))
    for _ in range(2):
        with (
            intake(settings, path) as (ingest, ledger),
            pytest.raises(StreamInvalid, match="MOORLINE_STREAM__ACCEPT_NEW_TOPICS=true"),
        ):
            ingest.step(0.2)
    accepting = settings.model_copy(update={"accept_new_topics": True})
    with intake(accepting, path) as (ingest, ledger):
        step_until(ingest, lambda: ledger.accounting().total == 13)
    with intake(settings, path) as (ingest, ledger):  # accepted once, it needs no flag
        assert ingest.step(0.5).records == 0
        assert ledger.accounting().consumed == {RATINGS: 13}
    assert balanced(settings, path)


# --- row 14: a second updater -------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from tests.updater.ledger.fixtures import Log, interaction
from updater.ledger import Ledger

ledger, log = Ledger(Path(sys.argv[1])), Log()
print(ledger.epoch, flush=True)
for line in sys.stdin:
    ledger.ingest([log.parsed(interaction(line.strip()))])
    print("written", flush=True)
"""


def writer(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ask(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{word}\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def test_a_second_updater_is_refused_also_while_the_first_is_stopped(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    first = writer(path)
    try:
        assert first.stdout is not None
        assert first.stdout.readline().strip() == "1"
        assert ask(first, "a") == "written"
        os.kill(first.pid, signal.SIGSTOP)
        second = writer(path)
        out, error = second.communicate("b\n", timeout=60)
        assert out == ""
        assert second.returncode == 1
        assert f"LedgerLocked: another updater (pid {first.pid}) is using" in error
        os.kill(first.pid, signal.SIGCONT)
        assert ask(first, "c") == "written"
    finally:
        first.kill()
        first.communicate()
    with Ledger(path) as ledger:  # a lock ends with its process
        assert ledger.accounting().total == 2


def test_a_stopped_updater_that_wakes_up_after_a_takeover_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    stale = writer(path)
    newer: subprocess.Popen[str] | None = None
    try:
        assert stale.stdout is not None
        assert stale.stdout.readline().strip() == "1"
        assert ask(stale, "a") == "written"
        os.kill(stale.pid, signal.SIGSTOP)
        path.with_name(f"{path.name}.lock").unlink()  # as on a file system that loses locks
        newer = writer(path)
        assert newer.stdout is not None
        assert newer.stdout.readline().strip() == "2"
        assert ask(newer, "b") == "written"
        os.kill(stale.pid, signal.SIGCONT)
        out, error = stale.communicate("c\n", timeout=60)
        assert out == ""
        assert stale.returncode == 1
        assert "LeaseLost: another updater took over" in error
        assert ask(newer, "d") == "written"
    finally:
        for process in (stale, newer):
            if process is not None:
                process.kill()
                process.communicate()
    with Ledger(path) as ledger:
        assert ledger.audit() == []
        assert ledger.accounting().total == 3
    with LedgerInspector(path) as inspector:
        assert [bool(inspector.histories(word)) for word in "abcd"] == [True, True, False, True]
