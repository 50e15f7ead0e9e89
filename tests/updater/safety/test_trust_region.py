"""The bound on a release: measured right, searched right, never exceeded."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moorline.settings import BoundSettings
from tests.updater.learning.fixtures import some_sequences
from updater.learning.policy import Policy
from updater.safety.trust_region import (
    BoundedStep,
    Refused,
    TrustRegion,
    largest_inside,
    measure_divergence,
)


@given(st.floats(0.01, 100.0), st.floats(1.0, 3.0), st.floats(0.01, 0.3))
def test_the_step_found_is_inside_and_useful(size: float, power: float, min_scale: float) -> None:
    def used(scale: float) -> float:
        return size * scale**power

    found = largest_inside(used, 8, min_scale)
    if size <= 1.0:
        assert found == 1.0
    elif found is not None:
        assert used(found) <= 1.0
        assert found >= min_scale
        assert used(found) >= 0.5  # not needlessly timid
    else:
        assert used(min_scale) > 0.5  # refused only near or beyond the smallest useful step


def test_an_exhausted_budget_refuses_every_step() -> None:
    assert largest_inside(lambda scale: 1.2 + scale, 6, 0.05) is None


def test_a_measurement_that_is_nan_is_never_inside() -> None:
    assert largest_inside(lambda scale: math.nan, 6, 0.05) is None  # noqa: ARG005


def test_divergence_is_the_mean_over_tokens_and_the_worst_sequence() -> None:
    q = torch.tensor([[0.5, 0.5]]).log()
    p = torch.tensor([[0.25, 0.75]]).log()
    kl = 0.5 * math.log(2.0) + 0.5 * math.log(0.5 / 0.75)
    measured = measure_divergence([q, q.repeat(3, 1)], [p, q.repeat(3, 1)], "live", "traffic")
    assert measured.tokens == 4
    assert measured.mean_kl_nats == pytest.approx(kl / 4)
    assert measured.max_prompt_kl_nats == pytest.approx(kl)


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    return Policy(tiny_model_dir, rank=4, alpha=8, seed=0)


def far_proposal(policy: Policy) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in policy.state().items()
    }


@pytest.mark.parametrize("limit", ["live_kl_nats", "anchor_kl_nats"])
def test_a_proposal_outside_is_shrunk_until_it_is_inside(policy: Policy, limit: str) -> None:
    bound = BoundSettings(live_kl_nats=10.0, anchor_kl_nats=10.0, min_step_scale=0.01)
    bound = bound.model_copy(update={limit: 0.02})
    region = TrustRegion(policy, some_sequences(4), bound, 256)
    live = policy.state()
    step = region.largest_step(live, far_proposal(policy), some_sequences(5, seed=9))
    assert isinstance(step, BoundedStep)
    assert 0.01 <= step.scale < 1.0
    assert len(step.divergences) == 4
    reference = limit.split("_")[0]
    for one in step.divergences:
        if one.measured_from == reference:
            assert one.mean_kl_nats <= 0.02
    # Measured again by hand, on the adapter that would be released.
    again = measure_divergence(
        region.logprobs(live, region.probes),
        region.logprobs(step.adapter, region.probes),
        "live",
        "probes",
    )
    assert again.mean_kl_nats == pytest.approx(step.divergences[0].mean_kl_nats, rel=1e-3)


def test_a_step_that_must_be_tiny_is_refused(policy: Policy) -> None:
    bound = BoundSettings(live_kl_nats=1e-7, min_step_scale=0.5)
    region = TrustRegion(policy, some_sequences(3), bound, 256)
    refused = region.largest_step(policy.state(), far_proposal(policy), [])
    assert isinstance(refused, Refused)
    assert refused.divergences[0].mean_kl_nats > 1e-7


def test_the_budget_left_is_the_limit_less_what_was_spent(policy: Policy) -> None:
    bound = BoundSettings(anchor_kl_nats=0.5)
    region = TrustRegion(policy, some_sequences(3), bound, 256)
    step = region.largest_step(policy.state(), policy.state(), [])
    assert isinstance(step, BoundedStep)
    assert region.anchor_budget_left_nats(step.divergences) == pytest.approx(0.5, abs=1e-6)
