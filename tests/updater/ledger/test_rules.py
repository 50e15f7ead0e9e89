"""The rules by themselves, on both sides of each limit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moorline.events import Fate, Reason
from moorline.stream import Topic
from tests.updater.ledger.fixtures import (
    HORIZON,
    NOW,
    Log,
    erasure,
    interaction,
    preference,
    rating,
)
from updater.ledger import Ledger
from updater.ledger.rules import Arrival, Known, Rating, Ruling, rule
from updater.ledger.schema import FeedbackState, InteractionState

REPLY = Known(1, InteractionState.PENDING, NOW, NOW, None, True, b"prompt")
WORD = Rating(
    id=1,
    interaction=1,
    over=None,
    feedback_id="fb-5",
    revision=0,
    rater="ann",
    aspect="rating",
    retracts=False,
    topic_partition=1,
    offset=1,
    event_time=NOW,
    arrived_at=NOW,
    state=FeedbackState.WAITING,
)
READY = Ruling(FeedbackState.READY, Fate.PENDING, Reason.NONE)
LATE = Ruling(FeedbackState.CLOSED, Fate.LATE, Reason.NONE)
NO_INTERACTION = Ruling(FeedbackState.CLOSED, Fate.EXPIRED, Reason.NO_INTERACTION)


def ruled(
    word: Rating = WORD,
    reply: Known = REPLY,
    over: Known | None = None,
    latest: Rating | None = None,
) -> Ruling:
    return rule(word, reply, over, latest, HORIZON)


@pytest.mark.parametrize(
    ("after_seconds", "expected"), [(0.0, READY), (HORIZON, READY), (HORIZON + 1, LATE)]
)
@pytest.mark.parametrize("lost", [False, True])
def test_a_rating_is_late_just_beyond_a_horizon_after_either_reply(
    after_seconds: float, expected: Ruling, lost: bool
) -> None:
    word = replace(WORD, arrived_at=NOW + after_seconds)
    fresh = replace(REPLY, event_time=NOW + after_seconds)
    assert ruled(word) == expected
    assert ruled(word, *((fresh, REPLY) if lost else (REPLY, fresh))) == expected


@pytest.mark.parametrize(
    ("after_seconds", "expected"),
    [(0.0, READY), (HORIZON, READY), (HORIZON + 1, NO_INTERACTION)],
)
@pytest.mark.parametrize("lost", [False, True])
def test_a_reply_comes_too_late_just_beyond_a_horizon_after_its_rating(
    after_seconds: float, expected: Ruling, lost: bool
) -> None:
    reply = replace(REPLY, arrived_at=NOW + after_seconds, event_time=NOW)
    assert ruled(WORD, reply) == expected
    assert ruled(WORD, *((REPLY, reply) if lost else (reply, REPLY))) == expected


def test_a_reply_that_is_not_kept_any_more_makes_its_rating_late() -> None:
    gone = replace(REPLY, retained=False)
    assert ruled(WORD, gone) == LATE
    assert ruled(WORD, REPLY, gone) == LATE
    assert ruled(WORD, gone, REPLY) == LATE


def test_what_was_erased_is_erased_whatever_else_is_true_of_it() -> None:
    erased = replace(REPLY, state=InteractionState.ERASED, retained=False, arrived_at=math.inf)
    for named in ((erased, None), (REPLY, erased), (erased, REPLY)):
        assert ruled(WORD, *named).fate is Fate.ERASED


@pytest.mark.parametrize(
    ("changes", "superseded"),
    [
        ({"event_time": NOW + 1}, True),
        ({"event_time": NOW - 1}, False),
        ({"event_time": NOW - 1, "arrived_at": NOW + 1}, False),
        ({"arrived_at": NOW + 1}, True),
        ({"arrived_at": NOW - 1, "feedback_id": "fb-9"}, False),
        ({"feedback_id": "fb-9"}, True),
        ({"feedback_id": "fb-4"}, False),
        ({"feedback_id": "fb-4", "event_time": NOW + 1}, True),
    ],
)
def test_the_last_word_is_the_latest_by_its_time_then_by_its_arrival(
    changes: dict[str, Any], superseded: bool
) -> None:
    latest = replace(WORD, id=2, state=FeedbackState.READY, **{"feedback_id": "fb-6"} | changes)
    expected = Ruling(FeedbackState.CLOSED, Fate.DUPLICATE, Reason.SUPERSEDED_RATING)
    assert ruled(latest=latest) == (expected if superseded else READY)


@pytest.mark.parametrize(("revision", "superseded"), [(1, True), (-1, False)])
def test_under_one_id_the_last_that_was_sent_counts_whatever_its_time_says(
    revision: int, superseded: bool
) -> None:
    clock = -9 if superseded else 9
    latest = replace(
        WORD, id=2, state=FeedbackState.READY, revision=revision, event_time=NOW + clock
    )
    assert ruled(latest=latest).is_latest != superseded


def test_a_retraction_is_never_late_and_takes_back_what_came_before_it() -> None:
    retraction = replace(WORD, retracts=True, arrived_at=NOW + 9 * HORIZON)
    assert ruled(retraction) == Ruling(FeedbackState.RETRACTED, Fate.RETRACTED, Reason.RETRACTION)
    latest = replace(retraction, feedback_id="fb-6", state=FeedbackState.RETRACTED)
    assert ruled(latest=latest) == Ruling(
        FeedbackState.CLOSED, Fate.RETRACTED, Reason.RATING_RETRACTED
    )


def test_a_word_that_was_learned_from_is_the_last_even_if_it_is_older() -> None:
    latest = replace(WORD, event_time=NOW - 9, state=FeedbackState.TRAINED)
    assert ruled(latest=latest).reason is Reason.ALREADY_TRAINED


def test_a_preference_takes_the_reason_of_either_reply_and_of_different_prompts() -> None:
    bad = replace(REPLY, untrainable=Reason.GREEDY_SAMPLING)
    for named in ((bad, None), (bad, REPLY), (REPLY, bad)):
        found = ruled(WORD, *named)
        assert (found.state, found.reason) == (FeedbackState.UNUSABLE, Reason.GREEDY_SAMPLING)
        assert found.is_latest
    other = replace(REPLY, prompt=b"another")
    assert ruled(WORD, REPLY, other).reason is Reason.PROMPTS_DIFFER
    assert ruled(WORD, REPLY, REPLY) == READY


@pytest.mark.parametrize(
    ("stamp", "at"),
    [
        (0, NOW),
        (-1, NOW),
        (1_000, NOW),
        (1_600_000_000_500, 1_600_000_000.5),
        (1_600_000_000, 1_600_000_000.0),
        (1_600_000_000_500_000, 1_600_000_000.5),
        (1_600_000_000_500_000_000, 1_600_000_000.5),
        (int(NOW * 1000) + 9_000, NOW),
    ],
)
def test_a_record_arrived_when_it_says_in_any_unit_but_never_after_now(
    stamp: int, at: float
) -> None:
    record = replace(Log().record(rating("a")), timestamp_ms=stamp)
    assert Arrival.of(record, 1, NOW).at == at


# --- in the ledger --------------------------------------------------------------------------------


def fates(ledger: Ledger, topic: Topic) -> dict[Fate, int]:
    return ledger.accounting().fates.get(topic, {})


@pytest.mark.parametrize(("beyond_seconds", "expired"), [(0.0, 0), (1.0, 1)])
def test_an_event_expires_just_beyond_the_horizon(
    tmp_path: Path, beyond_seconds: float, expired: int
) -> None:
    log = Log()
    with Ledger(tmp_path / "ledger.sqlite", horizon_seconds=HORIZON) as ledger:
        events = [interaction("a"), rating("b"), preference("c", "d")]
        ledger.ingest([log.parsed(event) for event in events], now=NOW)
        ledger.set_behind([], as_of=math.inf)
        found = ledger.expire(NOW + HORIZON + beyond_seconds)
        assert (found.interactions, found.feedback) == (expired, 2 * expired)
        assert fates(ledger, Topic.INTERACTIONS) == {Fate.EXPIRED if expired else Fate.PENDING: 1}
        assert ledger.audit() == []


@pytest.mark.parametrize(("after_seconds", "covered"), [(-1.0, True), (0.0, True), (1.0, False)])
def test_an_erasure_covers_what_was_said_up_to_its_moment(
    tmp_path: Path, after_seconds: float, covered: bool
) -> None:
    log = Log()
    with Ledger(tmp_path / "ledger.sqlite", horizon_seconds=HORIZON) as ledger:
        ledger.ingest([log.parsed(erasure("ana"))], now=NOW)
        said = interaction("a", at=NOW + after_seconds, user="ana")
        ledger.ingest([log.parsed(said, at=NOW + 9)], now=NOW + 9)
        expected = Fate.ERASED if covered else Fate.PENDING
        assert fates(ledger, Topic.INTERACTIONS) == {expected: 1}


@pytest.mark.parametrize("latest_first", [False, True])
def test_of_two_erasures_the_later_moment_counts(tmp_path: Path, latest_first: bool) -> None:
    log = Log()
    moments = [NOW + 5, NOW] if latest_first else [NOW, NOW + 5]
    with Ledger(tmp_path / "ledger.sqlite", horizon_seconds=HORIZON) as ledger:
        for at in moments:
            ledger.ingest([log.parsed(erasure("ana", at=at), at=at)], now=NOW + 5)
        said = interaction("a", at=NOW + 3, user="ana")
        ledger.ingest([log.parsed(said, at=NOW + 9)], now=NOW + 9)
        assert fates(ledger, Topic.INTERACTIONS) == {Fate.ERASED: 1}


def test_a_preference_read_after_its_losing_reply_was_erased_is_erased(tmp_path: Path) -> None:
    log = Log()
    with Ledger(tmp_path / "ledger.sqlite", horizon_seconds=HORIZON) as ledger:
        gone = erasure(interaction_id="lost")
        ledger.ingest([log.parsed(gone), log.parsed(interaction("won"))], now=NOW)
        ledger.ingest([log.parsed(preference("won", "lost"), at=NOW + 9)], now=NOW + 9)
        assert fates(ledger, Topic.FEEDBACK) == {Fate.ERASED: 1}
        assert fates(ledger, Topic.INTERACTIONS) == {Fate.PENDING: 1}


def test_an_erasure_covers_what_is_read_with_it_and_a_reply_for_ever(tmp_path: Path) -> None:
    log = Log()
    with Ledger(tmp_path / "ledger.sqlite", horizon_seconds=HORIZON) as ledger:
        events = [erasure("ana"), interaction("a", user="ana")]
        ledger.ingest([log.parsed(event) for event in events], now=NOW)
        ledger.ingest([log.parsed(erasure(interaction_id="b", at=NOW))], now=NOW)
        later = interaction("b", at=NOW + 60)
        ledger.ingest([log.parsed(later, at=NOW + 60)], now=NOW + 60)
        assert fates(ledger, Topic.INTERACTIONS) == {Fate.ERASED: 2}
