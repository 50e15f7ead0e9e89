"""Record batches made byte by byte, and sent: what no client library would send."""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kafka import KafkaAdminClient
from kafka import codec as codecs
from kafka import errors as kafka_errors
from kafka.protocol.producer import ProduceRequest
from kafka.record.util import calc_crc32c, encode_varint

CODECS = {"none": 0, "gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}
TRANSACTIONAL = 0x10
Header = tuple[bytes, bytes | None]
_Topic = ProduceRequest.TopicProduceData
_Partition = _Topic.PartitionProduceData


@dataclass(frozen=True)
class Raw:
    """One record, with nothing left out that Kafka's format can say."""

    value: bytes | None = None
    key: bytes | None = None
    headers: Sequence[Header] = ()
    timestamp_ms: int = -1
    body: bytes | None = None
    """In place of all that: the record's bytes behind its length."""


def varint(number: int) -> bytes:
    out = bytearray()
    encode_varint(number, out.append)
    return bytes(out)


def _nullable(value: bytes | None) -> bytes:
    return varint(-1) if value is None else varint(len(value)) + value


def _body(record: Raw, index: int, first_timestamp_ms: int) -> bytes:
    if record.body is not None:
        return record.body
    return b"".join(
        [
            b"\0",
            varint(record.timestamp_ms - first_timestamp_ms),
            varint(index),
            _nullable(record.key),
            _nullable(record.value),
            varint(len(record.headers)),
            *(_nullable(name) + _nullable(value) for name, value in record.headers),
        ]
    )


def batch(
    records: Sequence[Raw],
    codec: str = "none",
    *,
    producer: tuple[int, int, int] = (-1, -1, -1),
    transactional: bool = False,
    magic: int = 2,
    crc_error: int = 0,
    base_offset: int = 0,
) -> bytes:
    """A batch of format 2.

    Args:
        producer: id, epoch and first sequence number.
        crc_error: is added to the checksum.
    """
    first = records[0].timestamp_ms if records else -1
    bodies = [_body(record, index, first) for index, record in enumerate(records)]
    content = b"".join(varint(len(body)) + body for body in bodies)
    if codec != "none":
        content = getattr(codecs, f"{codec}_encode")(content)
    attributes = CODECS[codec] | (TRANSACTIONAL if transactional else 0)
    latest = max((record.timestamp_ms for record in records), default=-1)
    counted = struct.pack(
        ">hiqqqhii", attributes, len(records) - 1, first, latest, *producer, len(records)
    )
    checked = counted + content
    crc = (calc_crc32c(checked) + crc_error) & 0xFFFFFFFF
    tail = struct.pack(">ibI", -1, magic, crc) + checked
    return struct.pack(">qi", base_offset, len(tail)) + tail


class RawProducer:
    """Sends batches as they are, each to one partition, and waits for the broker's answer."""

    def __init__(self, bootstrap: str) -> None:
        self._admin = KafkaAdminClient(bootstrap_servers=bootstrap)
        self._leaders: dict[tuple[str, int], int] = {}

    def close(self) -> None:
        self._admin.close()

    def send(self, topic: str, partition: int, data: bytes) -> int:
        """The offset of its first record.

        Raises:
            KafkaError: the broker did not take it.
        """
        part = _Partition(index=partition, records=data)
        request = ProduceRequest(
            transactional_id=None,
            acks=-1,
            timeout_ms=30_000,
            topic_data=[_Topic(name=topic, partition_data=[part])],
            min_version=3,
            max_version=9,
        )
        answer = self._answer(request, topic, partition)
        while answer.error_code == kafka_errors.NotLeaderForPartitionError.errno:
            time.sleep(0.05)  # the topic is being made
            answer = self._answer(request, topic, partition)
        error = kafka_errors.for_code(answer.error_code)
        if error is not kafka_errors.NoError:
            raise error(answer.error_message)
        return int(answer.base_offset)

    def _answer(self, request: ProduceRequest, topic: str, partition: int) -> Any:
        leader = self._leader(topic, partition)

        async def send() -> Any:
            return await self._admin._manager.send(request, node_id=leader)

        (answered,) = self._admin._manager.run(send).responses
        (answer,) = answered.partition_responses
        return answer

    def _leader(self, topic: str, partition: int) -> int:
        if (topic, partition) not in self._leaders:
            (described,) = self._admin.describe_topics([topic])
            for one in described["partitions"]:
                self._leaders[topic, one["partition_index"]] = one["leader_id"]
        return self._leaders[topic, partition]


class RawName(str):
    """The name of a header, of any bytes, that the library's own producer sends as it is."""

    def __new__(cls, raw: bytes) -> RawName:
        name = super().__new__(cls, raw.decode(errors="backslashreplace"))
        name.raw = raw
        return name

    raw: bytes

    def encode(self, *_: Any) -> bytes:
        return self.raw
