"""What waits to be learned from, and what divergences are measured on."""

from __future__ import annotations

import hashlib
import sqlite3
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import TypeVar

from pydantic import ValidationError

from daemon.events import Feedback, Interaction
from updater.ledger.database import LedgerError
from updater.values import Example, TokenSequence

_Model = TypeVar("_Model", Interaction, Feedback)

_SCAN_PER_SEQUENCE = 8
"""Rows looked at for every sequence asked for: a bound on the work, not on the result."""


@dataclass(frozen=True)
class Claim:
    """Exactly which rows an example that was handed out is made of."""

    key: str
    interaction: int
    feedback: tuple[int, ...]


def example_id(key: str, feedback_ids: Iterable[str]) -> str:
    """Names an example by its content: the same reply and ratings always give the same id."""
    content = "\n".join([key, *sorted(feedback_ids)])
    return f"ex-{hashlib.sha256(content.encode()).hexdigest()[:32]}"


def examples_digest(example_ids: Iterable[str]) -> str:
    """sha256 over the ids of the examples that made a release, in any order."""
    return hashlib.sha256("\n".join(sorted(example_ids)).encode()).hexdigest()


def read_ready(connection: sqlite3.Connection, limit: int) -> list[tuple[Example, Claim]]:
    """Examples that wait for a batch, oldest interaction first.

    Raises:
        LedgerError: a body is damaged.
    """
    rows = connection.execute(
        "SELECT i.id, i.key, i.event_time, b.body FROM interactions i"
        " INDEXED BY interactions_ready JOIN interaction_bodies b ON b.id = i.id"
        " WHERE i.open_ratings > 0 ORDER BY i.event_time, i.key LIMIT ?",
        (limit,),
    ).fetchall()
    return [_example(connection, *row) for row in rows]


def _example(
    connection: sqlite3.Connection, identity: int, key: str, event_time: float, body: bytes
) -> tuple[Example, Claim]:
    rows = connection.execute(
        "SELECT f.id, f.feedback_id, f.event_time, b.body FROM feedback f"
        " JOIN feedback_bodies b ON b.id = f.id"
        " WHERE f.interaction = ? AND f.head = 1 AND f.state = 'ready'"
        " ORDER BY f.event_time, f.feedback_id",
        (identity,),
    ).fetchall()
    feedback = tuple(
        _parse(Feedback, row[3]).model_copy(update={"feedback_id": row[1], "created_at": row[2]})
        for row in rows
    )
    example = Example(
        example_id=example_id(key, (row[1] for row in rows)),
        interaction=_parse(Interaction, body).model_copy(update={"created_at": event_time}),
        feedback=feedback,
    )
    return example, Claim(key, identity, tuple(row[0] for row in rows))


def read_traffic(
    connection: sqlite3.Connection,
    limit: int,
    max_tokens: int,
    excluded: Collection[int],
) -> list[TokenSequence]:
    """Recent replies that no release has learned from: unrated ones first, then rated ones.

    Args:
        max_tokens: longer sequences are passed over.
        excluded: ``interactions.id`` of the batch at hand.
    """
    scan = limit * _SCAN_PER_SEQUENCE + len(excluded)
    unrated = connection.execute(
        "SELECT id, tokens, measurable FROM interactions INDEXED BY interactions_idle"
        " WHERE retained = 1 AND open_ratings = 0 AND NOT (state = 'decided' AND untrainable IS"
        " NULL) ORDER BY event_time DESC LIMIT ?",
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
    return [_sequence(connection, identity) for identity in chosen[:limit]]


def _sequence(connection: sqlite3.Connection, identity: int) -> TokenSequence:
    (body,) = connection.execute(
        "SELECT body FROM interaction_bodies WHERE id = ?", (identity,)
    ).fetchone()
    interaction = _parse(Interaction, body)
    return TokenSequence(interaction.prompt_token_ids, interaction.completion_token_ids)


def _parse(model: type[_Model], body: bytes) -> _Model:
    try:
        return model.model_validate_json(zlib.decompress(body))
    except (zlib.error, ValidationError):
        pass
    # Raised outside the handler: the cause would carry somebody's words.
    raise LedgerError("a stored body is damaged: restore the ledger from a backup")
