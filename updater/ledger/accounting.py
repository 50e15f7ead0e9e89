"""The accounting: every consumed record has one fate, and nothing else has one."""

from __future__ import annotations

import sqlite3
from collections import Counter
from dataclasses import dataclass
from typing import Any

from moorline.events import Fate, Reason


@dataclass(frozen=True)
class Accounting:
    """Where every consumed record is now."""

    events: dict[str, dict[Fate, dict[Reason, int]]]
    """topic -> fate -> reason -> events."""
    consumed: dict[str, int]
    """topic -> records consumed, counted apart from the fates."""
    missed: dict[str, int]
    """topic -> offsets that could not be read (gaps)."""

    @property
    def fates(self) -> dict[str, dict[Fate, int]]:
        """topic -> fate -> events."""
        return {
            topic: {fate: sum(reasons.values()) for fate, reasons in fates.items()}
            for topic, fates in self.events.items()
        }

    @property
    def total(self) -> int:
        """Events with a fate."""
        return sum(sum(fates.values()) for fates in self.fates.values())

    @property
    def balanced(self) -> bool:
        """Whether, topic by topic, every consumed record has exactly one fate."""
        return all(
            sum(self.fates.get(topic, {}).values()) == consumed
            for topic, consumed in self.consumed.items()
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON: ``{"fates": {every fate: n}, "topics": {topic: {fate: n}}, "total": n...}``."""
        by_topic = self.fates
        return {
            "fates": {
                str(fate): sum(fates.get(fate, 0) for fates in by_topic.values()) for fate in Fate
            },
            "topics": {
                topic: {str(fate): n for fate, n in fates.items()}
                for topic, fates in by_topic.items()
            },
            "reasons": {
                topic: {
                    str(fate): {str(reason): n for reason, n in reasons.items()}
                    for fate, reasons in fates.items()
                }
                for topic, fates in self.events.items()
            },
            "consumed": dict(self.consumed),
            "missed": dict(self.missed),
            "total": self.total,
            "balanced": self.balanced,
        }


def read_accounting(connection: sqlite3.Connection) -> Accounting:
    """From the kept totals: costs the same however many events there are."""
    events: dict[str, dict[Fate, dict[Reason, int]]] = {}
    for topic, fate, reason, n in connection.execute(
        "SELECT p.topic, t.fate, t.reason, sum(t.events) FROM totals t"
        " JOIN topic_partitions p ON p.id = t.topic_partition WHERE t.events > 0"
        " GROUP BY p.topic, t.fate, t.reason ORDER BY p.topic, t.fate, t.reason"
    ):
        events.setdefault(topic, {}).setdefault(Fate(fate), {})[Reason(reason)] = n
    consumed = dict(
        connection.execute(
            "SELECT topic, sum(consumed) FROM topic_partitions GROUP BY topic"
        ).fetchall()
    )
    missed = dict(
        connection.execute(
            "SELECT topic, sum(max(0, resumed_offset - expected_offset)) FROM gaps GROUP BY topic"
        ).fetchall()
    )
    return Accounting(events, consumed, missed)


def audit(connection: sqlite3.Connection) -> list[str]:
    """Recount from the rows themselves. Reads the whole ledger: for an operator, not for a cycle.

    Returns:
        One line for each difference; empty when there is none.
    """
    differences = []
    counted = Counter(
        {
            (topic_partition, fate, reason): n
            for topic_partition, fate, reason, n in connection.execute(
                "SELECT topic_partition, fate, reason, count(*) FROM events GROUP BY 1, 2, 3"
            )
        }
    )
    kept = Counter(
        {
            (topic_partition, fate, reason): n
            for topic_partition, fate, reason, n in connection.execute(
                "SELECT topic_partition, fate, reason, events FROM totals"
            )
        }
    )
    for name in sorted(counted.keys() | kept.keys()):
        if counted[name] != kept[name]:
            topic_partition, fate, reason = name
            differences.append(
                f"topic partition {topic_partition} {fate}/{reason}: {counted[name]} rows,"
                f" total {kept[name]}"
            )
    for question, what in _NEVER:
        (n,) = connection.execute(question).fetchone()
        if n:
            differences.append(f"{n} {what}")
    return differences


_NEVER = (
    (
        "SELECT count(*) FROM topic_partitions p WHERE consumed <>"
        " (SELECT count(*) FROM events WHERE topic_partition = p.id)",
        "partitions whose consumed records differ from their events",
    ),
    (
        "SELECT count(*) FROM interactions i WHERE open_ratings <> (SELECT count(*) FROM feedback"
        " WHERE interaction = i.id AND latest = 1 AND state = 'ready')",
        "interactions with a wrong number of open ratings",
    ),
    (
        "SELECT abs((SELECT count(*) FROM interactions WHERE open_ratings > 0)"
        " - (SELECT CAST(value AS INTEGER) FROM meta WHERE name = 'ready_examples'))",
        "difference in the number of ready examples",
    ),
    (
        "SELECT count(*) FROM interactions i JOIN events e ON e.topic_partition = i.topic_partition"
        " AND e.offset = i.offset WHERE (e.fate = 'pending') <> (i.state = 'pending')",
        "interactions whose state and fate disagree",
    ),
    (
        "SELECT count(*) FROM feedback f JOIN events e ON e.topic_partition = f.topic_partition"
        " AND e.offset = f.offset WHERE (e.fate = 'pending') <> (f.state IN ('waiting', 'ready'))",
        "ratings whose state and fate disagree",
    ),
    (
        "SELECT count(*) FROM interactions i WHERE (state <> 'awaited' AND retained = 1) <>"
        " EXISTS (SELECT 1 FROM interaction_bodies WHERE id = i.id)",
        "interactions whose body is missing or was kept too long",
    ),
    (
        "SELECT count(*) FROM feedback f JOIN interactions i ON i.id = f.interaction WHERE"
        " CASE WHEN EXISTS (SELECT 1 FROM feedback_bodies WHERE id = f.id)"
        " THEN NOT (f.state IN ('waiting', 'ready') OR f.state = 'trained' AND i.retained = 1)"
        " ELSE f.state IN ('waiting', 'ready') END",
        "ratings whose body is missing or was kept too long",
    ),
    (
        "SELECT count(*) FROM feedback WHERE state = 'ready' AND latest = 0",
        "ready ratings that are not their rater's last word",
    ),
    (
        "SELECT count(*) FROM feedback WHERE retracts = 1 AND state IN ('ready', 'trained')",
        "retractions that are learned from",
    ),
    (
        "SELECT count(*) FROM interactions i WHERE open_preferences <> (SELECT count(*)"
        " FROM feedback WHERE over IS NOT NULL AND state IN ('waiting', 'ready')"
        " AND (interaction = i.id OR over = i.id))",
        "interactions with a wrong number of open preferences",
    ),
    (
        "SELECT count(*) FROM feedback f WHERE state = 'ready' AND over IS NOT NULL"
        " AND NOT EXISTS (SELECT 1 FROM interaction_bodies WHERE id = f.over)",
        "ready preferences whose lost reply was not kept",
    ),
    (
        "SELECT count(*) FROM interactions i WHERE (state <> 'awaited' AND retained = 1 AND"
        " untrainable IS NULL) <> EXISTS (SELECT 1 FROM behaviour_policies WHERE interaction ="
        " i.id)",
        "interactions whose behaviour policies are missing or were kept too long",
    ),
    (
        "SELECT count(*) FROM interactions WHERE (state = 'erased') <>"
        " (topic_partition IS NOT NULL AND subject IS NULL)",
        "interactions that are erased and belong to somebody, or to nobody and are not",
    ),
    (
        "SELECT (SELECT count(*) FROM interaction_bodies WHERE key IN doomed_keys)"
        " + (SELECT count(*) FROM feedback_bodies WHERE key IN doomed_keys)",
        "bodies whose key is about to be destroyed",
    ),
    (
        "SELECT count(*) FROM crash_counts WHERE interaction NOT IN (SELECT id FROM interactions)",
        "crashes counted for replies that are not here",
    ),
    (
        "SELECT count(*) FROM refused_counts WHERE interaction NOT IN"
        " (SELECT id FROM interactions)",
        "refused candidates counted for replies that are not here",
    ),
    (
        "SELECT count(*) FROM (SELECT 1 FROM events WHERE fate = 'trained'"
        " AND (decided_by IS NULL OR decided_by NOT IN (SELECT version FROM releases)))",
        "trained events without their release",
    ),
)
