"""Reader, dead letters and releases on the embedded broker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition

from daemon.broker import EmbeddedBroker
from moorline import metrics
from moorline.events import Reason, Release, ReleaseKind
from moorline.settings import StreamSettings
from moorline.stream import (
    DeadLetters,
    Gap,
    GapCause,
    Publisher,
    Reader,
    Record,
    ReleaseFollower,
    StreamInvalid,
    StreamUnavailable,
    Topic,
    dlq_name,
    ensure_topics,
    publish_release,
    topic_name,
)
from moorline.stream.topics import describe_configs
from tests.kafka_fixtures import wait_until

pytest_plugins = ("tests.kafka_fixtures",)

BOTH = (Topic.INTERACTIONS, Topic.FEEDBACK)


@pytest.fixture
def admin(stream_settings: StreamSettings) -> Iterator[KafkaAdminClient]:
    client = KafkaAdminClient(bootstrap_servers=stream_settings.bootstrap)
    yield client
    client.close()


@pytest.fixture
def produce(stream_settings: StreamSettings, tmp_path: Path) -> Iterator[Publisher]:
    ensure_topics(stream_settings)
    publisher = Publisher(stream_settings, tmp_path / "spool")
    publisher.start()
    yield publisher
    publisher.close(0.1)


@pytest.fixture
def reader(stream_settings: StreamSettings) -> Iterator[Reader]:
    reader = Reader(stream_settings, BOTH)
    yield reader
    reader.close()


def put(publisher: Publisher, topic: Topic, count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        assert publisher.publish(topic, f"k{number}", b"%d" % number)
    assert publisher.flush(90)


def take(reader: Reader, count: int) -> list[Record]:
    records: list[Record] = []
    wait_until(lambda: len(records.__iadd__(reader.poll(500, 0.3))) >= count)
    return records


def positions_after(records: list[Record]) -> dict[tuple[Topic, int], tuple[str, int]]:
    return {(r.topic, r.partition): (r.topic_id, r.offset + 1) for r in records}


def test_an_unknown_partition_is_read_from_its_beginning(
    produce: Publisher, reader: Reader
) -> None:
    put(produce, Topic.INTERACTIONS, 50)
    put(produce, Topic.FEEDBACK, 30)
    records = take(reader, 80)
    assert len(records) == 80
    assert {record.topic for record in records} == set(BOTH)
    assert all(record.topic_id for record in records)
    assert reader.gaps() == []


def test_reading_goes_on_exactly_where_the_ledger_says(
    stream_settings: StreamSettings, produce: Publisher, reader: Reader
) -> None:
    put(produce, Topic.FEEDBACK, 100)
    first = reader.poll(37, 5)
    assert 0 < len(first) <= 37
    again = Reader(stream_settings, BOTH)
    again.seek(positions_after(first))
    rest = take(again, 100 - len(first))
    again.close()
    seen = [record.value for record in first + rest]
    assert len(seen) == len(set(seen)) == 100
    assert again.gaps() == []


def test_seek_goes_back_over_records_that_were_not_stored(
    produce: Publisher, reader: Reader
) -> None:
    put(produce, Topic.FEEDBACK, 20)
    stored = reader.poll(5, 5)
    assert take(reader, 20 - len(stored))
    reader.seek(positions_after(stored))
    assert len(take(reader, 20 - len(stored))) == 20 - len(stored)


def test_a_poll_gives_no_more_than_asked_and_keeps_order(
    produce: Publisher, reader: Reader
) -> None:
    put(produce, Topic.FEEDBACK, 60)
    records: list[Record] = []
    while len(records) < 60:
        batch = reader.poll(7, 5)
        assert 0 < len(batch) <= 7
        records += batch
    for partition in range(4):
        offsets = [r.offset for r in records if r.partition == partition]
        assert offsets == list(range(len(offsets)))


def test_lag_counts_what_was_not_read(produce: Publisher, reader: Reader) -> None:
    put(produce, Topic.FEEDBACK, 40)
    assert take(reader, 40)
    assert set(reader.lag().values()) == {0}
    assert set(reader.lag_seconds().values()) == {0.0}
    put(produce, Topic.FEEDBACK, 10, start=40)
    batch: list[Record] = []
    wait_until(lambda: bool(batch.__iadd__(reader.poll(1, 1))))
    wait_until(lambda: sum(reader.lag().values()) > 0)
    assert max(reader.lag_seconds().values()) < 60
    assert take(reader, 10 - len(batch))
    assert sum(reader.lag().values()) == 0


def test_lag_in_seconds_is_the_age_of_the_oldest_unread_event(
    stream_settings: StreamSettings, reader: Reader
) -> None:
    ensure_topics(stream_settings)
    check_ages(stream_settings, reader)


def check_ages(settings: StreamSettings, reader: Reader) -> None:
    """Also of a reader that has read nothing yet, and of one that has read a part."""
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


def test_an_age_that_cannot_be_known_now_is_left_out(
    own_tansu: EmbeddedBroker, topic_prefix: str, tmp_path: Path
) -> None:
    settings = StreamSettings(
        bootstrap=own_tansu.bootstrap, topic_prefix=topic_prefix, connect_timeout_seconds=1
    )
    ensure_topics(settings)
    publisher = Publisher(settings, tmp_path / "spool")
    publisher.start()
    put(publisher, Topic.FEEDBACK, 1)
    publisher.close(0.1)
    known, unknown = Reader(settings, BOTH), Reader(settings, BOTH)
    for reader in (known, unknown):
        reader.connect()
        wait_until(lambda reader=reader: sum(reader.lag().values()) == 1)  # type: ignore[misc]
    before = max(known.lag_seconds().values())
    own_tansu.stop()
    assert max(known.lag_seconds().values()) >= before
    assert set(unknown.lag_seconds().values()) == {0.0}
    assert len(unknown.lag_seconds()) == 7, "of eight partitions"
    for reader in (known, unknown):
        reader.close()


def test_committed_offsets_are_visible_to_lag_tools(
    stream_settings: StreamSettings, admin: KafkaAdminClient, produce: Publisher, reader: Reader
) -> None:
    put(produce, Topic.FEEDBACK, 25)
    records = take(reader, 25)
    positions = positions_after(records)
    reader.commit(positions)
    committed = admin.list_group_offsets(reader.group)[reader.group]
    name = topic_name(stream_settings, Topic.FEEDBACK)
    for (_, partition), (_, offset) in positions.items():
        assert committed[TopicPartition(name, partition)].offset == offset


def remake(admin: KafkaAdminClient, settings: StreamSettings, topic: Topic) -> None:
    admin.delete_topics([topic_name(settings, topic)])
    wait_until(lambda: ensure_topics(settings))


def test_a_topic_made_again_is_refused_with_the_remedy(
    stream_settings: StreamSettings, admin: KafkaAdminClient, produce: Publisher, reader: Reader
) -> None:
    put(produce, Topic.FEEDBACK, 10)
    positions = positions_after(take(reader, 10))
    remake(admin, stream_settings, Topic.FEEDBACK)
    fresh = Reader(stream_settings, BOTH)
    fresh.seek(positions)
    for _ in range(2):  # it stays refused
        with pytest.raises(StreamInvalid, match="MOORLINE_STREAM__ACCEPT_NEW_TOPICS=true"):
            fresh.poll(10, 0.5)
    fresh.close()


def test_a_topic_made_again_while_reading_never_passes_for_the_old_one(
    stream_settings: StreamSettings, admin: KafkaAdminClient, produce: Publisher, reader: Reader
) -> None:
    put(produce, Topic.FEEDBACK, 10)
    assert take(reader, 10)
    remake(admin, stream_settings, Topic.FEEDBACK)
    fresh = KafkaProducer(bootstrap_servers=stream_settings.bootstrap)
    for number in range(200):  # more than were in the old one: old positions exist in the new
        fresh.send(topic_name(stream_settings, Topic.FEEDBACK), b"new %d" % number, b"%d" % number)
    fresh.flush(10)
    fresh.close()

    def refused() -> bool:
        try:
            assert reader.poll(500, 0.2) == []
        except StreamInvalid:
            return True
        return False

    wait_until(refused)


def test_an_accepted_new_topic_is_read_from_its_start_and_the_gap_is_told(
    stream_settings: StreamSettings, admin: KafkaAdminClient, produce: Publisher, reader: Reader
) -> None:
    put(produce, Topic.FEEDBACK, 10)
    positions = positions_after(take(reader, 10))
    remake(admin, stream_settings, Topic.FEEDBACK)
    fresh = Reader(stream_settings.model_copy(update={"accept_new_topics": True}), BOTH)
    fresh.seek(positions)
    assert fresh.poll(10, 0.2) == []
    gaps = fresh.gaps()
    assert sorted((gap.partition, gap.expected_offset) for gap in gaps) == sorted(
        (partition, offset) for (_, partition), (_, offset) in positions.items()
    )
    assert {gap.cause for gap in gaps} == {GapCause.TOPIC_RECREATED}
    assert {gap.resumed_offset for gap in gaps} == {0}
    assert fresh.gaps() == []
    produce.publish(Topic.FEEDBACK, "k", b"first of the new")
    (record,) = take(fresh, 1)
    assert record.value == b"first of the new"
    assert record.topic_id not in {topic_id for topic_id, _ in positions.values()}
    fresh.close()


def test_different_partition_counts_are_refused(
    stream_settings: StreamSettings, admin: KafkaAdminClient, reader: Reader
) -> None:
    for topic, partitions in ((Topic.INTERACTIONS, 4), (Topic.FEEDBACK, 2)):
        options = {"num_partitions": partitions, "replication_factor": 1}
        admin.create_topics({topic_name(stream_settings, topic): options})
    for attempt in (lambda: ensure_topics(stream_settings), lambda: reader.poll(1, 0.1)):
        with pytest.raises(StreamInvalid, match=r"--alter --topic \S*feedback.v1 --partitions 4"):
            attempt()


def check_configs(
    settings: StreamSettings, admin: KafkaAdminClient, caplog: pytest.LogCaptureFixture
) -> None:
    """What is made is as it must be; what somebody else made is refused, or warned of."""
    ensure_topics(settings, horizon_seconds=7 * 86400)
    assert caplog.text.count("retention") == caplog.text.count("compacted") == 0
    names = [topic_name(settings, topic) for topic in Topic]
    made = describe_configs(admin, names)
    for name in names[:2]:
        assert made[name]["cleanup.policy"] == "delete"
        assert int(made[name]["retention.ms"]) == settings.retention_seconds * 1000
    assert made[topic_name(settings, Topic.RELEASES)]["cleanup.policy"] == "compact"

    def remake(prefix: str, topic: Topic, **configs: str) -> StreamSettings:
        theirs = settings.model_copy(update={"topic_prefix": settings.topic_prefix + prefix})
        options = {"num_partitions": 4, "replication_factor": 1}
        named = {name.replace("_", "."): value for name, value in configs.items()}
        admin.create_topics({topic_name(theirs, topic): options | {"configs": named}})
        return theirs

    short = remake("short.", Topic.FEEDBACK, retention_ms="3600000")
    ensure_topics(short, horizon_seconds=3600)
    assert "learning.horizon_seconds" not in caplog.text
    ensure_topics(short, horizon_seconds=7 * 86400)
    assert f"--add-config retention.ms={14 * 86_400_000}" in caplog.text
    assert caplog.text.count("learning.horizon_seconds") == 1

    compacted = remake("compacted.", Topic.FEEDBACK, cleanup_policy="compact")
    reader = Reader(compacted, BOTH)
    remake("compacted.", Topic.INTERACTIONS)
    for attempt in (lambda: ensure_topics(compacted), lambda: reader.poll(1, 0.1)):
        with pytest.raises(StreamInvalid, match=r"feedback.v1 is compacted.*policy=delete`"):
            attempt()
    reader.close()
    buried = remake("buried.", Topic.FEEDBACK)
    options = {"num_partitions": 1, "replication_factor": 1}
    policy = {"configs": {"cleanup.policy": "compact"}}
    admin.create_topics({dlq_name(buried, Topic.FEEDBACK): options | policy})
    with pytest.raises(StreamInvalid, match=r"feedback.v1.dlq is compacted"):
        ensure_topics(buried)


def test_retention_and_compaction_are_set_and_checked(
    stream_settings: StreamSettings, admin: KafkaAdminClient, caplog: pytest.LogCaptureFixture
) -> None:
    check_configs(stream_settings, admin, caplog)


def test_a_missing_topic_is_named_and_reading_begins_when_it_is_there(
    stream_settings: StreamSettings, reader: Reader
) -> None:
    with pytest.raises(StreamUnavailable, match=r"no topic \S*interactions.v1"):
        reader.poll(1, 0.1)
    ensure_topics(stream_settings)
    assert reader.poll(1, 0.1) == []


def test_a_broker_that_goes_away_is_told_and_reading_goes_on_after(
    own_tansu: EmbeddedBroker, topic_prefix: str
) -> None:
    settings = StreamSettings(
        bootstrap=own_tansu.bootstrap,
        topic_prefix=topic_prefix,
        connect_timeout_seconds=1,
        accept_new_topics=True,
    )
    ensure_topics(settings)
    reader = Reader(settings, BOTH)
    assert reader.poll(1, 0.1) == []
    assert reader.connected
    own_tansu.stop()

    def unavailable() -> bool:
        try:
            reader.poll(1, 0.2)
        except StreamUnavailable as error:
            return "does not answer" in str(error)
        return False

    wait_until(unavailable)
    assert not reader.connected
    own_tansu.start()
    ensure_topics(settings)
    assert reader.poll(1, 0.1) == []
    reader.close()


def read_raw(settings: StreamSettings, name: str) -> list[object]:
    consumer = KafkaConsumer(bootstrap_servers=settings.bootstrap, enable_auto_commit=False)
    partition = TopicPartition(name, 0)
    consumer.assign([partition])
    consumer.seek_to_beginning(partition)
    found: list[object] = []
    wait_until(lambda: bool(found.__iadd__(consumer.poll(500).get(partition, []))))
    consumer.close()
    return found


def test_a_dead_letter_has_the_original_bytes_and_its_story(
    stream_settings: StreamSettings, produce: Publisher, reader: Reader
) -> None:
    produce.publish(Topic.FEEDBACK, "k", b"\xff not json")
    (record,) = take(reader, 1)
    letters = DeadLetters(stream_settings)
    letters.start()
    letters.send(record, Reason.MALFORMED_JSON, "ingest")
    letters.close()
    (letter,) = read_raw(stream_settings, dlq_name(stream_settings, Topic.FEEDBACK))
    assert letter.value == b"\xff not json"  # type: ignore[attr-defined]
    assert letter.key == b"k"  # type: ignore[attr-defined]
    headers = dict(letter.headers)  # type: ignore[attr-defined]
    assert headers["moorline_origin_topic"].decode() == topic_name(stream_settings, Topic.FEEDBACK)
    assert headers["moorline_origin_topic_id"].decode() == record.topic_id
    assert int(headers["moorline_origin_partition"]) == record.partition
    assert int(headers["moorline_origin_offset"]) == record.offset
    assert int(headers["moorline_origin_timestamp_ms"]) == record.timestamp_ms
    assert headers["moorline_reason"] == b"malformed_json"
    assert headers["moorline_stage"] == b"ingest"
    assert headers["ce_type"] == b"moorline.feedback.v1"  # what came with it stays


@pytest.mark.parametrize(("key", "value"), [(None, b"v"), (b"k", None), (None, None)])
def test_a_dead_letter_may_lack_key_and_value(
    stream_settings: StreamSettings, key: bytes | None, value: bytes | None
) -> None:
    letters = DeadLetters(stream_settings)
    record = Record(Topic.FEEDBACK, "id", 0, 0, 1, key, value)
    letters.send(record, Reason.EMPTY_VALUE, "ingest")
    letters.close()
    (letter,) = read_raw(stream_settings, dlq_name(stream_settings, Topic.FEEDBACK))
    assert letter.key == key  # type: ignore[attr-defined]
    assert not letter.value or letter.value == value  # type: ignore[attr-defined]


def test_a_dead_letter_that_is_not_acknowledged_raises(topic_prefix: str) -> None:
    with EmbeddedBroker() as broker:
        settings = StreamSettings(
            bootstrap=broker.bootstrap, topic_prefix=topic_prefix, connect_timeout_seconds=1
        )
        letters = DeadLetters(settings)
        letters.start()
    record = Record(Topic.FEEDBACK, "id", 0, 0, 1, b"k", b"v")
    for _ in range(2):
        with pytest.raises(StreamUnavailable):
            letters.send(record, Reason.MALFORMED_JSON, "ingest")
    letters.close()


def release(version: int, alias: str = "assistant") -> Release:
    return Release(
        alias=alias,
        version=version,
        parent=None,
        kind=ReleaseKind.BASE,
        artifact_digest=None,
        files=(),
        base_model_digest="0" * 64,
        created_at=1.0,
    )


def test_releases_are_told_in_order_and_then_as_they_come(
    stream_settings: StreamSettings,
) -> None:
    publish_release(stream_settings, release(1))
    publish_release(stream_settings, release(2))
    publish_release(stream_settings, release(7, alias="other"))
    follower = ReleaseFollower(stream_settings, alias="assistant")
    seen: list[Release] = []
    wait_until(lambda: len(seen.__iadd__(follower.poll(0.5))) >= 2)
    assert [found.version for found in seen] == [1, 2]
    assert follower.poll(0.2) == []
    publish_release(stream_settings, release(3))
    wait_until(lambda: bool(seen.__iadd__(follower.poll(0.5))) and seen[-1].version == 3)
    follower.close()


def test_a_follower_ignores_what_it_cannot_read(stream_settings: StreamSettings) -> None:
    ensure_topics(stream_settings)
    producer = KafkaProducer(bootstrap_servers=stream_settings.bootstrap)
    name = topic_name(stream_settings, Topic.RELEASES)
    producer.send(name, b"{not json", b"assistant")
    producer.send(name, None, b"assistant")
    producer.flush(10)
    producer.close()
    publish_release(stream_settings, release(5))
    follower = ReleaseFollower(stream_settings)
    seen: list[Release] = []
    wait_until(lambda: bool(seen.__iadd__(follower.poll(0.5))))
    assert [found.version for found in seen] == [5]
    follower.close()


def test_a_follower_never_raises_and_comes_back(own_tansu: EmbeddedBroker) -> None:
    settings = StreamSettings(bootstrap=own_tansu.bootstrap, connect_timeout_seconds=1)
    follower = ReleaseFollower(settings)
    assert follower.poll(0.1) == []
    own_tansu.stop()
    for _ in range(5):
        assert follower.poll(0.2) == []
    own_tansu.start()
    publish_release(settings, release(1))
    seen: list[Release] = []
    wait_until(lambda: bool(seen.__iadd__(follower.poll(0.5))))
    assert seen[0].version == 1
    follower.close()


def test_a_gap_is_a_plain_value() -> None:
    gap = Gap(Topic.FEEDBACK, 1, 5, 9, GapCause.RETENTION)
    assert gap.cause == "retention"
