"""The publisher's Kafka producer: connected and checked on background threads, which may block."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from kafka import KafkaProducer

from moorline.settings import StreamSettings
from moorline.stream.client import (
    Connection,
    StreamInvalid,
    StreamUnavailable,
    admin_session,
    close_producer,
    connect,
    explain,
)
from moorline.stream.library_log import REPEATED_SECONDS
from moorline.stream.topics import Topic, describe, ensure_topics

logger = logging.getLogger("moorline.stream")

PROBE_SECONDS = 5.0
"""After so long without an acknowledgement the topics are checked: a broker that lost its data
answers, but would never take these events."""
REBUILD_SECONDS = 15.0
"""A broker that answers and still acknowledges nothing for so long gets a new client."""
RETRY_SECONDS = (0.5, 5.0)
"""First and longest wait between attempts to connect."""
HEADERS_ROOM_BYTES = 8_192


@dataclass
class Link:
    """Owns the producer. ``maintain`` is called often, by one thread, and never blocks."""

    settings: StreamSettings
    wake: threading.Event
    buffered_events: Callable[[], int]
    """How many events wait, for the log."""
    last_error: str = ""
    _logged: str = ""
    _log_again_at: float = 0.0
    _connection: Connection[KafkaProducer] | None = None
    _background: threading.Thread | None = None
    _retry_at: float = 0.0
    _retry_seconds: float = RETRY_SECONDS[0]
    _probed_at: float = 0.0
    _answering_since: float | None = None
    """When the broker began to answer, while our events still wait."""
    _broken: BaseException | None = None
    _closed: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def connected(self) -> bool:
        connection = self._connection
        return connection is not None and connection.alive

    @property
    def producer(self) -> KafkaProducer | None:
        connection = self._connection
        return connection.client if connection is not None else None

    def maintain(self, silence_seconds: float) -> BaseException | None:
        """Connect, or check the topics, when it is time.

        Returns:
            What is wrong with the producer, where it must be discarded; else None.
        """
        broken, self._broken = self._broken, None
        if broken is not None:
            return broken
        if self._background is not None and self._background.is_alive():
            return None
        now = time.monotonic()
        if silence_seconds <= PROBE_SECONDS:
            self._answering_since = None
            if self.last_error and self.connected:
                self._log_recovery()
        if self._connection is None and now >= self._retry_at:
            self._run_in_background(self._connect)
        elif silence_seconds > PROBE_SECONDS and now - self._probed_at > PROBE_SECONDS:
            self._probed_at = now
            self._run_in_background(self._probe)
        return None

    def discard_producer(self, error: BaseException) -> None:
        """Close the producer after this error; a new one is made after a pause."""
        self._log_once(explain(self.settings, error))
        connection, self._connection = self._connection, None
        self._schedule_retry()
        if connection is not None:
            close_producer(connection.client)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            connection, self._connection = self._connection, None
        if connection is not None:
            close_producer(connection.client)

    def _run_in_background(self, work: Callable[[], None]) -> None:
        self._background = threading.Thread(
            target=work, name="moorline-publisher-link", daemon=True
        )
        self._background.start()

    def _connect(self) -> None:
        try:
            ensure_topics(self.settings)
            connection = connect(
                KafkaProducer,
                self.settings,
                "publisher",
                acks="all",
                linger_ms=20,
                batch_size=256 * 1024,
                max_request_size=self.settings.max_event_bytes + HEADERS_ROOM_BYTES,
                max_block_ms=1000,  # only for metadata, and `ensure_topics` saw the topics
                # While it waits for the broker it keeps its sequence numbers: no duplicates.
                delivery_timeout_ms=7 * 86_400_000,
                allow_auto_create_topics=False,
            )
        except StreamUnavailable as error:
            self._log_once(error)
            self._schedule_retry()
            return
        with self._lock:
            if not self._closed:
                self._connection = connection
        if self._closed:
            close_producer(connection.client)
            return
        self._log_recovery()
        self._retry_seconds = RETRY_SECONDS[0]
        self.wake.set()

    def _probe(self) -> None:
        """Find out whether the broker is away or only this producer is broken."""
        try:
            with admin_session(self.settings) as admin:
                states = describe(admin, self.settings, tuple(Topic))
        except StreamUnavailable as error:
            self._answering_since = None
            self._log_once(error)
            return
        now = time.monotonic()
        self._answering_since = self._answering_since or now
        if len(states) < len(Topic):
            # Made again only by `_connect`, when this client is closed: it would deliver what the
            # next one delivers too.
            self._broken = StreamUnavailable("topics are gone from the broker: making them again")
        elif now - self._answering_since > REBUILD_SECONDS:
            self._broken = StreamUnavailable("the broker answers, but acknowledges no event")
        if self._broken is not None:
            self.wake.set()

    def _log_recovery(self) -> None:
        if self.last_error:
            events = self.buffered_events()
            logger.warning(
                "Kafka reachable again: %d buffered events are being sent",
                events,
                extra={
                    "event": "kafka_available",
                    "events": events,
                    "url": self.settings.bootstrap,
                },
            )
        self.last_error, self._logged, self._log_again_at = "", "", 0.0

    def _schedule_retry(self) -> None:
        self._retry_at = time.monotonic() + self._retry_seconds
        self._retry_seconds = min(2 * self._retry_seconds, RETRY_SECONDS[1])

    def _log_once(self, error: StreamUnavailable) -> None:
        """Log that it is away once and then seldom, whatever each attempt says; at once what
        somebody must change."""
        self.last_error = str(error)
        invalid = isinstance(error, StreamInvalid) and str(error) != self._logged
        if not invalid and time.monotonic() < self._log_again_at:
            return
        self._logged, self._log_again_at = str(error), time.monotonic() + REPEATED_SECONDS
        logger.error(
            "Kafka unavailable, buffering events in memory and on disk: %s",
            error,
            extra={
                "event": "kafka_unavailable",
                "events": self.buffered_events(),
                "url": self.settings.bootstrap,
            },
        )
