"""Consumes records: each once, by offset, with its join and its partition's next offset."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from moorline.errors import MoorlineError
from moorline.events import Erasure, Fate, Reason
from moorline.stream import Gap, GapCause, Record
from updater.ledger.adoption import AlreadyRead
from updater.ledger.database import RecordInvalid, is_of_the_file
from updater.ledger.erasure import Eraser
from updater.ledger.joins import Joins
from updater.ledger.rules import Arrival, Parsed


@dataclass(frozen=True)
class Ingested:
    """What one call of ``Ledger.ingest`` did."""

    records: int = 0
    """Newly consumed."""
    replayed: int = 0
    """Records that an earlier call had consumed already: skipped."""
    changes: Mapping[tuple[str, Fate, Reason], int] = field(default_factory=dict)
    """(topic, fate, reason) -> events that came to it, earlier events included."""


@dataclass
class _Cursor:
    """A partition's place, as it moves through one batch."""

    id: int
    start: int
    """Records before it were consumed by an earlier batch."""
    arrived_at: float
    seen: set[int] = field(default_factory=set)
    instructions: int = 0
    """How many of those are erasures, which have a row of their own and no fate."""

    def is_new(self, offset: int) -> bool:
        return offset >= self.start and offset not in self.seen


class Intake:
    """Takes one batch, inside one transaction."""

    def __init__(self, connection: sqlite3.Connection, joins: Joins, eraser: Eraser) -> None:
        self._execute = connection.execute
        self._joins = joins
        self._eraser = eraser
        self._cursors: dict[tuple[str, str, int], _Cursor] = {}
        self._already_read = AlreadyRead(connection)

    def consume(self, records: Sequence[Parsed], now: float) -> tuple[int, int]:
        """Give each record its row and move the offsets.

        Returns:
            How many were new, and how many had been consumed before.

        Raises:
            RecordInvalid: one of them raised an error that is not the disk's: roll all back.
        """
        new = 0
        for index, parsed in enumerate(records):
            cursor = self._cursor(parsed.record)
            if not cursor.is_new(parsed.record.offset):
                continue
            try:
                self._take(parsed, cursor, now)
            except (MoorlineError, MemoryError):
                raise
            except Exception as error:
                if is_of_the_file(error):
                    raise
                raise RecordInvalid(index, error) from error
            new += 1
        for cursor in self._cursors.values():
            self._execute(
                "UPDATE topic_partitions SET next_offset = ?, consumed = consumed + ?,"
                " arrived_at = ?"
                " WHERE id = ?",
                (
                    max([cursor.start, *(offset + 1 for offset in cursor.seen)]),
                    len(cursor.seen) - cursor.instructions,
                    cursor.arrived_at,
                    cursor.id,
                ),
            )
        return new, len(records) - new

    def _take(self, parsed: Parsed, cursor: _Cursor, now: float) -> None:
        arrival = Arrival.of(parsed.record, cursor.id, now)
        if isinstance(parsed.event, Erasure):
            self._eraser.carry_out(parsed.event, arrival.at, now)
            cursor.instructions += 1
        else:
            self._joins.add_event(self._already_read.judged(parsed, arrival.at), arrival)
        cursor.seen.add(parsed.record.offset)
        cursor.arrived_at = max(cursor.arrived_at, arrival.at)

    def record_gaps(self, gaps: Iterable[Gap], now: float) -> None:
        """Note offsets that nobody can read any more; call it before ``consume``."""
        for gap in gaps:
            if gap.cause is GapCause.RETENTION:
                # Else the next start would meet the same gap, wider by then, and count it twice.
                self._execute(
                    "UPDATE topic_partitions SET next_offset = max(next_offset, ?) WHERE id ="
                    " (SELECT max(id) FROM topic_partitions WHERE topic = ? AND partition = ?)",
                    (gap.resumed_offset, gap.topic, gap.partition),
                )
            self._execute(
                "INSERT INTO gaps (topic, partition, expected_offset, resumed_offset, cause, at)"
                " VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (gap.topic, gap.partition, gap.expected_offset, gap.resumed_offset, gap.cause, now),
            )

    def _cursor(self, record: Record) -> _Cursor:
        place = (str(record.topic), record.topic_id, record.partition)
        known = self._cursors.get(place)
        if known is not None:
            return known
        self._execute(
            "INSERT INTO topic_partitions (topic, topic_id, partition) VALUES (?, ?, ?)"
            " ON CONFLICT DO NOTHING",
            place,
        )
        row = self._execute(
            "SELECT id, next_offset, arrived_at FROM topic_partitions"
            " WHERE topic = ? AND topic_id = ? AND partition = ?",
            place,
        ).fetchone()
        cursor = self._cursors[place] = _Cursor(*row)
        return cursor
