"""What the reader gives: records and gaps."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

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


def record_from(topic: Topic, topic_id: str, raw: Any) -> Record:
    """A record of ours from one of the library's."""
    return Record(
        topic=topic,
        topic_id=topic_id,
        partition=raw.partition,
        offset=raw.offset,
        timestamp_ms=raw.timestamp,
        key=raw.key,
        value=raw.value,
        headers=tuple(raw.headers or ()),
    )
