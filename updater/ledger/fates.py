"""The one place where an event gets its fate, and where changes of fate are counted."""

from __future__ import annotations

import sqlite3
from collections import Counter

from moorline.events import Fate, Reason
from moorline.metrics import EVENTS


class Fates:
    """Writes fates inside one transaction; ``count`` after it has committed."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.changes: Counter[tuple[int, Fate, Reason]] = Counter()
        """(topic_partition id, fate, reason) -> events that came to it."""

    def record(
        self, topic_partition: int, offset: int, fate: Fate, reason: Reason, subject: int | None
    ) -> None:
        """Record the first fate of a consumed record."""
        self._connection.execute(
            "INSERT INTO events (topic_partition, offset, fate, reason, subject) VALUES (?, ?,"
            " ?, ?, ?)",
            (topic_partition, offset, fate, reason, subject),
        )
        self.changes[topic_partition, fate, reason] += 1

    def record_repeat(self, topic_partition: int, offset: int, first: int) -> None:
        """A record that says again what another one, with the row ``first``, has said."""
        self.record(topic_partition, offset, Fate.DUPLICATE, Reason.REPEATED_EVENT, first)

    def move(
        self,
        topic_partition: int,
        offset: int,
        fate: Fate,
        reason: Reason = Reason.NONE,
        decided_by: int | None = None,
    ) -> None:
        """Give a recorded event a later fate."""
        self._connection.execute(
            "UPDATE events SET fate = ?, reason = ?, decided_by = ?"
            " WHERE topic_partition = ? AND offset = ?",
            (fate, reason, decided_by, topic_partition, offset),
        )
        self.changes[topic_partition, fate, reason] += 1

    def by_topic(self) -> Counter[tuple[str, Fate, Reason]]:
        """The same counts by topic; call it inside the transaction."""
        topics = dict(self._connection.execute("SELECT id, topic FROM topic_partitions").fetchall())
        summed: Counter[tuple[str, Fate, Reason]] = Counter()
        for (topic_partition, fate, reason), events in self.changes.items():
            summed[topics[topic_partition], fate, reason] += events
        return summed


def count(changes: Counter[tuple[str, Fate, Reason]]) -> None:
    """Add committed changes of fate to the metric."""
    for (topic, fate, reason), events in changes.items():
        EVENTS.labels(topic=topic, fate=fate, reason=reason).inc(events)
