"""Stream to ledger: what is read, what is refused and why, and that nothing is skipped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moorline.events import (
    Fate,
    Interaction,
    LogprobConvention,
    PolicySpan,
    Reason,
    SamplingSettings,
)
from moorline.settings import SIGNALS
from moorline.stream import Gap, GapCause, Record, StreamUnavailable, Topic
from tests.updater.ledger import fixtures as ledger_fixtures
from tests.updater.ledger.fixtures import (
    HORIZON,
    NOW,
    VOCABULARY,
    Log,
    correction,
    erasure,
    interaction,
    preference,
    rating,
    signal,
)
from updater import ingest as ingest_module
from updater.ingest import Ingest, parse, why_untrainable
from updater.ledger import Ledger, LedgerUnavailable

REPLIES, RATINGS = Topic.INTERACTIONS, Topic.FEEDBACK


class Stream:
    """A reader over a list, with the reader's promises: in order, once, unless told to go back."""

    def __init__(self) -> None:
        self.unread: list[Record] = []
        self.found_gaps: list[Gap] = []
        self.committed: Mapping[tuple[Topic, int], tuple[str, int]] = {}

    def poll(self, max_records: int, timeout_seconds: float) -> list[Record]:
        del timeout_seconds
        taken, self.unread = self.unread[:max_records], self.unread[max_records:]
        return taken

    def gaps(self) -> list[Gap]:
        found, self.found_gaps = self.found_gaps, []
        return found

    def lag(self) -> Mapping[tuple[Topic, int], int]:
        lag = {(topic, partition): 0 for topic in (REPLIES, RATINGS) for partition in range(2)}
        for record in self.unread:
            lag[record.topic, record.partition] += 1
        return lag

    def positions(self) -> Mapping[tuple[Topic, int], tuple[str, int]]:
        return {}

    def commit(self, positions: Mapping[tuple[Topic, int], tuple[str, int]]) -> None:
        self.committed = dict(positions)


class Letters:
    """A dead-letter topic that may be away."""

    def __init__(self) -> None:
        self.sent: list[tuple[Record, Reason]] = []
        self.away_after: int | None = None

    def send(self, record: Record, reason: Reason, stage: str, error: str = "") -> None:
        assert stage == "ingest"
        assert bool(error) == (reason in (Reason.UNEXPECTED, Reason.CORRUPT_RECORD))
        if self.away_after is not None and len(self.sent) >= self.away_after:
            raise StreamUnavailable("the broker is away: start it")
        self.sent.append((record, reason))


@pytest.fixture
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    monkeypatch.setattr(ingest_module, "_PROGRESS_SECONDS", 0.0)
    with Ledger(tmp_path / "ledger.sqlite", horizon_seconds=HORIZON) as opened:
        yield opened
        assert opened.audit() == []


def make(ledger: Ledger, stream: Stream, letters: Letters, **changes: Any) -> Ingest:
    settings: dict[str, Any] = {
        "alias": "assistant",
        "vocab_size": VOCABULARY,
        "max_tokens": 50,
        "signals": SIGNALS,
        "max_event_bytes": 10_000,
    }
    return Ingest(stream, letters, ledger, **(settings | changes))


def test_a_step_moves_records_into_the_ledger(ledger: Ledger) -> None:
    log, stream, letters = Log(), Stream(), Letters()
    stream.unread = [log.record(interaction("a")), log.record(rating("a")), log.record(b"{")]
    done = make(ledger, stream, letters).step(0.0)
    assert (done.records, done.dead_lettered, done.stalled) == (3, 1, False)
    assert done.changes[REPLIES, Fate.PENDING, Reason.NONE] == 1
    assert ledger.count_ready() == 1
    assert [reason for _, reason in letters.sent] == [Reason.MALFORMED_JSON]
    assert stream.committed == ledger.offsets()
    assert make(ledger, stream, letters).step(0.0).records == 0


def test_a_record_is_committed_only_after_its_dead_letter_is_acknowledged(ledger: Ledger) -> None:
    log, stream, letters = Log(partitions=1), Stream(), Letters()
    events: list[Any] = [interaction("a"), rating("a"), b"1", rating("a", -1, "bob"), b"2"]
    stream.unread = [log.record(event) for event in events]
    ingest = make(ledger, stream, letters)
    letters.away_after = 0
    assert ingest.step(0.0).stalled
    assert ledger.accounting().total == 2, "what came before it is in"
    later = log.record(interaction("b"))
    stream.unread = [later]
    assert ingest.step(0.0).stalled
    assert stream.unread == [later], "nothing is read meanwhile"
    letters.away_after = 1
    assert ingest.step(0.0).records == 2
    letters.away_after = None
    assert ingest.step(0.0).records == 1
    assert ingest.step(0.0).records == 1
    assert [record.value for record, _ in letters.sent] == [b"1", b"2"], "once each, in order"
    assert ledger.accounting().total == 6


def test_a_ledger_that_cannot_be_written_holds_the_intake(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, stream, letters = Log(), Stream(), Letters()
    stream.unread = [log.record(b"{"), log.record(interaction("a"))]
    stream.found_gaps = [Gap(REPLIES, 7, 0, 9, GapCause.RETENTION)]
    ingest = make(ledger, stream, letters)

    def full(*_: object, **__: object) -> None:
        raise LedgerUnavailable("the disk is full: make room")

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "ingest", full)
        for _ in range(3):
            with pytest.raises(LedgerUnavailable):
                ingest.step(0.0)
    done = ingest.step(0.0)
    assert (done.records, done.gaps, done.stalled) == (2, 1, False)
    assert len(letters.sent) == 1, "not sent again for the ledger's sake"
    assert ledger.accounting().missed == {REPLIES: 9}


def test_a_gap_without_records_is_noted(ledger: Ledger) -> None:
    stream = Stream()
    stream.found_gaps = [Gap(RATINGS, 0, 5, 8, GapCause.RETENTION)]
    assert make(ledger, stream, Letters()).step(0.0).gaps == 1
    assert ledger.accounting().missed == {RATINGS: 3}


def test_nothing_expires_while_its_partner_may_be_unread(ledger: Ledger) -> None:
    log, stream = Log(partitions=1), Stream()
    stream.unread = [log.record(interaction("a")), log.record(rating("a"))]
    ingest = make(ledger, stream, Letters(), max_records=1)
    ledger.expire(NOW + 9 * HORIZON)
    ingest.step(0.0)
    assert ledger.expire(NOW + 9 * HORIZON).interactions == 0
    ingest.step(0.0)
    assert ledger.count_ready() == 1


def test_nothing_expires_while_a_record_of_its_partition_is_held(ledger: Ledger) -> None:
    """Kafka has nothing unread; what was read waits behind a dead letter that nobody takes."""
    log, stream, letters = Log(partitions=1), Stream(), Letters()
    letters.away_after = 0
    stream.unread = [log.record(interaction("a")), log.record(b"{"), log.record(rating("a"))]
    ingest = make(ledger, stream, letters)
    assert ingest.step(0.0).stalled
    assert ledger.expire(NOW + 9 * HORIZON).interactions == 0
    letters.away_after = None
    ingest.step(0.0)
    assert ledger.count_ready() == 1


def test_nothing_expires_while_a_partition_of_ours_is_not_looked_at(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, stream = Log(partitions=1), Stream()
    stream.unread = [log.record(interaction("a")), log.record(rating("b"))]
    ingest = make(ledger, stream, Letters())
    monkeypatch.setattr(stream, "lag", lambda: {(REPLIES, 0): 0})
    ingest.step(0.0)
    assert ledger.expire(NOW + 9 * HORIZON).interactions == 0
    monkeypatch.undo()
    monkeypatch.setattr(ingest_module, "_PROGRESS_SECONDS", 0.0)
    ingest.step(0.0)
    assert ledger.expire(NOW + 9 * HORIZON).interactions == 1


def test_a_gap_that_the_ledger_did_not_take_is_told_again(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream()
    ingest = make(ledger, stream, Letters())

    def full(*_: object, **__: object) -> None:
        raise LedgerUnavailable("the disk is full: make room")

    with monkeypatch.context() as patch:
        patch.setattr(ledger, "ingest", full)
        for first in (5, 50):
            stream.found_gaps = [Gap(RATINGS, 0, first, first + 3, GapCause.RETENTION)]
            with pytest.raises(LedgerUnavailable):
                ingest.step(0.0)
    assert ingest.step(0.0).gaps == 2
    assert ledger.accounting().missed == {RATINGS: 6}
    assert ingest.step(0.0).gaps == 0


@pytest.mark.parametrize("held", [False, True])
def test_an_erasure_is_unread_in_kafka_or_while_it_is_held(ledger: Ledger, held: bool) -> None:
    log, stream, letters = Log(partitions=1), Stream(), Letters()
    ingest = make(ledger, stream, letters)
    assert not ingest.erasures_unread()
    erased = log.record(erasure("ana"))
    if held:
        letters.away_after = 0
        stream.unread = [log.record(b"{"), erased]
        assert ingest.step(0.0).stalled
    else:
        stream.lag = lambda: {(Topic.ERASURES, 0): 1, (RATINGS, 0): 9}  # type: ignore[method-assign]
    assert ingest.erasures_unread()


def test_the_size_limit_is_crossed_just_beyond_it() -> None:
    value = rating("a").to_bytes()
    assert parse(record(value), max_event_bytes=len(value)).event is not None
    assert parse(record(value), max_event_bytes=len(value) - 1).reason is Reason.TOO_LARGE


def test_what_was_read_before_a_restart_is_not_read_again(ledger: Ledger) -> None:
    log, stream = Log(), Stream()
    records = [log.record(interaction("a")), log.record(rating("a"))]
    stream.unread = list(records)
    make(ledger, stream, Letters()).step(0.0)
    stream.unread = list(records)
    done = make(ledger, stream, Letters()).step(0.0)
    assert (done.records, done.replayed) == (0, 2)


# --- reading one record ---------------------------------------------------------------------------


def record(value: bytes | None, topic: Topic = RATINGS) -> Record:
    return replace(Log().record(b"", topic=topic), value=value)


def altered(event: Any, **fields: object) -> bytes:
    return json.dumps(json.loads(event.to_bytes()) | fields).encode()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, Reason.EMPTY_VALUE),
        (b"", Reason.EMPTY_VALUE),
        (b"\xff\xfe", Reason.MALFORMED_JSON),
        (b"{", Reason.MALFORMED_JSON),
        (b"[" * 5000, Reason.MALFORMED_JSON),
        (b"[]", Reason.SCHEMA_MISMATCH),
        (b"null", Reason.SCHEMA_MISMATCH),
        (b"{}", Reason.SCHEMA_MISMATCH),
        (b"x" * 10_001, Reason.TOO_LARGE),
        (altered(rating("a"), schema_version="2.0"), Reason.UNSUPPORTED_SCHEMA_VERSION),
        (altered(rating("a"), schema_version=None), Reason.UNSUPPORTED_SCHEMA_VERSION),
        (altered(rating("a"), value=2), Reason.SCHEMA_MISMATCH),
        (altered(rating("a"), value="NaN"), Reason.SCHEMA_MISMATCH),
        (altered(rating("a"), value=float("inf")), Reason.SCHEMA_MISMATCH),
        (
            altered(rating("a"), kind="score", value=1.1, score_min=0, score_max=1),
            Reason.SCHEMA_MISMATCH,
        ),
        (
            altered(rating("a"), kind="score", value=-0.1, score_min=0, score_max=1),
            Reason.SCHEMA_MISMATCH,
        ),
        (altered(rating("a"), kind="applause"), Reason.SCHEMA_MISMATCH),
        (altered(correction("a"), text=" \n"), Reason.SCHEMA_MISMATCH),
        (altered(preference("a", "b"), over="a"), Reason.SCHEMA_MISMATCH),
        (altered(preference("a", "b"), over=None), Reason.SCHEMA_MISMATCH),
        (altered(signal("a", "copied"), signal=""), Reason.SCHEMA_MISMATCH),
        (altered(rating("a"), created_at=-1), Reason.SCHEMA_MISMATCH),
        (altered(rating("a"), interaction_id="../../etc"), Reason.SCHEMA_MISMATCH),
        (altered(rating("a"), choice=-1), Reason.SCHEMA_MISMATCH),
    ],
)
def test_what_cannot_be_read_has_a_reason(value: bytes | None, reason: Reason) -> None:
    found = parse(record(value), max_event_bytes=10_000)
    assert found.event is None
    assert found.reason is reason


@given(st.binary(max_size=200), st.sampled_from([REPLIES, RATINGS]))
def test_no_bytes_break_the_reader(value: bytes, topic: Topic) -> None:
    assert parse(record(value, topic), max_event_bytes=100).reason is not Reason.NONE


def test_a_newer_minor_version_and_unknown_fields_are_read() -> None:
    value = altered(rating("a"), schema_version="1.7", colour="green")
    assert parse(record(value), 10_000).event is not None


def test_feedback_without_an_id_gets_that_of_its_record() -> None:
    value = json.dumps({"interaction_id": "a", "value": 1}).encode()
    first, second = parse(record(value), 1000).event, parse(record(value), 1000).event
    assert first is not None
    assert second is not None
    assert first.feedback_id == second.feedback_id == f"fb-t0.0.{0:020d}"  # type: ignore[union-attr]
    other = parse(replace(record(value), offset=1), 1000).event
    assert other.feedback_id > first.feedback_id  # type: ignore[union-attr]


def test_numbers_beyond_every_register_do_not_stop_the_intake(ledger: Ledger) -> None:
    log = Log()
    huge = 10**40
    spans = [{"version": huge, "start": 0, "end": 3}]
    values = [
        altered(interaction("a"), policy_spans=spans),
        altered(interaction("b"), completion_token_ids=[huge, 5, 6]),
        altered(interaction("c"), created_at=1e300),
        altered(interaction("d"), choice=huge),
    ]
    ledger.ingest(
        [ledger_fixtures.parsed(log.record(value, topic=REPLIES)) for value in values], now=NOW
    )
    assert ledger.accounting().total == 4


# --- what can be learned from ---------------------------------------------------------------------

SPAN = PolicySpan(version=0, start=0, end=3)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"alias": "other"}, Reason.UNKNOWN_POLICY),
        ({"policy_spans": (PolicySpan(version=8, start=0, end=3),)}, Reason.UNKNOWN_POLICY),
        ({"completion_token_ids": ()}, Reason.EMPTY_COMPLETION),
        ({"completion_token_ids": (4, VOCABULARY, 6)}, Reason.TOKEN_OUT_OF_VOCABULARY),
        ({"prompt_token_ids": (-1,)}, Reason.TOKEN_OUT_OF_VOCABULARY),
        ({"prompt_token_ids": (1,) * 48}, Reason.TOO_LONG),
        ({"prompt_token_ids": (1,) * 47}, None),
        ({"prompt_token_ids": ()}, Reason.EMPTY_PROMPT),
        ({"finish_reason": "abort"}, Reason.ABORTED),
        ({"finish_reason": "length"}, None),
        ({"policy_spans": (PolicySpan(version=0, start=0, end=2),)}, Reason.LENGTH_MISMATCH),
        ({"policy_spans": (PolicySpan(version=0, start=1, end=3),)}, Reason.LENGTH_MISMATCH),
        (
            {"policy_spans": tuple(PolicySpan(version=0, start=s, end=s + 1) for s in (0, 2))},
            Reason.LENGTH_MISMATCH,  # a hole
        ),
        (
            {"policy_spans": tuple(PolicySpan(version=0, start=s, end=s + 2) for s in (0, 1))},
            Reason.LENGTH_MISMATCH,  # an overlap
        ),
        (
            {
                "policy_spans": tuple(
                    PolicySpan(version=0, start=s, end=e) for s, e in ((0, 3), (3, 4))
                )
            },
            Reason.LENGTH_MISMATCH,  # beyond the end
        ),
        ({"policy_spans": (PolicySpan(version=7, start=0, end=3),)}, None),  # the newest one
        ({"prompt_token_ids": (0, VOCABULARY - 1)}, None),
        ({"completion_token_ids": (4, 5, -1)}, Reason.TOKEN_OUT_OF_VOCABULARY),
        ({"completion_logprobs": (-0.1, 2e-4, -0.1)}, Reason.INVALID_LOGPROBS),
        ({"completion_logprobs": (-0.1, -0.2, -0.3, -0.4)}, Reason.LENGTH_MISMATCH),
        ({"finish_reason": "error"}, Reason.ABORTED),
        (
            {"logprob_convention": LogprobConvention.RAW, "sampling": SamplingSettings(top_k=5)},
            Reason.RAW_LOGPROBS,
        ),
        (
            {
                "policy_spans": (
                    PolicySpan(version=0, start=0, end=1),
                    PolicySpan(version=1, start=1, end=3),
                )
            },
            None,  # a swap fell inside: each token's own behaviour probability is recorded
        ),
        ({"sampling": SamplingSettings(temperature=0.0)}, Reason.GREEDY_SAMPLING),
        ({"sampling": SamplingSettings(temperature=1e-30)}, Reason.GREEDY_SAMPLING),
        ({"sampling": SamplingSettings(temperature=0.01)}, None),
        ({"sampling": SamplingSettings(altered_by=("logit_bias",))}, Reason.ALTERED_SAMPLING),
        ({"completion_logprobs": ()}, Reason.NO_LOGPROBS),
        ({"completion_logprobs": (-0.1, None, -0.1)}, Reason.NO_LOGPROBS),
        ({"completion_logprobs": (-0.1, -0.2)}, Reason.LENGTH_MISMATCH),
        ({"completion_logprobs": (-0.1, float("nan"), -0.1)}, Reason.INVALID_LOGPROBS),
        ({"completion_logprobs": (-0.1, float("-inf"), -0.1)}, Reason.INVALID_LOGPROBS),
        ({"completion_logprobs": (-0.1, float("inf"), -0.1)}, Reason.INVALID_LOGPROBS),
        ({"completion_logprobs": (-0.1, -1e300, -0.1)}, Reason.INVALID_LOGPROBS),
        ({"completion_logprobs": (-0.1, 0.5, -0.1)}, Reason.INVALID_LOGPROBS),
        ({"completion_logprobs": (-0.1, 1e-6, -0.1)}, None),  # rounding
        ({"logprob_convention": LogprobConvention.RAW}, None),
        (
            {
                "logprob_convention": LogprobConvention.RAW,
                "sampling": SamplingSettings(temperature=0.7),
            },
            Reason.RAW_LOGPROBS,
        ),
        (
            {"logprob_convention": LogprobConvention.RAW, "sampling": SamplingSettings(top_p=0.9)},
            Reason.RAW_LOGPROBS,
        ),
        ({"sampling": SamplingSettings(temperature=0.7, top_p=0.9, top_k=40, min_p=0.1)}, None),
    ],
)
def test_what_no_gradient_follows_from_has_a_reason(
    changes: dict[str, Any], reason: Reason | None
) -> None:
    event = interaction("a", **changes)
    assert why_untrainable(event, VOCABULARY, "assistant", 50, newest_version=7) is reason
    # And so after the wire, where NaN and infinity travel as strings.
    again = Interaction.model_validate_json(event.to_bytes())
    assert why_untrainable(again, VOCABULARY, "assistant", 50, newest_version=7) is reason


@pytest.mark.parametrize("loses", [False, True])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"completion_logprobs": (-0.1, float("nan"), -0.1)}, Reason.INVALID_LOGPROBS),
        ({"completion_logprobs": (-0.1, float("inf"), -0.1)}, Reason.INVALID_LOGPROBS),
        ({"completion_logprobs": (-0.1, 0.5, -0.1)}, Reason.INVALID_LOGPROBS),
        ({"completion_token_ids": (4, VOCABULARY, 6)}, Reason.TOKEN_OUT_OF_VOCABULARY),
        ({"completion_token_ids": (), "completion_logprobs": ()}, Reason.EMPTY_COMPLETION),
        ({"prompt_token_ids": ()}, Reason.EMPTY_PROMPT),
        ({"completion_logprobs": (-0.1, -0.2)}, Reason.LENGTH_MISMATCH),
    ],
)
def test_no_gradient_sees_a_reply_that_is_not_as_it_should_be(
    ledger: Ledger, changes: dict[str, Any], reason: Reason, loses: bool
) -> None:
    log, stream = Log(), Stream()
    bad, good = ("b", "a") if loses else ("a", "b")
    events: list[Any] = [interaction(bad, **changes), interaction(good), preference("a", "b")]
    events += [rating(bad), correction(bad), signal(bad, "copied")]
    stream.unread = [log.record(event) for event in events]
    make(ledger, stream, Letters()).step(0.0)
    assert ledger.ready_examples(10) == []
    found = ledger.accounting().events
    assert found[REPLIES][Fate.NOT_TRAINABLE] == {reason: 1}
    assert found[RATINGS] == {Fate.NOT_TRAINABLE: {reason: 4}}
