"""Expiry: forgets what has waited for the whole horizon, a bounded number of rows at a time."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from moorline.events import Fate, Reason
from updater.ledger.fates import Fates
from updater.ledger.schema import FeedbackState, InteractionState


@dataclass(frozen=True)
class Expired:
    """What one call of ``Ledger.expire`` did."""

    interactions: int = 0
    """Interactions that nobody said anything of."""
    feedback: int = 0
    """Feedback whose interaction never came, or the other one that it names."""
    forgotten: int = 0
    """Bodies of already decided interactions that were deleted."""
    pruned: int = 0
    """Rows of long forgotten interactions that were deleted (their events keep their fates)."""


class Expiry:
    """Applies the horizon, inside one transaction."""

    def __init__(self, connection: sqlite3.Connection, fates: Fates) -> None:
        self._execute = connection.execute
        self._fates = fates

    def run(
        self, watermark: float, horizon_seconds: float, keep_decided_seconds: float, limit: int
    ) -> Expired:
        """Forget at most ``limit`` rows of each kind.

        Args:
            watermark: everything that arrived before it has been read, Unix seconds.
            keep_decided_seconds: bodies of decided replies go after so long, at the latest with
                the horizon.
        """
        before = watermark - horizon_seconds
        # Feedback first: an interaction is not idle while a preference that names it waits.
        feedback = self._waiting_feedback(before, limit)
        interactions, forgotten = self._idle_interactions(before, limit)
        if keep_decided_seconds < horizon_seconds:
            forgotten += self._decided_interactions(watermark - keep_decided_seconds, limit)
        # The rows stay one more horizon, so that late feedback is known to be late.
        pruned = self._expired_rows(before - horizon_seconds, limit)
        return Expired(interactions, feedback, forgotten, pruned)

    def _idle_interactions(self, before: float, limit: int) -> tuple[int, int]:
        rows = self._execute(
            "SELECT id, state, topic_partition, offset FROM interactions INDEXED BY"
            " interactions_idle"
            " WHERE retained = 1 AND open_ratings = 0 AND open_preferences = 0 AND event_time < ?"
            " ORDER BY event_time LIMIT ?",
            (before, limit),
        ).fetchall()
        expired = 0
        for identity, state, topic_partition, offset in rows:
            if state == InteractionState.PENDING:
                self._fates.change(topic_partition, offset, Fate.EXPIRED, Reason.NO_FEEDBACK)
                expired += 1
            self._drop_body(identity)
        return expired, len(rows) - expired

    def _decided_interactions(self, before: float, limit: int) -> int:
        rows = self._execute(
            "SELECT id FROM interactions INDEXED BY interactions_decided WHERE retained = 1"
            " AND open_ratings = 0 AND open_preferences = 0 AND state = 'decided'"
            " AND event_time < ? ORDER BY event_time LIMIT ?",
            (before, limit),
        ).fetchall()
        for (identity,) in rows:
            self._drop_body(identity)
        return len(rows)

    def _drop_body(self, identity: int) -> None:
        """Delete a reply's body, and those of the feedback that was learned from with it."""
        self._execute(
            "UPDATE interactions SET retained = 0, prompt = NULL, state = ? WHERE id = ?",
            (InteractionState.DECIDED, identity),
        )
        self._execute("DELETE FROM interaction_bodies WHERE id = ?", (identity,))
        self._execute(
            "DELETE FROM feedback_bodies WHERE id IN"
            " (SELECT id FROM feedback WHERE interaction = ?)",
            (identity,),
        )

    def _waiting_feedback(self, before: float, limit: int) -> int:
        rows = self._execute(
            "SELECT id, topic_partition, offset FROM feedback INDEXED BY feedback_waiting"
            " WHERE state = 'waiting' AND arrived_at < ? ORDER BY arrived_at LIMIT ?",
            (before, limit),
        ).fetchall()
        for identity, topic_partition, offset in rows:
            self._fates.change(topic_partition, offset, Fate.EXPIRED, Reason.NO_INTERACTION)
            self._execute(
                "UPDATE feedback SET state = ? WHERE id = ?", (FeedbackState.CLOSED, identity)
            )
            self._execute("DELETE FROM feedback_bodies WHERE id = ?", (identity,))
        return len(rows)

    def _expired_rows(self, before: float, limit: int) -> int:
        rows = self._execute(
            "SELECT id, subject FROM interactions INDEXED BY interactions_forgotten"
            " WHERE retained = 0 AND open_preferences = 0 AND event_time < ?"
            " ORDER BY event_time LIMIT ?",
            (before, limit),
        ).fetchall()
        pruned = 0
        for identity, subject in rows:
            waiting = self._execute(
                "SELECT 1 FROM feedback WHERE interaction = ? AND state = 'waiting' LIMIT 1",
                (identity,),
            ).fetchone()
            if waiting:  # more of them than `limit` expired at once; next time
                continue
            self._execute("DELETE FROM feedback WHERE interaction = ?", (identity,))
            self._execute("DELETE FROM interactions WHERE id = ?", (identity,))
            self._drop_subject(subject)
            pruned += 1
        return pruned

    def _drop_subject(self, subject: int | None) -> None:
        """Delete a subject of whom nothing is left, and their key."""
        for (key,) in self._execute(
            "DELETE FROM subjects WHERE id = ?1 AND NOT EXISTS"
            " (SELECT 1 FROM interactions WHERE subject = ?1) RETURNING key",
            (subject,),
        ).fetchall():
            if key is not None:
                self._execute("INSERT OR IGNORE INTO doomed_keys VALUES (?)", (key,))
