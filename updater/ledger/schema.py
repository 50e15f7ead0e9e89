"""What the columns of ``schema.sql`` may say."""

from __future__ import annotations

from enum import StrEnum


class InteractionState(StrEnum):
    """What a row of ``interactions`` waits for; its event's fate says how it ended."""

    AWAITED = "awaited"
    """Feedback came first: nothing but the key is known."""
    PENDING = "pending"
    """No release, candidate or horizon has decided it."""
    DECIDED = "decided"
    """Its event has its final fate. Ratings by others may still make new examples of it."""
    ERASED = "erased"
    """Its subject withdrew it. If it had been decided by then, its event keeps that fate."""


class FeedbackState(StrEnum):
    """Where a row of ``feedback`` is. ``latest = 1``: its rater's latest so far."""

    WAITING = "waiting"
    """Its interaction was not read yet, or the other one that it names."""
    READY = "ready"
    """A member of an example that waits for a batch (always latest)."""
    TRAINED = "trained"
    REJECTED = "rejected"
    UNUSABLE = "unusable"
    """Its interaction, or the other one that it names, is not trainable."""
    NOT_TRAINABLE = "not_trainable"
    """Declared not trainable after it was ready."""
    CLOSED = "closed"
    """Late, expired, superseded, taken back, or without credit: kept to know repeats."""
    RETRACTED = "retracted"
    """Its rater's last word is that nothing is said any more (always latest)."""
    ERASED = "erased"
    """Its rater withdrew it, or somebody the reply that it is on."""


class UpdateRole(StrEnum):
    """How a reply takes part in the update under way, and dies with the process if it does."""

    WITH_OTHERS = "with_others"
    """As one of the batch, or as one of those measured on."""
    ALONE = "alone"
    """By itself, after another reply has survived the same in the same process."""
