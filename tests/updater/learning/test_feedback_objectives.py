"""Losses of corrections and preferences: hand-worked, and derived a second way."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from updater.learning.feedback_objectives import (
    bounded_imitation,
    distillation_advantage,
    preference_loss,
    preference_margin,
)

ratios = st.floats(-30, 30)
betas = st.floats(0.01, 2.0)


def test_a_told_advantage_by_hand() -> None:
    hinted_replies = torch.tensor([0.5, 0.01, 0.2]).log().requires_grad_()
    untold = torch.tensor([0.25, 0.9, 0.2]).log().requires_grad_()
    advantage = distillation_advantage(hinted_replies, untold, 2.0)
    assert advantage.tolist() == pytest.approx([math.log(2), -2.0, 0.0])
    assert not advantage.requires_grad


@given(st.lists(st.tuples(st.floats(-40, 0), st.floats(-40, 0)), min_size=1, max_size=8))
def test_a_told_advantage_is_odd_and_bounded(rows: list[tuple[float, float]]) -> None:
    hinted_replies, untold = (torch.tensor(column) for column in zip(*rows, strict=True))
    advantage = distillation_advantage(hinted_replies, untold, 1.5)
    assert bool((advantage.abs() <= 1.5).all())
    assert torch.equal(advantage, -distillation_advantage(untold, hinted_replies, 1.5))


@given(st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=6), st.floats(0.01, 3.0))
def test_imitation_starts_as_plain_likelihood(chances: list[float], weight: float) -> None:
    log_p = torch.tensor([chances], dtype=torch.float64).log().requires_grad_()
    mask = torch.ones_like(log_p, dtype=torch.bool)
    weights = torch.full_like(log_p, weight)
    output = bounded_imitation(log_p, log_p.detach(), weights, mask)
    (slope,) = torch.autograd.grad(output.loss.sum(), log_p)
    assert torch.allclose(slope, -weights)


def test_imitation_stops_at_a_token_that_has_moved_far_enough() -> None:
    live = torch.tensor([[0.2, 0.2, 0.2]], dtype=torch.float64)
    now = torch.tensor([[0.2, 0.25, 0.6]], dtype=torch.float64)  # binary KL 0, 0.008, 0.334
    log_p = now.log().requires_grad_()
    mask = torch.ones_like(log_p, dtype=torch.bool)
    output = bounded_imitation(log_p, live.log(), torch.ones_like(log_p), mask)
    (slope,) = torch.autograd.grad(output.loss.sum(), log_p)
    assert slope[0].tolist() == pytest.approx([-1.0, -1.25, 0.0])


@given(ratios, ratios, betas)
def test_the_gradient_of_a_preference_is_the_one_derived_by_hand(
    chosen: float, rejected: float, beta: float
) -> None:
    # d/dm of log(1 + exp(-m)) is -1 / (1 + exp(m)); m = beta (chosen - rejected).
    x = torch.tensor([chosen], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([rejected], dtype=torch.float64, requires_grad=True)
    loss = preference_loss(x, y, beta)
    slopes = torch.autograd.grad(loss.sum(), (x, y))
    margin = beta * (chosen - rejected)
    wrong = 1 / (1 + math.exp(margin)) if margin < 700 else 0.0
    assert loss.item() == pytest.approx(math.log1p(math.exp(-margin)) if margin > -700 else -margin)
    assert float(slopes[0]) == pytest.approx(-beta * wrong)
    assert float(slopes[1]) == pytest.approx(beta * wrong)


def test_a_preference_by_hand() -> None:
    nothing = torch.zeros(1)
    assert float(preference_loss(nothing, nothing, 0.1)) == pytest.approx(math.log(2))
    up, down = torch.tensor([2.0]), torch.tensor([-3.0])
    assert float(preference_margin(up, down, 0.1)) == pytest.approx(0.5)
    assert float(preference_loss(up, down, 0.1)) == pytest.approx(math.log(1 + math.exp(-0.5)))


@given(ratios, ratios, betas)
def test_a_preference_and_its_reverse_differ_by_their_margin(
    chosen: float, rejected: float, beta: float
) -> None:
    x, y = (torch.tensor([value], dtype=torch.float64) for value in (chosen, rejected))
    gap = preference_loss(y, x, beta) - preference_loss(x, y, beta)
    assert float(gap) == pytest.approx(float(preference_margin(x, y, beta)), abs=1e-9)
