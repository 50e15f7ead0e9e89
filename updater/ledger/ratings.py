"""Feedback in the ledger: its rows, whose word is the last, and when it is given its place."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from dataclasses import fields
from typing import Any, Literal

from moorline.events import Fate, Feedback, Reason
from updater.ledger.bodies import Bodies
from updater.ledger.erasure_markers import ErasureMarkers
from updater.ledger.fates import Fates
from updater.ledger.keys import KeyRing
from updater.ledger.revisions import Earlier, content_digest, place_of, read_earlier
from updater.ledger.rules import Arrival, Known, Parsed, Rating, Ruling, fate_before, rule
from updater.ledger.schema import FeedbackState, InteractionState

_AWAITED = InteractionState.AWAITED
_ERASED = Ruling(FeedbackState.ERASED, Fate.ERASED, Reason.NONE)
_WAITING = Ruling(FeedbackState.WAITING, Fate.PENDING, Reason.NONE)
_UNDECIDED = (
    FeedbackState.WAITING,
    FeedbackState.READY,
    FeedbackState.UNUSABLE,
    FeedbackState.RETRACTED,
)
"""States of words that nothing was learned from, and that still count for something."""

_OF_A_RATING = tuple(field.name for field in fields(Rating) if field.name != "state")
"""Columns of ``feedback`` under the names of the fields."""


class Ratings:
    """Applies the rules to rows of feedback, inside one transaction."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        fates: Fates,
        keys: KeyRing,
        erasure_markers: ErasureMarkers,
        horizon_seconds: float,
    ) -> None:
        self._connection = connection
        self._execute = connection.execute
        self._fates = fates
        self._keys = keys
        self._bodies = Bodies(connection, keys)
        self._erasure_markers = erasure_markers
        self._horizon_seconds = horizon_seconds

    def add_feedback(self, event: Feedback, parsed: Parsed, arrival: Arrival) -> None:
        """Give a record of feedback its row, and its place if its reply is known."""
        of = self._known_or_awaited(event.key, arrival)
        over = None
        if event.over_key is not None and not event.retracted:
            over = self._known_or_awaited(event.over_key, arrival)
        event_time = min(event.created_at, arrival.at)
        erased = self._erasure_markers.cover(event, event_time)
        earlier = read_earlier(self._connection, of.id, event)
        content = content_digest(event)
        gone = erased or of.state is InteractionState.ERASED
        repeated = (earlier.erased if gone else None) or earlier.repeated_by(content)
        if repeated is not None:
            self._fates.record_repeat(arrival.topic_partition, arrival.offset, repeated)
            return
        ruling = _WAITING if parsed.reason is Reason.NONE else _without_credit(parsed.reason)
        ruling = _ERASED if erased else self._replace(earlier, event, arrival) or ruling
        row: dict[str, Any] = {
            "interaction": of.id,
            "over": None if over is None else over.id,
            "feedback_id": event.feedback_id,
            "revision": earlier.revision_at(arrival),
            "rater": "" if erased else event.rater,
            "aspect": event.aspect,
            "retracts": event.retracted,
            "topic_partition": arrival.topic_partition,
            "offset": arrival.offset,
            "event_time": event_time,
            "arrived_at": arrival.at,
        }
        if earlier.last and not erased:
            row |= place_of(event, earlier.last[0], event_time)
        identity = self._insert_feedback(row, None if erased else content, ruling.state)
        self._fates.record(
            arrival.topic_partition, arrival.offset, ruling.fate, ruling.reason, identity
        )
        if ruling.state is not FeedbackState.WAITING:
            return
        self._bodies.write_body("feedback", identity, event.to_bytes(), self._keys.new())
        self._execute(
            "UPDATE interactions SET event_time = max(event_time, ?)"
            " WHERE id IN (?, ?) AND state = 'awaited'",
            (arrival.at, row["interaction"], row["over"]),
        )
        self._admit_if_known(Rating(id=identity, state=FeedbackState.WAITING, **row))

    def _insert_feedback(
        self, row: dict[str, Any], content: bytes | None, state: FeedbackState
    ) -> int:
        values = {**row, "content": content, "state": state}
        (identity,) = self._execute(
            f"INSERT INTO feedback ({', '.join(values)}) VALUES ({', '.join('?' * len(values))})"
            " RETURNING id",
            tuple(values.values()),
        ).fetchone()
        return int(identity)

    def _replace(self, earlier: Earlier, event: Feedback, arrival: Arrival) -> Ruling | None:
        """What a feedback id said before no longer counts, unless it is in the weights; returns
        what becomes of the new word, where that is decided by what its id said before."""
        closed = FeedbackState.CLOSED
        if earlier.takes_back is not None:
            return Ruling(closed, Fate.RETRACTED, Reason.RATING_RETRACTED)
        if earlier.last and not earlier.last[0].is_before(arrival):
            return Ruling(closed, *fate_before(earlier.last[0].retracts, event.retracted))
        for word in earlier.last:
            if word.state in _UNDECIDED:
                fate, reason = fate_before(event.retracted, word.retracts)
                self._close(word.id, word.topic_partition, word.offset, fate, reason)
        if earlier.trained:
            self._forget_trained(earlier.trained)
            return Ruling(closed, Fate.DUPLICATE, Reason.ALREADY_TRAINED)
        return None

    def _close(
        self, identity: int, topic_partition: int, offset: int, fate: Fate, reason: Reason
    ) -> None:
        """A word no longer counts. Where it was its rater's last, it stays so, and bars older
        ones."""
        self._execute(
            "UPDATE feedback SET state = ? WHERE id = ?", (FeedbackState.CLOSED, identity)
        )
        self._execute("DELETE FROM feedback_bodies WHERE id = ?", (identity,))
        self._fates.move(topic_partition, offset, fate, reason)

    def _forget_trained(self, words: Iterable[int]) -> None:
        """They stay in the weights, but a revocation does not learn from them again."""
        for word in words:
            self._execute("DELETE FROM feedback_bodies WHERE id = ?", (word,))

    def admit_waiting(self, interaction: int) -> None:
        """An interaction was read: feedback that named it need not wait for it any more."""
        for rating in self._waiting(interaction):
            self._admit_if_known(rating)

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
            self._execute(
                "UPDATE feedback SET rater = '', content = NULL WHERE id = ?", (rating.id,)
            )
        if ruling.is_latest and latest is not None:
            self._supersede(latest, rating)
        if ruling.reason is Reason.ALREADY_TRAINED and latest is not None and rating.retracts:
            self._forget_trained([latest.id])
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

    def _supersede(self, latest: Rating, rating: Rating) -> None:
        """Let a rating take the place of its rater's latest; what was decided of that one stays."""
        self._execute("UPDATE feedback SET latest = 0 WHERE id = ?", (latest.id,))
        if latest.state in _UNDECIDED:
            fate, reason = fate_before(rating.retracts, latest.retracts)
            self._close(latest.id, latest.topic_partition, latest.offset, fate, reason)
        if latest.retracts != rating.retracts:
            self._change_why_replaced(rating)

    def _change_why_replaced(self, last: Rating) -> None:
        """Of all words before the last one, whether they were replaced or taken back."""
        fate, reason = fate_before(last.retracts, False)
        for topic_partition, offset in self._execute(
            "SELECT f.topic_partition, f.offset FROM feedback f JOIN events e"
            " ON e.topic_partition = f.topic_partition AND e.offset = f.offset"
            " WHERE f.interaction = ? AND f.rater = ? AND f.aspect = ? AND f.retracts = 0"
            " AND f.state = 'closed' AND e.reason IN (?, ?) AND e.reason <> ?",
            (
                last.interaction,
                last.rater,
                last.aspect,
                Reason.SUPERSEDED_RATING,
                Reason.RATING_RETRACTED,
                reason,
            ),
        ).fetchall():
            self._fates.move(topic_partition, offset, fate, reason)

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


def _without_credit(reason: Reason) -> Ruling:
    return Ruling(FeedbackState.CLOSED, Fate.NOT_TRAINABLE, reason)
