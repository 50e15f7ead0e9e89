"""Revokes releases: after an erasure with ``revoke``, nothing live may have learned from it.

The policy goes back to an ancestor that never did. What the releases between had learned from, and
is still kept, waits for a batch again; each rating is then in the accepted weights once, in the new
line.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection

from moorline.events import Fate, Reason, Release
from moorline.stream import Topic
from updater.ledger.database import LedgerError, set_meta
from updater.ledger.fates import Fates
from updater.ledger.schema import FeedbackState, InteractionState


def wanted_revocation(connection: sqlite3.Connection) -> int | None:
    """The version to go back to for the erasures that still ask for it; None: none does."""
    (ancestor,) = connection.execute(
        "SELECT min(last_clean_version) FROM erasures INDEXED BY erasures_to_revoke"
        " WHERE revoke = 1 AND revocation_version IS NULL"
    ).fetchone()
    return None if ancestor is None else int(ancestor)


def check_revocation(
    release: Release,
    *,
    wanted: int | None,
    revoked: Collection[int],
    next_version: int,
    epoch: int,
) -> None:
    """Refuse a release that is not the clean ancestor again, or one before it.

    Raises:
        LedgerError: which field is wrong.
    """
    if wanted is None:
        raise LedgerError("no erasure asks for a revocation")
    back = release.revokes_after
    if back is None or not 0 <= back <= wanted or back in revoked:
        raise LedgerError(f"release {release.name} revokes after {back}, not {wanted}")
    if (release.version, release.parent, release.lease_epoch) != (next_version, back, epoch):
        raise LedgerError(
            f"release {release.name} of parent {release.parent} in lease {release.lease_epoch} "
            f"cannot restore {back}: make it anew as version {next_version} in lease {epoch}"
        )


class Revocation:
    """Writes a revocation, inside one transaction."""

    def __init__(self, connection: sqlite3.Connection, fates: Fates) -> None:
        self._connection = connection
        self._execute = connection.execute
        self._fates = fates

    def run(self, release: Release) -> None:
        """``release`` is live; every version after the one it revokes after is revoked."""
        assert release.revokes_after is not None
        after = release.revokes_after
        # Ratings before replies: a reply that waits again may be asked for by its ratings.
        for topic in (Topic.FEEDBACK, Topic.INTERACTIONS):
            for topic_partition, offset, subject in self._execute(
                "SELECT e.topic_partition, e.offset, e.subject FROM events e"
                " JOIN topic_partitions p ON p.id = e.topic_partition"
                " WHERE e.decided_by > ? AND e.fate = 'trained' AND p.topic = ?",
                (after, topic),
            ).fetchall():
                back = self._requeue_rating if topic is Topic.FEEDBACK else self._requeue_reply
                fate = back(subject, topic_partition, offset)
                reason = Reason.NONE
                if fate is Fate.NOT_TRAINABLE:
                    reason = Reason.RELEASE_REVOKED
                self._fates.change(topic_partition, offset, fate, reason)
        self._execute("DELETE FROM decisions WHERE fate = 'trained' AND decided_by > ?", (after,))
        self._execute("DELETE FROM taught WHERE version > ?", (after,))
        self._execute("UPDATE releases SET revoked = 1 WHERE version > ?", (after,))
        # What the credit knew came from the releases revoked, too.
        set_meta(self._connection, "baselines", None)
        self._execute(
            "INSERT INTO releases (version, manifest) VALUES (?, ?)",
            (release.version, release.model_dump_json()),
        )
        self._execute(
            "UPDATE erasures SET revocation_version = ?"
            " WHERE revoke = 1 AND revocation_version IS NULL",
            (release.version,),
        )

    def _requeue_rating(self, identity: int, topic_partition: int, offset: int) -> Fate:
        """Queue a trained rating again, or end it; returns its new fate."""
        row = self._execute(
            "SELECT f.state, i.retained = 1 AND i.untrainable IS NULL AND EXISTS"
            " (SELECT 1 FROM feedback_bodies WHERE id = f.id) AND (f.over IS NULL OR EXISTS"
            " (SELECT 1 FROM interactions WHERE id = f.over AND retained = 1))"
            " FROM feedback f JOIN interactions i ON i.id = f.interaction"
            " WHERE f.id = ? AND f.topic_partition = ? AND f.offset = ?",
            (identity, topic_partition, offset),
        ).fetchone()
        if row is None:  # pruned long ago
            return Fate.NOT_TRAINABLE
        state, readable = row
        if state == FeedbackState.ERASED:
            return Fate.ERASED
        new = FeedbackState.READY if readable else FeedbackState.NOT_TRAINABLE
        self._execute("UPDATE feedback SET state = ? WHERE id = ?", (new, identity))
        if not readable:
            self._execute("DELETE FROM feedback_bodies WHERE id = ?", (identity,))
            return Fate.NOT_TRAINABLE
        return Fate.PENDING

    def _requeue_reply(self, identity: int, topic_partition: int, offset: int) -> Fate:
        """Queue a trained reply again, or end it; returns its new fate."""
        row = self._execute(
            "SELECT state, retained FROM interactions WHERE id = ? AND topic_partition = ? AND"
            " offset = ?",
            (identity, topic_partition, offset),
        ).fetchone()
        if row is None:
            return Fate.NOT_TRAINABLE
        state, retained = row
        if state == InteractionState.ERASED:
            return Fate.ERASED
        if not retained:
            return Fate.NOT_TRAINABLE
        self._execute(
            "UPDATE interactions SET state = ? WHERE id = ?", (InteractionState.PENDING, identity)
        )
        return Fate.PENDING
