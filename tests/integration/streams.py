"""What the tests of the stream share: writing, reading, administering, a release to publish."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition

from moorline.events import Release, ReleaseKind
from moorline.settings import StreamSettings
from moorline.stream import Publisher, Reader, Record, Topic, ensure_topics, topic_name
from moorline.stream.scan import Scanner
from tests.kafka_fixtures import wait_until

BOTH = (Topic.INTERACTIONS, Topic.FEEDBACK)
Start = Callable[..., Publisher]


def put(publisher: Publisher, topic: Topic, numbers: range) -> None:
    """Publish the numbers and wait until the broker has acknowledged them."""
    queue(publisher, topic, numbers)
    assert publisher.flush(90)


def queue(publisher: Publisher, topic: Topic, numbers: range) -> None:
    """Publish the numbers, whether a broker is there or not."""
    for number in numbers:
        assert publisher.publish(topic, f"k{number}", b"%d" % number)


def take(reader: Reader, count: int) -> list[Record]:
    """Poll until so many records were read."""
    records: list[Record] = []
    wait_until(lambda: len(records.__iadd__(reader.poll(500, 0.3))) >= count)
    return records


def positions_after(records: list[Record]) -> dict[tuple[Topic, int], tuple[str, int]]:
    """Where a ledger that has stored these records would go on."""
    return {(r.topic, r.partition): (r.topic_id, r.offset + 1) for r in records}


def read_numbers(settings: StreamSettings, topic: Topic, count: int) -> list[int]:
    """Every number on a topic, sorted; inside a partition they must be in order already.

    It is read with the patience that is default, whatever the one who wrote them has: a broker that
    was stopped a moment ago takes its time.
    """
    patience = StreamSettings().connect_timeout_seconds
    reader = Reader(settings.model_copy(update={"connect_timeout_seconds": patience}), [topic])
    try:
        records = take(reader, count) + reader.poll(100, 0.5)
    finally:
        reader.close()
    for partition in {record.partition for record in records}:
        numbers = [int(r.value or b"") for r in records if r.partition == partition]
        assert numbers == sorted(numbers)
    return sorted(int(record.value or b"") for record in records)


def read_raw(settings: StreamSettings, name: str) -> list[Any]:
    """The records of a topic's first partition, as the library gives them."""
    consumer = KafkaConsumer(bootstrap_servers=settings.bootstrap, enable_auto_commit=False)
    partition = TopicPartition(name, 0)
    consumer.assign([partition])
    consumer.seek_to_beginning(partition)
    found: list[Any] = []
    wait_until(lambda: bool(found.__iadd__(consumer.poll(500).get(partition, []))))
    consumer.close()
    return found


def announced(settings: StreamSettings) -> list[Release]:
    """Every release on the releases topic, in order."""
    name = topic_name(settings, Topic.RELEASES)
    with Scanner(settings, "test") as scanner:
        portions = list(scanner.read(name, 0, scanner.beginning(name, 0)))
    return [Release.model_validate_json(raw.value) for records in portions for raw in records]


def with_admin(bootstrap: str | None, work: Callable[[KafkaAdminClient], Any]) -> Any:
    """What ``work`` returns, given an admin client."""
    admin = KafkaAdminClient(bootstrap_servers=bootstrap)
    try:
        return work(admin)
    finally:
        admin.close()


def remake(settings: StreamSettings, topic: Topic) -> None:
    """Delete the topic and make it again: the same name, another id."""
    name = topic_name(settings, topic)
    with_admin(settings.bootstrap, lambda admin: admin.delete_topics([name]))
    wait_until(lambda: ensure_topics(settings))


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
