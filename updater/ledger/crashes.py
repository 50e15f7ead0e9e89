"""What is in the update under way, and what the updater has died with.

An update leaves a mark at each of its replies when it begins, and its end takes the marks away. One
that is still there at the next start is of an update that the process did not survive.
"""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moorline import metrics
from updater.ledger.claims import Claims
from updater.ledger.database import Database
from updater.ledger.schema import Attempt

logger = logging.getLogger("moorline.ledger")

_LOOKED_AT = 256


@dataclass(frozen=True)
class Suspect:
    """A reply that waits for a batch, and that the process has died with too often."""

    key: str
    deaths: int
    """Updates with it that the process did not survive, since one came to an end."""


class Crashes:
    """The marks, in transactions of their own; ``conclude`` is in that of a decision."""

    def __init__(self, database: Database, claims: Claims, suspect_after_crashes: int) -> None:
        self._database = database
        self._claims = claims
        self._suspect_after_deaths = suspect_after_crashes

    def count_crashes(self) -> None:
        """At a start: of whatever is still marked the process before has died."""
        with self._database.transaction("deaths") as connection:
            died = connection.execute(
                "UPDATE attempts SET deaths = deaths + 1, alone = alone + (under_way = ?),"
                " under_way = NULL WHERE under_way IS NOT NULL RETURNING deaths",
                (Attempt.ALONE,),
            ).fetchall()
        if died:
            logger.error(
                "the updater died in an update",
                extra={"replies": len(died), "deaths": max(deaths for (deaths,) in died)},
            )
        self.show()

    def begin(self, example_ids: Sequence[str], *, alone: bool = False) -> None:
        """An update from these begins.

        Args:
            alone: it is of one, and another one has survived the same in this process.

        Raises:
            LedgerError: an example is unknown. Nothing changed.
        """
        replies = [claim.interaction for claim in self._claims.of(example_ids).values()]
        with self._database.transaction("attempt") as connection:
            _forget_marks(connection)
            _mark(connection, replies, Attempt.ALONE if alone else Attempt.UPDATE)

    def measure_on(self, replies: Iterable[int]) -> None:
        """The update under way, if one is, goes on to measure on these (``interactions.id``)."""
        if self._under_way():
            with self._database.transaction("measured") as connection:
                _mark(connection, replies, Attempt.UPDATE)

    def end(self) -> None:
        """Whatever is under way is none of its replies' doing any more: nothing is counted."""
        if self._under_way():
            with self._database.transaction("undecided") as connection:
                _forget_marks(connection)

    def succeeded(self) -> None:
        """What was under way came to an end without a decision: it kills nobody."""
        with self._database.transaction("survived") as connection:
            conclude(connection)
        self.show()

    def suspects(self) -> list[Suspect]:
        """What waits and has cost too many lives, most deaths first, then oldest first."""
        return [
            Suspect(*row)
            for row in self._database.rows(
                "SELECT i.key, a.deaths FROM attempts a JOIN interactions i"
                " ON i.id = a.interaction WHERE a.deaths >= ? AND i.open_ratings > 0"
                " ORDER BY a.deaths DESC, i.event_time, i.key",
                self._suspect_after_deaths,
            )
        ]

    def crashes_alone(self, key: str) -> int:
        """Of this one's deaths, those with nobody else, after another had survived the same."""
        rows = self._database.rows(
            "SELECT a.alone FROM interactions i JOIN attempts a ON a.interaction = i.id"
            " WHERE i.key = ?",
            key,
        )
        return int(rows[0][0]) if rows else 0

    def excluded(self) -> set[int]:
        """Replies that nothing is measured on (``interactions.id``): suspects, rated or not."""
        rows = self._database.rows(
            "SELECT interaction FROM attempts WHERE deaths >= ?", self._suspect_after_deaths
        )
        return {interaction for (interaction,) in rows}

    def least_suspect(self, but: str, deaths: int) -> str | None:
        """Of the oldest others that wait, the key of the one in the fewest, fewer than so many."""
        found = self._database.rows(
            "SELECT key FROM (SELECT i.key, i.event_time, coalesce(a.deaths, 0) AS deaths"
            " FROM interactions i INDEXED BY interactions_ready"
            " LEFT JOIN attempts a ON a.interaction = i.id"
            " WHERE i.open_ratings > 0 AND i.key <> ? AND coalesce(a.deaths, 0) < ?"
            " ORDER BY i.event_time, i.key LIMIT ?) ORDER BY deaths, event_time, key LIMIT 1",
            but,
            deaths,
            _LOOKED_AT,
        )
        return found[0][0] if found else None

    def show(self) -> None:
        """Set the metric."""
        ((deaths,),) = self._database.rows(
            "SELECT max(a.deaths) FROM attempts a JOIN interactions i ON i.id = a.interaction"
            " WHERE i.open_ratings > 0"
        )
        metrics.UPDATE_CRASHES.set(deaths or 0)

    def _under_way(self) -> bool:
        return bool(
            self._database.rows("SELECT 1 FROM attempts WHERE under_way IS NOT NULL LIMIT 1")
        )


def conclude(connection: sqlite3.Connection) -> None:
    """The update under way came to an end: nothing that was in it kills the process."""
    connection.execute("DELETE FROM attempts WHERE under_way IS NOT NULL")


def _mark(connection: sqlite3.Connection, replies: Iterable[int], how: Attempt) -> None:
    connection.executemany(
        "INSERT INTO attempts (interaction, under_way) VALUES (?, ?)"
        " ON CONFLICT DO UPDATE SET under_way = excluded.under_way",
        ((reply, how) for reply in replies),
    )


def _forget_marks(connection: sqlite3.Connection) -> None:
    """As if it had never been begun."""
    connection.execute("UPDATE attempts SET under_way = NULL WHERE under_way IS NOT NULL")
    connection.execute("DELETE FROM attempts WHERE deaths = 0")
