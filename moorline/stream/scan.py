"""Records read again by range: for the audit, for redriving, for the age of what is unread.

It uses a consumer of its own that commits no offsets and joins no group.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from kafka import TopicPartition
from kafka import errors as kafka_errors

from moorline.settings import StreamSettings
from moorline.stream.batches import RawRecord
from moorline.stream.client import StreamUnavailable, explained
from moorline.stream.consumer import connect_consumer

logger = logging.getLogger("moorline.stream")

_POLL_MS = 500
_POLL_RECORDS = 1000


class RangeGone(StreamUnavailable):
    """Retention deleted a part of the range while it was read: read again from the beginning."""


class Scanner:
    """Reads ranges of partitions. One thread.

    Raises:
        StreamUnavailable: no broker answered.
        StreamInvalid: a login or permission is wrong.
    """

    def __init__(self, settings: StreamSettings, purpose: str, **options: Any) -> None:
        """Connect.

        Args:
            options: of the consumer, the library's names.
        """
        self._settings = settings
        self._connection = connect_consumer(settings, purpose, **options)

    def __enter__(self) -> Scanner:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect. Idempotent."""
        try:
            self._connection.client.close(autocommit=False)
        except (kafka_errors.KafkaError, OSError, RuntimeError) as error:
            logger.debug(
                "a Kafka client did not close cleanly; it is dropped all the same",
                extra={"event": "kafka_close_failed", "error": type(error).__name__},
            )

    def beginning(self, name: str, partition: int) -> int:
        """The first offset of a partition that retention has left."""
        place = TopicPartition(name, partition)
        with explained(self._settings, self._connection):
            found = self._connection.client.beginning_offsets([place], timeout_ms=self._patience_ms)
        return int(found[place])

    def end(self, name: str, partition: int) -> int:
        """The offset after the last record; the embedded broker may say too little."""
        place = TopicPartition(name, partition)
        with explained(self._settings, self._connection):
            listed = self._connection.client.end_offsets([place], timeout_ms=self._patience_ms)
            assigned = place in self._connection.client.assignment()
            high = self._connection.client.highwater(place) if assigned else None
        return max(int(listed[place]), high or 0)

    def read(
        self, name: str, partition: int, start: int, stop: int | None = None
    ) -> Iterator[list[RawRecord]]:
        """The records with offsets in [start, stop), in order, some at a time.

        Args:
            stop: None: up to the end, as it is when it is reached.

        Raises:
            RangeGone: retention has removed ``start``, or what comes next.
            StreamUnavailable: nothing came in ``connect_timeout_seconds``, though there is more.
        """
        client, place = self._connection.client, TopicPartition(name, partition)
        with explained(self._settings, self._connection):
            client.assign([place])
            client.seek(place, start)
        following = start
        deadline = time.monotonic() + self._patience_ms / 1000
        while stop is None or following < stop:
            records, position, high = self._poll(place)
            if records:
                following = records[-1].offset + 1
                yield [raw for raw in records if stop is None or raw.offset < stop]
                deadline = time.monotonic() + self._patience_ms / 1000  # the caller was slow
                continue
            following = max(following, position)
            if high is not None and following >= high:
                return
            if time.monotonic() > deadline:
                raise StreamUnavailable(
                    f"topic {name} partition {partition} gave nothing after offset {following} "
                    f"for {self._patience_ms / 1000:.0f} s: try again when the broker is well"
                )

    @property
    def _patience_ms(self) -> int:
        return int(max(self._settings.connect_timeout_seconds, 1.0) * 1000)

    def _poll(self, place: TopicPartition) -> tuple[list[RawRecord], int, int | None]:
        """Records; the next offset, moved over transaction markers; the end, where it is known."""
        client = self._connection.client
        with explained(self._settings, self._connection):
            try:
                batches = client.poll(timeout_ms=_POLL_MS, max_records=_POLL_RECORDS)
            except (kafka_errors.OffsetOutOfRangeError, kafka_errors.NoOffsetForPartitionError):
                raise RangeGone(
                    f"topic {place.topic} partition {place.partition}: the offsets asked for are "
                    "not on the broker (any more)"
                ) from None
            return batches.get(place, []), client.position(place) or 0, client.highwater(place)
