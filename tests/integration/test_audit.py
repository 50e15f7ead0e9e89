"""`moorline audit` on real brokers: what differs is found; what is explained is no loss."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition

from moorline.settings import StreamSettings
from moorline.stream import Publisher, Topic, ensure_topics, topic_name
from tests.integration.test_ingest_stream import read
from tests.kafka_fixtures import wait_until
from tests.updater.ledger.fixtures import interaction, rating
from tests.updater.ledger.test_inspection import moorline
from updater.audit import StreamAudit, audit_stream
from updater.ledger.inspection import LedgerInspector

pytest_plugins = ("tests.kafka_fixtures",)

REPLIES, RATINGS = Topic.INTERACTIONS, Topic.FEEDBACK


@pytest.fixture(params=["tansu", "apache_kafka"])
def settings(request: pytest.FixtureRequest, topic_prefix: str) -> StreamSettings:
    """Both kinds of broker."""
    bootstrap = str(request.getfixturevalue(request.param))
    return StreamSettings(bootstrap=bootstrap, topic_prefix=topic_prefix, partitions=2)


@pytest.fixture
def apache(apache_kafka: str, topic_prefix: str) -> StreamSettings:
    return StreamSettings(bootstrap=apache_kafka, topic_prefix=topic_prefix, partitions=2)


@contextlib.contextmanager
def publishing(settings: StreamSettings, spool: Path) -> Iterator[Publisher]:
    ensure_topics(settings)
    publisher = Publisher(settings, spool)
    publisher.start()
    try:
        yield publisher
        assert publisher.flush(30)
    finally:
        publisher.close(0.1)


def publish(settings: StreamSettings, spool: Path, names: range) -> None:
    """A reply and a rating of each name, and one record that cannot be read."""
    with publishing(settings, spool) as publisher:
        for number in names:
            event = interaction(f"r{number}", at=time.time())
            assert publisher.publish(REPLIES, event.interaction_id, event.to_bytes())
            word = rating(f"r{number}", at=time.time())
            assert publisher.publish(RATINGS, word.interaction_id, word.to_bytes())
        assert publisher.publish(RATINGS, "k", b"not json")


def audited(settings: StreamSettings, state: Path) -> StreamAudit:
    with LedgerInspector(state / "ledger.sqlite") as inspector:
        return audit_stream(settings, inspector)


def command(settings: StreamSettings, state: Path, *more: str) -> tuple[int, str]:
    where = ("--set", f"stream.bootstrap={settings.bootstrap}")
    prefix = ("--set", f"stream.topic_prefix={settings.topic_prefix}")
    return moorline("audit", *where, *prefix, *more, state=state)


def totals(found: StreamAudit) -> dict[str, int]:
    names = ("records", "events", "empty", "before", "missed", "unknown", "unread")
    return {name: sum(getattr(one, name) for one in found.partitions) for name in names}


def with_ledger(state: Path, sql: str, *parameters: object) -> None:
    with contextlib.closing(sqlite3.connect(state / "ledger.sqlite")) as connection:
        connection.execute(sql, parameters)
        connection.commit()


def test_the_books_balance_and_what_is_unread_is_no_loss(
    settings: StreamSettings, tmp_path: Path
) -> None:
    publish(settings, tmp_path / "spool", range(30))
    read(settings, tmp_path / "ledger.sqlite", until_total=61)
    publish(settings, tmp_path / "spool", range(30, 40))
    found = audited(settings, tmp_path)
    assert found.differences == found.notes == []
    assert totals(found) == {
        "records": 61,
        "events": 61,
        "empty": 0,
        "before": 0,
        "missed": 0,
        "unknown": 0,
        "unread": 21,
    }
    code, text = command(settings, tmp_path)
    assert code == 0, text
    assert "Audit passed: 61 events, each with one fate, in the ledger and on the" in text
    told = json.loads(command(settings, tmp_path, "--json")[1])
    assert told["balanced"]
    assert sum(one["records"] for one in told["partitions"]) == 61


def test_a_record_without_a_fate_and_a_fate_without_a_record_are_found(
    settings: StreamSettings, tmp_path: Path
) -> None:
    publish(settings, tmp_path / "spool", range(10))
    read(settings, tmp_path / "ledger.sqlite", until_total=21)
    with_ledger(
        tmp_path,
        "DELETE FROM events WHERE offset = 1 AND topic_partition ="
        " (SELECT id FROM topic_partitions WHERE topic = ? AND partition = 0)",
        REPLIES,
    )
    with_ledger(
        tmp_path,
        "INSERT INTO events (topic_partition, offset, fate, reason)"
        " SELECT id, next_offset, 'pending', 'none' FROM topic_partitions"
        " WHERE topic = ? AND partition = 1",
        RATINGS,
    )
    with_ledger(
        tmp_path,
        "UPDATE topic_partitions SET next_offset = next_offset + 1"
        " WHERE topic = ? AND partition = 1",
        RATINGS,
    )
    found = audited(settings, tmp_path)
    passed_over, without_record = sorted(found.differences, key=lambda line: "broker" in line)
    assert "interactions.v1 partition 0: records passed over without a fate: 1" in passed_over
    assert "(offsets 1)" in passed_over
    assert "feedback.v1 partition 1: events that have no record on the broker: 1" in without_record
    code, text = command(settings, tmp_path)
    assert code == 1
    assert "Audit failed" in text


def test_a_topic_made_again_is_noted_and_its_old_events_are_no_loss(
    settings: StreamSettings, tmp_path: Path
) -> None:
    publish(settings, tmp_path / "spool", range(5))
    read(settings, tmp_path / "ledger.sqlite", until_total=11)
    admin = KafkaAdminClient(bootstrap_servers=settings.bootstrap)
    admin.delete_topics([topic_name(settings, RATINGS)])
    admin.close()
    wait_until(lambda: ensure_topics(settings))
    found = audited(settings, tmp_path)
    assert found.differences == []
    (note,) = found.notes
    assert note.startswith("feedback.v1 was deleted or made again since: 6 events")
    assert totals(found)["records"] == 5


def test_markers_and_aborted_records_of_transactions_are_explained(
    apache: StreamSettings, tmp_path: Path
) -> None:
    ensure_topics(apache)
    producer = KafkaProducer(
        bootstrap_servers=apache.bootstrap, transactional_id=f"{apache.topic_prefix}t"
    )
    producer.init_transactions()
    for number in range(12):
        producer.begin_transaction()
        event = interaction(f"r{number}", at=time.time())
        key = event.interaction_id.encode()
        producer.send(topic_name(apache, REPLIES), event.to_bytes(), key).get(10)
        if number % 3:
            producer.commit_transaction()
        else:
            producer.abort_transaction()
    producer.close()
    publish(apache, tmp_path / "spool", range(100, 104))  # so that markers lie before what is read
    publish(apache, tmp_path / "spool", range(104, 108))
    sent = 8 + 8 + 8 + 2  # what was aborted was never said
    read(apache, tmp_path / "ledger.sqlite", until_total=sent)
    found = audited(apache, tmp_path)
    assert found.differences == []
    counts = totals(found)
    assert (counts["records"], counts["events"]) == (sent, sent)
    assert counts["empty"] > 0


def delete_before(settings: StreamSettings, topic: Topic, offset: int) -> None:
    """What retention does, now."""
    name = topic_name(settings, topic)
    admin = KafkaAdminClient(bootstrap_servers=settings.bootstrap)
    admin.delete_records({TopicPartition(name, number): offset for number in range(2)})
    admin.close()


def test_what_retention_removed_is_explained(apache: StreamSettings, tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    publish(apache, tmp_path / "spool", range(40))
    read(apache, path, until_total=81)
    delete_before(apache, REPLIES, 3)  # after they were read
    counts = totals(found := audited(apache, tmp_path))
    assert found.differences == found.notes == []
    assert (counts["before"], counts["missed"], counts["unknown"]) == (6, 0, 0)
    publish(apache, tmp_path / "spool", range(40, 80))
    admin = KafkaAdminClient(bootstrap_servers=apache.bootstrap)
    ends = {one.partition: one.stop for one in found.partitions if one.topic is REPLIES}
    name = topic_name(apache, REPLIES)
    admin.delete_records({TopicPartition(name, part): end + 2 for part, end in ends.items()})
    admin.close()  # before they were read
    read(apache, path, until_total=81 + 81 - 4)
    counts = totals(found := audited(apache, tmp_path))
    assert found.differences == found.notes == []
    assert (counts["before"], counts["missed"], counts["unknown"]) == (40, 4, 0)
    assert counts["records"] == counts["events"] == 81 + 81 - 4 - 40


def test_a_broker_that_is_away_is_one_line_that_names_offline(
    stream_settings: StreamSettings, tmp_path: Path
) -> None:
    publish(stream_settings, tmp_path / "spool", range(3))
    read(stream_settings, tmp_path / "ledger.sqlite", until_total=7)
    away = stream_settings.model_copy(update={"bootstrap": "127.0.0.1:1"})
    code, text = command(away, tmp_path, "--set", "stream.connect_timeout_seconds=1")
    assert code == 1
    assert "--offline" in text
    assert text.count("\n") == 1
    assert moorline("audit", state=tmp_path)[0] == 1, "no broker is known"
    assert command(away, tmp_path, "--offline")[0] == 0
