"""Which policy the line's distance is measured from: the base model, or a person's choice."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass


@dataclass(frozen=True)
class Anchor:
    """A policy that distances are measured from."""

    version: int
    """0: the base model."""
    reason: str = ""
    requested_by: str = ""
    requested_at: float = 0.0
    """Unix seconds; 0: nobody has asked for it, it is the anchor from the start."""
    applied_at: float = 0.0


def read_anchors(connection: sqlite3.Connection) -> list[Anchor]:
    """Every act of ``moorline reanchor``, oldest first."""
    rows = connection.execute(
        "SELECT version, reason, requested_by, requested_at, applied_at FROM anchors ORDER BY id"
    )
    return [Anchor(*row) for row in rows]


def current_anchor(connection: sqlite3.Connection) -> Anchor:
    """The newest one whose release was not revoked for an erasure; else the base model."""
    row = connection.execute(
        "SELECT version, reason, requested_by, requested_at, applied_at FROM anchors"
        " WHERE version = 0 OR version IN (SELECT version FROM releases WHERE NOT revoked)"
        " ORDER BY id DESC LIMIT 1"
    ).fetchone()
    return Anchor(0) if row is None else Anchor(*row)


def write_anchor(connection: sqlite3.Connection, anchor: Anchor) -> None:
    """From here on, distances are measured from it."""
    connection.execute(
        "INSERT INTO anchors (version, reason, requested_by, requested_at, applied_at)"
        " VALUES (?, ?, ?, ?, ?)",
        (
            anchor.version,
            anchor.reason,
            anchor.requested_by,
            anchor.requested_at,
            anchor.applied_at,
        ),
    )
