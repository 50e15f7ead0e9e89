"""One event's history: when it was read, what it joined, where it ended, and what decided that.

Made of the rows that hold no body: it cannot show what anybody wrote.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from moorline.events import Decision, Divergence, Fate, Reason, Verdict
from moorline.stream import Topic
from updater.ledger.database import LedgerError
from updater.ledger.reader import LedgerReader


@dataclass(frozen=True)
class Place:
    """Where a record lies."""

    topic: str
    partition: int
    offset: int
    topic_id: str = ""

    def __str__(self) -> str:
        return f"{self.topic}/{self.partition}/{self.offset}"


@dataclass(frozen=True)
class Outcome:
    """The release or rejected candidate that decided an event."""

    name: str
    """``assistant@v000042``, or ``rejection 3``."""
    at: float
    """Unix seconds."""
    parent: int | None
    examples: int
    reason: Reason
    divergences: tuple[Divergence, ...]
    verdict: Decision | None
    checks_passed: int
    checks_failed: tuple[str, ...]
    """Names."""
    cause: str = ""
    """Why nothing was judged: where the update raised, or how often the updater died of it."""


@dataclass(frozen=True)
class Joined:
    """The other side of a join."""

    name: str
    """An interaction's key, or a feedback id."""
    rater: str | None
    aspect: str | None
    """What feedback speaks of; None for a reply."""
    arrived_at: float | None
    """None: it was not read yet."""
    fate: Fate | None
    reason: Reason


@dataclass(frozen=True)
class EventHistory:
    """One consumed record, from its arrival to its end."""

    kind: str
    """interaction, feedback, dead letter, or forgotten (only its fate is left)."""
    place: Place
    fate: Fate
    reason: Reason
    name: str | None = None
    rater: str | None = None
    aspect: str | None = None
    event_time: float | None = None
    """When it happened by its client's clock, cut at arrival, Unix seconds."""
    arrived_at: float | None = None
    state: str | None = None
    first: Place | None = None
    """The record that counts, where this one repeats it."""
    repeats: tuple[Place, ...] = ()
    """Records that said the same again."""
    joined: tuple[Joined, ...] = ()
    outcome: Outcome | None = None
    example_id: str | None = None


class Histories(LedgerReader):
    """A ledger that can be asked for one event."""

    def histories(self, asked: str) -> list[EventHistory]:
        """Known under an interaction id, a key, a feedback id, or topic/partition/offset."""
        found = [
            self._history(*place)
            for place in [
                *self._place_of_record(asked),
                *self._places_of_interaction(asked),
                *self._places_of_feedback(asked),
            ]
        ]
        return list(dict.fromkeys(found))

    def decided_examples(self, key: str) -> list[tuple[str, Fate, Reason, int | None]]:
        """(example id, fate, reason, decided by) of a reply, also of one long forgotten."""
        return [
            (example_id, Fate(fate), Reason(reason), decided_by)
            for example_id, fate, reason, decided_by in self._database.rows(
                "SELECT example_id, fate, reason, decided_by FROM decisions"
                f" WHERE {_KEY_MATCHES} ORDER BY example_id",
                *_key_range(key),
            )
        ]

    def awaiting(self, asked: str) -> list[str]:
        """Feedback ids that wait for an interaction which was not read yet."""
        return [
            feedback_id
            for (feedback_id,) in self._database.rows(
                "SELECT f.feedback_id FROM interactions i JOIN feedback f ON f.interaction = i.id"
                " OR f.over = i.id"
                f" WHERE i.topic_partition IS NULL AND {_KEY_MATCHES} ORDER BY f.id",
                *_key_range(asked),
            )
        ]

    def _place_of_record(self, asked: str) -> list[tuple[int, int]]:
        topic, _, rest = asked.rpartition("/")
        topic, _, partition = topic.rpartition("/")
        if not (topic and _is_number(partition) and _is_number(rest)):
            return []
        return self._places(
            "SELECT e.topic_partition, e.offset FROM topic_partitions p JOIN events e ON"
            " e.topic_partition = p.id"
            " WHERE p.topic = ? AND p.partition = ? AND e.offset = ? ORDER BY p.id",
            topic,
            int(partition),
            int(rest),
        )

    def _places_of_interaction(self, asked: str) -> list[tuple[int, int]]:
        return self._places(
            f"SELECT topic_partition, offset FROM interactions i WHERE {_KEY_MATCHES}"
            " AND topic_partition IS NOT NULL ORDER BY i.key",
            *_key_range(asked),
        )

    def _places_of_feedback(self, asked: str) -> list[tuple[int, int]]:
        return self._places(
            "SELECT topic_partition, offset FROM feedback WHERE feedback_id = ? ORDER BY id", asked
        )

    def _places(self, sql: str, *parameters: Any) -> list[tuple[int, int]]:
        return [
            (topic_partition, offset)
            for topic_partition, offset in self._database.rows(sql, *parameters)
        ]

    def _history(self, topic_partition: int, offset: int) -> EventHistory:
        rows = self._database.rows(
            "SELECT p.topic, p.partition, p.topic_id, e.fate, e.reason, e.decided_by, e.subject"
            " FROM events e JOIN topic_partitions p ON p.id = e.topic_partition"
            " WHERE e.topic_partition = ? AND e.offset = ?",
            topic_partition,
            offset,
        )
        if not rows:
            raise LedgerError("a row has no event: run `moorline audit`")
        topic, partition, topic_id, fate, reason, decided_by, subject = rows[0]
        known: dict[str, Any] = {
            "place": Place(topic, partition, offset, topic_id),
            "fate": Fate(fate),
            "reason": Reason(reason),
            "outcome": self._outcome(Fate(fate), decided_by),
        }
        if known["fate"] is Fate.DEAD_LETTERED:
            return EventHistory("dead letter", **known)
        row = self._subject(topic, subject, topic_partition, offset, known["reason"])
        if row is None:
            return EventHistory("forgotten", **known)
        if row["place"] != (topic_partition, offset):
            known["first"] = Place(topic, partition, row["place"][1], topic_id)
        else:
            known["repeats"] = self._repeats(topic, subject, offset)
            known["example_id"] = self._example_id(row["key"], known["fate"], decided_by)
        return EventHistory(
            row["kind"],
            **known,
            name=row["name"],
            rater=row["rater"],
            aspect=row["aspect"],
            event_time=row["event_time"],
            arrived_at=row["arrived_at"] if "first" not in known else None,
            state=row["state"],
            joined=row["joined"],
        )

    def _subject(
        self, topic: str, subject: int | None, topic_partition: int, offset: int, reason: Reason
    ) -> dict[str, Any] | None:
        """The row that an event belongs to; None when it was pruned."""
        is_reply = topic == Topic.INTERACTIONS
        rows = self._database.rows(
            "SELECT i.topic_partition, i.offset, i.key, i.key, NULL, NULL, i.event_time,"
            " i.arrived_at,"
            " i.state, i.id, NULL FROM interactions i WHERE i.id = ?"
            if is_reply
            else "SELECT f.topic_partition, f.offset, i.key, f.feedback_id, f.rater, f.aspect,"
            " f.event_time, f.arrived_at, f.state, i.id, f.over FROM feedback f JOIN interactions i"
            " ON i.id = f.interaction WHERE f.id = ?",
            subject,
        )
        # A number may have been used again after its row was pruned.
        if not rows or (
            rows[0][:2] != (topic_partition, offset) and reason != Reason.REPEATED_EVENT
        ):
            return None
        *place, key, name, rater, aspect, event_time, arrived_at, state, reply, over = rows[0]
        return {
            "kind": "interaction" if is_reply else "feedback",
            "key": key,
            "name": name,
            "rater": rater,
            "aspect": aspect,
            "event_time": event_time,
            "arrived_at": arrived_at,
            "state": state,
            "place": tuple(place),
            "joined": self._feedback_of(reply) if is_reply else self._replies(reply, over),
        }

    def _feedback_of(self, interaction: int) -> tuple[Joined, ...]:
        return tuple(
            Joined(name, rater, aspect, arrived_at, Fate(fate), Reason(reason))
            for name, rater, aspect, arrived_at, fate, reason in self._database.rows(
                "SELECT f.feedback_id, f.rater, f.aspect, f.arrived_at, e.fate, e.reason"
                " FROM feedback f JOIN events e ON e.topic_partition = f.topic_partition AND"
                " e.offset = f.offset"
                " WHERE f.interaction = ?1 OR f.over = ?1 ORDER BY f.arrived_at, f.id",
                interaction,
            )
        )

    def _replies(self, interaction: int, over: int | None) -> tuple[Joined, ...]:
        """The reply that feedback is on, and the other one that a preference names."""
        return tuple(
            Joined(
                key,
                None,
                None,
                arrived_at if fate else None,
                Fate(fate) if fate else None,
                Reason(reason or Reason.NONE),
            )
            for key, arrived_at, fate, reason in self._database.rows(
                "SELECT i.key, i.arrived_at, e.fate, e.reason FROM interactions i LEFT JOIN events"
                " e ON e.topic_partition = i.topic_partition AND e.offset = i.offset WHERE i.id"
                " IN (?, ?)"
                " ORDER BY i.id = ?1 DESC",
                interaction,
                over,
            )
        )

    def _repeats(self, topic: str, subject: int, first: int) -> tuple[Place, ...]:
        return tuple(
            Place(topic, partition, offset, topic_id)
            for partition, offset, topic_id in self._database.rows(
                "SELECT p.partition, e.offset, p.topic_id FROM topic_partitions p JOIN events e"
                " ON e.topic_partition = p.id WHERE p.topic = ? AND e.subject = ? AND e.offset <> ?"
                " AND e.reason = ? ORDER BY p.id, e.offset",
                topic,
                subject,
                first,
                Reason.REPEATED_EVENT,
            )
        )

    def _example_id(self, key: str, fate: Fate, decided_by: int | None) -> str | None:
        if decided_by is None:
            return None
        rows = self._database.rows(
            "SELECT example_id FROM decisions WHERE decided_by = ? AND fate = ? AND key = ?",
            decided_by,
            fate,
            key,
        )
        return rows[0][0] if rows else None

    def _outcome(self, fate: Fate, decided_by: int | None) -> Outcome | None:
        if decided_by is None:
            return None
        if fate is Fate.TRAINED:
            release = self.release(decided_by)
            if release is None:
                raise LedgerError(f"release {decided_by} is missing: run `moorline audit`")
            return _outcome(
                release.name,
                release.created_at,
                release.parent,
                release.examples,
                Reason.NONE,
                release.divergences,
                release.verdict,
            )
        rows = self._database.rows(
            "SELECT at, parent, examples, reason, record FROM rejections WHERE id = ?", decided_by
        )
        if fate is not Fate.REJECTED or not rows:
            return None
        at, parent, examples, reason, record = rows[0]
        told = json.loads(record)
        return _outcome(
            f"rejection {decided_by}",
            at,
            parent,
            examples,
            Reason(reason),
            tuple(Divergence.model_validate(one) for one in told.get("divergences") or ()),
            Verdict.model_validate(told["verdict"]) if told.get("verdict") else None,
            told.get("cause") or "",
        )


_KEY_MATCHES = "(key = ? OR (key >= ? AND key < ?))"


def _is_number(text: str) -> bool:
    """Whether SQLite can hold it."""
    return text.isdecimal() and len(text) <= 18


def _key_range(asked: str) -> tuple[str, str, str]:
    """A key itself, and the keys of all choices of a reply."""
    return asked, f"{asked}/", f"{asked}0"  # "0" follows "/"


def _outcome(
    name: str,
    at: float,
    parent: int | None,
    examples: int,
    reason: Reason,
    divergences: tuple[Divergence, ...],
    verdict: Verdict | None,
    cause: str = "",
) -> Outcome:
    checks = verdict.checks if verdict else ()
    return Outcome(
        name,
        at,
        parent,
        examples,
        reason,
        divergences,
        verdict.decision if verdict else None,
        sum(check.passed for check in checks),
        tuple(check.name for check in checks if not check.passed),
        cause,
    )
