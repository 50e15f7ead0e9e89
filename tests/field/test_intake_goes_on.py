"""Whatever one record makes the intake raise is that record's dead letter; the others are kept."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moorline.events import Fate, Feedback, Reason
from moorline.stream import Topic
from tests.updater.ledger.fixtures import HORIZON, Log, erasure, interaction, rating
from tests.updater.test_ingest import Letters, Stream, make
from updater import ingest as ingest_module
from updater.ledger import Ledger, LedgerUnavailable
from updater.ledger.erasure import Eraser
from updater.ledger.ratings import Ratings


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    monkeypatch.setattr(ingest_module, "_PROGRESS_SECONDS", 0.0)
    with Ledger(tmp_path / "ledger.sqlite", horizon_seconds=HORIZON) as opened:
        yield opened
        assert opened.audit() == []
        assert opened.accounting().balanced


def fail_for_bob(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """A rating of Bob's raises after its rows are written."""
    admit = Ratings._admit_if_known

    def admit_or_raise(ratings: Ratings, given: Any) -> None:
        admit(ratings, given)
        if given.rater == "bob":
            raise error

    monkeypatch.setattr(Ratings, "_admit_if_known", admit_or_raise)


@pytest.mark.parametrize(
    "error",
    [
        TypeError("a word of Bob's"),
        OverflowError(),
        RecursionError(),
        UnicodeEncodeError("utf-8", "\ud83d", 0, 1, "surrogates"),
        sqlite3.IntegrityError(),
        sqlite3.OperationalError("integer overflow"),
        AssertionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_record_that_cannot_be_joined_is_a_dead_letter_and_leaves_no_row(
    ledger: Ledger,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    log, stream, letters = Log(partitions=1), Stream(), Letters()
    said = [b"1", rating("a"), rating("a", -1, "bob"), b"2", rating("b", 1, "bob"), rating("b")]
    stream.unread = [log.record(one) for one in [interaction("a"), interaction("b"), *said]]
    fail_for_bob(monkeypatch, error)
    with caplog.at_level(logging.ERROR):
        done = make(ledger, stream, letters).step(0.0)
    assert (done.records, done.dead_lettered) == (8, 4)
    assert ledger.count_ready() == 2
    fates = ledger.accounting().events[Topic.FEEDBACK]
    assert fates[Fate.DEAD_LETTERED] == {Reason.SCHEMA_MISMATCH: 2, Reason.UNEXPECTED: 2}
    assert sorted(record.offset for record, _ in letters.sent) == [0, 2, 3, 4]  # each once
    assert "a word of Bob's" not in caplog.text
    assert {vars(one)["event"] for one in caplog.records} == {"record_unexpected"}


def test_a_record_that_cannot_be_parsed_for_an_unknown_cause_is_a_dead_letter(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, stream, letters = Log(partitions=1), Stream(), Letters()
    stream.unread = [log.record(one) for one in (interaction("a"), rating("a"), rating("b"))]
    parse = ingest_module.read_feedback

    def parse_or_raise(value: bytes) -> Feedback:
        if b'"a"' in value:
            raise KeyError("x")
        return parse(value)

    monkeypatch.setattr(ingest_module, "read_feedback", parse_or_raise)
    assert make(ledger, stream, letters).step(0.0).records == 3
    assert [reason for _, reason in letters.sent] == [Reason.UNEXPECTED]


def test_an_erasure_that_cannot_be_carried_out_is_a_dead_letter(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, stream, letters = Log(partitions=1), Stream(), Letters()
    stream.unread = [log.record(one) for one in (interaction("a"), erasure("ana"), rating("a"))]

    def raise_it(*_: object) -> None:
        raise ValueError

    monkeypatch.setattr(Eraser, "_subjects", raise_it)
    assert make(ledger, stream, letters).step(0.0).records == 3
    assert [(record.topic, reason) for record, reason in letters.sent] == [
        (Topic.ERASURES, Reason.UNEXPECTED)
    ]


@pytest.mark.parametrize(
    "error", [MemoryError(), KeyboardInterrupt(), LedgerUnavailable("full"), OSError(28, "full")]
)
def test_what_is_not_the_records_fault_stops_the_intake_and_loses_nothing(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    log, stream, letters = Log(partitions=1), Stream(), Letters()
    stream.unread = [log.record(one) for one in (interaction("a"), rating("a", 1, "bob"))]
    ingest = make(ledger, stream, letters)
    with monkeypatch.context() as patch:
        fail_for_bob(patch, error)
        with pytest.raises(type(error)):
            ingest.step(0.0)
    assert ingest.step(0.0).records == 2
    assert letters.sent == []
    assert ledger.count_ready() == 1


def test_a_dead_letter_that_no_topic_takes_now_is_sent_later(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, stream, letters = Log(partitions=1), Stream(), Letters()
    stream.unread = [log.record(one) for one in (rating("a"), rating("a", -1, "bob"), b"1")]
    letters.away_after = 0
    ingest = make(ledger, stream, letters)
    fail_for_bob(monkeypatch, TypeError())
    done = ingest.step(0.0)
    assert (done.records, done.stalled) == (1, True)
    letters.away_after = None
    assert ingest.step(0.0).records == 2
    assert [record.offset for record, _ in letters.sent] == [1, 2]
