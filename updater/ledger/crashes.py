"""Counts in how many crashed updates a reply was.

An update marks each of its replies when it begins, and its end removes the marks. A mark that is
still there at the next start belongs to an update that crashed the process.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moorline import metrics
from updater.ledger.claims import Claims
from updater.ledger.database import Database
from updater.ledger.schema import UpdateRole

logger = logging.getLogger("moorline.ledger")

_OLDEST_COMPARED = 256


@dataclass(frozen=True)
class Suspect:
    """A reply that waits for a batch and was in too many crashed updates."""

    key: str
    crash_count: int
    """Updates with it that crashed the process, since the last one that did not."""


class Crashes:
    """Sets and counts the marks, in transactions of its own.

    ``clear_counts`` at the bottom of this module does it inside the transaction of a decision.
    """

    def __init__(self, database: Database, claims: Claims, suspect_after_crashes: int) -> None:
        self._database = database
        self._claims = claims
        self._suspect_after_crashes = suspect_after_crashes

    def count_crashes(self) -> None:
        """Count a crash for whatever is still marked; once, at a start."""
        with self._database.transaction("crashes") as connection:
            crashed = connection.execute(
                "UPDATE crash_counts SET crash_count = crash_count + 1,"
                " crash_count_alone = crash_count_alone + (in_update = ?),"
                " in_update = NULL WHERE in_update IS NOT NULL RETURNING crash_count",
                (UpdateRole.ALONE,),
            ).fetchall()
        if crashed:
            logger.error(
                "the updater crashed in its last update: counted for each of its replies",
                extra={
                    "event": "crash_counted",
                    "replies": len(crashed),
                    "crashes": max(crash_count for (crash_count,) in crashed),
                },
            )
        self.export_metrics()

    def mark_update(self, example_ids: Sequence[str], *, alone: bool = False) -> None:
        """Mark the replies of these examples: an update from them begins.

        Args:
            alone: it is of one example, after another one succeeded in the same process.

        Raises:
            LedgerError: an example is unknown. Nothing changed.
        """
        replies = [claim.interaction for claim in self._claims.for_examples(example_ids).values()]
        with self._database.transaction("attempt") as connection:
            _remove_marks(connection)
            _mark(connection, replies, UpdateRole.ALONE if alone else UpdateRole.WITH_OTHERS)

    def mark_measured(self, replies: Iterable[int]) -> None:
        """Mark the replies (``interactions.id``) that the update under way also measures on."""
        if self._under_way():
            with self._database.transaction("measured") as connection:
                _mark(connection, replies, UpdateRole.WITH_OTHERS)

    def remove_marks(self) -> None:
        """Remove the marks: a crash from here on is not the fault of the replies."""
        if self._under_way():
            with self._database.transaction("undecided") as connection:
                _remove_marks(connection)

    def clear_counts(self) -> None:
        """Clear the counts of an update that ended without a decision: it crashed nothing."""
        with self._database.transaction("succeeded") as connection:
            clear_counts(connection)
        self.export_metrics()

    def suspects(self) -> list[Suspect]:
        """Replies that wait and were in too many crashes, most crashes first, then oldest first."""
        return [
            Suspect(*row)
            for row in self._database.rows(
                "SELECT i.key, c.crash_count FROM crash_counts c JOIN interactions i"
                " ON i.id = c.interaction WHERE c.crash_count >= ? AND i.open_ratings > 0"
                " ORDER BY c.crash_count DESC, i.event_time, i.key",
                self._suspect_after_crashes,
            )
        ]

    def crashes_alone(self, key: str) -> int:
        """How often the process crashed with this reply alone, after another had succeeded."""
        rows = self._database.rows(
            "SELECT c.crash_count_alone FROM interactions i JOIN crash_counts c ON"
            " c.interaction = i.id"
            " WHERE i.key = ?",
            key,
        )
        return int(rows[0][0]) if rows else 0

    def excluded(self) -> set[int]:
        """Replies that nothing is measured on (``interactions.id``): suspects, rated or not."""
        rows = self._database.rows(
            "SELECT interaction FROM crash_counts WHERE crash_count >= ?",
            self._suspect_after_crashes,
        )
        return {interaction for (interaction,) in rows}

    def least_suspect(self, but: str, crash_count: int) -> str | None:
        """The key of the reply in the fewest crashes, out of the oldest others that are ready.

        Args:
            crash_count: only a reply in fewer crashes than this; None where there is none.
        """
        found = self._database.rows(
            "SELECT key FROM (SELECT i.key, i.event_time, coalesce(c.crash_count, 0) AS crash_count"
            " FROM interactions i INDEXED BY interactions_ready"
            " LEFT JOIN crash_counts c ON c.interaction = i.id"
            " WHERE i.open_ratings > 0 AND i.key <> ? AND coalesce(c.crash_count, 0) < ?"
            " ORDER BY i.event_time, i.key LIMIT ?) ORDER BY crash_count, event_time, key LIMIT 1",
            but,
            crash_count,
            _OLDEST_COMPARED,
        )
        return found[0][0] if found else None

    def export_metrics(self) -> None:
        """Set the metric to the highest count among the replies that wait."""
        ((crash_count,),) = self._database.rows(
            "SELECT max(c.crash_count) FROM crash_counts c JOIN interactions i ON i.id ="
            " c.interaction"
            " WHERE i.open_ratings > 0"
        )
        metrics.UPDATE_CRASHES.set(crash_count or 0)

    def _under_way(self) -> bool:
        return bool(
            self._database.rows("SELECT 1 FROM crash_counts WHERE in_update IS NOT NULL LIMIT 1")
        )


def clear_counts(connection: sqlite3.Connection) -> None:
    """Clear the counts of the replies in the update that has ended."""
    connection.execute("DELETE FROM crash_counts WHERE in_update IS NOT NULL")


def _mark(connection: sqlite3.Connection, replies: Iterable[int], role: UpdateRole) -> None:
    connection.executemany(
        "INSERT INTO crash_counts (interaction, in_update) VALUES (?, ?)"
        " ON CONFLICT DO UPDATE SET in_update = excluded.in_update",
        ((reply, role) for reply in replies),
    )


def _remove_marks(connection: sqlite3.Connection) -> None:
    """Remove the marks, and the rows that count no crash."""
    connection.execute("UPDATE crash_counts SET in_update = NULL WHERE in_update IS NOT NULL")
    connection.execute("DELETE FROM crash_counts WHERE crash_count = 0")
