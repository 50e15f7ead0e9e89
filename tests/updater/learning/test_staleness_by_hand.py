"""What is too far, mismatched or preferred, on a model whose distances are worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moorline.events import Feedback, FeedbackKind, Interaction, PolicySpan, Reason
from moorline.settings import LearningSettings
from tests.updater.learning.bigram import BigramPolicy, Rows, reply, rows, thumbed
from tests.updater.learning.test_trainer_by_hand import NOW, TOP_TWO, WROTE, Shelf
from updater.learning.behaviour import Behaviour, BehaviourPolicies, Fallback, Rerun
from updater.learning.off_policy import NEGLIGIBLE_WEIGHT, is_off_policy
from updater.learning.staleness import StalenessReport, measure_staleness, needs_distribution
from updater.values import Example

SETTINGS = LearningSettings()
LIVE = 3


def seen_at(
    live: Rows, examples: list[Example], archive: Shelf | None = None, **changes: Any
) -> StalenessReport:
    policy = BigramPolicy([[1 / len(live[0])] * len(live[0])] * len(live))
    policy.load_state(rows(*live))
    return measure_staleness(
        policy,
        BehaviourPolicies(policy, archive),  # type: ignore[arg-type]
        examples,
        live_version=LIVE,
        live=rows(*live),
        settings=SETTINGS.model_copy(update=changes),
    )


@pytest.mark.parametrize(("limit", "set_aside"), [(0.78, True), (0.80, False)])
def test_off_policy_is_the_divergence_of_the_live_policy_from_the_one_that_wrote(
    limit: float, set_aside: bool
) -> None:
    # KL(0.9 || 0.3) = 0.794 nats; the other way round it is 1.032.
    stale = thumbed(reply("a", [0], [0.9]))
    seen = seen_at([[0.3, 0.7]] * 2, [stale], max_off_policy_kl_nats=limit)
    assert seen.set_aside == ({"a": Reason.OFF_POLICY} if set_aside else {})
    # KL(0.3 || 0.9) = 1.032 nats, and 0.794 the other way round.
    stale = thumbed(reply("a", [0], [0.3]))
    seen = seen_at([[0.9, 0.1]] * 2, [stale], max_off_policy_kl_nats=limit + 0.238)
    assert seen.set_aside == ({"a": Reason.OFF_POLICY} if set_aside else {})


def test_exactly_at_the_limit_a_reply_is_learned_from() -> None:
    q, p = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()
    at = 0.5 * math.log(2.0) + 0.5 * math.log(0.5 / 0.75)
    assert not is_off_policy(q, p, at + 1e-6)
    assert is_off_policy(q, p, at - 1e-6)


def test_the_weight_below_which_nothing_is_taught_is_of_live_over_behaviour() -> None:
    q = torch.tensor([0.01]).log()
    assert is_off_policy(q, q + math.log(NEGLIGIBLE_WEIGHT * 0.99), 10.0)
    assert not is_off_policy(q, q + math.log(NEGLIGIBLE_WEIGHT * 1.01), 10.0)


def told(kind: FeedbackKind, interaction: Interaction, **what: Any) -> Feedback:
    return Feedback(interaction_id=interaction.interaction_id, kind=kind, **what)


def test_a_preference_has_no_ratio_and_its_losing_reply_is_run_again() -> None:
    won = reply("won", [0], [0.9], version=1)
    lost = reply("lost", [0, 1], [4 / 7, 3 / 7], version=1, sampling=TOP_TWO)
    said = told(FeedbackKind.PREFERENCE, won, over="lost")
    example = Example("won", won, (said,), {lost.key: lost})
    seen = seen_at([NOW] * 4, [example], Shelf({1: [WROTE] * 4}), max_off_policy_kl_nats=1e-6)
    assert seen.set_aside == {}
    assert set(seen.behaviours) == {lost.key}
    assert seen.behaviours[lost.key].log_q.exp().tolist() == pytest.approx([4 / 7, 3 / 7])


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (FeedbackKind.THUMBS, {"value": 1}),
        (FeedbackKind.SCORE, {"value": 0.5, "score_min": 0, "score_max": 1}),
        (FeedbackKind.SIGNAL, {"signal": "copied"}),
        (FeedbackKind.CORRECTION, {"text": "better"}),
        (FeedbackKind.PREFERENCE, {"over": "b"}),
    ],
)
def test_only_what_is_weighted_by_a_ratio_can_be_off_policy(
    kind: FeedbackKind, what: dict[str, Any]
) -> None:
    stale = reply("a", [0], [0.9])
    seen = seen_at([[0.1, 0.9]] * 2, [Example("a", stale, (told(kind, stale, **what),))])
    ratio = kind not in (FeedbackKind.CORRECTION, FeedbackKind.PREFERENCE)
    assert bool(seen.set_aside) is ratio


@pytest.mark.parametrize(("lie_nats", "set_aside"), [(0.19, False), (0.21, True), (math.nan, True)])
def test_a_record_that_its_policy_denies_is_set_aside_just_beyond_the_limit(
    lie_nats: float, set_aside: bool
) -> None:
    honest = reply("a", [0, 1], [4 / 7, 3 / 7], version=1, sampling=TOP_TWO)
    lies = tuple(value - lie_nats for value in honest.completion_logprobs if value is not None)
    forged = honest.model_copy(update={"completion_logprobs": lies})
    live = [WROTE] * 4
    seen = seen_at(live, [thumbed(forged)], Shelf({1: [WROTE] * 4}), mismatch_limit_nats=0.2)
    assert seen.set_aside == ({"a": Reason.MISMATCH} if set_aside else {})
    assert seen.diagnostics["set_aside_mismatch"] == float(set_aside)
    assert seen.diagnostics["set_aside_off_policy"] == 0.0


def test_the_mismatch_is_over_the_tokens_that_were_run_again() -> None:
    """Version 2 is gone: its tokens have no second opinion, and take no part in the mean."""
    mixed = reply("a", [0, 1, 0, 1], [4 / 7 * math.exp(-0.1), 3 / 7, 0.5, 0.5], sampling=TOP_TWO)
    spans = (PolicySpan(version=1, start=0, end=2), PolicySpan(version=2, start=2, end=4))
    mixed = mixed.model_copy(update={"policy_spans": spans})

    def measured(known: list[bool]) -> float | None:
        chances = torch.tensor([[4 / 7, 3 / 7, 0.0, 0.0]] * 2 + [[1.0] * 4] * 2).log()
        rerun = Rerun(chances, torch.tensor(known), {(2, Fallback.GONE): 2})
        return Behaviour.from_rerun(rerun, mixed, None).mismatch_nats(mixed)

    assert measured([True, True, False, False]) == pytest.approx(0.05, abs=1e-5)
    assert measured([False] * 4) is None


def test_the_share_is_of_what_is_left_and_one_where_nothing_is() -> None:
    near, far = reply("near", [0, 0], [0.3, 0.6]), reply("far", [1], [0.9])
    live = [[0.6, 0.4]] * 2
    both = seen_at(live, [thumbed(near), thumbed(far)], max_off_policy_kl_nats=0.3)
    assert set(both.set_aside) == {"far"}
    # r = 2, 1: 9 / (2 * 5)
    assert both.ess_share == pytest.approx(0.9, rel=1e-4)
    assert seen_at(live, [thumbed(far)], max_off_policy_kl_nats=0.3).ess_share == 1.0


@pytest.mark.parametrize(
    ("objective", "estimator", "truncated", "needed"),
    [
        ("dppo_kl", "binary", False, False),
        ("dppo_kl", "binary", True, True),
        ("dppo_kl", "topk", False, True),
        ("dppo_tv", "exact", False, True),
        ("ppo_clip", "exact", False, False),
        ("ppo_clip", "exact", True, True),
    ],
)
def test_a_distribution_is_needed_for_a_truncated_reply_or_a_measured_divergence(
    objective: str, estimator: str, truncated: bool, needed: bool
) -> None:
    settings = SETTINGS.model_copy(
        update={"objective": objective, "divergence_estimator": estimator}
    )
    sampling = {"sampling": TOP_TWO} if truncated else {}
    assert bool(needs_distribution(reply("a", [0], [0.5], **sampling), settings)) is needed  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "rerun"),
    [({}, False), ({"passes": 2}, True), ({"minibatch_examples": 1}, True)],
)
def test_a_fresh_truncated_reply_is_run_again_only_where_several_steps_follow(
    changes: dict[str, int], rerun: bool
) -> None:
    fresh = [
        reply(name, [0, 1], [4 / 7, 3 / 7], version=LIVE, sampling=TOP_TWO) for name in ("a", "b")
    ]
    seen = seen_at([WROTE] * 4, [thumbed(one) for one in fresh], **changes)
    assert (set(seen.behaviours) == {one.key for one in fresh}) is rerun
    assert bool(seen.behaviours) is rerun
