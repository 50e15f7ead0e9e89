"""Rewards, advantages, corrections and preferences, and what each rater weighs in them."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import example as once
from hypothesis import given
from hypothesis import strategies as st

from moorline.events import Feedback, FeedbackKind, Reason
from moorline.settings import SIGNALS
from tests.updater.ledger.fixtures import correction, interaction, preference, rating, score, signal
from updater.learning.advantages import (
    SIGNAL_WEIGHT,
    STD_FLOOR,
    CreditStats,
    assign_credit,
    overridden_signals,
    reward,
    why_no_credit,
)
from updater.learning.baselines import (
    HALF_LIFE_NATS,
    KEEP_LEAST,
    KEEP_MOST,
    LEAST_TRUST,
    Baselines,
    Cell,
    cell_name,
    rater_name,
)
from updater.learning.influence import MAX_RATER_SHARE, MAX_TENANT_SHARE
from updater.values import CreditedExample, Example


def credit(
    examples: list[Example], baselines: Baselines | None = None, **changes: Any
) -> tuple[tuple[CreditedExample, ...], Baselines, CreditStats]:
    return assign_credit(examples, baselines or Baselines(), signals=SIGNALS, **changes)


def preferring(identity: str, over: str, rater: str = "ann") -> Example:
    said = preference(identity, over, rater)
    return Example(identity, interaction(identity), (said,), {said.over_key: interaction(over)})  # type: ignore[dict-item]


def example(name: str, *ratings: Feedback, tenant: str = "default", **changes: Any) -> Example:
    return Example(name, interaction(name, tenant=tenant, **changes), ratings)


def thumbs(*values: int, rater: str | None = None) -> list[Example]:
    """One example for each thumb, each by a rater of its own unless one is named."""
    return [
        example(f"e{i}", rating(f"e{i}", value, rater or f"rater{i}"))
        for i, value in enumerate(values)
    ]


def advantages(examples: list[Example], baselines: Baselines | None = None) -> list[float]:
    return [one.advantage for one in credit(examples, baselines)[0]]


@pytest.mark.parametrize(
    ("value", "low", "high", "expected"),
    [(1, 1, 5, -1.0), (5, 1, 5, 1.0), (3, 1, 5, 0.0), (4, 1, 5, 0.5), (0.75, 0, 1, 0.5)],
)
def test_a_score_is_linear_over_its_range(
    value: float, low: float, high: float, expected: float
) -> None:
    scored = rating("a", value, kind=FeedbackKind.SCORE, score_min=low, score_max=high)
    assert reward(scored, SIGNALS) == pytest.approx(expected)


def test_thumbs_are_worth_what_they_say() -> None:
    assert reward(rating("a", 1), SIGNALS) == 1.0
    assert reward(rating("a", -1), SIGNALS) == -1.0


@given(st.tuples(*[st.floats(allow_nan=False, allow_infinity=False)] * 3).map(sorted))
@once([0.0, 5e-324, 5e-324])  # half of the smallest number is zero
@once([-1.7e308, 0.0, 1.7e308])  # the width of a huge range is infinite
def test_every_score_that_parses_has_a_reward_in_range(numbers: list[float]) -> None:
    low, value, high = numbers
    if low == high:
        return
    scored = rating("a", value, kind=FeedbackKind.SCORE, score_min=low, score_max=high)
    found = reward(scored, SIGNALS)
    assert found is not None
    assert -1.0 <= found <= 1.0


def test_signals_are_worth_what_the_settings_say() -> None:
    assert reward(signal("a", "copied"), SIGNALS) == SIGNALS["copied"]
    assert reward(signal("a", "copied"), {"copied": -1.0}) == -1.0
    assert reward(signal("a", "sneezed"), SIGNALS) is None
    assert why_no_credit(signal("a", "sneezed"), SIGNALS) is Reason.UNKNOWN_SIGNAL
    assert all(-1.0 <= value <= 1.0 for value in SIGNALS.values())


@pytest.mark.parametrize("said", [correction("a"), preferring("a", "b").feedback[0]])
def test_corrections_and_preferences_have_credit_but_no_reward(said: Feedback) -> None:
    assert why_no_credit(said, SIGNALS) is None
    assert reward(said, SIGNALS) is None


def test_explicit_ratings_outrank_signals() -> None:
    hints = [signal("a", "copied"), signal("a", "edited", "bob")]
    assert overridden_signals(hints) == []
    assert overridden_signals([*hints, correction("a")]) == []
    assert overridden_signals([*hints, rating("a", -1, "cy")]) == hints


def test_a_hand_worked_batch() -> None:
    credited, after, stats = credit(thumbs(1, 1, 1, -1))
    # No memory: the baseline is the batch's mean, 0.5; std of (0.5, 0.5, 0.5, -1.5) is sqrt(0.75).
    assert [one.reward for one in credited] == [1, 1, 1, -1]
    scale = math.sqrt(0.75)
    assert [one.advantage for one in credited] == pytest.approx([0.5 / scale] * 3 + [-1.5 / scale])
    assert stats.mean_baseline == pytest.approx(0.5)
    assert stats.reward_std == pytest.approx(scale)
    assert after.cell(cell_name("default")) == Cell(3.0, 1.0)


def test_the_baseline_remembers() -> None:
    known = Baselines({"": Cell(90, 10), cell_name("default"): Cell(90, 10)})
    _, _, stats = credit(thumbs(1, -1), known)
    (share,) = known.expected_shares([cell_name("default")], [0.5], [1.0])
    assert stats.mean_baseline == pytest.approx(2 * share - 1)


def test_tenants_have_baselines_of_their_own() -> None:
    known = Baselines({cell_name("x"): Cell(100, 0), cell_name("y"): Cell(0, 100)})
    both = [example("a", rating("a", 1), tenant="x"), example("b", rating("b", 1), tenant="y")]
    first, second = advantages(both, known)
    assert second > 1 > first >= 0


def test_tasks_have_baselines_of_their_own() -> None:
    known = Baselines({cell_name("default", "sql"): Cell(100, 0), cell_name("default"): Cell(0, 9)})
    both = [example("a", rating("a", 1), task="sql"), example("b", rating("b", 1))]
    first, second = advantages(both, known)
    assert second > first >= 0
    _, after, _ = credit(both, known)
    assert after.cell(cell_name("default", "sql")).good > 1


def test_on_stale_data_the_baseline_is_low() -> None:
    known = Baselines({"": Cell(75, 25), cell_name("default"): Cell(75, 25)})
    fresh, after, fresh_stats = credit(thumbs(1, 1, -1), known)
    stale, after_stale, stats = credit(thumbs(1, 1, -1), known, ess_share=0.5)
    assert 1 + stats.mean_baseline == pytest.approx((1 + fresh_stats.mean_baseline) / 2)
    assert stats.reward_std == fresh_stats.reward_std
    assert after_stale == after, "what is remembered are rewards, however stale"
    assert all(s.advantage > f.advantage for s, f in zip(stale, fresh, strict=True))
    assert stale[-1].advantage < 0, "what was bad stays bad"
    for wrong in (0.0, -1.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="ess_share"):
            credit(thumbs(1), ess_share=wrong)


def test_a_batch_of_equal_ratings_is_not_blown_up() -> None:
    known = Baselines({cell_name("default"): Cell(99, 1), "": Cell(99, 1)})
    assert all(0 < a < 0.2 for a in advantages(thumbs(1, 1, 1, 1), known))
    assert advantages(thumbs(1, 1, 1)) == [0.0, 0.0, 0.0]


def test_raters_who_disagree_are_averaged_and_counted() -> None:
    split = example("a", rating("a", 1, "ann"), rating("a", -1, "bob"))
    (credited,), _, stats = credit([split])
    assert credited.reward == 0.0
    assert stats.disputed_examples == 1


def test_one_person_alone_is_heard_in_full() -> None:
    credited, _, stats = credit(thumbs(1, 1, -1, -1, rater="ann"))
    assert {abs(one.advantage) for one in credited} == {1.0}
    assert (stats.raters, stats.capped_raters, stats.largest_rater_share) == (1, 0, 1.0)


def test_a_flood_by_one_rater_is_capped_and_seen() -> None:
    flood = [example(f"f{i}", rating(f"f{i}", -1, "mallory")) for i in range(200)]
    honest = thumbs(1, 1, 1, 1, 1)
    credited, after, stats = credit([*flood, *honest])
    weight = sum(abs(one.advantage) for one in credited[:200])
    others = sum(abs(one.advantage) for one in credited[200:])
    assert weight <= others
    assert stats.capped_raters == 1
    assert stats.largest_rater_share > 0.97
    assert stats.largest_rater_share_capped <= MAX_RATER_SHARE + 1e-9
    cell = after.cell("")
    assert cell.good / cell.count == pytest.approx(0.75), "nor can it move the baseline"


def test_a_flood_by_one_tenant_is_capped_and_seen() -> None:
    flood = [example(f"f{i}", rating(f"f{i}", -1, f"m{i}"), tenant="mob") for i in range(60)]
    credited, _, stats = credit([*flood, *thumbs(1, 1, 1, 1)])
    mob = sum(abs(one.advantage) for one in credited[:60])
    assert mob <= sum(abs(one.advantage) for one in credited[60:]) * (1 + 1e-9)
    assert (stats.tenants, stats.capped_raters) == (2, 60)
    assert stats.largest_tenant_share > 0.9
    assert stats.largest_tenant_share_capped <= MAX_TENANT_SHARE + 1e-9


def test_a_rater_whom_nobody_agrees_with_counts_less_and_it_is_seen() -> None:
    known = Baselines()
    everybody = ("ann", "bob", "cy", "troll")
    for batch in range(3):
        shared = [
            example(
                f"{batch}.{i}",
                *[
                    rating(f"{batch}.{i}", -1 if (i % 2 == 0) != (who == "troll") else 1, who)
                    for who in everybody
                ],
            )
            for i in range(4)
        ]
        credited, known, stats = credit(shared, known)
    assert known.trust(rater_name("default", "troll")) == LEAST_TRUST
    assert [known.trust(rater_name("default", who)) for who in everybody[:3]] == [1.0] * 3
    assert (stats.distrusted_raters, stats.smallest_trust) == (1, LEAST_TRUST)
    assert credited[1].reward == pytest.approx((3 - LEAST_TRUST) / (3 + LEAST_TRUST))


def test_a_signal_weighs_less_than_a_word() -> None:
    half = score("b", 0.75, rater="bob")
    (hint, word), _, stats = credit([example("a", signal("a", "copied")), example("b", half)])
    assert hint.reward == word.reward == SIGNALS["copied"]
    assert (stats.ratings, stats.signals) == (1, 1)
    known = Baselines({"": Cell(0, 99), cell_name("default"): Cell(0, 99)})
    (hint, word), _, _ = credit(
        [example("a", signal("a", "copied")), example("b", half)], known, max_rater_share=1.0
    )
    assert hint.advantage == pytest.approx(SIGNAL_WEIGHT * word.advantage)


def test_caps_are_on_what_words_weigh_not_on_their_number() -> None:
    hints = [example(f"h{i}", signal(f"h{i}", "copied", "ann")) for i in range(4)]
    _, _, stats = credit([*hints, *thumbs(1, 1, -1)])
    assert (stats.capped_raters, stats.largest_rater_share) == (0, 0.25)
    known = Baselines(agreements={rater_name("default", "ann"): Cell(0.0, 9.0)})
    distrusted = [example(f"d{i}", rating(f"d{i}", -1, "ann")) for i in range(5)]
    _, _, stats = credit([*distrusted, *thumbs(1, 1, -1)], known)
    assert (stats.capped_raters, stats.distrusted_raters) == (0, 1)
    assert stats.largest_rater_share == pytest.approx(0.25)


def test_a_signal_that_lost_its_reward_while_it_waited_teaches_nothing() -> None:
    (credited,), after, stats = assign_credit(
        [example("a", signal("a", "copied"))], Baselines(), signals={}
    )
    assert (credited.reward, credited.advantage, credited.has_signal) == (None, 0.0, False)
    assert after == Baselines()
    assert stats.mean_reward == 0.0


def test_corrections_and_preferences_go_on_with_their_weight() -> None:
    told = example("a", correction("a", "Say it so.", "bob"), rating("a", -1, "cy"))
    (first, second), after, stats = credit([told, preferring("b", "c")])
    (corrected,) = first.corrections
    assert (corrected.text, corrected.rater, corrected.weight) == ("Say it so.", "bob", 1.0)
    assert corrected.feedback_id == told.feedback[0].feedback_id
    assert first.reward == -1.0
    (preferred,) = second.preferences
    assert preferred.rejected == interaction("c")
    assert (second.reward, second.advantage, second.has_signal) == (None, 0.0, True)
    assert (stats.corrections, stats.preferences, stats.ratings, stats.raters) == (1, 1, 1, 3)
    assert after.cell("").count == 1.0, "only rewards are remembered"


def test_a_flood_of_corrections_is_capped_too() -> None:
    flood = [example(f"f{i}", correction(f"f{i}", rater="mallory")) for i in range(20)]
    credited, _, stats = credit([*flood, *thumbs(1, -1, 1, -1)])
    assert sum(one.corrections[0].weight for one in credited[:20]) == pytest.approx(4 / 3)
    assert stats.largest_rater_share_capped == pytest.approx(MAX_RATER_SHARE)


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
    credited, after, stats = credit(examples, moved_nats=moved_nats)
    assert [one.example for one in credited] == examples
    assert all(abs(one.advantage) <= 2 / STD_FLOOR for one in credited)
    assert all(one.advantage * (one.reward or 0.0) >= -1e-12 for one in credited)
    assert stats.ratings == len(rated)
    assert stats.raters == len({(tenant, rater) for rater, _, tenant in rated})
    assert Baselines.from_json(after.to_json()) == after
    assert all(math.isfinite(value) for value in stats.as_dict().values())
    again = credit(examples, moved_nats=moved_nats)
    assert again == (credited, after, stats)


FEEDBACK = st.one_of(
    st.tuples(st.just("thumb"), st.sampled_from([1, -1])),
    st.tuples(st.just("signal"), st.sampled_from(sorted(SIGNALS))),
    st.tuples(st.just("correction"), st.just("so")),
    st.tuples(st.just("preference"), st.just("loser")),
)


def said(identity: str, rater: str, kind: str, what: Any) -> Feedback:
    match kind:
        case "thumb":
            return rating(identity, what, rater)
        case "signal":
            return signal(identity, what, rater)
        case "correction":
            return correction(identity, what, rater)
    return preferring(identity, what, rater).feedback[0]


@given(
    st.lists(
        st.tuples(
            st.sampled_from("xyz"),
            st.lists(st.tuples(st.sampled_from("abcde"), FEEDBACK), min_size=1, max_size=4),
        ),
        min_size=1,
        max_size=12,
    ),
    st.floats(0.01, 1.0),
    st.randoms(use_true_random=False),
)
def test_weights_are_shares_and_order_does_not_matter(
    batch: list[tuple[str, list[tuple[str, tuple[str, Any]]]]], ess_share: float, random: object
) -> None:
    examples = [
        Example(
            f"e{i}",
            interaction(f"e{i}", tenant=tenant),
            tuple(said(f"e{i}", rater, *what) for rater, what in feedback),
            {"loser/0": interaction("loser")},
        )
        for i, (tenant, feedback) in enumerate(batch)
    ]
    known = Baselines(
        {"": Cell(3, 2)}, {rater_name("x", "a"): Cell(1, 9), rater_name("y", "b"): Cell(9, 1)}
    )
    credited, after, stats = credit(examples, known, ess_share=ess_share)
    for one in credited:
        weights = [taught.weight for taught in one.corrections]
        weights += [taught.weight for taught in one.preferences]
        assert all(0 < weight <= 1 for weight in weights)
        assert abs(one.advantage) <= 2 / STD_FLOOR
        assert (one.reward is None) is not any(
            reward(given, SIGNALS) is not None for given in one.example.feedback
        )
    assert stats.largest_tenant_share_capped <= max(MAX_TENANT_SHARE, 1 / stats.tenants) + 1e-6
    shuffled = [
        Example(e.example_id, e.interaction, tuple(reversed(e.feedback)), e.rejected)
        for e in examples
    ]
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    again, after_again, stats_again = credit(shuffled, known, ess_share=ess_share)
    before = {one.example.example_id: (one.reward, one.advantage) for one in credited}
    for one in again:
        assert (one.reward, one.advantage) == pytest.approx(before[one.example.example_id])
    assert after_again.cells.keys() == after.cells.keys()
    assert after_again.agreements == after.agreements
    assert stats_again.as_dict() == pytest.approx(stats.as_dict())


def test_an_empty_batch_has_no_credit() -> None:
    credited, after, stats = credit([], Baselines({"": Cell(1, 1)}))
    assert credited == ()
    assert stats.examples == 0
    assert after.cell("").count > 0


def test_an_example_without_ratings_is_refused() -> None:
    with pytest.raises(ValueError, match="without feedback"):
        credit([example("a")])


def test_how_far_the_policy_moved_decides_how_much_of_the_baseline_is_kept() -> None:
    known = Baselines({"": Cell(100, 100), cell_name("default"): Cell(100, 100)})
    counts = [
        credit(thumbs(1), known, moved_nats=moved)[1].cell(cell_name("default")).count
        for moved in (0.0, HALF_LIFE_NATS, 10.0)
    ]
    assert counts == pytest.approx([200 * KEEP_MOST + 1, 200 * 0.5 + 1, 200 * KEEP_LEAST + 1])


def test_a_rater_is_compared_with_the_others_only() -> None:
    """Ann says it twice, and loudly; Bob says the other thing once."""
    twice = [
        rating("a", 1, "ann"),
        rating("a", 0.9, "ann", kind=FeedbackKind.SCORE, score_min=0.0, score_max=1.0),
    ]
    _, after, _ = credit([example("a", *twice, rating("a", -1, "bob"))])
    assert after.agreements == {
        rater_name("default", "ann"): Cell(0.0, 2.0),
        rater_name("default", "bob"): Cell(0.0, 1.0),
    }
    _, alone, _ = credit([example("a", *twice)])
    assert alone.agreements == {}


def test_a_rater_agrees_with_the_sign_of_what_all_others_say_together() -> None:
    mixed = [rating("a", value, name) for name, value in (("ann", 1), ("bob", 1), ("cy", -1))]
    _, after, _ = credit([example("a", *mixed)])
    # Ann's others cancel out, and so do Bob's: only Cy has a crowd, and contradicts it.
    assert after.agreements == {rater_name("default", "cy"): Cell(0.0, 1.0)}


def test_an_example_weighs_what_its_raters_weigh_and_at_most_one() -> None:
    known = Baselines({"": Cell(0, 1e9), cell_name("default"): Cell(0, 1e9)})
    crowd = example("a", *[rating("a", 1, f"r{n}") for n in range(3)])
    one, hint = example("b", rating("b", 1, "solo")), example("c", signal("c", "copied", "sue"))
    credited, _, _ = credit([crowd, one, hint], known, max_rater_share=1.0, max_tenant_share=1.0)
    by_crowd, by_one, by_hint = (each.advantage for each in credited)
    assert by_crowd == by_one
    # Surprises of 2, 2 and 1.5 in units of one scale; the hint weighs a quarter of a word.
    assert by_hint / by_one == pytest.approx(SIGNAL_WEIGHT * 1.5 / 2.0)


def test_a_baseline_is_the_mean_of_rewards_by_their_weight() -> None:
    word, hint = example("a", rating("a", 1)), example("b", signal("b", "tool_failed", "bob"))
    _, after, stats = credit([word, hint], max_rater_share=1.0)
    good = 1.0 + SIGNAL_WEIGHT * (SIGNALS["tool_failed"] + 1) / 2
    bad = SIGNAL_WEIGHT * (1 - SIGNALS["tool_failed"]) / 2
    cell = after.cell(cell_name("default"))
    assert (cell.good, cell.bad) == pytest.approx((good, bad))
    mean = good / (good + bad)
    assert stats.mean_baseline == pytest.approx(2 * mean - 1)


def test_a_neutral_score_is_no_opinion_and_disputes_nothing() -> None:
    middle = rating("a", 0.5, "cy", kind=FeedbackKind.SCORE, score_min=0.0, score_max=1.0)
    _, after, stats = credit([example("a", rating("a", 1, "ann"), middle)])
    assert stats.disputed_examples == 0
    assert after.agreements == {}
    _, _, stats = credit([example("a", rating("a", 1, "ann"), rating("a", -1, "bob"), middle)])
    assert stats.disputed_examples == 1


def test_the_settings_of_the_caps_are_those_that_cap() -> None:
    two = [example("a", *[rating("a", 1, "ann")]), *thumbs(1, 1, 1)]
    flood = [*two, *[example(f"f{i}", rating(f"f{i}", -1, "mob")) for i in range(6)]]
    for share in (0.3, 0.5):
        _, _, stats = credit(flood, max_rater_share=share)
        assert stats.largest_rater_share_capped == pytest.approx(share)
    tenants = [example(f"t{i}", rating(f"t{i}", 1, f"r{i}"), tenant="big") for i in range(9)]
    others = [example(f"o{i}", rating(f"o{i}", 1, f"r{i}"), tenant=f"s{i}") for i in range(3)]
    for share in (0.4, 0.6):
        _, _, stats = credit([*tenants, *others], max_tenant_share=share)
        assert stats.largest_tenant_share_capped == pytest.approx(share)
