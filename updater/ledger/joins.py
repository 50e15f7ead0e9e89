"""Which rating belongs to which reply: the rules, and the rows that they make.

The rules depend on what an event says and on when it arrived at the broker, never on the order in
which it is read: the same events shuffled, repeated or interleaved give the same examples.

* The same interaction, or the same feedback id for it, again: ``duplicate/repeated_event``.
* Feedback that arrived more than a horizon after its interaction's event time: ``late``. An
  interaction that arrived more than a horizon after feedback for it: that feedback ``expired``.
* Of one rater's ratings of one reply the last counts (event time, then feedback id); the others
  are ``duplicate/superseded_rating``. Once it is in the weights, all others of that rater are
  ``duplicate/already_trained``.
* An interaction that no gradient follows from still joins; its feedback gets its reason.

Event times are what clients' clocks say, so they are cut at arrival, and lateness is judged by
arrival alone: a clock that is a day off cannot move a window.
"""

from __future__ import annotations

import sqlite3
import zlib
from dataclasses import dataclass

from daemon.events import Fate, Feedback, Interaction, Reason
from daemon.stream import Record
from updater.ledger.fates import Fates
from updater.ledger.schema import FeedbackState, InteractionState

_COMPRESSION_LEVEL = 1  # half of what 9 saves at a tenth of its cost

NOT_MEASURABLE = frozenset(
    {
        Reason.TOKEN_OUT_OF_VOCABULARY,
        Reason.EMPTY_COMPLETION,
        Reason.TOO_LONG,
        Reason.UNKNOWN_POLICY,
    }
)
"""Interactions that no divergence can be measured on either."""


@dataclass(frozen=True)
class Parsed:
    """A consumed record and what it turned out to be."""

    record: Record
    event: Interaction | Feedback | None
    """None: unreadable, and already acknowledged by the dead-letter topic."""
    reason: Reason = Reason.NONE
    """Unreadable: why. Readable: why no gradient follows from it, or ``NONE``."""


@dataclass(frozen=True)
class Arrival:
    """Where and when a record came in."""

    position: int
    offset: int
    at: float
    """When the broker got it, Unix seconds; never after now."""

    @classmethod
    def of(cls, record: Record, position: int, now: float) -> Arrival:
        """A record without a timestamp, or with one in the future, arrived now."""
        stamped = record.timestamp_ms / 1000 if record.timestamp_ms > 0 else now
        return cls(position, record.offset, min(stamped, now))


@dataclass(frozen=True)
class Known:
    """What a join needs of an interaction."""

    id: int
    state: InteractionState
    event_time: float
    arrived_at: float
    untrainable: Reason | None
    retained: bool


@dataclass(frozen=True)
class Rating:
    """What a join needs of a row of feedback."""

    id: int
    feedback_id: str
    rater: str
    position: int
    offset: int
    event_time: float
    arrived_at: float
    state: FeedbackState

    @property
    def order(self) -> tuple[float, str]:
        """The last of these is its rater's word."""
        return (self.event_time, self.feedback_id)


@dataclass(frozen=True)
class Ruling:
    """What becomes of one rating."""

    state: FeedbackState
    fate: Fate
    reason: Reason

    @property
    def is_head(self) -> bool:
        return self.state in (FeedbackState.READY, FeedbackState.UNUSABLE)


def rule(rating: Rating, of: Known, head: Rating | None, horizon_seconds: float) -> Ruling:
    """What becomes of ``rating`` of a known interaction. Pure.

    Args:
        head: the same rater's word so far, if any.
    """
    closed = FeedbackState.CLOSED
    if of.arrived_at > rating.arrived_at + horizon_seconds:
        return Ruling(closed, Fate.EXPIRED, Reason.NO_INTERACTION)
    if not of.retained or rating.arrived_at > of.event_time + horizon_seconds:
        return Ruling(closed, Fate.LATE, Reason.NONE)
    if head is not None and head.state is FeedbackState.TRAINED:
        return Ruling(closed, Fate.DUPLICATE, Reason.ALREADY_TRAINED)
    if head is not None and rating.order < head.order:
        return Ruling(closed, Fate.DUPLICATE, Reason.SUPERSEDED_RATING)
    if of.untrainable is not None:
        return Ruling(FeedbackState.UNUSABLE, Fate.NOT_TRAINABLE, of.untrainable)
    return Ruling(FeedbackState.READY, Fate.PENDING, Reason.NONE)


class Joins:
    """Applies the rules to the tables, inside one transaction."""

    def __init__(
        self, connection: sqlite3.Connection, fates: Fates, horizon_seconds: float
    ) -> None:
        self._execute = connection.execute
        self._fates = fates
        self._horizon_seconds = horizon_seconds

    def take(self, parsed: Parsed, arrival: Arrival) -> None:
        """One consumed record: its row in ``events``, and what follows from it."""
        match parsed.event:
            case None:
                self._fates.record(
                    arrival.position, arrival.offset, Fate.DEAD_LETTERED, parsed.reason, None
                )
            case Interaction():
                self._take_interaction(parsed.event, parsed, arrival)
            case Feedback():
                self._take_feedback(parsed.event, parsed, arrival)

    def _take_interaction(self, event: Interaction, parsed: Parsed, arrival: Arrival) -> None:
        row = self._execute(
            "SELECT id, state FROM interactions WHERE key = ?", (event.key,)
        ).fetchone()
        if row is not None and row[1] != InteractionState.AWAITED:
            self._fates.record(
                arrival.position, arrival.offset, Fate.DUPLICATE, Reason.REPEATED_EVENT, row[0]
            )
            return
        trainable = parsed.reason is Reason.NONE
        known = Known(
            id=row[0] if row else 0,
            state=InteractionState.PENDING if trainable else InteractionState.DECIDED,
            event_time=min(event.created_at, arrival.at),
            arrived_at=arrival.at,
            untrainable=None if trainable else parsed.reason,
            retained=True,
        )
        values = (
            arrival.position,
            arrival.offset,
            known.state,
            known.untrainable,
            known.event_time,
            known.arrived_at,
            min(event.policy_version, 2**63 - 1),
            len(event.prompt_token_ids) + len(event.completion_token_ids),
            parsed.reason not in NOT_MEASURABLE and len(event.completion_token_ids) > 0,
        )
        if row is None:
            (identity,) = self._execute(
                "INSERT INTO interactions (key, position, offset, state, untrainable, event_time,"
                " arrived_at, policy_version, tokens, measurable, retained)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 1) RETURNING id",
                (event.key, *values),
            ).fetchone()
        else:
            identity = known.id
            self._execute(
                "UPDATE interactions SET position = ?, offset = ?, state = ?, untrainable = ?,"
                " event_time = ?, arrived_at = ?, policy_version = ?, tokens = ?, measurable = ?,"
                " retained = 1 WHERE id = ?",
                (*values, identity),
            )
        self._keep_body("interaction_bodies", identity, parsed.record)
        fate = Fate.PENDING if trainable else Fate.NOT_TRAINABLE
        self._fates.record(arrival.position, arrival.offset, fate, parsed.reason, identity)
        if row is not None:
            for rating in self._waiting(identity):
                self._admit(rating, known)

    def _take_feedback(self, event: Feedback, parsed: Parsed, arrival: Arrival) -> None:
        known = self._interaction(event.key) or self._await_interaction(event.key, arrival)
        inserted = self._execute(
            "INSERT INTO feedback (interaction, feedback_id, rater, position, offset, event_time,"
            " arrived_at, state) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (interaction, feedback_id) DO NOTHING RETURNING id",
            (
                known.id,
                event.feedback_id,
                event.rater,
                arrival.position,
                arrival.offset,
                min(event.created_at, arrival.at),
                arrival.at,
                FeedbackState.WAITING if parsed.reason is Reason.NONE else FeedbackState.CLOSED,
            ),
        ).fetchone()
        if inserted is None:
            (first,) = self._execute(
                "SELECT id FROM feedback WHERE interaction = ? AND feedback_id = ?",
                (known.id, event.feedback_id),
            ).fetchone()
            self._fates.record(
                arrival.position, arrival.offset, Fate.DUPLICATE, Reason.REPEATED_EVENT, first
            )
            return
        (identity,) = inserted
        fate = Fate.PENDING if parsed.reason is Reason.NONE else Fate.NOT_TRAINABLE
        self._fates.record(arrival.position, arrival.offset, fate, parsed.reason, identity)
        if parsed.reason is not Reason.NONE:
            return
        self._keep_body("feedback_bodies", identity, parsed.record)
        if known.state is InteractionState.AWAITED:
            self._execute(
                "UPDATE interactions SET event_time = max(event_time, ?) WHERE id = ?",
                (arrival.at, known.id),
            )
            return
        rating = Rating(
            id=identity,
            feedback_id=event.feedback_id,
            rater=event.rater,
            position=arrival.position,
            offset=arrival.offset,
            event_time=min(event.created_at, arrival.at),
            arrived_at=arrival.at,
            state=FeedbackState.WAITING,
        )
        self._admit(rating, known)

    def _admit(self, rating: Rating, known: Known) -> None:
        """Give a rating of a known interaction its place."""
        head = self._head(known.id, rating.rater)
        ruling = rule(rating, known, head, self._horizon_seconds)
        if ruling.is_head and head is not None:
            self._unseat(head, known)
        self._execute(
            "UPDATE feedback SET state = ?, head = ? WHERE id = ?",
            (ruling.state, ruling.is_head, rating.id),
        )
        if ruling.fate is not Fate.PENDING:
            self._fates.move(rating.position, rating.offset, ruling.fate, ruling.reason)
        if ruling.state is FeedbackState.READY:
            self._execute(
                "UPDATE interactions SET open_ratings = open_ratings + 1 WHERE id = ?", (known.id,)
            )
        else:
            self._execute("DELETE FROM feedback_bodies WHERE id = ?", (rating.id,))

    def _unseat(self, head: Rating, known: Known) -> None:
        """A later rating takes the head's place; what was decided of the old one stays."""
        if head.state not in (FeedbackState.READY, FeedbackState.UNUSABLE):
            self._execute("UPDATE feedback SET head = 0 WHERE id = ?", (head.id,))
            return
        self._execute(
            "UPDATE feedback SET head = 0, state = ? WHERE id = ?", (FeedbackState.CLOSED, head.id)
        )
        self._fates.move(head.position, head.offset, Fate.DUPLICATE, Reason.SUPERSEDED_RATING)
        if head.state is FeedbackState.READY:
            self._execute("DELETE FROM feedback_bodies WHERE id = ?", (head.id,))
            self._execute(
                "UPDATE interactions SET open_ratings = open_ratings - 1 WHERE id = ?", (known.id,)
            )

    def _interaction(self, key: str) -> Known | None:
        row = self._execute(
            "SELECT id, state, event_time, arrived_at, untrainable, retained"
            " FROM interactions WHERE key = ?",
            (key,),
        ).fetchone()
        if row is None:
            return None
        identity, state, event_time, arrived_at, untrainable, retained = row
        return Known(
            identity,
            InteractionState(state),
            event_time,
            arrived_at,
            None if untrainable is None else Reason(untrainable),
            bool(retained),
        )

    def _await_interaction(self, key: str, arrival: Arrival) -> Known:
        """A row that feedback can wait at until its interaction is read."""
        (identity,) = self._execute(
            "INSERT INTO interactions (key, state, event_time, arrived_at, policy_version, tokens,"
            " measurable, retained) VALUES (?, ?, ?, ?, 0, 0, 0, 0) RETURNING id",
            (key, InteractionState.AWAITED, arrival.at, arrival.at),
        ).fetchone()
        return Known(identity, InteractionState.AWAITED, arrival.at, arrival.at, None, False)

    def _waiting(self, interaction: int) -> list[Rating]:
        return self._ratings("interaction = ? AND state = 'waiting'", (interaction,))

    def _head(self, interaction: int, rater: str) -> Rating | None:
        found = self._ratings("interaction = ? AND rater = ? AND head = 1", (interaction, rater))
        return found[0] if found else None

    def _ratings(self, condition: str, parameters: tuple[int | str, ...]) -> list[Rating]:
        rows = self._execute(
            "SELECT id, feedback_id, rater, position, offset, event_time, arrived_at, state"
            f" FROM feedback WHERE {condition}",
            parameters,
        )
        return [
            Rating(a, b, c, d, e, f, g, FeedbackState(state)) for a, b, c, d, e, f, g, state in rows
        ]

    def _keep_body(self, table: str, identity: int, record: Record) -> None:
        self._execute(
            f"INSERT INTO {table} (id, body) VALUES (?, ?)",
            (identity, zlib.compress(record.value or b"", _COMPRESSION_LEVEL)),
        )
