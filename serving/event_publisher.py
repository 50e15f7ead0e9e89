"""Publishes typed events to the stream as bytes; never blocks the event loop."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

from moorline.events import Feedback, Interaction
from moorline.stream import Publisher, Topic


class EventPublisher:
    """Puts events on their topics, keyed by interaction so that a join is local."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    def publish_interaction(self, event: Interaction) -> bool:
        """False when the event is larger than the stream takes, or queue and spool are full."""
        return self._publisher.publish(Topic.INTERACTIONS, event.key, event.to_bytes())

    async def publish_feedback(self, event: Feedback) -> bool:
        """Wait until a broker or the disk has the event; False when neither can take it."""
        kept = self._publisher.publish_durably(Topic.FEEDBACK, event.key, event.to_bytes())
        return await asyncio.wrap_future(kept)

    def stats(self) -> dict[str, Any]:
        """The publisher's state, for the status page."""
        return asdict(self._publisher.stats)
