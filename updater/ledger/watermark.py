"""The moment up to which everything was read: expiry goes by it."""

from __future__ import annotations

import math
from collections.abc import Collection

from updater.ledger.database import Database


class Watermark:
    """The event time up to which everything has been read; starts anew with each process."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._behind: frozenset[tuple[str, int]] = frozenset()
        self._behind_as_of = math.inf

    def set_behind(self, partitions: Collection[tuple[str, int]], as_of: float) -> None:
        """As ``Ledger.set_behind``."""
        self._behind = frozenset((str(topic), partition) for topic, partition in partitions)
        self._behind_as_of = as_of

    def watermark_at(self, now: float) -> float:
        """As ``Ledger.watermark``."""
        read_until: dict[tuple[str, int], float] = {
            (topic, partition): float(arrived_at)
            for topic, partition, arrived_at, _ in self._database.rows(
                "SELECT topic, partition, arrived_at, max(id) FROM topic_partitions"
                " GROUP BY topic, partition"
            )
        }
        return min(
            [now, self._behind_as_of, *(read_until.get(place, 0.0) for place in self._behind)]
        )
