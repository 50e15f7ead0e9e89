"""One event on its way from a caller to Kafka, and as it lies in the spool."""

from __future__ import annotations

import contextlib
import json
import struct
from concurrent.futures import Future
from dataclasses import dataclass

from moorline.stream.spool import Frame
from moorline.stream.topics import Topic

_ENVELOPE_LENGTH = struct.Struct(">I")


@dataclass(eq=False)
class OutgoingEvent:
    topic: Topic
    key: str
    value: bytes
    event_id: str
    timestamp_ms: int
    frame: Frame | None = None
    """Its copy in the spool."""
    safe: Future[bool] | None = None
    """Set when it is delivered or on disk (True), or dropped (False)."""
    sent_at: float = 0.0
    acknowledged: bool = False
    error: BaseException | None = None

    def resolve(self, kept: bool) -> None:
        """Tell who waits on ``safe`` how it ended: kept (delivered or on disk), or dropped."""
        if self.safe is not None and not self.safe.done():
            with contextlib.suppress(Exception):  # cancelled by its reader meanwhile
                self.safe.set_result(kept)

    def to_bytes(self) -> bytes:
        """Envelope and value, as the spool keeps them."""
        envelope = json.dumps([self.topic.value, self.key, self.event_id, self.timestamp_ms])
        raw = envelope.encode()
        return _ENVELOPE_LENGTH.pack(len(raw)) + raw + self.value

    @classmethod
    def from_bytes(cls, payload: bytes) -> OutgoingEvent:
        """Read what ``to_bytes`` wrote.

        Raises:
            ValueError: these bytes are no event.
        """
        start = _ENVELOPE_LENGTH.size
        try:
            (length,) = _ENVELOPE_LENGTH.unpack_from(payload)
        except struct.error as error:
            raise ValueError("no envelope") from error
        topic, key, event_id, timestamp_ms = json.loads(payload[start : start + length])
        value = payload[start + length :]
        return cls(Topic(topic), key, value, event_id, int(timestamp_ms))
