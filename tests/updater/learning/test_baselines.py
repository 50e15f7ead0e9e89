"""What rewards to expect, and how far raters agree: the memory of credit."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updater.learning.baselines import (
    AGREEMENT_KEEP,
    ENOUGH_SHARED_REPLIES,
    KEEP_LEAST,
    KEEP_MOST,
    LEAST_TRUST,
    PRIOR_COUNT,
    Baselines,
    Cell,
    cell_name,
    rater_name,
)

HERE, ANN = cell_name("here"), rater_name("here", "ann")
SHARES = st.lists(
    st.tuples(st.sampled_from([HERE, cell_name("there")]), st.floats(0, 1), st.floats(0.01, 1)),
    max_size=12,
)
AGREED = st.lists(
    st.tuples(st.sampled_from([ANN, rater_name("here", "bob")]), st.booleans()), max_size=12
)


def test_cells_lean_on_the_whole_when_they_know_little() -> None:
    known = Baselines({"": Cell(90, 10), HERE: Cell(90, 10)})
    whole = (90 + PRIOR_COUNT * 0.5) / (100 + PRIOR_COUNT)
    assert known.expected_shares([HERE], [0.5], [1.0]) == pytest.approx(
        [(90 + PRIOR_COUNT * whole) / (100 + PRIOR_COUNT)]
    )
    stranger = cell_name("new")
    assert known.expected_shares([stranger], [0.0], [1.0]) == pytest.approx(
        [90 / (100 + PRIOR_COUNT)]
    )


def test_tasks_of_one_tenant_have_cells_of_their_own() -> None:
    assert len({cell_name("a"), cell_name("a", "default"), cell_name("a", "sql")}) == 2
    assert cell_name("a", 'b", "c') != cell_name('a", "b', "c")


def test_memory_shortens_as_the_policy_moves() -> None:
    known = Baselines({"": Cell(100, 100)})

    def remembered(moved_nats: float) -> float:
        return known.after([], [], [], [], moved_nats).cell("").count

    assert remembered(0.0) == pytest.approx(200 * KEEP_MOST)
    assert remembered(0.06) == pytest.approx(200 * 0.5)
    assert remembered(9.0) == pytest.approx(200 * KEEP_LEAST)


def test_what_is_forgotten_leaves_the_state() -> None:
    known = Baselines({HERE: Cell(0.04, 0.0)}, {ANN: Cell(0.0, 0.05)})
    assert known.after([], [], [], [], 0.0) == Baselines()


def test_a_rater_is_heard_in_full_until_there_is_enough_to_judge_by() -> None:
    few = ENOUGH_SHARED_REPLIES - 0.1
    assert Baselines().trust(ANN) == 1.0
    assert Baselines(agreements={ANN: Cell(0.0, few)}).trust(ANN) == 1.0
    assert Baselines(agreements={ANN: Cell(0.0, 5.0)}).trust(ANN) == LEAST_TRUST
    assert Baselines(agreements={ANN: Cell(3.0, 7.0)}).trust(ANN) == pytest.approx(0.6)
    assert Baselines(agreements={ANN: Cell(5.0, 5.0)}).trust(ANN) == 1.0
    assert Baselines(agreements={ANN: Cell(0.0, 5.0)}).trust(rater_name("there", "ann")) == 1.0


def test_whoever_stops_contradicting_everybody_is_heard_in_full_again() -> None:
    known = Baselines(agreements={ANN: Cell(0.0, 20.0)})
    assert known.trust(ANN) == LEAST_TRUST
    for _ in range(30):
        known = known.after([], [], [], [(ANN, True)], 0.0)
    assert known.trust(ANN) == 1.0
    gone = Baselines(agreements={ANN: Cell(0.0, 20.0)}).after([], [], [], [], 0.0)
    assert gone.agreements[ANN].bad == pytest.approx(20.0 * AGREEMENT_KEEP)


@given(SHARES, AGREED, st.floats(0, 10), st.randoms(use_true_random=False))
def test_the_order_in_a_batch_does_not_matter(
    seen: list[tuple[str, float, float]],
    agreed: list[tuple[str, bool]],
    moved_nats: float,
    random: object,
) -> None:
    before = Baselines({"": Cell(2, 3), HERE: Cell(1, 1)}, {ANN: Cell(1, 4)})

    def after(rows: list[tuple[str, float, float]], opinions: list[tuple[str, bool]]) -> Baselines:
        names, shares, weights = ([row[place] for row in rows] for place in range(3))
        return before.after(names, shares, weights, opinions, moved_nats)  # type: ignore[arg-type]

    expected = after(seen, agreed)
    shuffled, opinions = list(seen), list(agreed)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    random.shuffle(opinions)  # type: ignore[attr-defined]
    assert after(shuffled, opinions) == expected
    assert Baselines.from_json(expected.to_json()) == expected
    assert all(LEAST_TRUST <= expected.trust(name) <= 1.0 for name in expected.agreements)
