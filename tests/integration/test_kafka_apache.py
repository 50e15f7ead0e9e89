"""What only a real Apache Kafka can show: crash and restart with data kept, silence, retention,
transactions, limits on size, logins and permissions. ``tests/kafka_fixtures.py`` says where it
comes from; what holds on the embedded broker too is in ``test_stream_contract.py``.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from kafka import KafkaAdminClient, KafkaProducer, TopicPartition
from kafka.admin import (
    ACL,
    ACLOperation,
    ACLPermissionType,
    ConfigResource,
    ConfigResourceType,
    OffsetSpec,
    ResourcePattern,
    ResourceType,
)
from pydantic import SecretStr

from moorline.events import Reason
from moorline.settings import StreamSettings
from moorline.stream import (
    DeadLetters,
    Gap,
    GapCause,
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
from moorline.stream.topics import describe
from tests.integration.streams import (
    BOTH,
    Start,
    announced,
    positions_after,
    put,
    queue,
    read_numbers,
    read_raw,
    release,
    take,
    with_admin,
)
from tests.kafka_fixtures import ApacheKafka, wait_until

pytest_plugins = ("tests.kafka_fixtures",)


@pytest.fixture
def settings(apache_kafka: str, topic_prefix: str) -> StreamSettings:
    return StreamSettings(bootstrap=apache_kafka, topic_prefix=topic_prefix)


# --- outages -----------------------------------------------------------------------------------


def test_kill_nine_of_the_broker_loses_and_doubles_nothing(
    stoppable_apache_kafka: ApacheKafka, topic_prefix: str, start: Start
) -> None:
    settings = StreamSettings(
        bootstrap=stoppable_apache_kafka.bootstrap,
        topic_prefix=topic_prefix,
        connect_timeout_seconds=3,
    )
    publisher = start(settings)
    put(publisher, Topic.INTERACTIONS, range(500))
    stoppable_apache_kafka.kill()
    queue(publisher, Topic.INTERACTIONS, range(500, 1500))
    wait_until(lambda: publisher.stats.spooled == 1000)
    assert not publisher.stats.connected
    stoppable_apache_kafka.start()
    put(publisher, Topic.INTERACTIONS, range(1500, 1600))
    assert read_numbers(settings, Topic.INTERACTIONS, 1600) == list(range(1600))
    assert publisher.stats.spooled_bytes == 0


def test_a_silent_broker_gets_every_event_once(
    stoppable_apache_kafka: ApacheKafka, topic_prefix: str, start: Start
) -> None:
    settings = StreamSettings(
        bootstrap=stoppable_apache_kafka.bootstrap,
        topic_prefix=topic_prefix,
        connect_timeout_seconds=2,
    )
    publisher = start(settings)
    put(publisher, Topic.INTERACTIONS, range(100))
    stoppable_apache_kafka.pause()
    queue(publisher, Topic.INTERACTIONS, range(100, 600))
    wait_until(lambda: publisher.stats.spooled == 500)
    time.sleep(7)  # longer than it takes to look at a silent broker
    stoppable_apache_kafka.resume()
    assert publisher.flush(90)
    assert read_numbers(settings, Topic.INTERACTIONS, 600) == list(range(600))
    assert publisher.stats.delivered == 600


def test_reading_goes_on_after_a_crash_of_the_broker_and_announcements_are_still_there(
    stoppable_apache_kafka: ApacheKafka, topic_prefix: str, start: Start
) -> None:
    settings = StreamSettings(
        bootstrap=stoppable_apache_kafka.bootstrap,
        topic_prefix=topic_prefix,
        connect_timeout_seconds=3,
    )
    publisher = start(settings)
    put(publisher, Topic.FEEDBACK, range(100))
    put(publisher, Topic.INTERACTIONS, range(1))
    publish_release(settings, release(1))
    reader = Reader(settings, BOTH)
    seen = reader.poll(40, 10)
    stoppable_apache_kafka.kill()
    stoppable_apache_kafka.start()

    def read_on() -> bool:
        with contextlib.suppress(StreamUnavailable):
            seen.extend(reader.poll(500, 0.5))
        return len(seen) >= 101

    wait_until(read_on, 60)
    reader.close()
    places = [(record.topic, record.partition, record.offset) for record in seen]
    assert len(places) == len(set(places)) == 101
    assert reader.gaps() == []
    assert announced(settings) == [release(1)]


# --- what is gone ------------------------------------------------------------------------------


def delete_before(settings: StreamSettings, topic: Topic, offsets: dict[int, int]) -> None:
    """What retention does, now: everything before these offsets is gone."""
    name = topic_name(settings, topic)
    wanted = {TopicPartition(name, partition): offset for partition, offset in offsets.items()}
    with_admin(settings.bootstrap, lambda admin: admin.delete_records(wanted))


def test_retention_that_passed_the_reader_is_an_explicit_gap(
    settings: StreamSettings, start: Start
) -> None:
    publisher = start(settings)
    put(publisher, Topic.FEEDBACK, range(200))
    reader = Reader(settings, BOTH)
    first = reader.poll(20, 10)
    reader.close()
    positions = positions_after(first)
    ((_, partition), (_, expected)) = next(iter(positions.items()))
    delete_before(settings, Topic.FEEDBACK, {partition: expected + 7})
    later = Reader(settings, BOTH)
    later.seek(positions)
    rest = take(later, 200 - len(first) - 7)
    later.close()
    (gap,) = later.gaps()
    assert (gap.topic, gap.partition) == (Topic.FEEDBACK, partition)
    assert (gap.expected_offset, gap.resumed_offset) == (expected, expected + 7)
    assert gap.cause is GapCause.RETENTION
    assert len(first) + len(rest) + 7 == 200


def test_retention_that_passes_while_reading_is_an_explicit_gap(
    settings: StreamSettings, start: Start
) -> None:
    publisher = start(settings)
    ensure_topics(settings)
    reader = Reader(settings, BOTH)
    assert reader.poll(1, 0.1) == []
    for number in range(80):  # more than the reader fetches ahead
        assert publisher.publish(Topic.FEEDBACK, f"k{number}", b"%d " % number + b"x" * 200_000)
    assert publisher.flush(90)
    ends = dict.fromkeys(range(4), -1)  # -1: up to the end
    delete_before(settings, Topic.FEEDBACK, ends)
    put(publisher, Topic.FEEDBACK, range(100, 120))
    records: list[Record] = []
    gaps: list[Gap] = []

    def all_accounted_for() -> bool:
        records.extend(reader.poll(500, 0.5))
        gaps.extend(reader.gaps())
        missed = sum(gap.resumed_offset - gap.expected_offset for gap in gaps)
        return len(records) + missed == 100

    wait_until(all_accounted_for)
    reader.close()
    numbers = [int((record.value or b"").split()[0]) for record in records]
    assert len(numbers) == len(set(numbers))
    assert set(range(100, 120)) <= set(numbers)
    assert {gap.cause for gap in gaps} == {GapCause.RETENTION}


def test_the_publisher_follows_a_topic_that_was_made_again(
    settings: StreamSettings, start: Start
) -> None:
    publisher = start(settings)
    put(publisher, Topic.FEEDBACK, range(10))
    name = topic_name(settings, Topic.FEEDBACK)
    with_admin(settings.bootstrap, lambda admin: admin.delete_topics([name]))

    def gone(admin: KafkaAdminClient) -> bool:
        return Topic.FEEDBACK not in describe(admin, settings, BOTH)

    wait_until(lambda: bool(with_admin(settings.bootstrap, gone)))
    put(publisher, Topic.FEEDBACK, range(100, 200))
    assert read_numbers(settings, Topic.FEEDBACK, 100) == list(range(100, 200))


def test_no_client_of_ours_makes_a_topic_by_asking_for_it(
    settings: StreamSettings, start: Start
) -> None:
    publisher = start(settings)
    put(publisher, Topic.FEEDBACK, range(10))
    reader = Reader(settings, BOTH)
    assert take(reader, 10)
    publisher.close()
    names = [topic_name(settings, topic) for topic in Topic]
    with_admin(settings.bootstrap, lambda admin: admin.delete_topics(names))
    wait_until(lambda: not with_admin(settings.bootstrap, lambda a: describe(a, settings, BOTH)))
    for _ in range(4):
        with contextlib.suppress(StreamUnavailable):
            reader.poll(10, 0.5)
    with contextlib.suppress(StreamUnavailable):
        announced(settings)
    assert not with_admin(settings.bootstrap, lambda a: describe(a, settings, BOTH))
    reader.close()


def test_a_stored_offset_past_the_end_is_refused(settings: StreamSettings, start: Start) -> None:
    put(start(settings), Topic.FEEDBACK, range(20))
    reader = Reader(settings, BOTH)
    positions = positions_after(take(reader, 20))
    reader.close()
    key, (topic_id, offset) = next(iter(positions.items()))
    later = Reader(settings, BOTH)
    later.seek(positions | {key: (topic_id, offset + 1000)})

    def refused() -> bool:
        try:
            later.poll(10, 0.5)
        except StreamInvalid as error:
            return "lost data" in str(error)
        return False

    wait_until(refused)
    later.close()


def test_partitions_that_are_added_to_both_topics_are_read(
    settings: StreamSettings, start: Start
) -> None:
    publisher = start(settings)
    put(publisher, Topic.FEEDBACK, range(50))
    reader = Reader(settings, BOTH)
    seen = take(reader, 50)

    def grow(topic: Topic) -> None:
        more = {topic_name(settings, topic): 6}
        with_admin(settings.bootstrap, lambda admin: admin.create_partitions(more))

    grow(Topic.INTERACTIONS)

    def refused() -> bool:
        try:
            reader.poll(10, 0.5)
        except StreamInvalid as error:
            return "--partitions 6" in str(error)
        return False

    wait_until(refused)
    grow(Topic.FEEDBACK)
    producer = KafkaProducer(bootstrap_servers=settings.bootstrap)
    for partition in range(6):
        producer.send(topic_name(settings, Topic.FEEDBACK), b"-1", b"x", partition=partition)
    producer.flush(10)
    producer.close()
    more: list[Record] = []

    def read_on() -> bool:
        with contextlib.suppress(StreamInvalid):  # the broker tells of new ones a little later
            more.extend(reader.poll(100, 0.5))
        return len(more) >= 6

    wait_until(read_on)
    reader.close()
    assert {record.partition for record in more} == set(range(6))
    assert len(seen) + len(more) == 56
    assert reader.gaps() == []


# --- topics and offsets ------------------------------------------------------------------------


def test_a_releases_topic_that_forgets_is_warned_of(
    settings: StreamSettings, caplog: pytest.LogCaptureFixture
) -> None:
    name = topic_name(settings, Topic.RELEASES)
    options = {"num_partitions": 1, "replication_factor": 1}
    with_admin(settings.bootstrap, lambda admin: admin.create_topics({name: options}))
    with caplog.at_level(logging.WARNING):
        ensure_topics(settings)
    assert "cleanup.policy=compact" in caplog.text


def test_a_transaction_marker_behind_the_last_event_is_no_lag(settings: StreamSettings) -> None:
    ensure_topics(settings)
    producer = KafkaProducer(
        bootstrap_servers=settings.bootstrap, transactional_id=f"{settings.topic_prefix}t"
    )
    producer.init_transactions()
    producer.begin_transaction()
    producer.send(topic_name(settings, Topic.FEEDBACK), b"v", partition=0).get(10)
    producer.commit_transaction()
    producer.close()
    reader = Reader(settings, BOTH)
    (record,) = take(reader, 1)

    def caught_up() -> bool:
        assert reader.poll(1, 0.2) == []
        return sum(reader.lag().values()) == 0

    wait_until(caught_up, 10)
    assert set(reader.lag_seconds().values()) == {0.0}
    later = Reader(settings, BOTH)  # the ledger knows only the record
    later.seek(positions_after([record]))
    assert later.poll(1, 0.5) == []
    assert sum(later.lag().values()) == 0
    assert later.gaps() == []
    for one in (reader, later):
        one.close()


def make_small(settings: StreamSettings, name: str, partitions: int, max_bytes: int) -> None:
    """Make a topic that takes only small records."""
    configs = {"max.message.bytes": str(max_bytes)}
    options = {"num_partitions": partitions, "replication_factor": 1, "configs": configs}
    with_admin(settings.bootstrap, lambda admin: admin.create_topics({name: options}))


def test_an_event_that_the_broker_finds_too_large_is_dropped_and_stops_nothing(
    settings: StreamSettings, start: Start
) -> None:
    make_small(settings, topic_name(settings, Topic.FEEDBACK), settings.partitions, 50_000)
    publisher = start(settings)
    queue(publisher, Topic.FEEDBACK, range(10))
    assert publisher.publish(Topic.FEEDBACK, "k", b"x" * 200_000)
    put(publisher, Topic.FEEDBACK, range(10, 20))
    assert publisher.stats.dropped == 1
    assert set(read_numbers(settings, Topic.FEEDBACK, 20)) == set(range(20))


def test_a_dead_letter_that_is_too_large_is_kept_in_part(settings: StreamSettings) -> None:
    name = dlq_name(settings, Topic.FEEDBACK)
    make_small(settings, name, 1, 600_000)
    letters = DeadLetters(settings)
    record = Record(Topic.FEEDBACK, "id", 0, 0, 1, b"k", b"y" * 1_000_000)
    letters.send(record, Reason.TOO_LARGE, "ingest")
    letters.close()
    (letter,) = read_raw(settings, name)
    assert dict(letter.headers)["moorline_truncated_from_bytes"] == b"1000000"  # type: ignore[attr-defined]
    assert letter.value == b"y" * 500_000  # type: ignore[attr-defined]


def test_real_retention_by_time_is_an_explicit_gap(settings: StreamSettings, start: Start) -> None:
    publisher = start(settings)
    put(publisher, Topic.FEEDBACK, range(50))
    reader = Reader(settings, BOTH)
    first = reader.poll(5, 10)
    reader.close()
    name = topic_name(settings, Topic.FEEDBACK)
    short = {"retention.ms": "1000", "segment.ms": "1000"}
    resource = ConfigResource(ConfigResourceType.TOPIC, name, configs=short)
    with_admin(settings.bootstrap, lambda admin: admin.alter_configs([resource]))
    partitions = [TopicPartition(name, number) for number in range(4)]

    def all_gone() -> bool:
        queue(publisher, Topic.FEEDBACK, range(1000, 1020))  # rolls the old segments
        publisher.flush(10)

        starts = with_admin(
            settings.bootstrap,
            lambda admin: admin.list_partition_offsets(
                dict.fromkeys(partitions, OffsetSpec.EARLIEST)
            ),
        )
        return all(starts[partition].offset > 10 for partition in partitions)

    wait_until(all_gone, 90)
    later = Reader(settings, BOTH)
    later.seek(positions_after(first))
    later.poll(10, 1)
    gaps = later.gaps()
    later.close()
    assert gaps
    assert {gap.cause for gap in gaps} == {GapCause.RETENTION}


# --- logins and permissions --------------------------------------------------------------------


@pytest.fixture
def secure(secure_apache_kafka: ApacheKafka, topic_prefix: str) -> StreamSettings:
    assert secure_apache_kafka.secure is not None
    return StreamSettings(
        bootstrap=secure_apache_kafka.secure["bootstrap"],
        topic_prefix=topic_prefix,
        security_protocol="SASL_SSL",
        sasl_mechanism="SCRAM-SHA-512",
        sasl_username="moor",
        sasl_password=SecretStr("right-password"),
        ssl_cafile=Path(secure_apache_kafka.secure["cafile"]),
        connect_timeout_seconds=20,
    )


def allow(broker: ApacheKafka, *granted: tuple[ResourceType, str, ACLOperation]) -> None:
    acls = [
        ACL(
            principal="User:moor",
            host="*",
            operation=operation,
            permission_type=ACLPermissionType.ALLOW,
            resource_pattern=ResourcePattern(kind, name),
        )
        for kind, name, operation in granted
    ]
    with_admin(broker.bootstrap, lambda admin: admin.create_acls(acls))


def allow_all(broker: ApacheKafka, settings: StreamSettings) -> None:
    names = [topic_name(settings, topic) for topic in Topic]
    names += [dlq_name(settings, topic) for topic in Topic]
    allow(broker, *((ResourceType.TOPIC, name, ACLOperation.ALL) for name in names))
    allow(
        broker, (ResourceType.GROUP, f"{settings.topic_prefix}moorline-updater", ACLOperation.ALL)
    )


def plain(broker: ApacheKafka, settings: StreamSettings) -> StreamSettings:
    """The same topics, as the administrator."""
    return StreamSettings(bootstrap=broker.bootstrap, topic_prefix=settings.topic_prefix)


def refusal(work: Callable[[], object], within_seconds: float = 5.0) -> str:
    """The message of the refusal, which must come well before the connection's time-out."""
    began = time.monotonic()
    with pytest.raises(StreamInvalid) as raised:
        work()
    assert time.monotonic() - began < within_seconds
    assert "right-password" not in str(raised.value)
    return str(raised.value)


def test_a_wrong_password_is_said_at_once(secure: StreamSettings, start: Start) -> None:
    wrong = secure.model_copy(update={"sasl_password": SecretStr("wrong-password")})
    reader = Reader(wrong, BOTH)
    for work in (lambda: ensure_topics(wrong), lambda: reader.poll(1, 0.1)):
        message = refusal(work)
        assert "refused the login of user 'moor'" in message
        assert "MOORLINE_STREAM__SASL_PASSWORD" in message
        assert "wrong-password" not in message
    publisher = start(wrong)
    assert publisher.publish(Topic.FEEDBACK, "k", b"v")
    wait_until(lambda: "refused the login" in publisher.stats.last_error, 5)
    assert not publisher.stats.connected


def test_a_certificate_that_nobody_vouches_for_is_said_at_once(secure: StreamSettings) -> None:
    message = refusal(lambda: ensure_topics(secure.model_copy(update={"ssl_cafile": None})))
    assert "CERTIFICATE_VERIFY_FAILED" in message
    assert "MOORLINE_STREAM__SSL_CAFILE" in message


def test_a_mechanism_that_the_broker_lacks_is_said_at_once(secure: StreamSettings) -> None:
    message = refusal(lambda: ensure_topics(secure.model_copy(update={"sasl_mechanism": "PLAIN"})))
    assert "does not offer PLAIN" in message


def test_plaintext_to_a_secure_port_says_which_setting_to_look_at(secure: StreamSettings) -> None:
    bare = StreamSettings(bootstrap=secure.bootstrap, connect_timeout_seconds=2)
    with pytest.raises(StreamUnavailable, match="MOORLINE_STREAM__SECURITY_PROTOCOL"):
        ensure_topics(bare)


def test_missing_permissions_are_said_and_work_when_they_are_granted(
    secure: StreamSettings, secure_apache_kafka: ApacheKafka, start: Start
) -> None:
    message = refusal(lambda: ensure_topics(secure))
    assert "'moor'" in message
    assert secure.topic_prefix in message
    assert "kafka-acls.sh" in message

    ensure_topics(plain(secure_apache_kafka, secure))
    reader, letters = Reader(secure, BOTH), DeadLetters(secure)
    record = Record(Topic.FEEDBACK, "id", 0, 0, 1, b"k", b"v")
    for work in (
        lambda: reader.poll(1, 0.5),
        lambda: letters.send(record, Reason.MALFORMED_JSON, "ingest"),
        lambda: publish_release(secure, release(1)),
    ):
        assert "kafka-acls.sh" in refusal(work)
    publisher = start(secure)
    queue(publisher, Topic.FEEDBACK, range(50))
    wait_until(lambda: "kafka-acls.sh" in publisher.stats.last_error)

    allow_all(secure_apache_kafka, secure)
    assert publisher.flush(90)
    records: list[Record] = []

    def read_on() -> bool:
        with contextlib.suppress(StreamInvalid):  # brokers learn of a permission a little later
            records.extend(reader.poll(100, 0.5))
        return len(records) >= 50

    wait_until(read_on)
    reader.commit(positions_after(records))
    reader.close()
    letters.send(record, Reason.MALFORMED_JSON, "ingest")
    letters.close()
    publish_release(secure, release(1))


def test_describe_without_write_is_said_and_works_when_write_is_granted(
    secure: StreamSettings, secure_apache_kafka: ApacheKafka, start: Start
) -> None:
    ensure_topics(plain(secure_apache_kafka, secure))
    names = [topic_name(secure, topic) for topic in Topic]
    names += [dlq_name(secure, topic) for topic in Topic]
    allow(
        secure_apache_kafka,
        *((ResourceType.TOPIC, name, ACLOperation.DESCRIBE) for name in names),
    )
    publisher = start(secure)
    queue(publisher, Topic.FEEDBACK, range(100))
    wait_until(lambda: "kafka-acls.sh" in publisher.stats.last_error)
    wait_until(lambda: publisher.stats.spooled == 100)
    allow_all(secure_apache_kafka, secure)
    assert publisher.flush(90)
    assert read_numbers(secure, Topic.FEEDBACK, 100) == list(range(100))
    assert publisher.stats.dropped == 0


def test_no_permission_on_the_group_costs_only_the_lag_tools(
    secure: StreamSettings, secure_apache_kafka: ApacheKafka, caplog: pytest.LogCaptureFixture
) -> None:
    ensure_topics(plain(secure_apache_kafka, secure))
    names = [topic_name(secure, topic) for topic in Topic]
    allow(secure_apache_kafka, *((ResourceType.TOPIC, name, ACLOperation.READ) for name in names))
    reader = Reader(secure, BOTH)

    def reads() -> bool:
        try:
            return reader.poll(1, 0.1) == []
        except StreamInvalid:
            return False

    wait_until(reads)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            reader.commit({(Topic.FEEDBACK, 0): ("id", 0)})
    reader.close()
    assert caplog.text.count("may not commit offsets") == 1
