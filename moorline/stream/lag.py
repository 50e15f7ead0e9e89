"""How far a reader is behind: events not yet read, and the age of the oldest of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka import errors as kafka_errors
from kafka.admin import OffsetSpec

from moorline import metrics
from moorline.settings import StreamSettings
from moorline.stream.client import StreamUnavailable
from moorline.stream.records import stamped_seconds
from moorline.stream.scan import Scanner
from moorline.stream.topics import Topic, topic_name

Key = tuple[Topic, int]

_PEEK_BYTES = 1
"""A broker sends the first batch whole, however little is asked for, and no more."""


def end_offsets(
    settings: StreamSettings,
    admin: KafkaAdminClient,
    consumer: KafkaConsumer,
    keys: Sequence[Key],
) -> dict[Key, int]:
    """The offset after the last record of each partition, as far as it can be known.

    The larger of what the broker lists and what the last fetch said: the embedded broker lists too
    little, and a fetch may be long ago.
    """
    partitions = {key: TopicPartition(topic_name(settings, key[0]), key[1]) for key in keys}
    ends: dict[Key, int] = {}
    if not partitions:
        return ends
    try:
        listed = admin.list_partition_offsets(
            dict.fromkeys(partitions.values(), OffsetSpec.LATEST), timeout_ms=1000
        )
    except (kafka_errors.KafkaError, OSError, RuntimeError):
        listed = {}
    for key, partition in partitions.items():
        try:
            high = consumer.highwater(partition)
        except kafka_errors.KafkaError:  # not assigned any more
            high = None
        known = [high] if high is not None else []
        known += [listed[partition].offset] if partition in listed else []
        if known:
            ends[key] = max(known)
    return ends


class Lag:
    """What is unread. May be asked from any thread; one at a time looks into the topics."""

    def __init__(self, settings: StreamSettings, topics: Sequence[Topic]) -> None:
        self._settings = settings
        self._topics = tuple(topics)
        self._ends: dict[Key, int] = {}
        self._oldest: dict[Key, tuple[int, float]] = {}
        """The offset that was unread, and when its record was made, Unix seconds."""
        self._scanner: Scanner | None = None
        self._lock = threading.Lock()

    def events(self, following: Mapping[Key, int], ends: Mapping[Key, int]) -> dict[Key, int]:
        """Events in each partition from ``following`` on.

        Args:
            following: the next offset that will be given to the reader's user.
            ends: as known now; what was last known stays, when the broker is away.
        """
        with self._lock:
            self._ends |= ends
            lags = {key: max(0, self._ends.get(key, 0) - at) for key, at in following.items()}
        for topic in self._topics:
            total = sum(events for key, events in lags.items() if key[0] is topic)
            metrics.LAG_EVENTS.labels(topic.value).set(total)
        return lags

    def seconds(self, following: Mapping[Key, int], lags: Mapping[Key, int]) -> dict[Key, float]:
        """The age of the oldest unread event of each partition; 0 where there is none.

        Looks at that record, so it knows the age also of what came while nobody read. A partition
        that cannot be looked into now keeps its last known record; one that never could is left
        out.
        """
        now = time.time()
        ages: dict[Key, float] = {}
        with self._lock:
            for key, offset in following.items():
                if lags.get(key, 0) == 0:
                    self._oldest.pop(key, None)
                    ages[key] = 0.0
                    continue
                known = self._oldest.get(key)
                if known is None or known[0] != offset:
                    known = self._peek_timestamp(key, offset) or known
                if known is not None:
                    self._oldest[key] = known
                    ages[key] = max(0.0, now - known[1])
        for topic in self._topics:
            worst = max((age for key, age in ages.items() if key[0] is topic), default=None)
            if worst is not None:
                metrics.LAG_SECONDS.labels(topic.value).set(worst)
        return ages

    def close(self) -> None:
        """Disconnect. Idempotent."""
        with self._lock:
            self._disconnect()

    def _peek_timestamp(self, key: Key, offset: int) -> tuple[int, float] | None:
        """(offset, timestamp) of the first record from there on, if it can be read."""
        topic, partition = key
        try:
            if self._scanner is None:
                self._scanner = Scanner(
                    self._settings,
                    "lag",
                    fetch_max_bytes=_PEEK_BYTES,
                    max_partition_fetch_bytes=_PEEK_BYTES,
                    # What an open transaction holds back is old from the moment it was written.
                    isolation_level="read_uncommitted",
                )
            name = topic_name(self._settings, topic)
            for records in self._scanner.read(name, partition, offset):
                stamped = stamped_seconds(records[0].timestamp) if records else None
                return None if stamped is None else (offset, stamped)
        except (StreamUnavailable, RuntimeError):
            self._disconnect()
        return None

    def _disconnect(self) -> None:
        scanner, self._scanner = self._scanner, None
        if scanner is not None:
            scanner.close()
