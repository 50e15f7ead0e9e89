"""What the reader gives: records and gaps."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from moorline.stream.batches import RawRecord
from moorline.stream.topics import Headers, Topic


@dataclass(frozen=True)
class Record:
    """One record as it came from the broker."""

    topic: Topic
    topic_id: str
    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    corrupt: str = ""
    """What is wrong with it, if it cannot be decoded; its value is what there was instead."""

    @property
    def stamped_at(self) -> float | None:
        """As ``stamped_seconds``."""
        return stamped_seconds(self.timestamp_ms)


class GapCause(StrEnum):
    RETENTION = "retention"
    """The broker had deleted the records before they were read."""
    TOPIC_RECREATED = "topic_recreated"
    """The topic was deleted and made again (and the operator accepted it)."""


@dataclass(frozen=True)
class Gap:
    """Offsets that nobody can read any more."""

    topic: Topic
    partition: int
    expected_offset: int
    resumed_offset: int
    cause: GapCause


def stamped_seconds(timestamp: int) -> float | None:
    """What a record's timestamp says, Unix seconds; None where it says nothing.

    Kafka's are milliseconds, but producers write seconds, microseconds and nanoseconds too: it is
    in the unit that puts it between the years 2001 and 2286.
    """
    for units_per_second in (10**3, 1, 10**6, 10**9):
        seconds = timestamp / units_per_second
        if 10**9 <= seconds < 10**10:
            return seconds
    return None


def record_from(topic: Topic, topic_id: str, raw: RawRecord) -> Record:
    """A record of ours from the broker's."""
    return Record(
        topic=topic,
        topic_id=topic_id,
        partition=raw.partition,
        offset=raw.offset,
        timestamp_ms=raw.timestamp,
        key=raw.key,
        value=raw.value,
        headers=raw.headers,
        corrupt=raw.corrupt,
    )
