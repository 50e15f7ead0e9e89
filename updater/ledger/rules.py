"""Which feedback belongs to which reply: the rules. Pure.

They depend on what an event says and on when it arrived at the broker, never on the order in
which it is read: the same events shuffled, repeated or interleaved give the same examples.

* The same interaction, or the same content under a feedback id, again:
  ``duplicate/repeated_event``. Other content under the id replaces it (``revisions.py``).
* Feedback that arrived more than a horizon after its interaction's event time: ``late``. An
  interaction that arrived more than a horizon after feedback for it: that feedback ``expired``.
* Of one rater's ratings of one aspect of a reply (``Feedback.aspect``) the last counts (event time,
  then arrival); the others are ``duplicate/superseded_rating``. Once it is in the weights, all
  others of that rater and aspect are ``duplicate/already_trained``.
* A retraction is feedback that says nothing: where it is the last, the ratings before it are
  ``retracted/rating_retracted``. It is never too late for what was not learned from yet.
* An interaction that no gradient follows from still joins; its feedback gets its reason.
* Feedback on a reply that its subject had erased is ``erased`` too, whoever gave it and whenever.
* A preference names two interactions. It is judged once both are there, by the same rules against
  each, and the two must answer one prompt.

Event times are what clients' clocks say, so they are cut at arrival, and feedback is judged by its
arrival: a clock that is ahead moves no window, and one that is behind shortens, by as much, the
windows of what it stamps.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from moorline.events import Erasure, Fate, Feedback, Interaction, Reason
from moorline.stream import Record
from updater.ledger.schema import FeedbackState, InteractionState


@dataclass(frozen=True)
class Parsed:
    """A consumed record and what it turned out to be."""

    record: Record
    event: Interaction | Feedback | Erasure | None
    """None: unreadable, and already acknowledged by the dead-letter topic."""
    reason: Reason = Reason.NONE
    """Unreadable: why. Readable: why no gradient follows from it, or ``NONE``."""
    error: str = ""
    """The error's type, where nobody foresaw it."""


@dataclass(frozen=True)
class Arrival:
    """Where and when a record came in."""

    topic_partition: int
    offset: int
    at: float
    """When the broker got it, Unix seconds; never after now."""

    @classmethod
    def from_record(cls, record: Record, topic_partition: int, now: float) -> Arrival:
        """A record without a timestamp, or with one in the future, arrived now."""
        stamped = record.stamped_at
        at = now if stamped is None else min(stamped, now)
        return cls(topic_partition, record.offset, at)


@dataclass(frozen=True)
class Known:
    """What a join needs of an interaction."""

    id: int
    state: InteractionState
    event_time: float
    arrived_at: float
    untrainable: Reason | None
    retained: bool
    prompt: bytes | None
    """``prompt_digest`` of it; None where it is not retained."""


@dataclass(frozen=True)
class Rating:
    """What a join needs of a row of feedback."""

    id: int
    interaction: int
    over: int | None
    feedback_id: str
    revision: int
    rater: str
    aspect: str
    retracts: bool
    topic_partition: int
    offset: int
    event_time: float
    arrived_at: float
    state: FeedbackState

    def is_before(self, other: Rating) -> bool:
        """Whether ``other``, of the same rater and aspect, is the later one."""
        if self.feedback_id == other.feedback_id:
            return self.revision < other.revision
        return self._order < other._order

    @property
    def _order(self) -> tuple[float, float, str]:
        return (self.event_time, self.arrived_at, self.feedback_id)


@dataclass(frozen=True)
class Ruling:
    """What becomes of one rating."""

    state: FeedbackState
    fate: Fate
    reason: Reason

    @property
    def is_latest(self) -> bool:
        return self.state in (
            FeedbackState.READY,
            FeedbackState.UNUSABLE,
            FeedbackState.RETRACTED,
        )


def prompt_digest(token_ids: Sequence[int]) -> bytes:
    """Tells prompts apart without keeping them; 16 bytes."""
    return hashlib.blake2b(repr(tuple(token_ids)).encode(), digest_size=16).digest()


def fate_before(last_retracts: bool, retracts: bool) -> tuple[Fate, Reason]:
    """The fate of feedback that a later one replaces, by whether each of the two takes back."""
    if last_retracts and not retracts:
        return Fate.RETRACTED, Reason.RATING_RETRACTED
    return Fate.DUPLICATE, Reason.SUPERSEDED_RATING


def rule(
    rating: Rating, of: Known, over: Known | None, latest: Rating | None, horizon_seconds: float
) -> Ruling:
    """What becomes of ``rating`` once every interaction that it names is known.

    Args:
        over: of a preference: the reply that lost.
        latest: the same rater's rating of the same aspect so far, if any.
    """
    closed = FeedbackState.CLOSED
    named = (of,) if over is None else (of, over)
    if any(one.state is InteractionState.ERASED for one in named):
        return Ruling(FeedbackState.ERASED, Fate.ERASED, Reason.NONE)
    if any(one.arrived_at > rating.arrived_at + horizon_seconds for one in named):
        return Ruling(closed, Fate.EXPIRED, Reason.NO_INTERACTION)
    horizon = math.inf if rating.retracts else horizon_seconds
    if any(not one.retained or rating.arrived_at > one.event_time + horizon for one in named):
        return Ruling(closed, Fate.LATE, Reason.NONE)
    if latest is not None and latest.state is FeedbackState.TRAINED:
        return Ruling(closed, Fate.DUPLICATE, Reason.ALREADY_TRAINED)
    if latest is not None and rating.is_before(latest):
        return Ruling(closed, *fate_before(latest.retracts, rating.retracts))
    if rating.retracts:
        return Ruling(FeedbackState.RETRACTED, Fate.RETRACTED, Reason.RETRACTION)
    unusable = next((one.untrainable for one in named if one.untrainable is not None), None)
    if unusable is None and over is not None and over.prompt != of.prompt:
        unusable = Reason.PROMPTS_DIFFER
    if unusable is not None:
        return Ruling(FeedbackState.UNUSABLE, Fate.NOT_TRAINABLE, unusable)
    return Ruling(FeedbackState.READY, Fate.PENDING, Reason.NONE)
