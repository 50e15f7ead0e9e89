"""Joins every consumed record to what it belongs to, as the rules say."""

from __future__ import annotations

import sqlite3
from dataclasses import fields
from typing import Literal

from moorline.events import Erasure, Fate, Feedback, Interaction, Reason, user_digest
from updater.ledger.bodies import Bodies
from updater.ledger.erasure_markers import ErasureMarkers
from updater.ledger.fates import Fates
from updater.ledger.keys import KeyRing
from updater.ledger.rules import Arrival, Known, Parsed, Rating, Ruling, prompt_digest, rule
from updater.ledger.schema import FeedbackState, InteractionState

_AWAITED = InteractionState.AWAITED
_ERASED = Ruling(FeedbackState.ERASED, Fate.ERASED, Reason.NONE)

NOT_MEASURABLE = frozenset(
    {
        Reason.TOKEN_OUT_OF_VOCABULARY,
        Reason.EMPTY_PROMPT,
        Reason.MULTIMODAL_PROMPT,
        Reason.EMPTY_COMPLETION,
        Reason.TOO_LONG,
        Reason.UNKNOWN_POLICY,
        Reason.UPDATE_CRASHED,
    }
)
"""Interactions that no divergence can be measured on either."""


_OF_A_RATING = tuple(field.name for field in fields(Rating) if field.name != "state")
"""Columns of ``feedback`` under the names of the fields."""


class Joins:
    """Applies the rules to the tables, inside one transaction."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        fates: Fates,
        keys: KeyRing,
        erasure_markers: ErasureMarkers,
        horizon_seconds: float,
    ) -> None:
        self._execute = connection.execute
        self._fates = fates
        self._keys = keys
        self._bodies = Bodies(connection, keys)
        self._erasure_markers = erasure_markers
        self._horizon_seconds = horizon_seconds

    def add_event(self, parsed: Parsed, arrival: Arrival) -> None:
        """Give a consumed record its row in ``events``, and join it to what it belongs to."""
        match parsed.event:
            case Erasure():
                raise TypeError("an erasure is an instruction, not an event: see Intake")
            case None:
                self._fates.record(
                    arrival.topic_partition, arrival.offset, Fate.DEAD_LETTERED, parsed.reason, None
                )
            case Interaction():
                self._add_interaction(parsed.event, parsed, arrival)
            case Feedback():
                self._add_feedback(parsed.event, parsed, arrival)

    def _add_interaction(self, event: Interaction, parsed: Parsed, arrival: Arrival) -> None:
        row = self._execute(
            "SELECT id, state FROM interactions WHERE key = ?", (event.key,)
        ).fetchone()
        if row is not None and row[1] != _AWAITED:
            self._record_repeat(arrival, row[0])
            return
        erased = self._erasure_markers.cover(event, min(event.created_at, arrival.at))
        subject, key = (None, 0) if erased else self._subject(event)
        identity = self._write_interaction(event, parsed, arrival, subject)
        fate, reason = Fate.ERASED, Reason.NONE
        if not erased:
            self._bodies.write_body("interaction", identity, parsed.record.value or b"", key)
            fate = Fate.PENDING if parsed.reason is Reason.NONE else Fate.NOT_TRAINABLE
            reason = parsed.reason
        self._fates.record(arrival.topic_partition, arrival.offset, fate, reason, identity)
        if row is not None:
            for rating in self._waiting(identity):
                self._admit_if_known(rating)

    def _record_repeat(self, arrival: Arrival, first: int) -> None:
        self._fates.record(
            arrival.topic_partition, arrival.offset, Fate.DUPLICATE, Reason.REPEATED_EVENT, first
        )

    def _subject(self, event: Interaction) -> tuple[int, int]:
        """Its row of ``subjects``, and the key for its body: the user's, or one of its own."""
        user = user_digest(event.users[0]) if event.users else ""
        row = self._execute(
            "SELECT id, key FROM subjects WHERE tenant = ? AND user = ?", (event.tenant, user)
        ).fetchone()
        if row is not None and row[1] is not None:
            return row[0], row[1]
        key = self._keys.new()
        (subject,) = self._execute(
            "INSERT INTO subjects (tenant, user, key) VALUES (?, ?, ?)"
            " ON CONFLICT DO UPDATE SET key = excluded.key RETURNING id",
            (event.tenant, user, key if user else None),
        ).fetchone()
        return subject, key

    def _write_interaction(
        self, event: Interaction, parsed: Parsed, arrival: Arrival, subject: int | None
    ) -> int:
        """Its row, over that of an awaited one if there is one; returns ``interactions.id``.

        Args:
            subject: None: it was erased before it came.
        """
        erased = subject is None
        if event.pseudonym_key is not None:
            self._execute(
                "INSERT INTO pseudonym_keys VALUES (?, ?) ON CONFLICT DO UPDATE SET"
                " last_arrival = max(last_arrival, excluded.last_arrival)",
                (event.pseudonym_key, arrival.at),
            )
        trainable = parsed.reason is Reason.NONE and not erased
        length = len(event.completion_token_ids)
        state = InteractionState.PENDING if trainable else InteractionState.DECIDED
        row = {
            "key": event.key,
            "subject": subject,
            "topic_partition": arrival.topic_partition,
            "offset": arrival.offset,
            "state": InteractionState.ERASED if erased else state,
            "untrainable": None if trainable or erased else parsed.reason,
            "event_time": min(event.created_at, arrival.at),
            "arrived_at": arrival.at,
            "prompt": None if erased else prompt_digest(event.prompt_token_ids),
            "tokens": len(event.prompt_token_ids) + length,
            "measurable": parsed.reason not in NOT_MEASURABLE and length > 0,
            "retained": not erased,
        }
        assignments = ", ".join(f"{name} = excluded.{name}" for name in row)
        (identity,) = self._execute(
            f"INSERT INTO interactions ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})"
            f" ON CONFLICT (key) DO UPDATE SET {assignments} RETURNING id",
            tuple(row.values()),
        ).fetchone()
        if not erased:
            for user in event.users[1:]:
                self._execute(
                    "INSERT OR IGNORE INTO other_users (user, interaction) VALUES (?, ?)",
                    (user_digest(user), identity),
                )
        if trainable:
            for version in {min(span.version, 2**63 - 1) for span in event.policy_spans}:
                self._execute(
                    "INSERT INTO behaviour_policies (interaction, version) VALUES (?, ?)",
                    (identity, version),
                )
        return int(identity)

    def _add_feedback(self, event: Feedback, parsed: Parsed, arrival: Arrival) -> None:
        of = self._known_or_awaited(event.key, arrival)
        over = None if event.over_key is None else self._known_or_awaited(event.over_key, arrival)
        event_time = min(event.created_at, arrival.at)
        if self._erasure_markers.cover(event, event_time):
            state, fate, reason = FeedbackState.ERASED, Fate.ERASED, Reason.NONE
        elif parsed.reason is Reason.NONE:
            state, fate, reason = FeedbackState.WAITING, Fate.PENDING, Reason.NONE
        else:
            state, fate, reason = FeedbackState.CLOSED, Fate.NOT_TRAINABLE, parsed.reason
        row = (
            of.id,
            None if over is None else over.id,
            event.feedback_id,
            "" if state is FeedbackState.ERASED else event.rater,
            event.aspect,
            arrival.topic_partition,
            arrival.offset,
            event_time,
            arrival.at,
            state,
        )
        inserted = self._execute(
            "INSERT INTO feedback (interaction, over, feedback_id, rater, aspect,"
            " topic_partition, offset,"
            " event_time, arrived_at, state) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (interaction, feedback_id) DO NOTHING RETURNING id",
            row,
        ).fetchone()
        if inserted is None:
            (first,) = self._execute(
                "SELECT id FROM feedback WHERE interaction = ? AND feedback_id = ?",
                (of.id, event.feedback_id),
            ).fetchone()
            self._record_repeat(arrival, first)
            return
        (identity,) = inserted
        self._fates.record(arrival.topic_partition, arrival.offset, fate, reason, identity)
        if state is not FeedbackState.WAITING:
            return
        self._bodies.write_body("feedback", identity, parsed.record.value or b"", self._keys.new())
        self._execute(
            "UPDATE interactions SET event_time = max(event_time, ?)"
            " WHERE id IN (?, ?) AND state = 'awaited'",
            (arrival.at, *row[:2]),
        )
        self._admit_if_known(Rating(identity, *row[:-1], FeedbackState.WAITING))

    def _admit_if_known(self, rating: Rating) -> None:
        """Give a rating its place, unless an interaction that it names is still awaited."""
        names = [rating.interaction, *([] if rating.over is None else [rating.over])]
        found = [self._known("id", name) for name in names]
        named = [one for one in found if one is not None and one.state is not _AWAITED]
        if len(named) < len(names):
            return
        of, over = named[0], named[1] if len(named) > 1 else None
        latest = self._latest(rating)
        ruling = rule(rating, of, over, latest, self._horizon_seconds)
        if self._erased_for_its_tenant(rating):
            ruling = _ERASED
        if ruling.state is FeedbackState.ERASED:
            self._execute("UPDATE feedback SET rater = '' WHERE id = ?", (rating.id,))
        if ruling.is_latest and latest is not None:
            self._supersede(latest)
        self._execute(
            "UPDATE feedback SET state = ?, latest = ? WHERE id = ?",
            (ruling.state, ruling.is_latest, rating.id),
        )
        if ruling.fate is not Fate.PENDING:
            self._fates.move(rating.topic_partition, rating.offset, ruling.fate, ruling.reason)
        if ruling.state is not FeedbackState.READY:
            self._execute("DELETE FROM feedback_bodies WHERE id = ?", (rating.id,))

    def _erased_for_its_tenant(self, rating: Rating) -> bool:
        """Whose reply it is, and so of which tenant a rater speaks, is known only now."""
        if not self._erasure_markers.any:
            return False
        tenants = self._execute(
            "SELECT s.tenant FROM interactions i JOIN subjects s ON s.id = i.subject"
            " WHERE i.id = ?",
            (rating.interaction,),
        )
        return any(
            self._erasure_markers.cover_rater(rating.rater, tenant, rating.event_time)
            for (tenant,) in tenants.fetchall()
        )

    def _supersede(self, latest: Rating) -> None:
        """Let a rating take the place of its rater's latest; what was decided of that one stays."""
        if latest.state not in (FeedbackState.READY, FeedbackState.UNUSABLE):
            self._execute("UPDATE feedback SET latest = 0 WHERE id = ?", (latest.id,))
            return
        self._execute(
            "UPDATE feedback SET latest = 0, state = ? WHERE id = ?",
            (FeedbackState.CLOSED, latest.id),
        )
        self._fates.move(
            latest.topic_partition, latest.offset, Fate.DUPLICATE, Reason.SUPERSEDED_RATING
        )
        if latest.state is FeedbackState.READY:
            self._execute("DELETE FROM feedback_bodies WHERE id = ?", (latest.id,))

    def _known_or_awaited(self, key: str, arrival: Arrival) -> Known:
        """An interaction, or a row that feedback can wait at until it is read."""
        known = self._known("key", key)
        if known is not None:
            return known
        (identity,) = self._execute(
            "INSERT INTO interactions (key, state, event_time, arrived_at, tokens, measurable,"
            " retained) VALUES (?, ?, ?, ?, 0, 0, 0) RETURNING id",
            (key, _AWAITED, arrival.at, arrival.at),
        ).fetchone()
        return Known(identity, _AWAITED, arrival.at, arrival.at, None, False, None)

    def _known(self, column: Literal["id", "key"], value: int | str) -> Known | None:
        row = self._execute(
            "SELECT id, state, event_time, arrived_at, untrainable, retained, prompt"
            f" FROM interactions WHERE {column} = ?",
            (value,),
        ).fetchone()
        if row is None:
            return None
        identity, state, event_time, arrived_at, untrainable, retained, prompt = row
        return Known(
            identity,
            InteractionState(state),
            event_time,
            arrived_at,
            None if untrainable is None else Reason(untrainable),
            bool(retained),
            prompt,
        )

    def _waiting(self, interaction: int) -> list[Rating]:
        """The feedback that names this interaction, on either side."""
        return [
            *self._ratings("interaction = ? AND state = 'waiting'", (interaction,)),
            *self._ratings("over = ? AND state = 'waiting'", (interaction,)),
        ]

    def _latest(self, rating: Rating) -> Rating | None:
        found = self._ratings(
            "interaction = ? AND rater = ? AND aspect = ? AND latest = 1",
            (rating.interaction, rating.rater, rating.aspect),
        )
        return found[0] if found else None

    def _ratings(self, condition: str, parameters: tuple[int | str, ...]) -> list[Rating]:
        rows = self._execute(
            f"SELECT state, {', '.join(_OF_A_RATING)} FROM feedback WHERE {condition}", parameters
        )
        return [
            Rating(state=FeedbackState(state), **dict(zip(_OF_A_RATING, facts, strict=True)))
            for state, *facts in rows
        ]
