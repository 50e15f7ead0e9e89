"""How fast to learn from stale data, and what is too far away."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from updater.learning.off_policy import batch_ess_share, is_off_policy

logprobs = st.lists(st.floats(-12.0, -1e-3), min_size=1, max_size=20)


@given(logprobs)
def test_at_lag_zero_everything_counts_and_nothing_is_too_far(log_q: list[float]) -> None:
    same = torch.tensor(log_q)
    assert batch_ess_share(same, same) == pytest.approx(1.0)
    assert not is_off_policy(same, same, 1e-6)


@given(logprobs, logprobs)
def test_the_share_is_a_share(log_q: list[float], log_p: list[float]) -> None:
    size = min(len(log_q), len(log_p))
    share = batch_ess_share(torch.tensor(log_q[:size]), torch.tensor(log_p[:size]))
    assert 0.0 < share <= 1.0


def test_one_heavy_token_of_four_is_worked_out_by_hand() -> None:
    q = torch.tensor([0.25, 0.25, 0.25, 0.25])
    p = torch.tensor([0.75, 0.25, 0.25, 0.25])  # r = 3, 1, 1, 1: 36 / (4 * 12)
    assert batch_ess_share(q.log(), p.log()) == pytest.approx(0.75)


def test_a_batch_of_no_tokens_has_full_share() -> None:
    assert batch_ess_share(torch.empty(0), torch.empty(0)) == 1.0


def test_too_far_by_divergence_and_by_negligible_weight() -> None:
    # Binary KL(0.9 || 0.3) = 0.9 log 3 + 0.1 log(1 / 7) = 0.794
    confident, shaken = torch.tensor([0.9]).log(), torch.tensor([0.3]).log()
    assert not is_off_policy(confident, shaken, 0.80)
    assert is_off_policy(confident, shaken, 0.79)
    # A rare token made rarer: hardly any divergence, but its weight is r = 0.01.
    rare, rarer = torch.tensor([0.01]).log(), torch.tensor([0.0001]).log()
    assert is_off_policy(rare, rarer, 10.0)
    assert not is_off_policy(rarer, rare, 10.0)


def test_a_long_reply_is_judged_by_its_mean_not_by_its_sum() -> None:
    q, p = torch.full((1000,), 0.5), torch.full((1000,), 0.4)
    assert not is_off_policy(q.log(), p.log(), 0.5)


@pytest.mark.parametrize("broken", ["behaviour", "live"])
def test_what_cannot_be_measured_is_too_far_and_has_no_share(broken: str) -> None:
    fine, nan = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.5, math.nan]).log()
    log_q, log_p = (nan, fine) if broken == "behaviour" else (fine, nan)
    assert is_off_policy(log_q, log_p, 10.0)
    assert math.isnan(batch_ess_share(log_q, log_p)), "credit refuses it"
