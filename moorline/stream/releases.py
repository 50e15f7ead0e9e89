"""Releases on their compacted topic: written by the updater's outbox, for whoever follows them.

The artifact store is the truth of what is released, and servers read it alone.
"""

from __future__ import annotations

import logging
import time

from kafka import KafkaConsumer, TopicPartition
from kafka import errors as kafka_errors
from pydantic import ValidationError

from moorline.events import Release
from moorline.settings import StreamSettings
from moorline.stream.client import Connection, StreamUnavailable, explained
from moorline.stream.compacted import write_acknowledged
from moorline.stream.consumer import connect_consumer
from moorline.stream.topics import Topic, ensure_topics, topic_name

logger = logging.getLogger("moorline.stream")

_RETRY_SECONDS = 5.0
_SLICE_SECONDS = 0.2


def publish_release(settings: StreamSettings, release: Release) -> None:
    """Write ``release`` to the releases topic, keyed by alias; returns when it is acknowledged.

    Idempotent for its readers: they go by alias and version, so it may be repeated.

    Raises:
        StreamUnavailable: it was not acknowledged; try again later.
        StreamInvalid: a login or permission is wrong.
    """
    event_id = f"{release.name}/{release.lease_epoch}"
    write_acknowledged(
        settings, Topic.RELEASES, release.alias, release.to_bytes(), event_id, "updater"
    )


class ReleaseFollower:
    """Reads the releases topic from its start, and then on. One thread.

    Never raises for Kafka's sake. ``connected`` and the log say how it
    is; a release can be told more than once.

    Args:
        alias: only releases of this one; None: all.
    """

    def __init__(self, settings: StreamSettings, alias: str | None = None) -> None:
        self._settings = settings
        self._alias = alias
        self._connection: Connection[KafkaConsumer] | None = None
        self._retry_at = 0.0
        self._told = ""
        self._closed = False

    @property
    def connected(self) -> bool:
        """Whether the last contact with a broker succeeded."""
        connection = self._connection
        return connection is not None and connection.alive

    def poll(self, timeout_seconds: float) -> list[Release]:
        """Releases that appeared, in order; empty after about ``timeout_seconds`` without any.

        The first connection, or one after an outage, may take ``connect_timeout_seconds`` more.
        """
        deadline = time.monotonic() + timeout_seconds
        while not self._closed:
            found = self._poll_once(max(0.0, deadline - time.monotonic()))
            if found or time.monotonic() >= deadline:
                return found
        return []

    def close(self) -> None:
        """Disconnect; a ``poll`` of another thread returns soon. Idempotent."""
        self._closed = True
        self._disconnect()

    def _poll_once(self, timeout_seconds: float) -> list[Release]:
        if self._connection is None and time.monotonic() < self._retry_at:
            time.sleep(min(timeout_seconds, _SLICE_SECONDS))
            return []
        try:
            connection = self._connection or self._connect()
            with explained(self._settings, connection):
                batches = connection.client.poll(timeout_ms=int(timeout_seconds * 1000))
        except (StreamUnavailable, RuntimeError) as error:
            if str(error) != self._told and not self._closed:
                self._told = str(error)
                logger.warning(
                    "cannot read the releases topic, will retry: %s",
                    error,
                    extra={"event": "releases_unavailable", "error": str(error)},
                )
            self._disconnect()
            self._retry_at = time.monotonic() + _RETRY_SECONDS
            return []
        if self._told:
            self._told = ""
            logger.warning(
                "the releases topic can be read again", extra={"event": "releases_available"}
            )
        releases = [self._parse(raw.value) for batch in batches.values() for raw in batch]
        return [
            release
            for release in releases
            if release is not None and self._alias in (None, release.alias)
        ]

    def _connect(self) -> Connection[KafkaConsumer]:
        ensure_topics(self._settings)
        connection = connect_consumer(
            self._settings,
            "follower",
            # Told again is harmless, so a reset needs no refusal: a topic that was compacted or
            # made again is simply read from its start.
            auto_offset_reset="earliest",
        )
        partition = TopicPartition(topic_name(self._settings, Topic.RELEASES), 0)
        with explained(self._settings, connection):
            connection.client.assign([partition])
            connection.client.seek_to_beginning(partition)
        self._connection = connection
        return connection

    def _parse(self, value: bytes | None) -> Release | None:
        if value is None:
            return None
        try:
            return Release.model_validate_json(value)
        except ValidationError as error:
            logger.warning(
                "a record of the releases topic is no release: ignored",
                extra={"event": "release_invalid", "count": error.error_count()},
            )
            return None

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            try:
                connection.client.close(autocommit=False)
            except (kafka_errors.KafkaError, OSError, RuntimeError) as error:
                logger.debug(
                    "the connection to the releases topic could not be closed",
                    extra={"event": "close_failed", "error": type(error).__name__},
                )


__all__ = ["ReleaseFollower", "publish_release"]
