"""The ledger: joins, fates, releases, the horizon, and who may open it."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moorline.events import Divergence, Fate, FeedbackKind, Reason, ReleaseKind, SamplingSettings
from moorline.stream import Gap, GapCause, Topic
from tests.updater.ledger.fixtures import (
    HORIZON,
    HOUR,
    NOW,
    VOCABULARY,
    Log,
    correction,
    interaction,
    preference,
    rating,
    release,
    signal,
)
from updater.learning.baselines import Baselines, Cell
from updater.ledger import (
    BatchDecision,
    LeaseLost,
    Ledger,
    LedgerError,
    LedgerLocked,
    LedgerUnavailable,
    examples_digest,
)
from updater.ledger.examples import MOST_FEEDBACK

REPLIES, RATINGS = Topic.INTERACTIONS, Topic.FEEDBACK


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger(path, horizon_seconds=HORIZON) as opened:
        yield opened
        assert opened.audit() == []
        assert opened.accounting().balanced


def feed(ledger: Ledger, log: Log, *events: object, at: float = NOW, now: float = NOW) -> None:
    ledger.ingest([log.parsed(event, at) for event in events], now=now)  # type: ignore[arg-type]


def fates(ledger: Ledger, topic: Topic) -> dict[tuple[Fate, Reason], int]:
    reasons = ledger.accounting().events.get(topic, {})
    return {(fate, reason): n for fate, by in reasons.items() for reason, n in by.items()}


def train(ledger: Ledger, limit: int = 100) -> list[str]:
    ids = [example.example_id for example in ledger.ready_examples(limit)]
    ledger.commit_release(release(ledger, ids), BatchDecision(ids))
    return ids


# --- joins ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("feedback_first", [True, False])
def test_a_rating_joins_its_reply_in_either_order(ledger: Ledger, feedback_first: bool) -> None:
    events = [interaction("a"), rating("a")]
    for event in reversed(events) if feedback_first else events:
        feed(ledger, Log(), event)
    (example,) = ledger.ready_examples(10)
    assert example.interaction == interaction("a")
    assert example.feedback == (rating("a"),)
    assert ledger.count_ready() == 1


def test_a_rating_joins_only_its_choice(ledger: Ledger) -> None:
    log = Log()
    feed(ledger, log, interaction("a", choice=0), interaction("a", choice=1))
    feed(ledger, log, rating("a", choice=1))
    (example,) = ledger.ready_examples(10)
    assert example.interaction.choice == 1


def test_repeated_events_are_duplicates(ledger: Ledger) -> None:
    log = Log()
    for _ in range(3):
        feed(ledger, log, interaction("a"), rating("a"))
    assert ledger.count_ready() == 1
    assert fates(ledger, REPLIES)[Fate.DUPLICATE, Reason.REPEATED_EVENT] == 2
    assert fates(ledger, RATINGS)[Fate.DUPLICATE, Reason.REPEATED_EVENT] == 2


def test_records_that_were_consumed_are_not_consumed_again(ledger: Ledger) -> None:
    log = Log()
    batch = [log.parsed(interaction("a")), log.parsed(rating("a"))]
    ledger.ingest(batch, now=NOW)
    again = ledger.ingest([*batch, *batch], now=NOW)
    assert (again.records, again.replayed) == (0, 4)
    assert ledger.accounting().total == 2


def test_a_record_twice_in_one_batch_is_consumed_once(ledger: Ledger) -> None:
    record = Log().parsed(interaction("a"))
    done = ledger.ingest([record, record], now=NOW)
    assert (done.records, done.replayed) == (1, 1)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_last_rating_of_a_rater_counts(ledger: Ledger, order: tuple[int, ...]) -> None:
    ratings = [rating("a", value, at=NOW + i) for i, value in enumerate((1, -1, 1))]
    log = Log()
    feed(ledger, log, interaction("a"))
    for index in order:
        feed(ledger, log, ratings[index], at=NOW + 60, now=NOW + 60)
    (example,) = ledger.ready_examples(10)
    assert example.feedback == (ratings[2],)
    assert fates(ledger, RATINGS) == {
        (Fate.PENDING, Reason.NONE): 1,
        (Fate.DUPLICATE, Reason.SUPERSEDED_RATING): 2,
    }


def test_two_raters_make_one_example(ledger: Ledger) -> None:
    feed(ledger, Log(), interaction("a"), rating("a"), rating("a", -1, "bob"))
    (example,) = ledger.ready_examples(10)
    assert {one.rater for one in example.feedback} == {"ann", "bob"}
    assert ledger.count_ready() == 1


@pytest.mark.parametrize("feedback_first", [True, False])
def test_feedback_shares_the_reason_of_an_untrainable_reply(
    ledger: Ledger, feedback_first: bool
) -> None:
    greedy = interaction("a", sampling=SamplingSettings(temperature=0.0))
    events = [greedy, rating("a"), rating("a", -1, at=NOW - 1)]
    log = Log()
    for event in reversed(events) if feedback_first else events:
        feed(ledger, log, event)
    assert ledger.count_ready() == 0
    assert fates(ledger, REPLIES) == {(Fate.NOT_TRAINABLE, Reason.GREEDY_SAMPLING): 1}
    assert fates(ledger, RATINGS) == {
        (Fate.NOT_TRAINABLE, Reason.GREEDY_SAMPLING): 1,
        (Fate.DUPLICATE, Reason.SUPERSEDED_RATING): 1,
    }


def test_a_signal_without_a_reward_is_counted_and_not_learned_from(ledger: Ledger) -> None:
    log = Log()
    sneezed = rating("a", kind=FeedbackKind.SIGNAL, signal="sneezed", feedback_id="s")
    feed(ledger, log, interaction("a"), rating("a", at=NOW - 5), sneezed, sneezed)
    (example,) = ledger.ready_examples(10)
    assert [one.kind for one in example.feedback] == [FeedbackKind.THUMBS]
    assert fates(ledger, RATINGS)[Fate.NOT_TRAINABLE, Reason.UNKNOWN_SIGNAL] == 1
    assert fates(ledger, RATINGS)[Fate.DUPLICATE, Reason.REPEATED_EVENT] == 1


def test_dead_letters_are_counted_by_reason(ledger: Ledger) -> None:
    feed(ledger, Log(), b"{", b'{"schema_version": "9.0"}', b"[]")
    assert fates(ledger, RATINGS) == {
        (Fate.DEAD_LETTERED, Reason.MALFORMED_JSON): 1,
        (Fate.DEAD_LETTERED, Reason.UNSUPPORTED_SCHEMA_VERSION): 1,
        (Fate.DEAD_LETTERED, Reason.SCHEMA_MISMATCH): 1,
    }


def test_event_times_in_the_future_are_cut_at_arrival(ledger: Ledger) -> None:
    tomorrow = NOW + 24 * HOUR
    feed(ledger, Log(), interaction("a", at=tomorrow), rating("a", at=tomorrow))
    (example,) = ledger.ready_examples(10)
    assert example.interaction.created_at == NOW
    assert example.feedback[0].created_at == NOW
    # A stamp in the future that the broker kept is cut at now.
    feed(ledger, Log(topic_id="t1"), interaction("b", at=tomorrow), at=tomorrow)
    assert ledger.watermark(NOW) == NOW


# --- what is learned from -------------------------------------------------------------------------


def test_examples_come_oldest_first_and_stay_until_decided(ledger: Ledger) -> None:
    log = Log()
    for name, at in [("b", NOW - 5), ("c", NOW), ("a", NOW - 9)]:
        feed(ledger, log, interaction(name, at=at), rating(name))
    names = [example.interaction.interaction_id for example in ledger.ready_examples(3)]
    assert names == ["a", "b", "c"]
    assert [e.interaction.interaction_id for e in ledger.ready_examples(3)] == names
    assert ledger.count_ready() == 3
    assert ledger.oldest_ready_at() == NOW


def test_of_one_reply_only_the_newest_hand_out_can_be_decided(ledger: Ledger) -> None:
    log = Log()
    feed(ledger, log, interaction("a"), rating("a", 1, rater="bob", at=NOW - 2))
    (older,) = ledger.ready_examples(1)
    feed(ledger, log, rating("a", -1, rater="bob", at=NOW - 1))
    (newer,) = ledger.ready_examples(1)
    assert newer.example_id != older.example_id
    ledger.commit_release(release(ledger, [newer]), BatchDecision([newer.example_id]))
    with pytest.raises(LedgerError, match="decided before"):
        ledger.commit_release(release(ledger, [older]), BatchDecision([older.example_id]))
    assert ledger.accounting().fates[RATINGS][Fate.TRAINED] == 1
    assert ledger.audit() == []


def test_a_flood_on_one_reply_is_learned_from_bit_by_bit(ledger: Ledger) -> None:
    log = Log()
    raters = [f"r{number:03d}" for number in range(MOST_FEEDBACK + 6)]
    feed(ledger, log, interaction("a"), *(correction("a", rater=name) for name in raters))
    heard: list[str] = []
    for size in (MOST_FEEDBACK, 6):
        (example,) = ledger.ready_examples(1)
        assert len(example.feedback) == size
        heard += [one.rater for one in example.feedback]
        ledger.commit_release(release(ledger, [example]), BatchDecision([example.example_id]))
    assert sorted(heard) == raters
    assert ledger.count_ready() == 0
    assert ledger.accounting().fates[RATINGS] == {Fate.TRAINED: len(raters)}
    assert ledger.audit() == []


def test_held_out_traffic_is_recent_fit_and_not_of_the_batch(ledger: Ledger) -> None:
    log = Log()
    feed(
        ledger,
        log,
        interaction("old", at=NOW - 50, prompt_token_ids=(10,)),
        interaction("new", at=NOW - 10, prompt_token_ids=(11,)),
        interaction("long", at=NOW, prompt_token_ids=(12,) * 50),
        interaction("greedy", at=NOW - 20, prompt_token_ids=(13,), sampling={"temperature": 0}),
        interaction("foreign", at=NOW, prompt_token_ids=(14,), alias="other"),
        interaction("batch", at=NOW, prompt_token_ids=(15,)),
        interaction("rated", at=NOW, prompt_token_ids=(16,)),
        rating("batch"),
    )
    batch = [example.example_id for example in ledger.ready_examples(5)]
    feed(ledger, log, rating("rated"))

    def first_tokens(limit: int) -> list[int]:
        found = ledger.held_out_traffic(limit, exclude=batch, max_tokens=20)
        return [sequence.prompt_token_ids[0] for sequence in found]

    assert first_tokens(10) == [11, 13, 10, 16]
    assert first_tokens(2) == [11, 13]


def test_a_release_trains_its_examples_once(ledger: Ledger) -> None:
    feed(ledger, Log(), interaction("a"), rating("a"), interaction("b"), rating("b"))
    ids = train(ledger)
    assert len(ids) == 2
    assert fates(ledger, REPLIES) == fates(ledger, RATINGS) == {(Fate.TRAINED, Reason.NONE): 2}
    assert (ledger.live_version(), ledger.next_version()) == (1, 2)
    assert [name for name, _ in ledger.trained_examples(1)] == sorted(ids)
    with pytest.raises(LedgerError, match="not handed out"):
        ledger.commit_release(release(ledger, ids), BatchDecision(ids))


def test_the_same_rater_teaches_one_reply_once(ledger: Ledger) -> None:
    log = Log()
    feed(ledger, log, interaction("a"), rating("a"))
    train(ledger)
    feed(ledger, log, rating("a", -1, at=NOW + 1), at=NOW + 9, now=NOW + 9)
    feed(ledger, log, rating("a", -1, at=NOW - 9))
    assert ledger.count_ready() == 0
    assert fates(ledger, RATINGS)[Fate.DUPLICATE, Reason.ALREADY_TRAINED] == 2


def test_another_rater_makes_a_new_example_and_the_reply_keeps_its_first_fate(
    ledger: Ledger,
) -> None:
    log = Log()
    feed(ledger, log, interaction("a"), rating("a"))
    train(ledger)
    feed(ledger, log, rating("a", -1, "bob"))
    (example,) = ledger.ready_examples(10)
    assert [one.rater for one in example.feedback] == ["bob"]
    ledger.commit_rejection(Reason.GATE_BLOCKED, BatchDecision([example.example_id]), now=NOW)
    assert fates(ledger, REPLIES) == {(Fate.TRAINED, Reason.NONE): 1}
    assert fates(ledger, RATINGS) == {
        (Fate.TRAINED, Reason.NONE): 1,
        (Fate.REJECTED, Reason.GATE_BLOCKED): 1,
    }


def test_a_rating_that_comes_while_its_older_one_trains_is_not_trained(ledger: Ledger) -> None:
    log = Log()
    feed(ledger, log, interaction("a"), rating("a", at=NOW - 5))
    (example,) = ledger.ready_examples(10)
    feed(ledger, log, rating("a", -1, at=NOW), rating("a", 1, "bob"))
    ledger.commit_release(release(ledger, [0]), BatchDecision([example.example_id]))
    assert fates(ledger, RATINGS) == {
        (Fate.TRAINED, Reason.NONE): 1,
        (Fate.DUPLICATE, Reason.ALREADY_TRAINED): 1,
        (Fate.PENDING, Reason.NONE): 1,
    }
    (left,) = ledger.ready_examples(10)
    assert [one.rater for one in left.feedback] == ["bob"]


def test_a_new_rating_after_a_rejection_gets_another_chance(ledger: Ledger) -> None:
    log = Log()
    feed(ledger, log, interaction("a"), rating("a", at=NOW - 5))
    (example,) = ledger.ready_examples(10)
    divergence = Divergence(
        measured_from="live",
        tokens_from="traffic",
        mean_kl_nats=float("nan"),
        max_prompt_kl_nats=1.0,
        tokens=3,
    )
    number = ledger.commit_rejection(
        Reason.DIVERGENCE_BOUND,
        BatchDecision([example.example_id], record={"divergences": [divergence]}),
        now=NOW,
    )
    assert ledger.next_version() == 1, "a rejected candidate takes no number"
    (rejection,) = ledger.rejections()
    assert (rejection["id"], rejection["reason"], rejection["examples"]) == (
        number,
        Reason.DIVERGENCE_BOUND,
        1,
    )
    assert json.loads(rejection["record"])["divergences"][0]["tokens"] == 3
    feed(ledger, log, rating("a", at=NOW - 9), rating("a", -1, at=NOW))
    assert ledger.count_ready() == 1
    assert fates(ledger, RATINGS) == {
        (Fate.REJECTED, Reason.DIVERGENCE_BOUND): 1,
        (Fate.DUPLICATE, Reason.SUPERSEDED_RATING): 1,
        (Fate.PENDING, Reason.NONE): 1,
    }


@pytest.mark.parametrize(("reason", "open_after"), [(Reason.MISMATCH, 0), (Reason.NO_ADVANTAGE, 1)])
def test_what_is_not_trainable_says_so_of_later_ratings_only_if_the_reply_is_at_fault(
    ledger: Ledger, reason: Reason, open_after: int
) -> None:
    log = Log()
    feed(ledger, log, interaction("a"), rating("a"))
    (example,) = ledger.ready_examples(10)
    feed(ledger, log, rating("a", 1, "bob"))
    ledger.commit_no_update(BatchDecision([example.example_id], {example.example_id: reason}))
    assert fates(ledger, REPLIES) == {(Fate.NOT_TRAINABLE, reason): 1}
    assert ledger.count_ready() == open_after
    feed(ledger, log, rating("a", 1, "cy"))
    (pending,) = [n for (fate, _), n in fates(ledger, RATINGS).items() if fate is Fate.PENDING] or [
        0
    ]
    assert pending == 2 * open_after


@pytest.mark.parametrize("released", [True, False])
def test_what_a_candidate_did_not_learn_from_is_set_aside_with_its_decision(
    ledger: Ledger, released: bool
) -> None:
    log = Log()
    feed(ledger, log, interaction("a"), rating("a"), interaction("b"), rating("b"))
    ids = [example.example_id for example in ledger.ready_examples(10)]
    aside = {ids[1]: Reason.OFF_POLICY}
    if released:
        with pytest.raises(LedgerError, match="examples 2, the ledger expects 1"):
            ledger.commit_release(release(ledger, ids), BatchDecision(ids, set_aside=aside))
        ledger.commit_release(release(ledger, ids[:1]), BatchDecision(ids, set_aside=aside))
        assert [name for name, _ in ledger.trained_examples(1)] == ids[:1]
        judged = (Fate.TRAINED, Reason.NONE)
    else:
        ledger.commit_rejection(Reason.GATE_BLOCKED, BatchDecision(ids, set_aside=aside), now=NOW)
        assert ledger.rejections()[0]["examples"] == 1
        judged = (Fate.REJECTED, Reason.GATE_BLOCKED)
    expected = {judged: 1, (Fate.NOT_TRAINABLE, Reason.OFF_POLICY): 1}
    assert fates(ledger, REPLIES) == fates(ledger, RATINGS) == expected
    feed(ledger, log, rating("b", 1, "bob"))
    assert ledger.count_ready() == 1, "how far the policy is away is measured anew"


def test_what_is_set_aside_must_be_of_the_batch(ledger: Ledger) -> None:
    feed(ledger, Log(), interaction("a"), rating("a"))
    ids = [example.example_id for example in ledger.ready_examples(10)]
    with pytest.raises(LedgerError, match="not in the batch"):
        ledger.commit_release(
            release(ledger, ids), BatchDecision(ids, set_aside={"ex-0": Reason.OFF_POLICY})
        )
    assert ledger.count_ready() == 1


@pytest.mark.parametrize(
    "wrong", [{"version": 5}, {"parent": 4}, {"lease_epoch": 9}, {"examples": 2}]
)
def test_a_release_that_does_not_follow_is_refused_and_changes_nothing(
    ledger: Ledger, wrong: dict[str, int]
) -> None:
    feed(ledger, Log(), interaction("a"), rating("a"))
    ids = [example.example_id for example in ledger.ready_examples(10)]
    with pytest.raises(LedgerError, match=next(iter(wrong))):
        ledger.commit_release(release(ledger, ids).model_copy(update=wrong), BatchDecision(ids))
    assert ledger.count_ready() == 1
    assert ledger.unpublished() == []
    ledger.commit_release(release(ledger, ids), BatchDecision(ids))


def test_the_base_model_may_be_recorded_as_version_0(ledger: Ledger) -> None:
    values = {"kind": ReleaseKind.BASE, "version": 0, "artifact_digest": None, "parent": None}
    base = release(ledger).model_copy(update=values)
    ledger.commit_release(base, BatchDecision([]))
    assert (ledger.live_version(), ledger.next_version()) == (0, 1)
    train(ledger)
    with pytest.raises(LedgerError, match="version 0"):
        ledger.commit_release(base, BatchDecision([]))


def test_baselines_are_committed_with_their_release(ledger: Ledger) -> None:
    assert ledger.baselines() == Baselines()
    baselines = Baselines({"x": Cell(1.5, 2.0)})
    with pytest.raises(LedgerError):
        ledger.commit_release(release(ledger, version=9), BatchDecision([], baselines=baselines))
    assert ledger.baselines() == Baselines()
    ledger.commit_release(release(ledger), BatchDecision([], baselines=baselines))
    assert ledger.baselines() == baselines


def test_the_outbox_gives_each_release_until_it_is_published(ledger: Ledger) -> None:
    train(ledger)
    train(ledger)
    assert [one.version for one in ledger.unpublished()] == [1, 2]
    ledger.mark_published(1)
    ledger.mark_published(1)
    assert [one.version for one in ledger.unpublished()] == [2]
    assert [one.version for one in ledger.releases()] == [1, 2]
    assert ledger.release(2) == ledger.unpublished()[0]


def test_the_digest_of_examples_does_not_depend_on_their_order() -> None:
    assert examples_digest(["a", "b"]) == examples_digest(["b", "a"]) != examples_digest(["a"])


# --- the horizon ----------------------------------------------------------------------------------


def test_what_waits_longer_than_the_horizon_expires(ledger: Ledger) -> None:
    log = Log()
    feed(ledger, log, interaction("a"), rating("b"), interaction("c"), rating("c"))
    assert ledger.expire(NOW + HORIZON).interactions == 0
    expired = ledger.expire(NOW + HORIZON + 1)
    assert (expired.interactions, expired.feedback) == (1, 1)
    assert fates(ledger, REPLIES)[Fate.EXPIRED, Reason.NO_FEEDBACK] == 1
    assert fates(ledger, RATINGS)[Fate.EXPIRED, Reason.NO_INTERACTION] == 1
    assert ledger.count_ready() == 1, "a rated reply waits for its batch, however long"


@pytest.mark.parametrize("expire_first", [True, False])
@pytest.mark.parametrize("interaction_first", [True, False])
def test_feedback_after_the_horizon_is_late_whenever_it_is_read(
    ledger: Ledger, expire_first: bool, interaction_first: bool
) -> None:
    log, later = Log(), NOW + HORIZON + 5
    # The rater's clock says that it was in time; the broker's says that it was not.
    late = rating("a", at=NOW + 1)
    if interaction_first:
        feed(ledger, log, interaction("a"))
        if expire_first:
            ledger.expire(later)
        feed(ledger, log, late, at=later, now=later)
    else:
        feed(ledger, log, late, at=later, now=later)
        feed(ledger, log, interaction("a"), now=later)
    ledger.expire(later)
    assert fates(ledger, RATINGS) == {(Fate.LATE, Reason.NONE): 1}
    assert fates(ledger, REPLIES) == {(Fate.EXPIRED, Reason.NO_FEEDBACK): 1}


def test_bodies_go_after_one_horizon_and_rows_after_two_but_fates_stay(
    ledger: Ledger, path: Path
) -> None:
    log = Log()
    feed(ledger, log, interaction("a"), rating("a"), interaction("b"), rating("z"))
    train(ledger)
    expired = ledger.expire(NOW + HORIZON + 1)
    assert (expired.interactions, expired.forgotten) == (1, 1)
    later = NOW + HORIZON + 2
    feed(ledger, log, rating("a", 1, "bob"), at=later, now=later)
    assert fates(ledger, RATINGS)[Fate.LATE, Reason.NONE] == 1
    total = ledger.accounting().total
    assert ledger.expire(NOW + 2 * HORIZON + 1).pruned == 3
    with sqlite3.connect(path) as connection:
        for table in ("interactions", "interaction_bodies", "feedback", "feedback_bodies"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
    connection.close()
    assert ledger.accounting().total == total


def test_bodies_of_what_is_decided_may_go_before_the_horizon(tmp_path: Path) -> None:
    log = Log()
    with Ledger(
        tmp_path / "l.sqlite", horizon_seconds=HORIZON, keep_decided_seconds=2 * HOUR
    ) as ledger:
        greedy = interaction("greedy", sampling=SamplingSettings(temperature=0.0))
        feed(ledger, log, interaction("a"), rating("a"), interaction("waits"), greedy)
        feed(ledger, log, interaction("c"), interaction("d"), preference("c", "d"))
        train(ledger)
        later = NOW + 2 * HOUR + 1
        feed(ledger, log, rating("c", rater="bob"), at=later - HOUR, now=later)
        assert ledger.expire(later - HOUR).forgotten == 0
        assert ledger.expire(later, limit=2).forgotten == 2
        assert ledger.expire(later).forgotten == 1, "bob's word on c waits for a batch"
        feed(ledger, log, rating("a", rater="bob"), rating("waits"), at=later, now=later)
        ready = {example.interaction.interaction_id for example in ledger.ready_examples(9)}
        assert ready == {"c", "waits"}
        assert fates(ledger, RATINGS)[Fate.LATE, Reason.NONE] == 1
        assert ledger.audit() == []


def test_expiry_is_done_a_bounded_number_of_rows_at_a_time(ledger: Ledger) -> None:
    feed(ledger, Log(), *[interaction(f"a{i}") for i in range(5)])
    later = NOW + HORIZON + 1
    assert [ledger.expire(later, limit=2).interactions for _ in range(4)] == [2, 2, 1, 0]


def test_the_file_shrinks_again_bit_by_bit_when_what_waited_is_gone(
    ledger: Ledger, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("updater.ledger.database._PAGES_GIVEN_BACK", 20)
    log, later = Log(), NOW + HORIZON + 1
    # Of random tokens: nothing compresses them away.
    tokens = tuple(random.Random(0).choices(range(VOCABULARY), k=900))
    feed(ledger, log, *[interaction(f"r{i}", prompt_token_ids=tokens) for i in range(400)])
    ledger._database.wipe()  # moves the WAL into the file
    sizes = [path.stat().st_size]
    while len(sizes) < 3 or sizes[-1] < sizes[-2]:
        ledger.expire(later)
        ledger._database.wipe()
        sizes.append(path.stat().st_size)
    assert sizes[0] - sizes[1] == 20 * 4096
    assert sizes[-1] < sizes[0] / 2
    ((pages,),), ((free,),) = map(
        ledger._database.rows, ("PRAGMA page_count", "PRAGMA freelist_count")
    )
    assert 0 < free <= pages / 4


def test_a_partition_with_unread_records_holds_the_horizon_back(ledger: Ledger) -> None:
    log, later = Log(partitions=1), NOW + 3 * HORIZON
    feed(ledger, log, interaction("a"))
    ledger.set_behind([(RATINGS, 0)], as_of=later)
    assert ledger.watermark(later) == 0.0, "nothing was read of it"
    assert ledger.expire(later).interactions == 0
    feed(ledger, log, rating("a"), at=NOW + HOUR, now=later)
    assert ledger.count_ready() == 1
    assert ledger.watermark(later) == NOW + HOUR
    ledger.set_behind([], as_of=later - 7)
    assert ledger.watermark(later) == later - 7
    assert ledger.watermark(NOW) == NOW


# --- offsets and gaps -----------------------------------------------------------------------------


def test_offsets_follow_what_was_consumed(ledger: Ledger) -> None:
    assert ledger.offsets() == {}
    log = Log(partitions=1)
    feed(ledger, log, interaction("a"), interaction("b"), rating("a"))
    assert ledger.offsets() == {(REPLIES, 0): ("t0", 2), (RATINGS, 0): ("t0", 1)}
    assert ledger.release_offsets() == {REPLIES: {0: 2}, RATINGS: {0: 1}}


def test_a_topic_that_was_made_again_starts_anew(ledger: Ledger) -> None:
    feed(ledger, Log(partitions=1), interaction("a"), interaction("b"))
    feed(ledger, Log(partitions=1, topic_id="t1"), interaction("c"))
    assert ledger.offsets() == {(REPLIES, 0): ("t1", 1)}
    assert ledger.accounting().consumed == {REPLIES: 3}


def test_a_gap_is_noted_once_and_moves_the_offset(ledger: Ledger) -> None:
    feed(ledger, Log(partitions=1), interaction("a"))
    gap = Gap(REPLIES, 0, expected_offset=1, resumed_offset=41, cause=GapCause.RETENTION)
    ledger.ingest([], [gap], now=NOW)
    ledger.ingest([], [gap], now=NOW)
    assert ledger.accounting().missed == {REPLIES: 40}
    assert ledger.offsets() == {(REPLIES, 0): ("t0", 41)}


# --- opening --------------------------------------------------------------------------------------


def test_a_second_updater_is_refused_in_one_line(path: Path) -> None:
    program = f"from pathlib import Path; from updater.ledger import *; Ledger(Path({str(path)!r}))"
    with Ledger(path):
        with pytest.raises(LedgerLocked, match=r"another updater \(pid \d+\) is using") as refusal:
            Ledger(path)
        assert "\n" not in str(refusal.value)
        second = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert "LedgerLocked: another updater (pid" in second.stderr
    Ledger(path).close()


def test_every_opening_is_a_new_lease(path: Path) -> None:
    epochs = []
    for _ in range(3):
        with Ledger(path) as ledger:
            epochs.append(ledger.epoch)
            assert ledger.lease_epoch() == ledger.epoch
    assert epochs == [1, 2, 3]


def test_an_updater_whose_lease_was_taken_over_cannot_write(path: Path) -> None:
    with Ledger(path) as stale:
        path.with_name(f"{path.name}.lock").unlink()  # as on a file system that loses locks
        with Ledger(path) as newer:
            with pytest.raises(LeaseLost, match="must stop"):
                stale.ingest([Log().parsed(interaction("a"))], now=NOW)
            feed(newer, Log(), interaction("a"))
            assert newer.accounting().total == 1


def test_a_reader_sees_a_ledger_that_is_being_written(path: Path) -> None:
    with pytest.raises(LedgerError, match="no ledger"):
        Ledger.open_readonly(path)
    with Ledger(path) as ledger, Ledger.open_readonly(path) as reader:
        feed(ledger, Log(), interaction("a"), rating("a"))
        assert reader.count_ready() == 1
        assert reader.accounting().as_dict() == ledger.accounting().as_dict()
        assert not hasattr(reader, "ingest")
    with Ledger.open_readonly(path) as reader:
        assert reader.count_ready() == 1


def test_examples_and_offsets_survive_a_restart(path: Path) -> None:
    log = Log()
    with Ledger(path) as ledger:
        feed(ledger, log, interaction("a"), rating("a"), interaction("b"))
        before = (ledger.offsets(), ledger.ready_examples(9), ledger.accounting())
        stale = [example.example_id for example in ledger.ready_examples(9)]
    with Ledger(path) as ledger:
        with pytest.raises(LedgerError, match="not handed out"):
            ledger.commit_no_update(BatchDecision(stale, dict.fromkeys(stale, Reason.MISMATCH)))
        assert (ledger.offsets(), ledger.ready_examples(9), ledger.accounting()) == before


def test_what_is_not_a_ledger_is_refused(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(LedgerError, match="damaged"):
        Ledger(path)
    path.unlink()
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE t (a)")
    other.close()
    with pytest.raises(LedgerError, match="not a Moorline ledger"):
        Ledger(path)
    other = sqlite3.connect(path)
    other.execute("PRAGMA user_version = 99")
    other.close()
    with pytest.raises(LedgerError, match="format 99"):
        Ledger(path)


def test_deaths_are_of_whatever_the_update_under_way_was_made_of(path: Path) -> None:
    log = Log()
    with Ledger(path, suspect_after_crashes=2) as ledger:
        feed(ledger, log, *[interaction(name) for name in "abcd"], *[rating(n) for n in "abc"])
    for life in range(3):
        with Ledger(path, suspect_after_crashes=2) as ledger:
            assert [one.key for one in ledger.crashes.suspects()] == (
                ["a/0", "b/0", "c/0"] if life == 2 else []
            )
            ids = [one.example_id for one in ledger.ready_examples(9)]
            ledger.crashes.mark_update(ids[:2])
            # What was measured on has died too, and is not measured on any more.
            measured = ledger.held_out_traffic(9, exclude=ids[:2])
            assert len(measured) == (0 if life == 2 else 2)
    with Ledger(path, suspect_after_crashes=2) as ledger:
        assert ledger.crashes.excluded() == {1, 2, 3, 4}
        assert [(one.key, one.crash_count) for one in ledger.crashes.suspects()] == [
            ("a/0", 3),
            ("b/0", 3),
            ("c/0", 2),
        ]
        (first,) = ledger.examples_of(["a/0", "d/0"])
        assert ledger.crashes.least_suspect("a/0", 9) == "c/0"
        assert ledger.crashes.least_suspect("c/0", 3) is None
        ledger.crashes.mark_update([first.example_id], alone=True)
    with Ledger(path, horizon_seconds=HORIZON, suspect_after_crashes=2) as ledger:
        assert [ledger.crashes.crashes_alone(key) for key in ("a/0", "b/0")] == [1, 0]
        feed(ledger, log, rating("a", -1, at=NOW + 9), at=NOW + 9)
        assert ledger.crashes.suspects()[0].crash_count == 4, "the reply is the same"
        ids = [one.example_id for one in ledger.ready_examples(9)]
        ledger.commit_no_update(BatchDecision(ids[:1], dict.fromkeys(ids[:1], Reason.NO_ADVANTAGE)))
        assert [one.key for one in ledger.crashes.suspects()] == ["b/0", "c/0"]
        ledger.crashes.mark_update(ids[1:])
        ledger.crashes.remove_marks()
        assert [one.crash_count for one in ledger.crashes.suspects()] == [3, 2]
        ledger.crashes.mark_update(ids[1:2])
        ledger.crashes.clear_counts()
        assert [one.key for one in ledger.crashes.suspects()] == ["c/0"]
        ledger.expire(NOW + 3 * HORIZON)
        assert ledger.crashes.excluded() == {3}, "nobody rated d, and it is forgotten"
        assert ledger.audit() == []


def test_a_reply_that_kills_the_updater_is_never_read_by_an_update_again(ledger: Ledger) -> None:
    log = Log()
    feed(ledger, log, interaction("a"), rating("a"), interaction("b"))
    ids = [one.example_id for one in ledger.ready_examples(9)]
    feed(ledger, log, rating("a", 1, "bob"))
    ledger.commit_rejection(Reason.UPDATE_CRASHED, BatchDecision(ids), now=NOW)
    feed(ledger, log, rating("a", 1, "cy"))
    assert ledger.ready_examples(9) == []
    assert len(ledger.held_out_traffic(9)) == 1, "b"
    assert ledger.accounting().events[str(Topic.FEEDBACK)] == {
        Fate.REJECTED: {Reason.UPDATE_CRASHED: 1},
        Fate.NOT_TRAINABLE: {Reason.UPDATE_CRASHED: 2},
    }


def test_a_full_disk_changes_nothing_and_passes(ledger: Ledger) -> None:
    log = Log()
    batch = [log.parsed(interaction(f"a{i}", user="u" * 200)) for i in range(200)]
    connection = ledger._database._connection
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(LedgerUnavailable, match="free space"):
        ledger.ingest(batch, now=NOW)
    assert ledger.accounting().total == 0
    connection.execute("PRAGMA max_page_count = 1000000")
    assert ledger.ingest(batch, now=NOW).records == 200


def test_no_step_of_a_cycle_reads_a_whole_table(ledger: Ledger) -> None:
    connection = ledger._database._connection
    statements: set[str] = set()
    connection.set_trace_callback(statements.add)
    log = Log()
    feed(ledger, log, rating("a"), *[interaction(name) for name in "abc"], rating("a"))
    feed(ledger, log, rating("a", -1), rating("b"), rating("b", 1, "bob"))
    feed(ledger, log, preference("a", "c"), preference("d", "a"), interaction("d"), rating("c"))
    feed(ledger, log, signal("a", "copied"), correction("b"), preference("e", "f"))
    assert len(ledger.ready_examples(2)) == 2
    feed(ledger, log, rating("a", -1, at=NOW + 1), at=NOW + 1, now=NOW + 1)
    ids = [example.example_id for example in ledger.ready_examples(1)]
    ledger.held_out_traffic(5, exclude=ids)
    ledger.commit_release(release(ledger, ids), BatchDecision(ids))
    train(ledger)
    for name in (
        "policy_versions_referenced",
        "count_ready",
        "oldest_ready_at",
        "offsets",
        "accounting",
        "unpublished",
    ):
        getattr(ledger, name)()
    ledger.expire(NOW + 3 * HORIZON)
    connection.set_trace_callback(None)
    # A row for each partition, fate, gap; keys are destroyed in every cycle, attempts end.
    small = ("topic_partitions", "p", "t", "gaps", "meta", "doomed_keys", "crash_counts")
    asked = [sql for sql in statements if sql.startswith(("SELECT", "UPDATE", "DELETE"))]
    assert len(asked) > 20
    for sql in asked:
        for *_, step in connection.execute(f"EXPLAIN QUERY PLAN {sql}"):
            if step.startswith("SCAN"):
                assert "INDEX" in step or step.split()[1] in small, f"{step}: {sql}"
            if "TEMP B-TREE" in step:  # sorting is for few rows: partitions, one reply's ratings
                assert "topic_partitions" in sql or "f.interaction =" in sql, f"{step}: {sql}"


def test_a_directory_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LedgerUnavailable, match="choose another state_dir"):
        Ledger(tmp_path / "file" / "state" / "ledger.sqlite")
