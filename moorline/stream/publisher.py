"""The server's way out to Kafka: never blocks, never raises into a reply, forgets nothing lightly.

An event goes from ``publish`` into a bounded queue in memory; one thread hands it to Kafka. While
Kafka is away (or silent for a second) that thread moves the events to the spool on disk, in order,
and later drains the spool before anything newer. What finds both full is dropped and counted.

Order, oldest first, always: window (handed to the client, not acknowledged), spool, queue.
An event of the window may also be in the spool, as a copy that outlives this process.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
import uuid
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from kafka import KafkaProducer
from kafka import errors as kafka_errors

from moorline import metrics
from moorline.failpoints import failpoint
from moorline.settings import StreamSettings
from moorline.stream.link import Link
from moorline.stream.outgoing import OutgoingEvent
from moorline.stream.spool import Frame, FrameEnd, Spool, SpoolNotSynced
from moorline.stream.topics import Headers, Topic, cloud_event_headers, topic_name

logger = logging.getLogger("moorline.stream")

QUEUE_MAX_BYTES = 64 * 2**20
"""Bytes of values in memory, beside the bound on events: 10,000 long replies would be gigabytes."""
WINDOW_MAX_EVENTS = 2_000
WINDOW_MAX_BYTES = 16 * 2**20
SILENCE_SECONDS = 1.0
"""An event that waits so long for its acknowledgement is copied to the spool."""
# An event itself is what the broker refuses: sending it again would stop all behind it. The client
# then gives the same error to everything it holds, so only an event that was alone is guilty.
_POISON = (
    kafka_errors.MessageSizeTooLargeError,
    kafka_errors.RecordListTooLargeError,
    kafka_errors.InvalidRecordError,
    kafka_errors.InvalidTopicError,
    ValueError,
    TypeError,
)


@dataclass(frozen=True)
class PublisherStats:
    """Where the events are."""

    queued: int
    """Only in memory, not yet acknowledged."""
    spooled: int
    """On disk."""
    spooled_bytes: int
    dropped: int
    """Since the start."""
    delivered: int
    """Acknowledged by a broker, since the start."""
    connected: bool
    last_error: str = ""
    """Why it is not connected; one line."""


class Publisher:
    """Publishes events from any thread, without ever blocking the caller.

    Args:
        spool_dir: its directory, held exclusively from ``start`` to ``close``.
        source: CloudEvents source of the records.
    """

    def __init__(self, settings: StreamSettings, spool_dir: Path, source: str = "moorline") -> None:
        self._settings = settings
        self._spool_dir = spool_dir
        self._source = source
        self._spool: Spool | None = None
        self._queue: deque[OutgoingEvent] = deque()
        self._queue_bytes = 0
        self._window: deque[OutgoingEvent] = deque()
        self._window_bytes = 0
        # Delivered behind one that was not, and the client failed: not to be sent again.
        self._delivered_early: set[FrameEnd] = set()
        self._lock = threading.Lock()  # guards the queue and the counters; held for microseconds
        self._wake = threading.Event()
        self._accepting = True
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._link = Link(settings, self._wake, lambda: self._outstanding)
        self._outstanding = 0  # accepted (or found in the spool), neither delivered nor dropped
        self._dropped = 0
        self._delivered = 0
        self._spooled = 0
        self._spooled_bytes = 0
        self._progress_at = time.monotonic()
        self._disk_failed_at = float("-inf")
        self._disk_failing = False
        self._alone = 0
        """So many events are still to be sent one at a time: one of them is refused."""

    # --- any thread ---

    def start(self) -> None:
        """Open the spool and begin. Needs no broker.

        Raises:
            SpoolLocked: another process uses the spool directory.
            OSError: the spool directory cannot be made or read.
        """
        if self._settings.spool_max_bytes > 0:
            self._spool = Spool(self._spool_dir, self._settings.spool_max_bytes)
            self._outstanding += self._spool.count
            if self._spool.count:
                logger.info(
                    "events of an earlier run wait in the spool and are sent first",
                    extra={
                        "event": "spool_holds_events",
                        "events": self._spool.count,
                        "path": str(self._spool_dir),
                    },
                )
        self._measure()
        self._thread = threading.Thread(target=self._run, name="moorline-publisher", daemon=True)
        self._thread.start()

    def publish(self, topic: Topic, key: str, value: bytes) -> bool:
        """Take one event, at once. False: no room (or too large, or closed); counted as dropped."""
        return self._accept(self._event(topic, key, value))

    def publish_durably(self, topic: Topic, key: str, value: bytes) -> Future[bool]:
        """As ``publish``; the future says when the event is safe.

        True once a broker acknowledged it or it is synced to the spool; False when it was dropped.
        For doors that promise something to the sender (``asyncio.wrap_future`` it).
        """
        event = self._event(topic, key, value)
        event.safe = Future()
        if not self._accept(event):
            event.resolve(kept=False)
        return event.safe

    @property
    def stats(self) -> PublisherStats:
        return PublisherStats(
            queued=self._in_memory_only(),
            spooled=self._spooled,
            spooled_bytes=self._spooled_bytes,
            dropped=self._dropped,
            delivered=self._delivered,
            connected=self._link.connected and not self._silent(),
            last_error=self._link.last_error,
        )

    def flush(self, timeout_seconds: float) -> bool:
        """Wait until everything taken so far is acknowledged; False when time ran out."""
        deadline = time.monotonic() + timeout_seconds
        while self._outstanding > 0:
            if time.monotonic() >= deadline or self._thread is None:
                return False
            self._wake.set()
            time.sleep(0.01)
        return True

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Deliver what can be delivered in time; leave the rest in the spool. Idempotent."""
        with self._lock:
            self._accepting = False
        if self._thread is None:
            return
        deadline = time.monotonic() + timeout_seconds
        if self._link.connected:
            self.flush(timeout_seconds)
        self._stopping.set()
        self._wake.set()
        self._thread.join(max(1.0, deadline - time.monotonic()) + 5.0)
        self._thread = None
        self._link.close()
        if self._dropped:
            logger.warning(
                "stopped; events were dropped during this run",
                extra={"event": "events_dropped", "events": self._dropped},
            )

    def _event(self, topic: Topic, key: str, value: bytes) -> OutgoingEvent:
        return OutgoingEvent(topic, key, value, uuid.uuid4().hex, int(time.time() * 1000))

    def _accept(self, event: OutgoingEvent) -> bool:
        size = len(event.value)
        with self._lock:
            fits = (
                self._accepting
                and size <= self._settings.max_event_bytes
                and len(self._queue) < self._settings.queue_max_events
                and self._queue_bytes + size <= QUEUE_MAX_BYTES
            )
            if fits:
                self._queue.append(event)
                self._queue_bytes += size
                self._outstanding += 1
            else:
                self._dropped += 1
        if not fits:
            metrics.EVENTS_DROPPED.labels(event.topic.value).inc()
            return False
        if not self._wake.is_set():
            self._wake.set()
        return True

    def _drop(self, event: OutgoingEvent) -> None:
        """Lose an event that was accepted."""
        with self._lock:
            self._dropped += 1
            self._outstanding -= 1
        metrics.EVENTS_DROPPED.labels(event.topic.value).inc()
        event.resolve(kept=False)

    def _deliver(self, event: OutgoingEvent) -> None:
        with self._lock:
            self._delivered += 1
            self._outstanding -= 1
        metrics.EVENTS_PUBLISHED.labels(event.topic.value).inc()
        event.resolve(kept=True)

    def _in_memory_only(self) -> int:
        return max(0, self._outstanding - self._spooled)

    def _silent(self) -> bool:
        """Whether the oldest event in the window waits for longer than it should."""
        try:
            oldest = self._window[0]
        except IndexError:
            return False
        return time.monotonic() - max(oldest.sent_at, self._progress_at) > SILENCE_SECONDS

    # --- the publisher's thread ---

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._step()
            except Exception:  # whatever it is, replies go on, and so must this thread
                logger.exception(
                    "the event publisher failed unexpectedly; it tries again in a second",
                    extra={"event": "publisher_failed", "seconds": 1.0},
                )
                time.sleep(1.0)
            self._wake.wait(0.02 if self._window else 0.25)
            self._wake.clear()
        try:
            self._reap()
            self._spill()
            self._drop_what_is_left()
        finally:
            if self._spool is not None:
                self._spool.close()
            self._measure()

    def _step(self) -> None:
        self._reap()
        self._maintain_link()
        self._feed()
        backlog = self._spool is not None and self._spool.unread > 0
        if self._silent() or (self._queue and (backlog or not self._link.connected)):
            self._spill()
        self._measure()

    def _reap(self) -> None:
        """Take acknowledged events off the window; act on refused ones."""
        failure = next((event.error for event in self._window if event.error is not None), None)
        released = False
        if isinstance(failure, _POISON):
            if self._alone and len(self._window) == 1:
                self._refuse(self._window[0])
            else:
                self._alone = len(self._window)
        while self._window and self._window[0].acknowledged:
            event = self._window.popleft()
            self._window_bytes -= len(event.value)
            if event.frame is not None and self._spool is not None:
                self._spool.release(event.frame)
                released = True
            self._alone = max(0, self._alone - 1)
            if event.error is None:
                self._deliver(event)
            self._progress_at = time.monotonic()
        if released and self._spool is not None:
            with contextlib.suppress(OSError):
                self._spool.save()
        if failure is not None:
            self._take_back(failure)

    def _refuse(self, event: OutgoingEvent) -> None:
        event.acknowledged = True  # done with; counted as dropped, not as delivered
        logger.error(
            "event dropped: the broker rejected it as invalid (it will not be retried)",
            extra={
                "event": "event_rejected_by_broker",
                "topic": event.topic.value,
                "error": type(event.error).__name__,
            },
        )
        self._drop(event)

    def _take_back(self, failure: BaseException) -> None:
        """The client is of no more use: what it did not deliver goes through a new one."""
        self._link.discard_producer(failure)
        loose = []
        for event in self._window:
            if event.frame is not None:
                if event.acknowledged:
                    self._delivered_early.add(event.frame.position)
            elif event.acknowledged and event.error is None:
                self._deliver(event)
            elif not event.acknowledged:
                # A new value: the old client's late answer must not reach the next attempt.
                loose.append(replace(event, error=None, sent_at=0.0))
        self._window.clear()
        self._window_bytes = 0
        if self._spool is not None:
            self._spool.rewind()
        with self._lock:
            self._queue.extendleft(reversed(loose))
            self._queue_bytes += sum(len(event.value) for event in loose)

    def _maintain_link(self) -> None:
        silence = 0.0
        if self._window:
            silence = time.monotonic() - max(self._window[0].sent_at, self._progress_at)
        verdict = self._link.maintain(silence)
        if verdict is not None:
            self._take_back(verdict)

    def _feed(self) -> None:
        """Hand events to the client: from the spool first, then from the queue."""
        producer = self._link.producer
        if producer is None:
            return
        while self._window_bytes < WINDOW_MAX_BYTES and len(self._window) < (
            1 if self._alone else WINDOW_MAX_EVENTS
        ):
            event = self._next_event()
            if event is None:
                return
            if event.frame is not None and event.frame.position in self._delivered_early:
                self._delivered_early.discard(event.frame.position)
                event.acknowledged = True
                self._put_in_window(event)
                continue
            try:
                self._send(producer, event)
            except (kafka_errors.KafkaError, ValueError, TypeError) as error:
                event.error = error
                self._put_in_window(event)
                return

    def _next_event(self) -> OutgoingEvent | None:
        while self._spool is not None and (frame := self._spool.next()) is not None:
            try:
                event = OutgoingEvent.from_bytes(frame.payload or b"")
            except ValueError:
                self._spool.release(frame)
                with self._lock:
                    self._dropped += frame.count
                    self._outstanding -= frame.count
                metrics.EVENTS_DROPPED.labels("unknown").inc(frame.count)
                continue
            event.frame = Frame(frame.position, None)
            return event
        with self._lock:
            if not self._queue:
                return None
            event = self._queue.popleft()
            self._queue_bytes -= len(event.value)
            return event

    def _send(self, producer: KafkaProducer, event: OutgoingEvent) -> None:
        failpoint("publisher.before_send")
        headers: Headers = cloud_event_headers(
            event.topic, event.event_id, self._source, event.timestamp_ms
        )
        future = producer.send(
            topic_name(self._settings, event.topic),
            value=event.value,
            key=event.key.encode(),
            headers=list(headers),
            timestamp_ms=event.timestamp_ms,
        )
        event.sent_at = time.monotonic()
        self._put_in_window(event)

        def on_success(_: object) -> None:
            event.acknowledged = True
            self._wake.set()

        def on_failure(error: BaseException) -> None:
            event.error = error
            self._wake.set()

        future.add_callback(on_success)
        future.add_errback(on_failure)

    def _put_in_window(self, event: OutgoingEvent) -> None:
        self._window.append(event)
        self._window_bytes += len(event.value)

    def _spill(self) -> None:
        """Copy the window, and move the queue, to the spool, in order, as far as it has room."""
        spool = self._spool
        if spool is None or time.monotonic() - self._disk_failed_at < 1.0:
            return
        written: list[OutgoingEvent] = []
        try:
            loose = [event for event in self._window if event.frame is None]
            # Only when the spool has nothing unread were events of the window taken from the queue.
            for event in loose:
                if event.acknowledged:
                    continue
                event.frame = spool.append(event.to_bytes())
                if event.frame is None:
                    return
                spool.skip()
                written.append(event)
            while True:
                with self._lock:
                    if not self._queue:
                        break
                    event = self._queue[0]
                if spool.append(event.to_bytes()) is None:
                    return
                with self._lock:
                    self._queue.popleft()
                    self._queue_bytes -= len(event.value)
                written.append(event)
        except OSError as error:
            self._disk_failed("write", error)
            if isinstance(error, SpoolNotSynced):
                written.clear()  # they wait for the broker's word
        finally:
            if written:
                self._sync(spool, written)

    def _sync(self, spool: Spool, written: list[OutgoingEvent]) -> None:
        try:
            failpoint("publisher.before_spool_sync")
            spool.sync()
        except OSError as error:
            self._disk_failed("sync", error)
            return
        if self._disk_failing:
            self._disk_failing = False
            logger.warning(
                "the spool can be written again: events that wait are on disk",
                extra={
                    "event": "spool_available",
                    "events": spool.count,
                    "path": str(self._spool_dir),
                },
            )
        for event in written:
            event.resolve(kept=True)

    def _disk_failed(self, phase: str, error: OSError) -> None:
        self._disk_failed_at = time.monotonic()
        self._disk_failing = True
        metrics.DISK_REFUSALS.labels(where="spool").inc()
        logger.error(
            "the spool cannot be written: events wait in memory only, and are dropped when it is "
            "full",
            extra={
                "event": "spool_unavailable",
                "phase": phase,
                "error": error.strerror or str(error),
                "path": str(self._spool_dir),
            },
        )

    def _drop_what_is_left(self) -> None:
        """At the end: what is neither delivered nor on disk is lost."""
        left = [event for event in self._window if event.frame is None and not event.acknowledged]
        for event in itertools.chain(left, self._queue):
            self._drop(event)
        self._window.clear()
        self._queue.clear()

    def _measure(self) -> None:
        if self._spool is not None:
            self._spooled, self._spooled_bytes = self._spool.count, self._spool.size_bytes
        metrics.PUBLISHER_QUEUED.set(self._in_memory_only())
        metrics.SPOOLED_EVENTS.set(self._spooled)
        metrics.SPOOL_BYTES.set(self._spooled_bytes)
        metrics.BROKER_CONNECTED.set(self._link.connected and not self._silent())
