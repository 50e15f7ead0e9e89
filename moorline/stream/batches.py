"""Record batches as they come from a broker, read so that no record can end the reading.

The library stops at the first record that it cannot decode, and at the same one whenever it tries
again. Here the name of a header may be of any bytes; and what breaks Kafka's format is given as
the bytes that it is, with what is wrong with it, and what follows is read.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

from kafka.consumer.fetcher import Fetcher, IsolationLevel
from kafka.errors import CorruptRecordError
from kafka.record.default_records import DefaultRecordBatch
from kafka.record.legacy_records import LegacyRecordBatch
from kafka.record.util import decode_varint

from moorline.stream.client import StreamUnavailable
from moorline.stream.codecs import unpack
from moorline.stream.topics import Headers

_PREFIX = struct.Struct(">qi")
"""Base offset, and the length of what follows."""
_MAGIC_AT = 16
_HEADER_BYTES = DefaultRecordBatch.HEADER_STRUCT.size


class RawRecord(NamedTuple):
    """One record as the broker gave it."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    """As its producer or the broker set it: milliseconds, if they keep to Kafka's rules."""
    key: bytes | None
    value: bytes | None
    """The bytes of a record that cannot be read, or all bytes of its batch."""
    headers: Headers
    """A null value is an empty one here; a name that is not UTF-8 has its bytes as ``\\xe9``."""
    corrupt: str = ""
    """What is wrong with one that cannot be read."""


class PartitionRecords(Fetcher.PartitionRecords):  # type: ignore[misc]
    """What one fetch brought of one partition, in place of the library's own reading of it."""

    def _unpack_records(self, tp: Any, records: Any, *_: Any) -> Iterator[RawRecord]:
        batches = list(_split(records._buffer))
        for index, (base, data) in enumerate(batches):
            offset = base
            self.bytes_read += len(data)
            try:
                batch = _open(data)
                if not self._is_hidden(batch):
                    for record in _read(tp, batch):
                        offset = record.offset + 1
                        self.records_read += 1
                        self.next_fetch_offset = offset
                        yield record
                self.next_fetch_offset = max(offset, getattr(batch, "next_offset", offset))
            except (StreamUnavailable, MemoryError):
                raise
            except Exception as error:  # a decoder may fail in any way
                following = batches[index + 1][0] if index + 1 < len(batches) else None
                end = following or _stated_end(data) or max(offset, self.fetch_offset) + 1
                self.next_fetch_offset = max(end, offset + 1)
                detail = f"{type(error).__name__}: {error}"[:200]
                yield RawRecord(tp.topic, tp.partition, offset, -1, None, bytes(data), (), detail)
        self.drain()

    def _is_hidden(self, batch: Any) -> bool:
        """Whether it is a transaction's marker, or of a transaction that was aborted."""
        if batch.magic < 2:
            return False
        if self.isolation_level == IsolationLevel.READ_COMMITTED and batch.has_producer_id():
            self._consume_aborted_transactions_up_to(batch.last_offset)
            if self._contains_abort_marker(batch):
                self.aborted_producer_ids.discard(batch.producer_id)
            elif self._is_batch_aborted(batch):
                return True
        return bool(batch.is_control_batch)


def _split(data: Any) -> Iterator[tuple[int, memoryview]]:
    """(base offset, bytes) of each whole batch; a fetch may cut the last one."""
    view, at = memoryview(data), 0
    while at + _PREFIX.size <= len(view):
        base, length = _PREFIX.unpack_from(view, at)
        if length < 0:
            raise CorruptRecordError(f"a record batch of {length} bytes at offset {base}")
        end = at + _PREFIX.size + length
        if end > len(view):
            return
        yield base, view[at:end]
        at = end


def _open(data: memoryview) -> Any:
    """The library's view of a batch whose checksum is right."""
    magic = struct.unpack_from(">b", data, _MAGIC_AT)[0]
    if not 0 <= magic <= 2:
        raise CorruptRecordError(f"unknown record format {magic}")
    batch = DefaultRecordBatch(data) if magic == 2 else LegacyRecordBatch(data, magic)
    if not batch.validate_crc():
        raise CorruptRecordError("wrong checksum")
    return batch


def _stated_end(data: memoryview) -> int | None:
    """The offset behind a batch that cannot be read, where its header agrees with itself."""
    if len(data) < _HEADER_BYTES or data[_MAGIC_AT] != 2:
        return None
    batch = DefaultRecordBatch(data[:_HEADER_BYTES])
    agrees = 0 <= batch.last_offset_delta == batch.records_count - 1
    return int(batch.next_offset) if agrees else None


def _read(tp: Any, batch: Any) -> Iterator[RawRecord]:
    """The records of a batch, each behind the one before it.

    Raises:
        Exception: what follows in the batch cannot be told apart.
    """
    if batch.magic < 2:
        for old in batch:
            time = -1 if old.timestamp is None else old.timestamp
            yield RawRecord(tp.topic, tp.partition, old.offset, time, old.key, old.value, ())
        return
    data = unpack(batch.compression_type, bytes(batch._buffer[_HEADER_BYTES:]))
    at, expected = 0, batch.base_offset
    for _ in range(batch.records_count):
        if expected > batch.last_offset:  # the broker has counted fewer: these have no offset
            return
        length, begin = decode_varint(data, at)
        at = begin + length
        if length < 0 or at > len(data):
            raise CorruptRecordError("a record is longer than its batch")
        body = data[begin:at]
        try:
            record = _decode(tp, batch, body)
            if not expected <= record.offset <= batch.last_offset:
                raise CorruptRecordError("its offset is not between its neighbours'")
        except (ValueError, IndexError, CorruptRecordError) as error:
            record = RawRecord(
                tp.topic, tp.partition, expected, -1, None, body, (), f"broken record: {error}"
            )
        expected = record.offset + 1
        yield record


def _decode(tp: Any, batch: Any, body: bytes) -> RawRecord:
    """One record of format 2, behind its length.

    Raises:
        ValueError, IndexError, CorruptRecordError: it is not one.
    """
    later, at = decode_varint(body, 1)  # behind the attributes, of which none is in use
    offset_delta, at = decode_varint(body, at)
    key, at = _nullable(body, at)
    value, at = _nullable(body, at)
    count, at = decode_varint(body, at)
    headers = []
    for _ in range(count):
        name, at = _nullable(body, at)
        content, at = _nullable(body, at)
        headers.append(((name or b"").decode(errors="backslashreplace"), content or b""))
    if at != len(body):
        raise CorruptRecordError(f"{len(body) - at} bytes behind its last header")
    by_broker = batch.timestamp_type == DefaultRecordBatch.LOG_APPEND_TIME
    return RawRecord(
        tp.topic,
        tp.partition,
        batch.base_offset + offset_delta,
        batch.max_timestamp if by_broker else batch.first_timestamp + later,
        key,
        value,
        tuple(headers),
    )


def _nullable(body: bytes, at: int) -> tuple[bytes | None, int]:
    """Bytes behind their length, and where they end; a negative length is null."""
    length, at = decode_varint(body, at)
    if length < 0:
        return None, at
    if at + length > len(body):
        raise CorruptRecordError("a field is longer than its record")
    return body[at : at + length], at + length
