"""What the stream promises on any broker: each test runs on the embedded one and on Apache Kafka.

What only one of them can show is in ``test_kafka_reader.py`` and ``test_kafka_publisher.py`` (a
broker that goes, comes late or comes back empty) and in ``test_kafka_apache.py`` (one that keeps
its data, retention, transactions, permissions).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from kafka import KafkaProducer
from kafka.errors import KafkaError

from moorline import metrics
from moorline.events import Reason
from moorline.settings import StreamSettings
from moorline.stream import (
    DeadLetters,
    GapCause,
    Publisher,
    Reader,
    Record,
    StreamInvalid,
    StreamUnavailable,
    Topic,
    dlq_name,
    ensure_topics,
    publish_release,
    topic_name,
)
from moorline.stream.copies import count_copies
from moorline.stream.topics import describe_configs
from tests.integration.streams import (
    BOTH,
    Start,
    announced,
    positions_after,
    put,
    queue,
    read_raw,
    release,
    remake,
    take,
    with_admin,
)
from tests.kafka_fixtures import wait_until

pytest_plugins = ("tests.kafka_fixtures",)


@pytest.fixture
def settings(broker: str, topic_prefix: str) -> StreamSettings:
    return StreamSettings(bootstrap=broker, topic_prefix=topic_prefix, connect_timeout_seconds=5)


@pytest.fixture
def publisher(settings: StreamSettings, start: Start) -> Publisher:
    ensure_topics(settings)
    return start(settings)


@pytest.fixture
def reader(settings: StreamSettings) -> Iterator[Reader]:
    reader = Reader(settings, BOTH)
    yield reader
    reader.close()


# --- publishing --------------------------------------------------------------------------------


def test_events_arrive_once_in_order_with_their_headers(
    publisher: Publisher, reader: Reader
) -> None:
    put(publisher, Topic.INTERACTIONS, range(3000))
    records = take(reader, 3000)
    assert reader.poll(1, 0.3) == []
    for partition in range(4):
        numbers = [int(r.value or b"") for r in records if r.partition == partition]
        assert numbers == sorted(numbers)
    assert sorted(int(record.value or b"") for record in records) == list(range(3000))
    assert dict(records[0].headers)["ce_type"] == b"moorline.interactions.v1"
    assert records[0].key == b"k" + (records[0].value or b"")
    assert len({dict(record.headers)["ce_id"] for record in records}) == 3000
    stats = publisher.stats
    assert (stats.delivered, stats.dropped, stats.queued, stats.spooled) == (3000, 0, 0, 0)
    assert stats.connected


def test_many_threads_may_publish(settings: StreamSettings, publisher: Publisher) -> None:
    threads = [
        threading.Thread(
            target=queue, args=(publisher, Topic.INTERACTIONS, range(start, start + 250))
        )
        for start in range(0, 1000, 250)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert publisher.flush(90)
    reader = Reader(settings, BOTH)
    records = take(reader, 1000) + reader.poll(100, 0.3)
    reader.close()
    assert sorted(int(record.value or b"") for record in records) == list(range(1000))


def test_a_too_large_event_is_rejected_on_arrival(
    settings: StreamSettings, publisher: Publisher
) -> None:
    assert not publisher.publish(Topic.FEEDBACK, "k", b"x" * (settings.max_event_bytes + 1))
    assert publisher.publish(Topic.FEEDBACK, "k", b"x" * settings.max_event_bytes)
    assert publisher.flush(90)
    assert publisher.stats.dropped == 1


# --- reading -----------------------------------------------------------------------------------


def test_an_unknown_partition_is_read_from_its_beginning(
    publisher: Publisher, reader: Reader
) -> None:
    put(publisher, Topic.INTERACTIONS, range(50))
    put(publisher, Topic.FEEDBACK, range(30))
    records = take(reader, 80)
    assert len(records) == 80
    assert {record.topic for record in records} == set(BOTH)
    assert all(record.topic_id for record in records)
    assert reader.gaps() == []


def test_reading_goes_on_exactly_where_the_ledger_says(
    settings: StreamSettings, publisher: Publisher, reader: Reader
) -> None:
    put(publisher, Topic.FEEDBACK, range(100))
    first = reader.poll(37, 5)
    assert 0 < len(first) <= 37
    again = Reader(settings, BOTH)
    again.seek(positions_after(first))
    rest = take(again, 100 - len(first))
    again.close()
    seen = [record.value for record in first + rest]
    assert len(seen) == len(set(seen)) == 100
    assert again.gaps() == []


def test_seek_goes_back_over_records_that_were_not_stored(
    publisher: Publisher, reader: Reader
) -> None:
    put(publisher, Topic.FEEDBACK, range(20))
    stored = reader.poll(5, 5)
    assert take(reader, 20 - len(stored))
    reader.seek(positions_after(stored))
    assert len(take(reader, 20 - len(stored))) == 20 - len(stored)


def test_a_poll_gives_no_more_than_asked_and_keeps_order(
    publisher: Publisher, reader: Reader
) -> None:
    put(publisher, Topic.FEEDBACK, range(60))
    records: list[Record] = []
    while len(records) < 60:
        batch = reader.poll(7, 5)
        assert 0 < len(batch) <= 7
        records += batch
    for partition in range(4):
        offsets = [r.offset for r in records if r.partition == partition]
        assert offsets == list(range(len(offsets)))


def test_a_missing_topic_is_named_and_reading_begins_when_it_is_there(
    settings: StreamSettings, reader: Reader
) -> None:
    with pytest.raises(StreamUnavailable, match=r"no topic \S*interactions.v1"):
        reader.poll(1, 0.1)
    ensure_topics(settings)
    assert reader.poll(1, 0.1) == []


# --- lag and committed offsets -----------------------------------------------------------------


def test_lag_counts_what_was_not_read(publisher: Publisher, reader: Reader) -> None:
    put(publisher, Topic.FEEDBACK, range(40))
    assert take(reader, 40)
    assert set(reader.lag().values()) == {0}
    assert set(reader.lag_seconds().values()) == {0.0}
    put(publisher, Topic.FEEDBACK, range(40, 50))
    batch: list[Record] = []
    wait_until(lambda: bool(batch.__iadd__(reader.poll(1, 1))))
    wait_until(lambda: sum(reader.lag().values()) > 0)
    assert max(reader.lag_seconds().values()) < 60
    assert take(reader, 10 - len(batch))
    assert sum(reader.lag().values()) == 0


def test_lag_in_seconds_is_the_age_of_the_oldest_unread_event(
    settings: StreamSettings, reader: Reader
) -> None:
    """A reader that has read nothing yet knows it, and one that has read a part."""
    ensure_topics(settings)
    now_ms = int(time.time() * 1000)
    producer = KafkaProducer(bootstrap_servers=settings.bootstrap)
    for seconds in (500, 300, 100):
        producer.send(
            topic_name(settings, Topic.FEEDBACK),
            b"%d" % seconds,
            partition=0,
            timestamp_ms=now_ms - seconds * 1000,
        ).get(10)
    producer.close()
    reader.connect()
    wait_until(lambda: sum(reader.lag().values()) == 3)

    def oldest() -> float:
        ages = reader.lag_seconds()
        waited = time.time() - now_ms / 1000
        assert all(age == 0 for key, age in ages.items() if key != (Topic.FEEDBACK, 0))
        exposed = metrics.LAG_SECONDS.labels(Topic.FEEDBACK.value)._value.get()
        assert exposed == ages[Topic.FEEDBACK, 0]
        return max(0.0, ages[Topic.FEEDBACK, 0] - waited)

    for seconds in (500, 300, 100):
        assert oldest() == pytest.approx(seconds, abs=1)
        (record,) = reader.poll(1, 5)
        assert record.value == b"%d" % seconds
    assert oldest() == 0


def test_committed_offsets_are_visible_to_lag_tools(
    settings: StreamSettings, publisher: Publisher, reader: Reader
) -> None:
    put(publisher, Topic.FEEDBACK, range(25))
    positions = positions_after(take(reader, 25))
    name = topic_name(settings, Topic.FEEDBACK)
    wanted = {(name, partition): offset for (_, partition), (_, offset) in positions.items()}

    def visible() -> bool:
        reader.commit(positions)  # a new broker has no coordinator for a moment
        try:
            groups = with_admin(
                settings.bootstrap, lambda admin: admin.list_group_offsets(reader.group)
            )
        except KafkaError:
            return False
        found = {(at.topic, at.partition): one.offset for at, one in groups[reader.group].items()}
        return wanted.items() <= found.items()

    wait_until(visible)


def test_offsets_that_somebody_resets_on_the_broker_move_nothing(
    settings: StreamSettings, publisher: Publisher, reader: Reader
) -> None:
    put(publisher, Topic.FEEDBACK, range(40))
    positions = positions_after(take(reader, 40))
    reader.commit({key: (topic_id, 0) for key, (topic_id, _) in positions.items()})
    later = Reader(settings, BOTH)
    later.seek(positions)
    assert later.poll(10, 1) == []
    later.close()


# --- topics made again -------------------------------------------------------------------------


def test_a_topic_made_again_is_refused_with_the_remedy(
    settings: StreamSettings, publisher: Publisher, reader: Reader
) -> None:
    put(publisher, Topic.FEEDBACK, range(10))
    positions = positions_after(take(reader, 10))
    remake(settings, Topic.FEEDBACK)
    fresh = Reader(settings, BOTH)
    fresh.seek(positions)
    for _ in range(2):  # it stays refused
        with pytest.raises(StreamInvalid, match="MOORLINE_STREAM__ACCEPT_NEW_TOPICS=true"):
            fresh.poll(10, 0.5)
    fresh.close()


def test_a_topic_made_again_while_reading_never_passes_for_the_old_one(
    settings: StreamSettings, publisher: Publisher, reader: Reader
) -> None:
    put(publisher, Topic.FEEDBACK, range(10))
    assert take(reader, 10)
    remake(settings, Topic.FEEDBACK)
    # more than were in the old one: old positions exist in the new
    put(publisher, Topic.FEEDBACK, range(1000, 1200))

    def refused() -> bool:
        try:
            assert reader.poll(500, 0.2) == []
        except StreamInvalid as error:
            return "MOORLINE_STREAM__ACCEPT_NEW_TOPICS=true" in str(error)
        return False

    wait_until(refused)


def test_an_accepted_new_topic_is_read_from_its_start_and_the_gap_is_told(
    settings: StreamSettings, publisher: Publisher, reader: Reader
) -> None:
    put(publisher, Topic.FEEDBACK, range(10))
    positions = positions_after(take(reader, 10))
    remake(settings, Topic.FEEDBACK)
    fresh = Reader(settings.model_copy(update={"accept_new_topics": True}), BOTH)
    fresh.seek(positions)
    assert fresh.poll(10, 0.2) == []
    gaps = fresh.gaps()
    assert sorted((gap.partition, gap.expected_offset) for gap in gaps) == sorted(
        (partition, offset) for (_, partition), (_, offset) in positions.items()
    )
    assert {gap.cause for gap in gaps} == {GapCause.TOPIC_RECREATED}
    assert {gap.resumed_offset for gap in gaps} == {0}
    assert fresh.gaps() == []
    put(publisher, Topic.FEEDBACK, range(1000, 1040))
    records = take(fresh, 40)
    fresh.close()
    assert sorted(int(record.value or b"") for record in records) == list(range(1000, 1040))
    old_ids = {topic_id for topic_id, _ in positions.values()}
    assert old_ids.isdisjoint(record.topic_id for record in records)


# --- how topics are made -----------------------------------------------------------------------


def test_different_partition_counts_are_refused(settings: StreamSettings, reader: Reader) -> None:
    for topic, partitions in ((Topic.INTERACTIONS, 4), (Topic.FEEDBACK, 2)):
        make_topic(settings, topic_name(settings, topic), partitions)
    for attempt in (lambda: ensure_topics(settings), lambda: reader.poll(1, 0.1)):
        with pytest.raises(StreamInvalid, match=r"--alter --topic \S*feedback.v1 --partitions 4"):
            attempt()


def make_topic(settings: StreamSettings, name: str, partitions: int = 4, **configs: str) -> None:
    """A topic as somebody else would make it."""
    options = {
        "num_partitions": partitions,
        "replication_factor": 1,
        "configs": {key.replace("_", "."): value for key, value in configs.items()},
    }
    with_admin(settings.bootstrap, lambda admin: admin.create_topics({name: options}))


def under(settings: StreamSettings, prefix: str) -> StreamSettings:
    return settings.model_copy(update={"topic_prefix": settings.topic_prefix + prefix})


def test_topics_are_made_once_with_their_retention_and_compaction(
    settings: StreamSettings, caplog: pytest.LogCaptureFixture
) -> None:
    assert ensure_topics(settings, horizon_seconds=7 * 86400)
    assert not ensure_topics(settings)
    assert caplog.text.count("retention") == caplog.text.count("compacted") == 0
    names = [topic_name(settings, topic) for topic in Topic]
    assert "copies" not in caplog.text
    copies = with_admin(settings.bootstrap, lambda admin: count_copies(admin, names))
    assert copies == dict.fromkeys(names, 1)  # of one broker
    made = with_admin(settings.bootstrap, lambda admin: describe_configs(admin, names))
    for name in names[:2]:
        assert made[name]["cleanup.policy"] == "delete"
        assert int(made[name]["retention.ms"]) == settings.retention_seconds * 1000
    assert made[topic_name(settings, Topic.RELEASES)]["cleanup.policy"] == "compact"


def test_a_retention_shorter_than_the_horizon_is_warned_of(
    settings: StreamSettings, caplog: pytest.LogCaptureFixture
) -> None:
    make_topic(settings, topic_name(settings, Topic.FEEDBACK), retention_ms="3600000")
    ensure_topics(settings, horizon_seconds=3600)
    assert "learning.horizon_seconds" not in caplog.text
    ensure_topics(settings, horizon_seconds=7 * 86400)
    assert f"--add-config retention.ms={14 * 86_400_000}" in caplog.text
    assert caplog.text.count("learning.horizon_seconds") == 1


def test_a_compacted_topic_of_events_or_dead_letters_is_refused(
    settings: StreamSettings,
) -> None:
    compacted, dead = under(settings, "compacted."), under(settings, "dead.")
    make_topic(settings, topic_name(compacted, Topic.FEEDBACK), cleanup_policy="compact")
    make_topic(settings, topic_name(compacted, Topic.INTERACTIONS))
    reader = Reader(compacted, BOTH)
    for attempt in (lambda: ensure_topics(compacted), lambda: reader.poll(1, 0.1)):
        with pytest.raises(StreamInvalid, match=r"feedback.v1 is compacted.*policy=delete`"):
            attempt()
    reader.close()
    make_topic(settings, dlq_name(dead, Topic.FEEDBACK), 1, cleanup_policy="compact")
    with pytest.raises(StreamInvalid, match=r"feedback.v1.dlq is compacted"):
        ensure_topics(dead)


# --- dead letters ------------------------------------------------------------------------------


def test_a_dead_letter_has_the_original_bytes_and_says_where_they_came_from(
    settings: StreamSettings, publisher: Publisher, reader: Reader
) -> None:
    publisher.publish(Topic.FEEDBACK, "k", b"\xff not json")
    (record,) = take(reader, 1)
    letters = DeadLetters(settings)
    letters.start()
    letters.send(record, Reason.MALFORMED_JSON, "ingest")
    letters.close()
    (letter,) = read_raw(settings, dlq_name(settings, Topic.FEEDBACK))
    assert letter.value == b"\xff not json"
    assert letter.key == b"k"
    headers = dict(letter.headers)
    assert headers["moorline_origin_topic"].decode() == topic_name(settings, Topic.FEEDBACK)
    assert headers["moorline_origin_topic_id"].decode() == record.topic_id
    assert int(headers["moorline_origin_partition"]) == record.partition
    assert int(headers["moorline_origin_offset"]) == record.offset
    assert int(headers["moorline_origin_timestamp_ms"]) == record.timestamp_ms
    assert headers["moorline_reason"] == b"malformed_json"
    assert headers["moorline_stage"] == b"ingest"
    assert headers["ce_type"] == b"moorline.feedback.v1"  # what came with it stays


@pytest.mark.parametrize(("key", "value"), [(None, b"v"), (b"k", None), (None, None)])
def test_a_dead_letter_may_lack_key_and_value(
    settings: StreamSettings, key: bytes | None, value: bytes | None
) -> None:
    letters = DeadLetters(settings)
    record = Record(Topic.FEEDBACK, "id", 0, 0, 1, key, value)
    letters.send(record, Reason.EMPTY_VALUE, "ingest")
    letters.close()
    (letter,) = read_raw(settings, dlq_name(settings, Topic.FEEDBACK))
    assert letter.key == key
    assert not letter.value or letter.value == value


# --- releases ----------------------------------------------------------------------------------


def test_releases_are_on_their_topic_in_the_order_of_their_announcement(
    settings: StreamSettings,
) -> None:
    made = [release(1), release(2), release(7, alias="other"), release(2)]
    for one in made:
        publish_release(settings, one)
    wait_until(lambda: announced(settings) == made)
