"""What was sent under one feedback id: sent again with other content, it replaces what it said.

The last record of its partition counts, whatever its ``created_at`` says; of two partitions, the
one that arrived last. An id belongs to its rater: two raters may use the same one. A retraction
that names no rater takes back what has its feedback id, whoever gave it.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moorline.events import ANONYMOUS, Feedback, FeedbackKind
from updater.ledger.rules import Arrival
from updater.ledger.schema import FeedbackState

_MOST_READ = 100
"""Newest revisions of an id that are looked at: a bound on what one record can cost."""


@dataclass(frozen=True)
class Revision:
    """One row of feedback under the id."""

    id: int
    rater: str
    aspect: str
    revision: int
    """Its place among all that was said under the id, by whichever rater; ascending."""
    event_time: float
    arrived_at: float
    topic_partition: int
    offset: int
    state: str
    """A ``FeedbackState``."""
    retracts: bool
    content: bytes | None

    def is_before(self, arrival: Arrival) -> bool:
        """Whether a record that arrives now is newer."""
        return self.topic_partition == arrival.topic_partition or self.arrived_at <= arrival.at


@dataclass(frozen=True)
class Earlier:
    """What the id said before, as far as a new event speaks for it."""

    next_revision: int
    last: tuple[Revision, ...] = ()
    """The last feedback of each rater whom the event speaks for; the event's own rater first."""
    trained: tuple[int, ...] = ()
    """Rows under the id that are in the weights."""
    takes_back: Revision | None = None
    """A retraction that came before anything that it could take back: it takes the event back."""
    erased: int | None = None
    """A row under the id that was erased."""

    def revision_at(self, arrival: Arrival) -> int:
        """The place of a record that arrives now: after the last one, or before it."""
        if self.last and not self.last[0].is_before(arrival):
            return self.last[0].revision - 1
        return self.next_revision

    def repeated_by(self, content: bytes) -> int | None:
        """The row of the last one, where the event says the same again."""
        return self.last[0].id if self.last and self.last[0].content == content else None


def content_digest(event: Feedback) -> bytes:
    """Tells contents apart without keeping them; 16 bytes. The same at both doors."""
    said: tuple[object, ...] = ("retracted",)
    if not event.retracted:
        said = (event.kind.value, event.value, event.text, event.over_key, event.signal)
        if event.kind is FeedbackKind.SCORE:
            said += (event.score_min, event.score_max)
    return hashlib.blake2b(repr(said).encode(), digest_size=16).digest()


def read_earlier(connection: sqlite3.Connection, interaction: int, event: Feedback) -> Earlier:
    """What was sent under the event's id for this reply."""
    rows = [
        Revision(*row)
        for row in connection.execute(
            "SELECT id, rater, aspect, revision, event_time, arrived_at, topic_partition, offset,"
            " state, retracts, content FROM feedback WHERE interaction = ? AND feedback_id = ?"
            " ORDER BY revision DESC LIMIT ?",
            (interaction, event.feedback_id, _MOST_READ),
        )
    ]
    next_revision = rows[0].revision + 1 if rows else 0
    erased = next((row.id for row in rows if row.state == FeedbackState.ERASED), None)
    rows = [row for row in rows if row.state != FeedbackState.ERASED]
    own = [row for row in rows if row.rater == event.rater]
    theirs = rows if event.retracted and event.rater == ANONYMOUS else own
    last = {row.rater: row for row in reversed(theirs)}
    return Earlier(
        next_revision,
        tuple(sorted(last.values(), key=lambda row: row.rater != event.rater)),
        tuple(row.id for row in theirs if row.state == FeedbackState.TRAINED),
        None if event.retracted else _unfulfilled(own, rows),
        erased,
    )


def place_of(event: Feedback, last: Revision, event_time: float) -> dict[str, Any]:
    """Columns of feedback that replaces another: a retraction takes its place, so that nothing else
    of the rater is taken back; a rating is not older than it."""
    if event.retracted:
        return {"rater": last.rater, "aspect": last.aspect, "event_time": last.event_time}
    return {"event_time": max(event_time, last.event_time)}


def _unfulfilled(own: Sequence[Revision], rows: Sequence[Revision]) -> Revision | None:
    """A retraction that nothing has come for yet: of this rater, or of nobody in particular."""
    if own:
        return own[0] if own[0].retracts and len(own) == 1 else None
    return next((row for row in rows if row.retracts and row.rater == ANONYMOUS), None)


def rating_name(feedback_id: str, revision: int, rater_digest: str, content: bytes | None) -> str:
    """Names one piece of feedback of one rater among all on its reply."""
    if content is None:  # from before format 6, when an id was said once
        return feedback_id
    return f"{feedback_id} {revision} {rater_digest}"
