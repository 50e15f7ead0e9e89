"""Counts in how many refused candidates a reply was, so that its ratings are tried again smaller.

A candidate that the bound or the gate refuses says little about one reply of its batch. So the
replies stay ready, and the next batches are parts of that one, until a part passes or a reply has
been refused ``max_tries`` times.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from updater.ledger.examples import Claim


@dataclass(frozen=True)
class RefusedReply:
    """A reply that waits for another try."""

    key: str
    refused: int
    """Candidates that were refused with it, 1 or more."""


def count_refusal(
    connection: sqlite3.Connection, claims: Mapping[str, Claim], max_tries: int
) -> tuple[dict[str, Claim], dict[str, Claim]]:
    """Count a refused candidate for each of its examples.

    Returns:
        The examples that have had their tries, and those that wait for another.
    """
    ended: dict[str, Claim] = {}
    returned: dict[str, Claim] = {}
    for example_id, claim in claims.items():
        (refused,) = connection.execute(
            "INSERT INTO refused_counts (interaction, refused) VALUES (?, 1)"
            " ON CONFLICT DO UPDATE SET refused = refused + 1 RETURNING refused",
            (claim.interaction,),
        ).fetchone()
        (ended if refused >= max_tries else returned)[example_id] = claim
    return ended, returned


def forget_refusals(connection: sqlite3.Connection, interaction: int) -> None:
    """The reply's example was decided: what is said of it later begins anew."""
    connection.execute("DELETE FROM refused_counts WHERE interaction = ?", (interaction,))


def most_refused(connection: sqlite3.Connection, limit: int) -> list[RefusedReply]:
    """Ready replies that were refused most often, all of them equally often, oldest first."""
    rows = connection.execute(
        "SELECT i.key, r.refused FROM refused_counts r JOIN interactions i ON i.id = r.interaction"
        " WHERE i.open_ratings > 0 ORDER BY r.refused DESC, i.event_time, i.key LIMIT ?",
        (limit,),
    )
    found = [RefusedReply(*row) for row in rows]
    return [one for one in found if one.refused == found[0].refused]


def refusals_of(connection: sqlite3.Connection, interactions: Iterable[int]) -> int:
    """The most refusals among these replies (``interactions.id``)."""
    wanted: Collection[int] = tuple(interactions)
    marks = ",".join("?" * len(wanted))
    (refused,) = connection.execute(
        f"SELECT max(refused) FROM refused_counts WHERE interaction IN ({marks})", tuple(wanted)
    ).fetchone()
    return int(refused or 0)
