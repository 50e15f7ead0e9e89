"""Answers for an auditor: what was consumed where, and what is behind a release.

Questions of an operator, not of a cycle: some of them read a whole table. None touches a body.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moorline.events import Erasure, Fate, Release
from moorline.stream import GapCause, Topic
from updater.ledger.anchors import Anchor
from updater.ledger.database import Database, LedgerError
from updater.ledger.erasure import Forgotten, concerned, last_clean_version, taught_versions
from updater.ledger.history import Histories

_CHUNK = 10_000


@dataclass(frozen=True)
class Consumed:
    """A partition, as far as the ledger has read it."""

    topic_partition: int
    """Its row."""
    topic: Topic
    topic_id: str
    partition: int
    next_offset: int
    events: int


@dataclass(frozen=True)
class Lineage:
    """What a release learned from, and from whom."""

    release: Release
    ancestors: tuple[Release, ...]
    """Parent first, down to the release after the base model."""
    examples: tuple[tuple[str, str], ...]
    """(example id, interaction key)."""
    events: dict[str, int]
    """topic -> events that ended in it."""
    raters: int
    """Different ones among the feedback whose rows are still here."""
    revoked: bool = False
    """For an erasure: what it had learned from is erased, or waits to be learned from again."""
    anchors: tuple[Anchor, ...] = ()
    """Every policy that a person made the anchor of the line, oldest first."""


class LedgerInspector(Histories):
    """A ledger, opened read-only, also while an updater writes it."""

    def __init__(self, path: Path) -> None:
        """Open it.

        Raises:
            LedgerError: there is none, or it cannot be read.
        """
        super().__init__(Database(path, readonly=True))

    # --- for the audit ----------------------------------------------------------------------

    def consumed(self) -> list[Consumed]:
        """Every partition of every incarnation of a topic, oldest incarnation first."""
        return [
            Consumed(row[0], Topic(row[1]), *row[2:])
            for row in self._database.rows(
                "SELECT id, topic, topic_id, partition, next_offset, consumed FROM topic_partitions"
                " WHERE topic <> ? ORDER BY id",
                Topic.ERASURES,  # instructions, compacted by the broker
            )
        ]

    def event_offsets(self, topic_partition: int, start: int, stop: int) -> Iterator[int]:
        """Offsets in [start, stop) that have a fate, ascending; holds no lock between chunks."""
        while True:
            rows = self._database.rows(
                "SELECT offset FROM events WHERE topic_partition = ? AND offset >= ? AND offset < ?"
                " ORDER BY offset LIMIT ?",
                topic_partition,
                start,
                stop,
                _CHUNK,
            )
            yield from (offset for (offset,) in rows)
            if len(rows) < _CHUNK:
                return
            start = rows[-1][0] + 1

    def count_events(self, topic_partition: int, stop: int) -> int:
        """Events before ``stop``."""
        ((n,),) = self._database.rows(
            "SELECT count(*) FROM events WHERE topic_partition = ? AND offset < ?",
            topic_partition,
            stop,
        )
        return int(n)

    def first_offset(self, topic_partition: int) -> int | None:
        """The first event's."""
        ((first,),) = self._database.rows(
            "SELECT min(offset) FROM events WHERE topic_partition = ?", topic_partition
        )
        return None if first is None else int(first)

    def missed(self, topic: Topic, partition: int) -> list[tuple[int, int]]:
        """[expected, resumed) ranges of the newest incarnation that retention had removed."""
        return [
            (expected, resumed)
            for expected, resumed in self._database.rows(
                "SELECT expected_offset, resumed_offset FROM gaps WHERE topic = ?1 AND"
                " partition = ?2 AND cause = ?3 AND id > coalesce((SELECT max(id) FROM gaps"
                " WHERE topic = ?1 AND partition = ?2 AND cause <> ?3), 0) ORDER BY id",
                topic,
                partition,
                GapCause.RETENTION,
            )
        ]

    # --- for an erasure ---------------------------------------------------------------------

    def would_forget(self, erasure: Erasure) -> Forgotten:
        """What an erasure would do now. Reads whole tables."""
        with self._database.snapshot() as connection:
            rows = concerned(connection, erasure)
            taught = taught_versions(connection, erasure)
            feedback = set(rows.feedback)
            for reply in rows.interactions:
                feedback.update(
                    identity
                    for (identity,) in connection.execute(
                        "SELECT id FROM feedback WHERE (interaction = ?1 OR over = ?1)"
                        " AND state <> 'erased'",
                        (reply,),
                    )
                )
        live = self.live_version()
        ancestor = last_clean_version(live, taught, self.release)
        revoke = erasure.revoke and ancestor != live
        return Forgotten(len(rows.interactions), len(feedback), taught, ancestor, revoke)

    # --- one release ------------------------------------------------------------------------

    def lineage(self, version: int) -> Lineage:
        """Everything that made a release.

        Raises:
            LedgerError: there is no such release.
        """
        release = self.release(version)
        if release is None:
            raise LedgerError(f"there is no release {version}: see `moorline releases`")
        ancestors: list[Release] = []
        parent = self.release(release.parent) if release.parent else None
        while parent is not None:
            ancestors.append(parent)
            parent = self.release(parent.parent) if parent.parent else None
        events = self._database.rows(
            "SELECT p.topic, count(*) FROM events e JOIN topic_partitions p ON p.id ="
            " e.topic_partition"
            " WHERE e.decided_by = ? AND e.fate = ? GROUP BY p.topic ORDER BY p.topic",
            version,
            Fate.TRAINED,
        )
        ((raters,),) = self._database.rows(
            "SELECT count(DISTINCT f.rater) FROM events e JOIN topic_partitions p ON p.id ="
            " e.topic_partition"
            " JOIN feedback f ON f.id = e.subject AND f.topic_partition = e.topic_partition"
            " AND f.offset = e.offset WHERE e.decided_by = ? AND e.fate = ? AND p.topic = ?"
            " AND f.rater <> ''",
            version,
            Fate.TRAINED,
            Topic.FEEDBACK,
        )
        return Lineage(
            release,
            tuple(ancestors),
            tuple(self.trained_examples(version)),
            dict(events),
            int(raters),
            revoked=version in self.revoked_versions(),
            anchors=tuple(self.anchors()),
        )
