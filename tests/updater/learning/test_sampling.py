"""The distribution a token was sampled from."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moorline.events import SamplingSettings
from updater.learning.sampling import processed_logprobs, support

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, -5.0], [0.0, 0.0, 3.0, -2.0, 1.0]])


def as_distribution(logits: torch.Tensor, sampling: SamplingSettings) -> torch.Tensor:
    """Every token's processed probability, one gather at a time."""
    columns = [
        processed_logprobs(logits, torch.full((logits.shape[0],), token), sampling).exp()
        for token in range(logits.shape[-1])
    ]
    return torch.stack(columns, dim=-1)


@given(st.floats(0.1, 3.0))
def test_without_truncation_it_is_the_tempered_softmax(temperature: float) -> None:
    probabilities = as_distribution(LOGITS, SamplingSettings(temperature=temperature))
    assert torch.allclose(probabilities, (LOGITS / temperature).softmax(-1), atol=1e-6)


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    # softmax of the first row: 0.643, 0.237, 0.087, 0.032, 0.001
    assert support(LOGITS, SamplingSettings(top_p=0.6))[0].tolist() == [True] + [False] * 4
    assert support(LOGITS, SamplingSettings(top_p=0.9))[0].tolist() == [True] * 3 + [False] * 2


def test_top_k_and_min_p_cut_where_they_say() -> None:
    assert support(LOGITS, SamplingSettings(top_k=2)).sum(-1).tolist() == [2, 2]
    half = support(LOGITS, SamplingSettings(min_p=0.3))
    probabilities = LOGITS.softmax(-1)
    wanted = probabilities >= 0.3 * probabilities.max(-1, keepdim=True).values
    assert torch.equal(half, wanted)


@given(
    st.floats(0.2, 2.0),
    st.floats(0.05, 1.0),
    st.integers(0, 5),
    st.floats(0.0, 0.9),
    st.lists(st.floats(-8, 8), min_size=5, max_size=5),
)
def test_what_remains_possible_sums_to_one(
    temperature: float, top_p: float, top_k: int, min_p: float, row: list[float]
) -> None:
    logits = torch.tensor([row])
    sampling = SamplingSettings(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    kept = support(logits / temperature, sampling)
    assert kept.any(dim=-1).all()
    possible = as_distribution(logits, sampling)[kept]
    assert float(possible.sum()) == pytest.approx(1.0, abs=1e-5)


def test_a_token_outside_the_support_is_finite_and_rarer_than_untruncated() -> None:
    outside = processed_logprobs(LOGITS[:1], torch.tensor([4]), SamplingSettings(top_p=0.5))
    assert torch.isfinite(outside).all()
    assert float(outside) < -5.0


def test_greedy_sampling_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature 0"):
        processed_logprobs(LOGITS, torch.tensor([0, 1]), SamplingSettings(temperature=0.0))


def test_the_gradient_flows_to_the_logits() -> None:
    logits = LOGITS.clone().requires_grad_(True)
    processed_logprobs(logits, torch.tensor([0, 2]), SamplingSettings(top_p=0.9)).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert logits.grad.abs().sum() > 0
