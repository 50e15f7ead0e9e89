"""One record onto a compacted topic, acknowledged: a release's manifest, an erasure."""

from __future__ import annotations

import time

from kafka import KafkaProducer

from moorline.events import Erasure, Release
from moorline.failpoints import failpoint
from moorline.settings import StreamSettings
from moorline.stream.client import close_producer, connect, explained
from moorline.stream.topics import Topic, cloud_event_headers, ensure_topics, topic_name

_ACKNOWLEDGE_SECONDS = 10.0


def publish_release(settings: StreamSettings, release: Release) -> None:
    """Write ``release`` to the releases topic, keyed by its alias.

    For dashboards and whoever else wants to know: servers read the artifact store alone. May be
    repeated: its readers go by alias and version.

    Raises:
        StreamUnavailable: it was not acknowledged; try again later.
        StreamInvalid: a login or permission is wrong.
    """
    event_id = f"{release.name}/{release.lease_epoch}"
    write_acknowledged(
        settings, Topic.RELEASES, release.alias, release.to_bytes(), event_id, "updater"
    )


def publish_erasure(settings: StreamSettings, erasure: Erasure) -> None:
    """Write ``erasure`` to the erasures topic, keyed by its subject.

    Idempotent for its reader, which knows it by its id.

    Raises:
        StreamUnavailable: it was not acknowledged; try again.
        StreamInvalid: a login or permission is wrong.
    """
    write_acknowledged(
        settings, Topic.ERASURES, erasure.key, erasure.to_bytes(), erasure.erasure_id, "forget"
    )


def write_acknowledged(
    settings: StreamSettings, topic: Topic, key: str, value: bytes, event_id: str, source: str
) -> None:
    """Write one record with a producer of its own; returns when it is acknowledged.

    Args:
        source: which part of Moorline says it, for the CloudEvents header.

    Raises:
        StreamUnavailable: it was not acknowledged; try again later.
        StreamInvalid: a login or permission is wrong.
    """
    ensure_topics(settings)
    connection = connect(
        KafkaProducer,
        settings,
        topic.name.lower(),
        acks="all",
        max_block_ms=int(settings.connect_timeout_seconds * 1000),
        allow_auto_create_topics=False,
    )
    timestamp_ms = int(time.time() * 1000)
    headers = cloud_event_headers(topic, event_id, f"moorline/{source}", timestamp_ms)
    try:
        failpoint(f"{topic.name.lower()}.before_send")
        with explained(settings, connection):
            connection.client.send(
                topic_name(settings, topic),
                value=value,
                key=key.encode(),
                headers=list(headers),
                timestamp_ms=timestamp_ms,
            ).get(timeout=_ACKNOWLEDGE_SECONDS)
        failpoint(f"{topic.name.lower()}.after_acknowledgement")
    finally:
        close_producer(connection.client)
