"""Takes releases into the ledger that it does not know: it was lost, or is an older copy.

What is lost with a ledger is which ratings those releases learned from. A rating trains at most
once, so one that was there before the newest of them does not train again.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import replace

from moorline.events import Fate, Feedback, Reason, Release
from updater.ledger.database import read_meta, set_meta
from updater.ledger.fates import Fates
from updater.ledger.rules import Parsed

VERSIONS = "adopted_versions"
READ = "adopted_read"
TAKEN = "versions_taken"


def adopt(
    connection: sqlite3.Connection, fates: Fates, releases: Sequence[Release], taken: int
) -> None:
    """Enter the releases as published; the newest one of the ledger is live.

    Args:
        releases: none of them is in the ledger.
        taken: the highest version that the store has a manifest of, readable or not.
    """
    execute = connection.execute
    (live,) = execute("SELECT coalesce(max(version), 0) FROM releases").fetchone()
    for release in releases:
        execute(
            "INSERT INTO releases (version, manifest, published) VALUES (?, ?, 1)",
            (release.version, release.model_dump_json()),
        )
    for release in releases:
        if release.revokes_after is not None:
            execute(
                "UPDATE releases SET revoked = 1 WHERE version > ? AND version < ?",
                (release.revokes_after, release.version),
            )
    set_meta(connection, TAKEN, str(max(taken, int(read_meta(connection, TAKEN) or 0))))
    adopted = {*adopted_versions(connection), *(release.version for release in releases)}
    set_meta(connection, VERSIONS, json.dumps(sorted(adopted)))
    newest = max(releases, key=lambda release: release.version, default=None)
    if newest is not None and newest.version > live:
        read = {"offsets": newest.offsets, "at": newest.created_at}
        set_meta(connection, READ, json.dumps(read))
        _end_open_ratings(connection, fates)


def adopted_versions(connection: sqlite3.Connection) -> tuple[int, ...]:
    """The releases of which it is not known here who taught them."""
    return tuple(json.loads(read_meta(connection, VERSIONS) or "[]"))


def _end_open_ratings(connection: sqlite3.Connection, fates: Fates) -> None:
    """Those of an older copy of the ledger."""
    for identity, topic_partition, offset in connection.execute(
        "UPDATE feedback SET state = 'not_trainable' WHERE state IN ('waiting', 'ready')"
        " RETURNING id, topic_partition, offset"
    ).fetchall():
        connection.execute("DELETE FROM feedback_bodies WHERE id = ?", (identity,))
        fates.change(topic_partition, offset, Fate.NOT_TRAINABLE, Reason.MAY_HAVE_TAUGHT)


class AlreadyRead:
    """Knows which ratings had been read when the newest adopted release was made: those below its
    offsets, and not younger than it, as they are where a topic was made again."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        known = json.loads(read_meta(connection, READ) or "{}")
        self._offsets: dict[str, dict[str, int]] = known.get("offsets", {})
        self._at = float(known.get("at", 0.0))

    def judged(self, parsed: Parsed, arrived_at: float) -> Parsed:
        """The record, with the reason not to train on it if it may have taught already."""
        if parsed.reason is not Reason.NONE or not isinstance(parsed.event, Feedback):
            return parsed
        record = parsed.record
        read_until = self._offsets.get(str(record.topic), {}).get(str(record.partition), 0)
        if record.offset >= read_until or arrived_at > self._at:
            return parsed
        return replace(parsed, reason=Reason.MAY_HAVE_TAUGHT)
