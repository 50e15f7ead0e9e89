"""Rewards, baselines, advantages, and the cap on one rater's influence."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemon.events import Feedback, FeedbackKind, Reason
from tests.updater.ledger_fixtures import interaction, rating
from updater.credit import (
    KEEP_LEAST,
    KEEP_MOST,
    MAX_RATER_SHARE,
    PRIOR_COUNT,
    STD_FLOOR,
    Baselines,
    Cell,
    assign_credit,
    cell_name,
    rater_weights,
    reward,
    why_no_credit,
)
from updater.values import Example


def example(name: str, *ratings: Feedback, tenant: str = "default") -> Example:
    return Example(name, interaction(name, tenant=tenant), ratings)


def thumbs(*values: int, rater: str | None = None) -> list[Example]:
    """One example for each thumb, each by a rater of its own unless one is named."""
    return [
        example(f"e{i}", rating(f"e{i}", value, rater or f"rater{i}"))
        for i, value in enumerate(values)
    ]


def advantages(examples: list[Example], baselines: Baselines | None = None) -> list[float]:
    return [one.advantage for one in assign_credit(examples, baselines or Baselines())[0]]


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [(1, 1, 5, -1.0), (5, 1, 5, 1.0), (3, 1, 5, 0.0), (4, 1, 5, 0.5), (0.75, 0, 1, 0.5)],
)
def test_a_score_is_linear_over_its_range(
    value: float, low: float, high: float, expected: float
) -> None:
    scored = rating("a", value, kind=FeedbackKind.SCORE, score_min=low, score_max=high)
    assert reward(scored) == pytest.approx(expected)


def test_thumbs_are_worth_what_they_say() -> None:
    assert reward(rating("a", 1)) == 1.0
    assert reward(rating("a", -1)) == -1.0


@given(st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 3).map(sorted))
def test_every_score_that_parses_has_a_reward_in_range(numbers: list[float]) -> None:
    low, value, high = numbers
    if low == high:
        return
    scored = rating("a", value, kind=FeedbackKind.SCORE, score_min=low, score_max=high)
    assert -1.0 <= reward(scored) <= 1.0


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": FeedbackKind.CORRECTION, "text": "so"},
        {"kind": FeedbackKind.PREFERENCE, "over": "other"},
        {"kind": FeedbackKind.SIGNAL, "signal": "copied"},
    ],
)
def test_other_kinds_have_no_reward_and_say_why(changes: dict[str, object]) -> None:
    feedback = rating("a", **changes)
    assert why_no_credit(feedback) is Reason.UNSUPPORTED_KIND
    with pytest.raises(ValueError, match="no reward"):
        reward(feedback)
    assert why_no_credit(rating("a")) is None


def test_a_hand_worked_batch() -> None:
    credited, after, stats = assign_credit(thumbs(1, 1, 1, -1), Baselines())
    # No memory: the baseline is the batch's mean, 0.5; std of (0.5, 0.5, 0.5, -1.5) is sqrt(0.75).
    assert [one.reward for one in credited] == [1, 1, 1, -1]
    scale = math.sqrt(0.75)
    assert [one.advantage for one in credited] == pytest.approx([0.5 / scale] * 3 + [-1.5 / scale])
    assert stats.mean_baseline == pytest.approx(0.5)
    assert stats.reward_std == pytest.approx(scale)
    assert after.cell(cell_name("default")) == Cell(3.0, 1.0)


def test_the_baseline_remembers_and_leans_on_the_whole_when_it_knows_little() -> None:
    known = Baselines({"": Cell(90, 10), cell_name("default"): Cell(90, 10)})
    _, _, stats = assign_credit(thumbs(1, -1), known)
    whole = (90 + PRIOR_COUNT * 0.5) / (100 + PRIOR_COUNT)
    cell = (90 + PRIOR_COUNT * whole) / (100 + PRIOR_COUNT)
    assert stats.mean_baseline == pytest.approx(2 * cell - 1)
    stranger = [example("a", rating("a", -1), tenant="new")]
    _, _, stats = assign_credit(stranger, known)
    assert stats.mean_baseline == pytest.approx(2 * (90 / (100 + PRIOR_COUNT)) - 1)


def test_tenants_have_baselines_of_their_own() -> None:
    known = Baselines({cell_name("x"): Cell(100, 0), cell_name("y"): Cell(0, 100)})
    both = [example("a", rating("a", 1), tenant="x"), example("b", rating("b", 1), tenant="y")]
    first, second = advantages(both, known)
    assert second > 1 > first >= 0


def test_memory_shortens_as_the_policy_moves() -> None:
    known = Baselines({"": Cell(100, 100), cell_name("default"): Cell(100, 100)})

    def remembered(moved_nats: float) -> float:
        _, after, _ = assign_credit(thumbs(1), known, moved_nats=moved_nats)
        return after.cell("").ratings - 1.0

    assert remembered(0.0) == pytest.approx(200 * KEEP_MOST)
    assert remembered(0.06) == pytest.approx(200 * 0.5)
    assert remembered(9.0) == pytest.approx(200 * KEEP_LEAST)


def test_tenants_that_are_forgotten_leave_the_state() -> None:
    baselines = Baselines({cell_name("gone"): Cell(0.04, 0.0)})
    _, after, _ = assign_credit(thumbs(1), baselines)
    assert cell_name("gone") not in after.cells


def test_a_batch_of_equal_ratings_is_not_blown_up() -> None:
    known = Baselines({cell_name("default"): Cell(99, 1), "": Cell(99, 1)})
    assert all(0 < a < 0.2 for a in advantages(thumbs(1, 1, 1, 1), known))
    assert advantages(thumbs(1, 1, 1)) == [0.0, 0.0, 0.0]


def test_raters_who_disagree_are_averaged_and_counted() -> None:
    split = example("a", rating("a", 1, "ann"), rating("a", -1, "bob"))
    (credited,), _, stats = assign_credit([split], Baselines())
    assert credited.reward == 0.0
    assert stats.disputed_examples == 1


def test_one_person_alone_is_heard_in_full() -> None:
    credited, _, stats = assign_credit(thumbs(1, 1, -1, -1, rater="ann"), Baselines())
    assert {abs(one.advantage) for one in credited} == {1.0}
    assert (stats.raters, stats.capped_raters, stats.largest_rater_share) == (1, 0, 1.0)


def test_a_flood_by_one_rater_is_capped_and_seen() -> None:
    flood = [example(f"f{i}", rating(f"f{i}", -1, "mallory")) for i in range(200)]
    honest = thumbs(1, 1, 1, 1, 1)
    credited, after, stats = assign_credit([*flood, *honest], Baselines())
    weight = sum(abs(one.advantage) for one in credited[:200])
    others = sum(abs(one.advantage) for one in credited[200:])
    assert weight <= others
    assert stats.capped_raters == 1
    assert stats.largest_rater_share > 0.97
    assert stats.largest_rater_share_capped <= MAX_RATER_SHARE + 1e-9
    cell = after.cell("")
    assert cell.good / cell.ratings == pytest.approx(0.75), "nor can it move the baseline"


@given(
    st.dictionaries(st.text(max_size=3), st.integers(1, 10_000), min_size=1, max_size=12),
    st.floats(0.01, 1.0),
)
def test_no_rater_exceeds_the_share(ratings: dict[str, int], max_share: float) -> None:
    weights = rater_weights(ratings, max_share)
    influence = {rater: n * weights[rater] for rater, n in ratings.items()}
    share = max(max_share, 1 / len(ratings))
    assert max(influence.values()) <= share * math.fsum(influence.values()) * (1 + 1e-6)
    assert all(0 < weight <= 1 for weight in weights.values())
    # Nobody is cut who need not be: the cut ones all have the same, largest influence.
    cut = [influence[rater] for rater, weight in weights.items() if weight < 1]
    assert all(one == pytest.approx(max(influence.values())) for one in cut)


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdef"), st.sampled_from([1, -1]), st.sampled_from("xy")),
        min_size=1,
        max_size=30,
    ),
    st.floats(0, 1),
)
def test_advantages_are_bounded_and_keep_the_order_of_rewards(
    rated: list[tuple[str, int, str]], moved_nats: float
) -> None:
    examples = [
        example(f"e{i}", rating(f"e{i}", value, rater), tenant=tenant)
        for i, (rater, value, tenant) in enumerate(rated)
    ]
    credited, after, stats = assign_credit(examples, Baselines(), moved_nats=moved_nats)
    assert [one.example for one in credited] == examples
    assert all(abs(one.advantage) <= 2 / STD_FLOOR for one in credited)
    assert all(one.advantage * one.reward >= -1e-12 for one in credited)
    assert stats.ratings == len(rated)
    assert stats.raters == len({rater for rater, _, _ in rated})
    assert Baselines.from_json(after.to_json()) == after
    assert all(math.isfinite(value) for value in stats.as_dict().values())
    again = assign_credit(examples, Baselines(), moved_nats=moved_nats)
    assert again == (credited, after, stats)


def test_weights_of_equal_raters_are_one() -> None:
    assert set(rater_weights(Counter("abcdefgh")).values()) == {1.0}
    assert rater_weights({}) == {}


def test_an_empty_batch_has_no_credit() -> None:
    credited, after, stats = assign_credit([], Baselines({"": Cell(1, 1)}))
    assert credited == ()
    assert stats.examples == 0
    assert after.cell("").ratings > 0


def test_an_example_without_ratings_is_refused() -> None:
    with pytest.raises(ValueError, match="without feedback"):
        assign_credit([example("a")], Baselines())
