"""Joins every consumed record to what it belongs to, as the rules say."""

from __future__ import annotations

import sqlite3

from moorline.events import Erasure, Fate, Feedback, Interaction, Reason, user_digest
from updater.ledger.bodies import Bodies
from updater.ledger.erasure_markers import ErasureMarkers
from updater.ledger.fates import Fates
from updater.ledger.keys import KeyRing
from updater.ledger.ratings import Ratings
from updater.ledger.rules import Arrival, Parsed, prompt_digest
from updater.ledger.schema import InteractionState

_AWAITED = InteractionState.AWAITED

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
        self._ratings = Ratings(connection, fates, keys, erasure_markers, horizon_seconds)

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
                self._ratings.add_feedback(parsed.event, parsed, arrival)

    def _add_interaction(self, event: Interaction, parsed: Parsed, arrival: Arrival) -> None:
        row = self._execute(
            "SELECT id, state FROM interactions WHERE key = ?", (event.key,)
        ).fetchone()
        if row is not None and row[1] != _AWAITED:
            self._fates.record_repeat(arrival.topic_partition, arrival.offset, row[0])
            return
        if event.users:
            self._note_pseudonym_key(event.pseudonym_key or "", arrival)
        erased = self._erasure_markers.erases(event, min(event.created_at, arrival.at))
        subject, key = (None, 0) if erased else self._subject(event)
        identity = self._write_interaction(event, parsed, arrival, subject)
        fate, reason = Fate.ERASED, Reason.NONE
        if not erased:
            self._bodies.write_body("interaction", identity, parsed.record.value or b"", key)
            fate = Fate.PENDING if parsed.reason is Reason.NONE else Fate.NOT_TRAINABLE
            reason = parsed.reason
        self._fates.record(arrival.topic_partition, arrival.offset, fate, reason, identity)
        if row is not None:
            self._ratings.admit_waiting(identity)

    def _note_pseudonym_key(self, fingerprint: str, arrival: Arrival) -> None:
        self._execute(
            "INSERT INTO pseudonym_keys VALUES (?, ?) ON CONFLICT DO UPDATE SET"
            " last_arrival = max(last_arrival, excluded.last_arrival)",
            (fingerprint, arrival.at),
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
