"""How much of the newest feedback names a reply that nobody recorded."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass

from updater.ledger.schema import FeedbackState

_WINDOW_SECONDS = 3600.0
_PATIENCE_SECONDS = 300.0
"""A reply travels on a topic of its own: it may be read so much later than its feedback."""
_MOST_READ = 1000
"""Newest ones that are looked at: a bound on what a look costs."""


@dataclass(frozen=True)
class RecentFeedback:
    """Feedback of the last hour; not of the last minutes, whose reply may be on its way."""

    found: int
    """Whose replies have been read."""
    missing: int
    """That name a reply which has not: nothing is learned from it until the reply comes."""


def read_recent_feedback(
    connection: sqlite3.Connection, now: float, horizon_seconds: float
) -> RecentFeedback:
    """Count it; the minutes are fewer where feedback waits for less than an hour."""
    rows = connection.execute(
        "SELECT state = ?, count(*) FROM (SELECT state FROM feedback"
        " WHERE arrived_at BETWEEN ? AND ? ORDER BY arrived_at DESC LIMIT ?) GROUP BY 1",
        (
            FeedbackState.WAITING,
            now - min(_WINDOW_SECONDS, horizon_seconds),
            now - min(_PATIENCE_SECONDS, horizon_seconds / 2),
            _MOST_READ,
        ),
    )
    counts = {bool(is_missing): n for is_missing, n in rows}
    return RecentFeedback(found=counts.get(False, 0), missing=counts.get(True, 0))
