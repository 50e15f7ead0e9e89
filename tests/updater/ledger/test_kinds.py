"""Corrections, preferences and signals in the ledger, and which examples make a batch."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.events import Fate, FeedbackKind, PolicySpan, Reason, SamplingSettings
from moorline.stream import Topic
from tests.updater.ledger.fixtures import (
    FAST_DISK,
    HORIZON,
    HOUR,
    NOW,
    Log,
    correction,
    interaction,
    preference,
    rating,
    release,
    score,
    signal,
)
from updater.ledger import BatchDecision, Ledger

REPLIES, WORDS = Topic.INTERACTIONS, Topic.FEEDBACK
GREEDY = SamplingSettings(temperature=0.0)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite", horizon_seconds=HORIZON) as opened:
        yield opened
        assert opened.audit() == []
        assert opened.accounting().balanced


def feed(ledger: Ledger, log: Log, *events: Any, at: float = NOW, now: float | None = None) -> None:
    ledger.ingest([log.parsed(event, at) for event in events], now=at if now is None else now)


def fates(ledger: Ledger, topic: Topic = WORDS) -> dict[tuple[Fate, Reason], int]:
    reasons = ledger.accounting().events.get(topic, {})
    return {(fate, reason): n for fate, by in reasons.items() for reason, n in by.items()}


def train(ledger: Ledger, limit: int = 100) -> None:
    ids = [example.example_id for example in ledger.ready_examples(limit)]
    ledger.commit_release(release(ledger, ids), BatchDecision(ids))


# --- one rater, several aspects -------------------------------------------------------------------


def test_each_aspect_that_a_rater_speaks_of_counts_once(ledger: Ledger) -> None:
    log = Log(partitions=3)
    feed(ledger, log, *[interaction(name) for name in "abc"])
    for later in range(3):
        at = NOW + later
        feed(
            ledger,
            log,
            rating("a", -1, at=at),
            score("a", 0.5, at=at, feedback_id=f"score{later}"),
            correction("a", f"version {later}", at=at),
            preference("a", "b", at=at),
            preference("a", "c", at=at),
            at=NOW + 9,
        )
    (example,) = ledger.ready_examples(10)
    assert [one.kind for one in example.feedback].count(FeedbackKind.PREFERENCE) == 2
    (corrected,) = [one.text for one in example.feedback if one.kind is FeedbackKind.CORRECTION]
    assert corrected == "version 2"
    assert {one.created_at for one in example.feedback} == {NOW + 2}
    assert example.rejected.keys() == {"b/0", "c/0"}
    assert fates(ledger) == {
        (Fate.PENDING, Reason.NONE): 4,
        (Fate.DUPLICATE, Reason.SUPERSEDED_RATING): 11,
    }
    train(ledger)
    feed(ledger, log, correction("a", "once more", at=NOW + 5), at=NOW + 10)
    assert fates(ledger)[Fate.DUPLICATE, Reason.ALREADY_TRAINED] == 1
    feed(ledger, log, signal("a", "copied", at=NOW + 5), at=NOW + 10)
    assert ledger.count_ready() == 1, "of this nobody has spoken before"


def test_signals_beside_an_explicit_rating_are_not_learned_from(ledger: Ledger) -> None:
    hints = [signal("a", "copied"), signal("a", "edited"), signal("a", "copied", "bob")]
    feed(ledger, Log(), interaction("a"), *hints)
    (example,) = ledger.ready_examples(10)
    assert len(example.feedback) == 3
    feed(ledger, Log(topic_id="t1"), rating("a", -1, "cy"), correction("a"))
    (example,) = ledger.ready_examples(10)
    assert {one.kind for one in example.feedback} == {FeedbackKind.THUMBS, FeedbackKind.CORRECTION}
    train(ledger)
    assert fates(ledger) == {
        (Fate.TRAINED, Reason.NONE): 2,
        (Fate.NOT_TRAINABLE, Reason.OVERRIDDEN_SIGNAL): 3,
    }


# --- preferences ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("at_once", [True, False])
def test_a_preference_joins_both_replies_in_any_order(
    ledger: Ledger, order: tuple[int, ...], at_once: bool
) -> None:
    events = [interaction("a"), interaction("b", at=NOW + 1), preference("a", "b", at=NOW + 2)]
    log, ordered = Log(partitions=3), [events[index] for index in order]
    for batch in [ordered] if at_once else [[event] for event in ordered]:
        assert ledger.ready_examples(10) == []
        feed(ledger, log, *batch, at=NOW + 5)
    (example,) = ledger.ready_examples(10)
    assert example.interaction == events[0]
    assert example.feedback == (events[2],)
    assert example.rejected == {"b/0": events[1]}
    assert (ledger.count_ready(), ledger.oldest_ready_at()) == (1, NOW + 5)
    assert fates(ledger, REPLIES) == {(Fate.PENDING, Reason.NONE): 2}


def test_a_preference_may_be_over_another_choice_of_one_reply(ledger: Ledger) -> None:
    feed(ledger, Log(), interaction("a", choice=0), interaction("a", choice=1))
    feed(ledger, Log(), preference("a", "a", choice=1, over_choice=0))
    (example,) = ledger.ready_examples(10)
    assert (example.interaction.choice, example.rejected["a/0"].choice) == (1, 0)


@pytest.mark.parametrize("feedback_first", [True, False])
@pytest.mark.parametrize(
    ("winner", "loser", "reason"),
    [
        ({}, {"prompt_token_ids": (1, 2)}, Reason.PROMPTS_DIFFER),
        ({}, {"sampling": GREEDY}, Reason.GREEDY_SAMPLING),
        ({"sampling": GREEDY}, {"prompt_token_ids": (1, 2)}, Reason.GREEDY_SAMPLING),
        ({}, {"alias": "other"}, Reason.UNKNOWN_POLICY),
    ],
)
def test_a_pair_that_cannot_be_compared_says_why(
    ledger: Ledger,
    feedback_first: bool,
    winner: dict[str, Any],
    loser: dict[str, Any],
    reason: Reason,
) -> None:
    events = [interaction("a", **winner), interaction("b", **loser), preference("a", "b")]
    feed(ledger, Log(), *(reversed(events) if feedback_first else events))
    assert ledger.count_ready() == 0
    assert fates(ledger) == {(Fate.NOT_TRAINABLE, reason): 1}


@pytest.mark.parametrize("missing", ["a", "b"])
def test_a_preference_whose_other_reply_never_comes_expires(ledger: Ledger, missing: str) -> None:
    there = "b" if missing == "a" else "a"
    feed(ledger, Log(), interaction(there), preference("a", "b", at=NOW + HOUR), at=NOW + HOUR)
    ledger.expire(NOW + HORIZON + 1)
    assert fates(ledger) == {(Fate.PENDING, Reason.NONE): 1}
    assert fates(ledger, REPLIES) == {(Fate.PENDING, Reason.NONE): 1}, "held while it may be needed"
    ledger.expire(NOW + HORIZON + HOUR + 1)
    assert fates(ledger) == {(Fate.EXPIRED, Reason.NO_INTERACTION): 1}
    assert fates(ledger, REPLIES) == {(Fate.EXPIRED, Reason.NO_FEEDBACK): 1}
    assert ledger.expire(NOW + 9 * HORIZON).pruned == 2


@pytest.mark.parametrize("stale", ["a", "b"])
def test_a_preference_is_late_when_it_is_for_either_reply(ledger: Ledger, stale: str) -> None:
    old, later = NOW - HORIZON - 5, NOW + 1
    feed(ledger, Log(), interaction(stale, at=old), at=old)
    feed(ledger, Log(topic_id="t1"), interaction("b" if stale == "a" else "a"))
    feed(ledger, Log(topic_id="t2"), preference("a", "b"), at=later)
    assert fates(ledger) == {(Fate.LATE, Reason.NONE): 1}


def test_a_reply_that_lost_is_kept_until_its_preference_is_decided(ledger: Ledger) -> None:
    log, later = Log(), NOW + 3 * HORIZON
    feed(ledger, log, interaction("a"), interaction("b"), preference("a", "b"))
    ledger.expire(later)
    (example,) = ledger.ready_examples(10)
    assert example.rejected == {"b/0": interaction("b")}
    train(ledger)
    assert fates(ledger, REPLIES) == {(Fate.TRAINED, Reason.NONE): 2}, "it taught, too"
    assert ledger.expire(later).forgotten == 2
    assert fates(ledger, REPLIES) == {(Fate.TRAINED, Reason.NONE): 2}


def test_a_rejected_or_unused_pair_leaves_the_loser_to_its_own_feedback(ledger: Ledger) -> None:
    log = Log()
    feed(ledger, log, interaction("a"), interaction("b"), preference("a", "b"))
    (example,) = ledger.ready_examples(10)
    ledger.commit_no_update(
        BatchDecision([example.example_id], {example.example_id: Reason.NO_ADVANTAGE})
    )
    assert fates(ledger, REPLIES)[Fate.PENDING, Reason.NONE] == 1
    feed(ledger, log, rating("b", -1))
    (example,) = ledger.ready_examples(10)
    assert example.interaction.interaction_id == "b"
    ledger.expire(NOW + 2 * HORIZON)
    train(ledger)


def test_a_reply_that_turns_out_untrainable_takes_preferences_over_it_along(
    ledger: Ledger,
) -> None:
    feed(ledger, Log(), interaction("a"), interaction("b", at=NOW - 9), rating("b"))
    feed(ledger, Log(topic_id="t1"), preference("a", "b"), rating("a", 1, "bob"))
    worse = next(e for e in ledger.ready_examples(10) if e.interaction.interaction_id == "b")
    ledger.commit_no_update(BatchDecision([worse.example_id], {worse.example_id: Reason.MISMATCH}))
    (left,) = ledger.ready_examples(10)
    assert [one.rater for one in left.feedback] == ["bob"]
    assert fates(ledger) == {
        (Fate.NOT_TRAINABLE, Reason.MISMATCH): 2,
        (Fate.PENDING, Reason.NONE): 1,
    }


def test_a_reply_that_lost_is_not_held_out(ledger: Ledger) -> None:
    events = [interaction("a", at=NOW - 5), interaction("b"), rating("b", -1), preference("a", "b")]
    feed(ledger, Log(), *events, interaction("c", prompt_token_ids=(7,)))
    (first, _) = ledger.ready_examples(10)
    assert first.rejected
    (held_out,) = ledger.held_out_traffic(10, exclude=[first.example_id])
    assert held_out.prompt_token_ids == (7,)


# --- policies that must be kept -------------------------------------------------------------------


def test_policies_are_referenced_while_their_replies_can_be_trained_on(ledger: Ledger) -> None:
    def spans(*versions: int) -> tuple[PolicySpan, ...]:
        # One token each, the rest from the last.
        ends = [*range(1, len(versions)), 3]
        starts = [0, *ends[:-1]]
        return tuple(
            PolicySpan(version=v, start=s, end=e)
            for v, s, e in zip(versions, starts, ends, strict=True)
        )

    log = Log()
    assert ledger.policy_versions_referenced() == set()
    feed(
        ledger,
        log,
        interaction("a", policy_spans=spans(3, 4, 5)),
        interaction("b", policy_spans=spans(5)),
        interaction("c", policy_spans=spans(9), sampling=GREEDY),
        interaction("d", policy_spans=spans(7)),
        interaction("e", policy_spans=spans(0)),
        rating("b"),
        rating("d"),
    )
    assert ledger.policy_versions_referenced() == {0, 3, 4, 5, 7}
    doubted = next(e for e in ledger.ready_examples(9) if e.interaction.policy_version == 7)
    ledger.commit_no_update(
        BatchDecision([doubted.example_id], {doubted.example_id: Reason.MISMATCH})
    )
    assert ledger.policy_versions_referenced() == {0, 3, 4, 5}
    ledger.expire(NOW + HORIZON + 1)
    assert ledger.policy_versions_referenced() == {5}, "a rated reply waits for its batch"
    train(ledger)
    assert ledger.policy_versions_referenced() == {5}, "others may still speak of it"
    ledger.expire(NOW + HORIZON + 1)
    assert ledger.policy_versions_referenced() == set()


# --- which examples make a batch ------------------------------------------------------------------

AGES = st.lists(st.integers(0, 50) | st.just(40), min_size=1, max_size=40)


def test_half_of_a_batch_is_the_oldest_and_half_is_spread_over_the_rest(ledger: Ledger) -> None:
    for age in range(100):
        name = f"r{age:02d}"
        feed(ledger, Log(topic_id=name), interaction(name, at=NOW - age), rating(name))
    ages = [int(NOW - e.interaction.created_at) for e in ledger.ready_examples(8)]
    assert ages == [99, 98, 97, 96, 72, 48, 24, 0]
    assert [int(NOW - e.interaction.created_at) for e in ledger.ready_examples(1)] == [99]
    assert [int(NOW - e.interaction.created_at) for e in ledger.ready_examples(2)] == [99, 0]


@settings(max_examples=60, deadline=None)
@given(AGES, st.integers(1, 9), st.randoms(use_true_random=False))
def test_no_example_starves_and_a_batch_follows_from_what_waits(
    ages: list[int], limit: int, random: object
) -> None:
    waiting = sorted((NOW - age, f"r{index:02d}") for index, age in enumerate(ages))
    events = [
        event
        for at, name in waiting
        for event in (interaction(name, at=at), rating(name, rater=name, at=at))
    ]
    shuffled = list(events)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    with (
        tempfile.TemporaryDirectory(dir=FAST_DISK) as folder,
        Ledger(Path(folder) / "a") as one,
        Ledger(Path(folder) / "b") as other,
    ):
        feed(one, Log(), *events)
        feed(other, Log(), *shuffled)
        while waiting:
            batch = one.ready_examples(limit)
            assert [e.example_id for e in other.ready_examples(limit)] == [
                example.example_id for example in batch
            ]
            chosen = [(e.interaction.created_at, e.interaction.interaction_id) for e in batch]
            assert len(chosen) == min(limit, len(waiting))
            assert chosen == sorted(chosen)
            assert set(waiting[: (limit + 1) // 2]) <= set(chosen), "the oldest wait no longer"
            if limit > 1:
                assert chosen[-1][0] == waiting[-1][0], "and the freshest is heard"
            train(one, limit)
            train(other, limit)
            waiting = [place for place in waiting if place not in chosen]
        assert one.count_ready() == 0
