"""Records that no careful producer sends: each is read or dead-lettered, so is the next."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from kafka import KafkaProducer

from moorline.events import Fate, Reason
from moorline.settings import StreamSettings
from moorline.stream import Topic, dlq_name, ensure_topics, topic_name
from moorline.stream.codecs import MAX_UNPACKED_BYTES
from moorline.stream.scan import Scanner
from tests.field.raw_batches import Raw, RawName, RawProducer, batch
from tests.field.streams import now_ms, running_intake
from tests.integration.streams import with_admin
from tests.kafka_fixtures import wait_until
from tests.updater.ledger.fixtures import interaction, rating

THUMB = rating("r", at=time.time()).to_bytes()
REPLY = interaction("r", at=time.time()).to_bytes()


@pytest.fixture
def settings(apache_kafka: str, topic_prefix: str) -> StreamSettings:
    """Topics of one partition, that take whatever Kafka can carry."""
    found = StreamSettings(bootstrap=apache_kafka, topic_prefix=topic_prefix, partitions=1)
    configs = {
        "max.message.bytes": str(20 * 2**20),
        "message.timestamp.after.max.ms": str(2**63 - 1),
        "retention.ms": "-1",  # a timestamp in seconds is of 1970
    }
    options = {"num_partitions": 1, "replication_factor": 1, "configs": configs}
    with_admin(apache_kafka, lambda admin: admin.create_topics({feedback(found): options}))
    ensure_topics(found)
    return found


@pytest.fixture
def producer(settings: StreamSettings) -> Iterator[RawProducer]:
    made = RawProducer(str(settings.bootstrap))
    yield made
    made.close()


def feedback(settings: StreamSettings) -> str:
    return topic_name(settings, Topic.FEEDBACK)


def send(producer: RawProducer, settings: StreamSettings, *records: Raw, **options: Any) -> int:
    return producer.send(feedback(settings), 0, batch(records, **options))


def letters_of(settings: StreamSettings) -> list[tuple[bytes | None, dict[str, bytes]]]:
    """(value, headers) of each dead letter of the feedback topic."""
    with Scanner(settings, "test") as scanner:
        found = scanner.read(dlq_name(settings, Topic.FEEDBACK), 0, 0)
        return [(raw.value, dict(raw.headers)) for batch in found for raw in batch]


def test_an_empty_value_with_a_null_header_is_dead_lettered(
    settings: StreamSettings, producer: RawProducer, tmp_path: Path
) -> None:
    send(producer, settings, Raw(None, b"k", [(b"trace", None)]), Raw(THUMB))
    with running_intake(settings, tmp_path / "ledger") as intake:
        intake.read_all()
        assert intake.reasons() == {Reason.EMPTY_VALUE: 1}
        assert intake.consumed() == 2
    ((value, headers),) = letters_of(settings)
    assert value is None
    assert headers["trace"] == b""


@pytest.mark.parametrize("codec", ["none", "gzip", "snappy", "lz4", "zstd"])
def test_every_codec_is_read(
    settings: StreamSettings, producer: RawProducer, tmp_path: Path, codec: str
) -> None:
    producer.send(topic_name(settings, Topic.INTERACTIONS), 0, batch([Raw(REPLY)], codec))
    send(producer, settings, Raw(THUMB), Raw(b"{" * 100_000), codec=codec)
    with running_intake(settings, tmp_path / "ledger") as intake:
        intake.read_all()
        assert intake.ledger.count_ready() == 1
        assert intake.reasons() == {Reason.MALFORMED_JSON: 1}


def test_a_topic_that_the_broker_compresses_is_read(
    apache_kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    settings = StreamSettings(bootstrap=apache_kafka, topic_prefix=topic_prefix, partitions=1)
    options = {
        "num_partitions": 1,
        "replication_factor": 1,
        "configs": {"compression.type": "zstd"},
    }
    name = topic_name(settings, Topic.FEEDBACK)
    with_admin(settings.bootstrap, lambda admin: admin.create_topics({name: options}))
    ensure_topics(settings)
    producer = RawProducer(str(settings.bootstrap))
    send(producer, settings, Raw(THUMB))
    producer.close()
    with running_intake(settings, tmp_path / "ledger") as intake:
        intake.read_all()
        assert intake.ledger.accounting().fates[Topic.FEEDBACK] == {Fate.PENDING: 1}


def test_a_batch_that_unpacks_to_gigabytes_is_one_dead_letter(
    settings: StreamSettings, producer: RawProducer, tmp_path: Path
) -> None:
    zeros = Raw(b"\0" * (MAX_UNPACKED_BYTES + 1))
    for codec in ("gzip", "lz4", "zstd"):
        send(producer, settings, zeros, codec=codec)
    send(producer, settings, Raw(THUMB))
    with running_intake(settings, tmp_path / "ledger") as intake:
        intake.read_all()
        assert intake.reasons() == {Reason.CORRUPT_RECORD: 3}
        assert intake.consumed() == 4


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_a_header_name_of_any_bytes_is_read(
    settings: StreamSettings, producer: RawProducer, tmp_path: Path, codec: str
) -> None:
    odd = [(b"\xe9tat", b"1"), (b"", b""), (b"\xed\xa0\x80", None), (b"a\0b", b"\xff")]
    send(producer, settings, Raw(THUMB, headers=odd), Raw(b"?", headers=odd), codec=codec)
    with running_intake(settings, tmp_path / "ledger") as intake:
        intake.read_all()
        assert intake.reasons() == {Reason.MALFORMED_JSON: 1}
        assert intake.ledger.accounting().fates[Topic.FEEDBACK][Fate.PENDING] == 1
    ((value, headers),) = letters_of(settings)
    assert value == b"?"
    assert headers["\\xe9tat"] == b"1"


def test_what_an_aborted_transaction_said_is_nobodys_word(
    settings: StreamSettings, tmp_path: Path
) -> None:
    producer = KafkaProducer(
        bootstrap_servers=settings.bootstrap, transactional_id=f"{settings.topic_prefix}t"
    )
    producer.init_transactions()
    with running_intake(settings, tmp_path / "ledger") as intake:
        for number in range(3):
            producer.begin_transaction()
            name = [(RawName(b"\xe9"), b"")]
            said = rating("r", rater=f"aborted-{number}").to_bytes()
            producer.send(feedback(settings), said, partition=0, headers=name).get(10)
            producer.abort_transaction()
            producer.begin_transaction()
            said = rating("r", rater=f"committed-{number}").to_bytes()
            producer.send(feedback(settings), said, partition=0).get(10)
            producer.commit_transaction()
        intake.read_all()
        assert intake.consumed() == 3
        assert intake.ledger.accounting().missed == {}
        # What nobody said at the end is passed too, so that its retention is no loss.
        producer.begin_transaction()
        producer.send(feedback(settings), THUMB, partition=0).get(10)
        producer.abort_transaction()
        intake.read_all()
        assert intake.consumed() == 3

        def passed() -> bool:
            intake.step()
            return intake.ledger.offsets()[Topic.FEEDBACK, 0][1] == 3 * 4 + 2

        wait_until(passed, 10)
    producer.close()


def test_an_open_transaction_is_waited_for_and_shows_as_lag(
    settings: StreamSettings, producer: RawProducer, tmp_path: Path
) -> None:
    open_one = KafkaProducer(
        bootstrap_servers=settings.bootstrap, transactional_id=f"{settings.topic_prefix}t"
    )
    open_one.init_transactions()
    open_one.begin_transaction()
    open_one.send(feedback(settings), rating("r").to_bytes(), partition=0).get(10)
    send(producer, settings, Raw(THUMB))
    with running_intake(settings, tmp_path / "ledger") as intake:
        for _ in range(3):
            assert intake.step().records == 0
        assert intake.reader.lag()[Topic.FEEDBACK, 0] == 2
        assert 0.0 < intake.reader.lag_seconds()[Topic.FEEDBACK, 0] < 600
        open_one.commit_transaction()
        intake.read_all()
        assert intake.consumed() == 2
    open_one.close()


@pytest.mark.parametrize(
    "timestamp",
    [-1, 0, 1, 2**62, now_ms() // 1000, now_ms(), now_ms() * 1000, now_ms() * 10**6],
    ids=["none", "zero", "one", "huge", "seconds", "milliseconds", "microseconds", "nanoseconds"],
)
def test_a_rating_counts_whatever_the_unit_of_its_timestamp(
    settings: StreamSettings, producer: RawProducer, tmp_path: Path, timestamp: int
) -> None:
    reply = interaction("r", at=now_ms() / 1000).to_bytes()
    replies = topic_name(settings, Topic.INTERACTIONS)
    producer.send(replies, 0, batch([Raw(reply, timestamp_ms=now_ms())]))
    said = b'{"interaction_id":"r","kind":"thumbs","value":1}'
    send(producer, settings, Raw(said, timestamp_ms=timestamp))
    with running_intake(settings, tmp_path / "ledger") as intake:
        intake.read_all()
        assert intake.ledger.count_ready() == 1


def test_a_record_of_ten_megabytes_and_a_giant_header_are_dead_lettered(
    settings: StreamSettings, producer: RawProducer, tmp_path: Path
) -> None:
    for record in (
        Raw(b"x" * 10_000_000),
        Raw(b"?", headers=[(b"h", b"y" * 10_000_000)]),
        Raw(b"?", headers=[(b"n" * 10_000_000, b"")]),
        Raw(None, b"k" * 10_000_000),
        Raw(THUMB),
    ):
        send(producer, settings, record)
    with running_intake(settings, tmp_path / "ledger") as intake:
        intake.read_all()
        reasons = {Reason.TOO_LARGE: 1, Reason.MALFORMED_JSON: 2, Reason.EMPTY_VALUE: 1}
        assert intake.reasons() == reasons
    sizes = [headers["moorline_truncated_from_bytes"] for _, headers in letters_of(settings)]
    assert sizes == [b"10000000", b"1", b"1", b"0"]


def test_keys_of_any_bytes_and_of_none_are_read(
    settings: StreamSettings, producer: RawProducer, tmp_path: Path
) -> None:
    for key in (None, b"", b"\xff\x00\xed\xa0\x80", os.urandom(2000)):
        send(producer, settings, Raw(THUMB, key), Raw(None, key), Raw(b"", key))
    with running_intake(settings, tmp_path / "ledger") as intake:
        intake.read_all()
        assert intake.consumed() == 12
        assert intake.reasons() == {Reason.EMPTY_VALUE: 8}


def test_a_random_body_never_stops_the_intake(
    settings: StreamSettings, producer: RawProducer, tmp_path: Path
) -> None:
    """Whether a broker takes it or not."""
    taken = 0
    for seed in range(50):
        body = struct.pack(">Q", seed * 2654435761) * 3
        try:
            send(producer, settings, Raw(body=body))
            taken += 1
        except Exception:
            continue
    send(producer, settings, Raw(THUMB))
    with running_intake(settings, tmp_path / "ledger") as intake:
        intake.read_all()
        assert intake.consumed() == taken + 1
