"""Corrections, preferences and measurements on a model whose numbers can be worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moorline.settings import LearningSettings
from tests.updater.learning.bigram import BigramPolicy, reply, rows, thumbed, with_advantage
from tests.updater.learning.test_trainer_by_hand import Corrector, first_gradient, trainer
from updater.learning.feedback_losses import FeedbackLosses
from updater.learning.trainer import Trainer
from updater.values import Batch, Correction, CreditedExample, Preference

SETTINGS = LearningSettings(anchor_weight=0.0)
CHANCES = [[0.8, 0.2], [0.4, 0.6]]


def corrected(weight: float = 1.0, tokens: int = 1) -> CreditedExample:
    example = thumbed(reply("a", [0] * tokens, [0.8] * tokens))
    return CreditedExample(example, None, 0.0, (Correction("f", "ann", "text", weight),))


def preferred(name: str, weight: float = 1.0) -> CreditedExample:
    """Token 0 over token 1, where both were recorded with a chance of one half."""
    lost = reply(f"{name}-lost", [1], [0.5])
    example = thumbed(reply(name, [0], [0.5]))
    return CreditedExample(example, None, 0.0, (), (Preference("f", "ann", lost, weight),))


def losses_of(settings: dict[str, Any]) -> FeedbackLosses:
    policy = BigramPolicy(CHANCES)
    return FeedbackLosses(policy, Corrector(), SETTINGS.model_copy(update=settings))  # type: ignore[arg-type]


@pytest.mark.parametrize(("weight", "correction_weight"), [(1.0, 1.0), (0.5, 1.0), (0.5, 3.0)])
def test_a_corrected_token_teaches_by_its_weight_and_the_settings(
    weight: float, correction_weight: float
) -> None:
    changes = {"correction_weight": correction_weight, "distillation_weight": 0.0}
    made = Trainer(
        BigramPolicy(CHANCES),
        SETTINGS.model_copy(update={**changes, "gradient_clip": 9.0}),
        chat=Corrector(),  # type: ignore[arg-type]
    )
    # The text is token 1 after token 0; the reply has two tokens to take the mean over.
    found = first_gradient(made, corrected(weight, tokens=2))
    size = weight * correction_weight / 2
    assert found[0].tolist() == pytest.approx([size * 0.8, -size * 0.8], rel=1e-4)


@pytest.mark.parametrize(("clip_nats", "expected"), [(2.0, math.log(0.5)), (0.3, -0.3)])
def test_what_is_told_is_cut_at_the_clip_of_the_settings(clip_nats: float, expected: float) -> None:
    made = losses_of({"distillation_clip_nats": clip_nats, "correction_weight": 0.0})
    # Told the correction (token 1 before it), token 0 has 0.4 in place of 0.8.
    found = made.prepare([corrected()])["a"].advantage
    assert found is not None
    assert found.tolist() == pytest.approx([expected], rel=1e-4)
    assert made.diagnostics["distillation_advantage_size"] == pytest.approx(-expected, rel=1e-4)


def test_two_corrections_of_one_reply_add_up() -> None:
    made = losses_of({"correction_weight": 0.0})
    one = corrected()
    twice = CreditedExample(one.example, None, 0.0, one.corrections * 2)
    found = made.prepare([twice])["a"].advantage
    assert found is not None
    assert found.tolist() == pytest.approx([2 * math.log(0.5)], rel=1e-4)
    assert made.diagnostics["corrections"] == 2.0


@pytest.mark.parametrize(("max_example_tokens", "fits"), [(12, True), (11, False)])
def test_a_correction_that_just_fits_teaches(max_example_tokens: int, fits: bool) -> None:
    made = losses_of({"max_example_tokens": max_example_tokens})
    made.prepare([corrected(tokens=10)])  # two tokens of prompt when told, ten of reply
    assert made.diagnostics["corrections_not_distilled"] == float(not fits)
    assert made.diagnostics["corrections_not_imitated"] == 0.0  # two tokens in all


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize(("weight", "preference_weight"), [(1.0, 1.0), (0.5, 3.0)])
def test_a_preference_is_one_reply_of_its_minibatch(
    beta: float, weight: float, preference_weight: float
) -> None:
    settings = {"preference_beta": beta, "preference_weight": preference_weight}
    made = losses_of(settings)
    prepared = made.prepare([preferred("p", weight), preferred("q", weight), corrected()])
    found = [loss.item() for loss in made.losses(list(prepared.values()), 9, {})][-2:]
    # log p/q of the one that won less that of the one that lost: log 0.8/0.5 - log 0.2/0.5
    margin = beta * (math.log(0.8 / 0.5) - math.log(0.2 / 0.5))
    by_hand = preference_weight * weight * -math.log(1 / (1 + math.exp(-margin))) / 3
    assert found == pytest.approx([by_hand] * 2, rel=1e-4)
    assert made.diagnostics["preference_margin"] == pytest.approx(margin, rel=1e-4)
    assert made.diagnostics["preferences"] == 2.0


def test_the_measurements_of_an_update_are_what_they_are_called() -> None:
    live = [[0.8, 0.2], [0.5, 0.5]]
    made = trainer(live=live, minibatch_examples=1)
    fresh = reply("a", [0, 0], [0.8, 0.4], version=5)
    stale = reply("b", [1], [0.4], version=2).model_copy(update={"created_at": 1_010.0})
    batch = Batch((with_advantage(fresh, 1.0), with_advantage(stale, 1.0)), live_version=5)
    found = made.propose(batch, now=1_030.0).diagnostics
    assert (found["staleness_versions_mean"], found["staleness_versions_max"]) == (1.5, 3.0)
    assert (found["staleness_seconds_mean"], found["staleness_seconds_max"]) == (25.0, 30.0)
    assert found["completion_tokens_mean"] == 1.5
    assert found["behaviour_recorded_share"] == 1.0
    assert found["behaviour_exact_share"] == 0.0
    # Only of what the live policy wrote: log 0.8/0.8 and log 0.8/0.4.
    assert found["mismatch_nats"] == pytest.approx(math.log(2) / 2, rel=1e-4)


def test_entropy_is_the_mean_over_the_tokens_of_the_reply() -> None:
    made = trainer(live=[[0.8, 0.2], [0.5, 0.5]])
    both = reply("a", [1, 0, 1], [0.2, 0.5, 0.2])  # after 0, after 1, after 0
    found = made.propose(Batch((with_advantage(both, 1.0),), live_version=0)).diagnostics
    confident = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    by_hand = (2 * confident + math.log(2)) / 3
    assert found["entropy_nats"] == pytest.approx(by_hand, rel=1e-4)


def test_the_state_that_computes_is_the_one_asked_for() -> None:
    policy = BigramPolicy(CHANCES)
    with policy.using(rows([0.5, 0.5], [0.5, 0.5])), policy.using(None):
        assert torch.equal(policy._now, policy._anchor)  # type: ignore[arg-type]
    assert policy._now is None
