"""The dead-letter topics: unreadable records with their original bytes, origin and reason."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace

from kafka import KafkaProducer
from kafka import errors as kafka_errors

from moorline.events import Reason
from moorline.failpoints import failpoint
from moorline.settings import StreamSettings
from moorline.stream.client import (
    Connection,
    StreamInvalid,
    close_producer,
    connect,
    explained,
)
from moorline.stream.records import Record
from moorline.stream.topics import (
    DEAD_LETTER_MAX_BYTES,
    Headers,
    dlq_name,
    ensure_topics,
    software_version,
    topic_name,
)

logger = logging.getLogger("moorline.stream")

KEPT_BYTES = 500_000
"""Bytes kept of an original that the dead-letter topic refuses for its size."""
KEPT_KEY_BYTES = 1_000
"""Bytes kept of its key."""
_ACKNOWLEDGE_SECONDS = 10.0


class DeadLetters:
    """Writes to ``<topic>.dlq`` and waits until it is acknowledged.

    Only then may the reader's offset move on: nothing is skipped in silence. A time-out is not a
    proof of loss, so a letter may be there twice.
    """

    def __init__(self, settings: StreamSettings) -> None:
        self._settings = settings
        self._connection: Connection[KafkaProducer] | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Connect, and make the topics if they are missing. ``send`` does it too.

        Raises:
            StreamUnavailable: no broker answered.
            StreamInvalid: a login or permission is wrong.
        """
        with self._lock:
            self._connected()

    def send(self, record: Record, reason: Reason, stage: str, error: str = "") -> None:
        """Put ``record`` on its topic's dead-letter topic.

        Args:
            stage: the module that gave up on it, as ``ingest``.
            error: what it raised, where the reason does not say it all.

        Raises:
            StreamUnavailable: it was not acknowledged; do not move on, try again.
            StreamInvalid: a login or permission is wrong; likewise.
        """
        about = origin_headers(self._settings, record, reason, stage)
        if error:
            about += (("moorline_error", error.encode(errors="replace")),)
        with self._lock:
            try:
                self._send(record, record.headers + about)
            except _TooLargeError:
                self._send_in_part(record, about)
        logger.warning(
            "event sent to its dead-letter topic: it cannot be used (`moorline redrive` lists it)",
            extra={
                "event": "event_dead_lettered",
                "topic": record.topic.value,
                "partition": record.partition,
                "offset": record.offset,
                "reason": reason.value,
                "phase": stage,
            },
        )

    def close(self) -> None:
        """Disconnect. Idempotent."""
        with self._lock:
            self._disconnect()

    def _send_in_part(self, record: Record, about: Headers) -> None:
        """The beginning of what the topic does not take whole, and none of its own headers.

        Raises: StreamInvalid, StreamUnavailable.
        """
        size = len(record.value or b"")
        part = replace(
            record,
            key=None if record.key is None else record.key[:KEPT_KEY_BYTES],
            value=None if record.value is None else record.value[:KEPT_BYTES],
        )
        name = dlq_name(self._settings, record.topic)
        try:
            self._send(part, (*about, ("moorline_truncated_from_bytes", str(size).encode())))
        except _TooLargeError as error:
            raise StreamInvalid(
                f"topic {name} takes no event of {KEPT_BYTES} bytes: run `kafka-configs.sh --alter "
                f"--entity-type topics --entity-name {name} --add-config "
                f"max.message.bytes={DEAD_LETTER_MAX_BYTES}`"
            ) from error

    def _send(self, record: Record, headers: Headers) -> None:
        """Raises: _TooLargeError, StreamUnavailable."""
        connection = self._connected()
        nothing = record.value is None and record.key is None
        failpoint("dead_letters.before_send")
        try:
            with explained(self._settings, connection):
                try:
                    connection.client.send(
                        dlq_name(self._settings, record.topic),
                        # Kafka takes no record that has neither.
                        value=b"" if nothing else record.value,
                        key=record.key,
                        headers=list(headers),
                    ).get(timeout=_ACKNOWLEDGE_SECONDS)
                except (
                    kafka_errors.MessageSizeTooLargeError,
                    kafka_errors.RecordListTooLargeError,
                ) as error:
                    raise _TooLargeError from error
        except BaseException:
            # A producer that was refused once stays broken, also when the cause is gone.
            self._disconnect()
            raise
        failpoint("dead_letters.after_acknowledgement")

    def _connected(self) -> Connection[KafkaProducer]:
        if self._connection is None:
            ensure_topics(self._settings)
            self._connection = connect(
                KafkaProducer,
                self._settings,
                "dead-letters",
                acks="all",
                max_block_ms=int(self._settings.connect_timeout_seconds * 1000),
                max_request_size=DEAD_LETTER_MAX_BYTES,
                allow_auto_create_topics=False,
            )
        return self._connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            close_producer(connection.client)


class _TooLargeError(Exception):
    """The dead-letter topic does not take a record of this size."""


def origin_headers(settings: StreamSettings, record: Record, reason: Reason, stage: str) -> Headers:
    """Where a dead letter came from, and why it is one; `redrive` reads them."""
    return (
        ("moorline_origin_topic", topic_name(settings, record.topic).encode()),
        ("moorline_origin_topic_id", record.topic_id.encode()),
        ("moorline_origin_partition", str(record.partition).encode()),
        ("moorline_origin_offset", str(record.offset).encode()),
        ("moorline_origin_timestamp_ms", str(record.timestamp_ms).encode()),
        ("moorline_reason", reason.value.encode()),
        ("moorline_stage", stage.encode()),
        ("moorline_version", software_version().encode()),
    )
