"""Reads the examples that wait for a batch, and the traffic that divergences are measured on."""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from moorline.events import Interaction, user_digest
from updater.learning.advantages import overridden_signals
from updater.ledger.bodies import Bodies
from updater.ledger.revisions import word_name
from updater.values import Example, TokenSequence, as_sequence

_Place = tuple[float, str]
"""Event time and key: the order in which examples wait."""

MOST_FEEDBACK = 64
"""Most ratings of one example: it bounds the work of an update (a correction costs as much as a
reply). What is beyond it stays ready, and is the next example of the same reply."""
_SCAN_PER_SEQUENCE = 8
"""Rows looked at for every sequence asked for: a bound on the work, not on the result."""


@dataclass(frozen=True)
class Claim:
    """Exactly which rows an example that was handed out is made of."""

    key: str
    interaction: int
    feedback: tuple[int, ...]
    over: tuple[int, ...] = ()
    """Interactions that its preferences name as the ones that lost."""
    overridden_signals: tuple[int, ...] = ()
    """Signals beside an explicit rating: decided with the example, but not learned from."""


def example_id(key: str, words: Iterable[str]) -> str:
    """Names an example by its content: the same reply and ratings (``word_name``) always give the
    same id."""
    content = "\n".join([key, *sorted(words)])
    return f"ex-{hashlib.sha256(content.encode()).hexdigest()[:32]}"


def examples_digest(example_ids: Iterable[str]) -> str:
    """sha256 over the ids of the examples that made a release, in any order."""
    return hashlib.sha256("\n".join(sorted(example_ids)).encode()).hexdigest()


def read_ready(
    connection: sqlite3.Connection, bodies: Bodies, limit: int
) -> list[tuple[Example, Claim]]:
    """At most ``limit`` (1 or more) examples that wait for a batch, oldest interaction first.

    Half of them, rounded up, are the oldest, so that nothing starves; the others are spread evenly
    over the rest by age, so that a batch holds fresh replies however many stale ones wait.

    Raises:
        BodyErased: the key of a body is gone.
        LedgerError: a body is damaged.
    """
    oldest = _oldest(connection, limit)
    chosen = set(oldest)
    if len(oldest) == limit:
        sure = oldest[: (limit + 1) // 2]
        chosen = {*sure, *_spread(connection, limit - len(sure), after=sure[-1])}
        others = [place for place in oldest if place not in chosen]
        chosen.update(others[: limit - len(chosen)])
    return [_example(connection, bodies, key) for _, key in sorted(chosen)]


def read_named(
    connection: sqlite3.Connection, bodies: Bodies, keys: Iterable[str]
) -> list[tuple[Example, Claim]]:
    """The examples of those of these replies that wait for a batch; errors as ``read_ready``."""
    ready = [
        key
        for key in keys
        if connection.execute(
            "SELECT 1 FROM interactions WHERE key = ? AND open_ratings > 0", (key,)
        ).fetchone()
    ]
    return [_example(connection, bodies, key) for key in ready]


def _oldest(connection: sqlite3.Connection, limit: int) -> list[_Place]:
    return connection.execute(
        "SELECT event_time, key FROM interactions INDEXED BY interactions_ready"
        " WHERE open_ratings > 0 ORDER BY event_time, key LIMIT ?",
        (limit,),
    ).fetchall()


def _spread(connection: sqlite3.Connection, number: int, after: _Place) -> list[_Place]:
    """At most so many after a place: the first at or after each of evenly spaced moments.

    A seek in the index for each, so that it costs the same however many wait.
    """
    (newest,) = connection.execute(
        "SELECT max(event_time) FROM interactions INDEXED BY interactions_ready"
        " WHERE open_ratings > 0"
    ).fetchone()
    begin, found = after[0], []
    for step in range(1, number + 1):
        moment = newest if step == number else begin + (newest - begin) * step / number
        row = connection.execute(
            "SELECT event_time, key FROM interactions INDEXED BY interactions_ready"
            " WHERE open_ratings > 0 AND (event_time, key) > (?, ?)"
            " ORDER BY event_time, key LIMIT 1",
            max(after, (moment, "")),
        ).fetchone()
        if row is None:
            break
        after = row
        found.append(row)
    return found


def _example(connection: sqlite3.Connection, bodies: Bodies, key: str) -> tuple[Example, Claim]:
    identity, event_time = connection.execute(
        "SELECT id, event_time FROM interactions WHERE key = ?", (key,)
    ).fetchone()
    rows = connection.execute(
        "SELECT f.id, f.over, f.feedback_id, f.event_time, f.revision, f.rater, f.content"
        " FROM feedback f"
        " WHERE f.interaction = ? AND f.latest = 1 AND f.state = 'ready'"
        " ORDER BY f.event_time, f.feedback_id LIMIT ?",
        (identity, MOST_FEEDBACK),
    ).fetchall()
    feedback = {
        row[0]: bodies.feedback(row[0]).model_copy(
            update={"feedback_id": row[2], "created_at": row[3]}
        )
        for row in rows
    }
    overridden = overridden_signals(feedback.values())
    weighted = {rating: one for rating, one in feedback.items() if one not in overridden}
    over = tuple(sorted({row[1] for row in rows if row[1] is not None}))
    names = {row[0]: word_name(row[2], row[4], user_digest(row[5]), row[6]) for row in rows}
    example = Example(
        example_id=example_id(key, (names[rating] for rating in weighted)),
        interaction=bodies.interaction(identity).model_copy(update={"created_at": event_time}),
        feedback=tuple(weighted.values()),
        rejected=dict(_rejected(connection, bodies, loser) for loser in over),
    )
    return example, Claim(
        key, identity, tuple(weighted), over, tuple(sorted(feedback.keys() - weighted.keys()))
    )


def _rejected(
    connection: sqlite3.Connection, bodies: Bodies, identity: int
) -> tuple[str, Interaction]:
    key, event_time = connection.execute(
        "SELECT key, event_time FROM interactions WHERE id = ?", (identity,)
    ).fetchone()
    return key, bodies.interaction(identity).model_copy(update={"created_at": event_time})


def read_traffic(
    connection: sqlite3.Connection,
    bodies: Bodies,
    limit: int,
    max_tokens: int,
    excluded: Collection[int],
) -> dict[int, TokenSequence]:
    """Recent replies that no release has learned from: unrated ones first, then rated ones.

    Args:
        max_tokens: longer sequences are passed over.
        excluded: ``interactions.id`` of the batch at hand, replies that lost included.

    Returns:
        By ``interactions.id``.

    Raises:
        BodyErased: the key of a body is gone.
        LedgerError: a body is damaged.
    """
    scan = limit * _SCAN_PER_SEQUENCE + len(excluded)
    unrated = connection.execute(
        "SELECT id, tokens, measurable FROM interactions INDEXED BY interactions_idle"
        " WHERE retained = 1 AND open_ratings = 0 AND open_preferences = 0"
        " AND NOT (state = 'decided' AND untrainable IS NULL) ORDER BY event_time DESC LIMIT ?",
        (scan,),
    ).fetchall()
    rated = connection.execute(
        "SELECT id, tokens, measurable FROM interactions INDEXED BY interactions_ready"
        " WHERE open_ratings > 0 AND state = 'pending' ORDER BY event_time DESC, key DESC LIMIT ?",
        (scan,),
    ).fetchall()
    chosen = [
        identity
        for identity, tokens, measurable in [*unrated, *rated]
        if measurable and tokens <= max_tokens and identity not in excluded
    ]
    return {identity: as_sequence(bodies.interaction(identity)) for identity in chosen[:limit]}
