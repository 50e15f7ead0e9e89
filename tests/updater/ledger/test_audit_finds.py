"""The audit reports each figure that was tampered with, by name, and nothing else is reported."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from moorline.events import Fate, Reason
from moorline.stream import Topic
from tests.updater.ledger.fixtures import (
    HORIZON,
    NOW,
    Log,
    correction,
    erasure,
    interaction,
    preference,
    rating,
    release,
)
from updater.ledger import BatchDecision, Ledger
from updater.ledger.accounting import _NEVER, Accounting, audit

REPLIES, RATINGS = Topic.INTERACTIONS, Topic.FEEDBACK


@pytest.fixture
def books(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """Replies in every state, ready to be tampered with: without the triggers that keep counts."""
    path, log = tmp_path / "ledger.sqlite", Log(partitions=1)
    with Ledger(path, horizon_seconds=HORIZON) as ledger:
        events = [
            *[interaction(name) for name in ("taught", "rejected", "ready", "won", "lost")],
            interaction("gone", user="ana"),
            interaction("greedy", finish_reason="abort"),
            rating("taught"),
        ]
        ledger.ingest([log.parsed(event) for event in events], now=NOW)
        first = [one.example_id for one in ledger.ready_examples(9)]
        ledger.commit_release(release(ledger, first), BatchDecision(first))
        ledger.ingest([log.parsed(rating("rejected"))], now=NOW)
        second = [one.example_id for one in ledger.ready_examples(9)]
        record = {"verdict": None, "divergences": [], "diagnostics": {}, "cause": ""}
        ledger.commit_rejection(Reason.GATE_BLOCKED, BatchDecision(second, record=record), now=NOW)
        said = [rating("ready"), correction("ready", rater="bob"), preference("won", "lost")]
        ledger.ingest([log.parsed(event) for event in said], now=NOW)
        ledger.ingest([log.parsed(rating("nobody-yet"))], now=NOW)
        ledger.forget(erasure("ana"), now=NOW)
    connection = sqlite3.connect(path, isolation_level=None)
    for (name,) in connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'trigger'"
    ).fetchall():
        connection.execute(f"DROP TRIGGER {name}")
    yield connection
    connection.close()


def of(name: str) -> str:
    return f"(SELECT id FROM interactions WHERE key = '{name}/0')"


READY = "UPDATE feedback SET {} WHERE state = 'ready' AND aspect = 'rating'"
TAMPERED = [
    ("UPDATE topic_partitions SET consumed = consumed + 1", "consumed records differ"),
    ("UPDATE topic_partitions SET consumed = consumed - 1", "consumed records differ"),
    ("UPDATE interactions SET open_ratings = open_ratings + 1 WHERE open_ratings > 0", "ratings"),
    (f"UPDATE interactions SET open_ratings = 9 WHERE id = {of('taught')}", "open ratings"),
    ("UPDATE meta SET value = value + 1 WHERE name = 'ready_examples'", "ready examples"),
    ("UPDATE meta SET value = value - 1 WHERE name = 'ready_examples'", "ready examples"),
    (f"UPDATE interactions SET state = 'decided' WHERE id = {of('ready')}", "state and fate"),
    (f"UPDATE interactions SET state = 'pending' WHERE id = {of('taught')}", "state and fate"),
    ("UPDATE feedback SET state = 'ready' WHERE state = 'trained'", "ratings whose state"),
    ("UPDATE feedback SET state = 'trained' WHERE state = 'ready'", "ratings whose state"),
    ("UPDATE feedback SET state = 'trained' WHERE state = 'waiting'", "ratings whose state"),
    (f"DELETE FROM interaction_bodies WHERE id = {of('ready')}", "interactions whose body"),
    (f"INSERT INTO interaction_bodies VALUES ({of('gone')}, 1, x'')", "interactions whose body"),
    (
        "DELETE FROM feedback_bodies WHERE id IN (SELECT id FROM feedback WHERE state = 'ready')",
        "ratings whose body",
    ),
    (
        "DELETE FROM feedback_bodies WHERE id IN (SELECT id FROM feedback WHERE state = 'waiting')",
        "ratings whose body",
    ),
    (
        "INSERT INTO feedback_bodies SELECT id, 1, x'' FROM feedback WHERE state = 'rejected'",
        "ratings whose body",
    ),
    ("UPDATE feedback SET latest = 0 WHERE state = 'ready'", "last word"),
    ("UPDATE feedback SET retracts = 1 WHERE state = 'ready'", "retractions that are learned"),
    ("UPDATE feedback SET retracts = 1 WHERE state = 'trained'", "retractions that are learned"),
    (f"UPDATE interactions SET open_preferences = 0 WHERE id = {of('won')}", "open preferences"),
    (f"UPDATE interactions SET open_preferences = 0 WHERE id = {of('lost')}", "open preferences"),
    (f"UPDATE interactions SET open_preferences = 1 WHERE id = {of('ready')}", "open preferences"),
    (f"DELETE FROM interaction_bodies WHERE id = {of('lost')}", "lost reply was not kept"),
    (f"DELETE FROM behaviour_policies WHERE interaction = {of('ready')}", "behaviour policies"),
    (f"INSERT INTO behaviour_policies VALUES ({of('gone')}, 7)", "behaviour policies"),
    (f"INSERT INTO behaviour_policies VALUES ({of('greedy')}, 7)", "behaviour policies"),
    (f"UPDATE interactions SET state = 'erased' WHERE id = {of('ready')}", "that are erased and"),
    (f"UPDATE interactions SET subject = NULL WHERE id = {of('ready')}", "that are erased and"),
    (f"UPDATE interactions SET subject = 1 WHERE id = {of('gone')}", "that are erased and"),
    ("INSERT INTO doomed_keys SELECT key FROM interaction_bodies LIMIT 1", "key is about to be"),
    ("INSERT INTO doomed_keys SELECT key FROM feedback_bodies LIMIT 1", "key is about to be"),
    ("INSERT INTO crash_counts VALUES (999, NULL, 1, 0)", "crashes counted"),
    ("INSERT INTO refused_counts VALUES (999, 1)", "refused candidates counted"),
    ("UPDATE events SET decided_by = NULL WHERE fate = 'trained'", "without their release"),
    ("UPDATE events SET decided_by = 99 WHERE fate = 'trained'", "without their release"),
    ("DELETE FROM releases", "without their release"),
    ("UPDATE totals SET events = events + 1 WHERE fate = 'trained'", "trained/none: 1 rows,"),
    ("UPDATE totals SET events = events - 1 WHERE fate = 'trained'", "trained/none: 1 rows,"),
    ("UPDATE totals SET reason = 'off_policy' WHERE fate = 'trained'", "trained/off_policy: 0 row"),
    ("UPDATE events SET reason = 'off_policy' WHERE fate = 'trained'", "trained/off_policy: 1 row"),
    ("DELETE FROM events WHERE fate = 'trained'", "trained/none: 0 rows, total 1"),
]


@pytest.mark.parametrize(("sql", "said"), TAMPERED)
def test_each_figure_that_is_wrong_is_reported_by_name(
    books: sqlite3.Connection, sql: str, said: str
) -> None:
    assert audit(books) == []
    changed = books.execute(sql).rowcount
    assert changed > 0
    assert any(said in line for line in audit(books)), audit(books)


def test_every_question_of_the_audit_is_tried() -> None:
    for _, what in _NEVER:
        assert any(said in what for _, said in TAMPERED), what


@pytest.mark.parametrize(
    ("rows", "consumed", "balanced"),
    [
        ({REPLIES: 2, RATINGS: 1}, {REPLIES: 2, RATINGS: 1}, True),
        ({}, {}, True),
        ({REPLIES: 1, RATINGS: 2}, {REPLIES: 2, RATINGS: 1}, False),  # only the sums agree
        ({REPLIES: 2, RATINGS: 1}, {REPLIES: 2, RATINGS: 2}, False),
        ({REPLIES: 3, RATINGS: 1}, {REPLIES: 2, RATINGS: 1}, False),
        ({REPLIES: 2}, {REPLIES: 2, RATINGS: 1}, False),
    ],
)
def test_balanced_is_topic_by_topic_and_said_in_the_json_too(
    rows: dict[str, int], consumed: dict[str, int], balanced: bool
) -> None:
    events = {topic: {Fate.TRAINED: {Reason.NONE: n}} for topic, n in rows.items()}
    found = Accounting(events, consumed, {RATINGS: 4})
    assert found.balanced is balanced
    assert found.total == sum(rows.values())
    shown = found.as_dict()
    assert shown["balanced"] is balanced
    assert shown["total"] == shown["fates"]["trained"] == found.total
    assert shown["missed"] == {RATINGS: 4}
    assert shown["consumed"] == consumed
