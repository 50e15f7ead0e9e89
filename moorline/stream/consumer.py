"""Consumers: of committed records only, and past every record that cannot be decoded."""

from __future__ import annotations

from typing import Any

from kafka import KafkaConsumer

from moorline.settings import StreamSettings
from moorline.stream.batches import PartitionRecords
from moorline.stream.client import Connection, connect

_ROOM_BYTES = 2**20
"""Beside one event of the largest size, so that a fetch brings more than one record."""


def connect_consumer(
    settings: StreamSettings, purpose: str, **options: Any
) -> Connection[KafkaConsumer]:
    """A connected consumer that belongs to no group and moves no offsets.

    It gives ``RawRecord``s: those of a transaction once it is committed, of an aborted one never.

    Args:
        purpose: part of the client id, for the broker's logs.
        options: the library's names; they win.

    Raises:
        StreamUnavailable, StreamInvalid: as ``connect``.
    """
    defaults: dict[str, Any] = {
        "isolation_level": "read_committed",
        "auto_offset_reset": "none",
        "enable_auto_commit": False,
        "allow_auto_create_topics": False,
        "max_partition_fetch_bytes": settings.max_event_bytes + _ROOM_BYTES,
    }
    connection = connect(KafkaConsumer, settings, purpose, **(defaults | options))
    connection.client._fetcher.PartitionRecords = PartitionRecords
    return connection
