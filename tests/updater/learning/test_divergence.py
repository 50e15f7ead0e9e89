"""Divergences: the inequalities they must obey, and the ends where floating point breaks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, kl_divergence

from updater.learning import divergence as dv

VOCABULARY = 9
ROUNDING = 1e-7
ENDS = (0.0, 1e-12, 0.5, 1.0 - 1e-12, 1.0)

logits = st.lists(st.floats(-25, 25), min_size=VOCABULARY, max_size=VOCABULARY)
# The complement of a recorded log q is known to ~1e-16 absolutely; chi2 divides by it, so the tests
# that compare views stay where that is still a small relative error.
mild_logits = st.lists(st.floats(-8, 8), min_size=VOCABULARY, max_size=VOCABULARY)
tokens = st.integers(0, VOCABULARY - 1)
probabilities = st.floats(1e-12, 1 - 1e-12)

EXACT = [dv.exact_kl, dv.exact_tv, dv.exact_chi2, dv.exact_js]
BINARY = [dv.binary_kl, dv.binary_tv, dv.binary_chi2, dv.binary_js]
Measure = Callable[[Tensor, Tensor], Tensor]


def distribution(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).log_softmax(-1)


def log(probability: float) -> Tensor:
    return torch.tensor(probability, dtype=torch.float64).log()


def at_least(larger: Tensor, smaller: Tensor) -> bool:
    """larger >= smaller, up to rounding at their scale (chi2 may be 1e20)."""
    return bool(larger >= smaller - ROUNDING * (1 + larger.abs()))


@pytest.mark.parametrize("measure", EXACT)
@settings(deadline=None)
@given(q=logits, p=logits)
def test_never_negative(measure: Measure, q: list[float], p: list[float]) -> None:
    assert measure(distribution(q), distribution(p)) >= 0


@pytest.mark.parametrize("measure", EXACT)
@settings(deadline=None)
@given(q=logits)
def test_zero_between_equals(measure: Measure, q: list[float]) -> None:
    assert measure(distribution(q), distribution(q)) <= 1e-12


@pytest.mark.parametrize("measure", EXACT)
@settings(deadline=None)
@given(q=logits, token=tokens, shift=st.floats(0.05, 5))
def test_positive_between_different(
    measure: Measure, q: list[float], token: int, shift: float
) -> None:
    log_q = distribution(q)
    shifted = torch.tensor(q, dtype=torch.float64)
    shifted[token] += shift
    log_p = shifted.log_softmax(-1)
    if dv.exact_tv(log_q, log_p) > 1e-6:  # below, a double cannot tell them apart in every measure
        assert measure(log_q, log_p) > 0


@settings(deadline=None)
@given(q=logits, p=logits)
def test_pinsker_and_its_relatives(q: list[float], p: list[float]) -> None:
    log_q, log_p = distribution(q), distribution(p)
    kl, tv = dv.exact_kl(log_q, log_p), dv.exact_tv(log_q, log_p)
    js = dv.exact_js(log_q, log_p)
    assert at_least((kl / 2).sqrt(), tv - 1e-7)
    assert at_least(torch.log1p(dv.exact_chi2(log_p, log_q)), kl)  # KL(q||p) <= log(1+chi2(q||p))
    assert at_least(tv * math.log(2), js)  # Lin 1991
    assert js <= math.log(2) + ROUNDING
    assert tv <= 1 + ROUNDING


@pytest.mark.parametrize(("exact", "binary"), list(zip(EXACT, BINARY, strict=True)))
@settings(deadline=None)
@given(q=mild_logits, p=mild_logits, token=tokens, k=st.integers(1, VOCABULARY - 1))
def test_coarser_views_never_see_more(
    exact: Measure, binary: Measure, q: list[float], p: list[float], token: int, k: int
) -> None:
    log_q, log_p = distribution(q), distribution(p)
    seen_by_k = exact(*dv.top_k_bins(log_q, log_p, k, torch.tensor(token)))
    assert at_least(exact(log_q, log_p), seen_by_k)
    assert at_least(seen_by_k, binary(log_q[token], log_p[token]))


@settings(deadline=None)
@given(q=logits, p=logits, token=tokens, k=st.integers(1, VOCABULARY - 1))
def test_top_k_bins_are_distributions(q: list[float], p: list[float], token: int, k: int) -> None:
    for bins in dv.top_k_bins(distribution(q), distribution(p), k, torch.tensor(token)):
        assert bins.exp().sum().item() == pytest.approx(1.0, abs=1e-9)


def test_top_k_keeps_q_s_likeliest_the_token_and_a_tail() -> None:
    q = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    p = torch.tensor([0.4, 0.1, 0.3, 0.2]).log()
    bins_q, bins_p = dv.top_k_bins(q, p, 1, torch.tensor(3))
    torch.testing.assert_close(bins_q.exp(), torch.tensor([0.5, 0.05, 0.45]))
    torch.testing.assert_close(bins_p.exp(), torch.tensor([0.4, 0.2, 0.4]))
    assert dv.exact_tv(bins_q, bins_p).item() == pytest.approx(0.15)


@pytest.mark.parametrize("k", [0, 4, -1])
def test_top_k_refuses_an_impossible_k(k: int) -> None:
    log_q = torch.zeros(4).log_softmax(-1)
    with pytest.raises(ValueError, match="k must be in"):
        dv.top_k_bins(log_q, log_q, k)


def test_recorded_top_logprobs_get_the_same_tail() -> None:
    log_q = distribution([3.0, 2.0, 1.0, 0.0])
    bins, _ = dv.top_k_bins(log_q, log_q, 2)
    torch.testing.assert_close(dv.add_tail_bin(log_q[:2]), bins)


@pytest.mark.parametrize("measure", [dv.exact_tv, dv.exact_js])
@settings(deadline=None)
@given(q=logits, p=logits)
def test_symmetric_where_due(measure: Measure, q: list[float], p: list[float]) -> None:
    log_q, log_p = distribution(q), distribution(p)
    torch.testing.assert_close(measure(log_q, log_p), measure(log_p, log_q))


def test_kl_and_chi2_have_a_direction() -> None:
    log_q, log_p = log(0.01), log(0.3)
    assert dv.binary_kl(log_q, log_p) < 0.6 * dv.binary_kl(log_p, log_q)
    assert dv.binary_chi2(log_q, log_p) > 5 * dv.binary_chi2(log_p, log_q)


@settings(deadline=None)
@given(q=logits, p=logits)
def test_agrees_with_torch_distributions(q: list[float], p: list[float]) -> None:
    log_q, log_p = distribution(q), distribution(p)
    reference = kl_divergence(Categorical(logits=log_q), Categorical(logits=log_p))
    torch.testing.assert_close(dv.exact_kl(log_q, log_p), reference, rtol=1e-9, atol=1e-9)


@settings(deadline=None)
@given(q=st.floats(1e-6, 1 - 1e-6), p=st.floats(1e-6, 1 - 1e-6))
def test_binary_agrees_with_bernoulli(q: float, p: float) -> None:
    bernoulli = [Bernoulli(torch.tensor(x, dtype=torch.float64)) for x in (q, p)]
    torch.testing.assert_close(
        dv.binary_kl(log(q), log(p)), kl_divergence(*bernoulli), rtol=1e-7, atol=1e-9
    )
    assert dv.binary_tv(log(q), log(p)).item() == pytest.approx(abs(q - p), abs=1e-12)
    assert dv.binary_chi2(log(q), log(p)).item() == pytest.approx(
        (p - q) ** 2 / (q * (1 - q)), rel=1e-6, abs=1e-12
    )


def test_the_two_worked_examples_of_the_documentation() -> None:
    assert dv.binary_tv(log(0.001), log(0.0014)).item() == pytest.approx(0.0004)
    assert dv.binary_kl(log(0.001), log(0.0014)) < 1e-4
    assert dv.binary_kl(log(0.999), log(0.80)).item() == pytest.approx(0.22, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("measure", BINARY)
@pytest.mark.parametrize("q", ENDS)
@pytest.mark.parametrize("p", ENDS)
def test_finite_with_finite_gradients_at_the_ends(
    measure: Measure, q: float, p: float, dtype: torch.dtype
) -> None:
    log_q = torch.tensor(q, dtype=dtype).log()
    log_p = torch.tensor(p, dtype=dtype).log().requires_grad_()
    value = measure(log_q, log_p)
    (gradient,) = torch.autograd.grad(value, log_p)
    assert value.isfinite()
    assert gradient.isfinite()
    assert value >= 0
    if q == p:
        assert value <= 1e-6


@pytest.mark.parametrize("measure", EXACT)
def test_exact_is_finite_when_supports_differ(measure: Measure) -> None:
    log_q = torch.tensor([0.5, 0.5, 0.0]).log()
    log_p = torch.tensor([0.0, 0.5, 0.5]).log().requires_grad_()
    value = measure(log_q, log_p)
    (gradient,) = torch.autograd.grad(value, log_p)
    assert value.isfinite()
    assert value > 0.1
    assert gradient.isfinite().all()


def test_losing_a_certain_token_is_further_than_any_limit() -> None:
    assert dv.binary_kl(torch.tensor(0.0), torch.tensor(-math.inf)).item() == pytest.approx(
        -math.log(1e-30), rel=1e-3
    )


def test_nan_is_not_hidden() -> None:
    assert dv.binary_kl(log(0.5), torch.tensor(math.nan, dtype=torch.float64)).isnan()


@settings(deadline=None)
@given(p=probabilities)
def test_log_complement(p: float) -> None:
    assert dv.log_complement(log(p)).item() == pytest.approx(math.log1p(-p), rel=1e-6, abs=1e-12)


def test_log_complement_keeps_digits_that_one_minus_p_loses() -> None:
    log_p = torch.tensor(-1e-12)  # float32, where exp() is exactly 1
    assert dv.log_complement(log_p).item() == pytest.approx(math.log(1e-12), rel=1e-6)


@pytest.mark.parametrize("measure", EXACT)
def test_gradients_match_finite_differences(measure: Measure) -> None:
    torch.manual_seed(0)
    log_q = torch.randn(3, 5, dtype=torch.float64).log_softmax(-1)
    raw = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: measure(log_q, x.log_softmax(-1)), raw)
    assert torch.autograd.gradcheck(lambda x: measure(x.log_softmax(-1), log_q), raw)


@pytest.mark.parametrize("measure", BINARY)
def test_binary_gradients_match_finite_differences(measure: Measure) -> None:
    log_q = torch.tensor([0.02, 0.3, 0.95], dtype=torch.float64).log()
    log_p = torch.tensor([0.5, 0.2, 0.7], dtype=torch.float64).log().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: measure(log_q, x), log_p)


def test_gradient_of_binary_kl_by_hand() -> None:
    q, p = 0.3, 0.6
    log_p = log(p).requires_grad_()
    (gradient,) = torch.autograd.grad(dv.binary_kl(log(q), log_p), log_p)
    assert gradient.item() == pytest.approx((p - q) / (1 - p))  # d/dp = (p-q)/(p(1-p)), times p


def test_sampled_estimators_are_unbiased() -> None:
    """Their exact expectation over all tokens of q, not a simulation."""
    log_q, log_p = distribution([2.0, 1.0, 0.0, -1.0]), distribution([0.5, 1.5, 0.0, -0.5])
    q = log_q.exp()
    for sampled, exact in (
        (dv.k1, dv.exact_kl),
        (dv.k3, dv.exact_kl),
        (dv.sampled_chi2, dv.exact_chi2),
        (dv.sampled_tv, dv.exact_tv),
    ):
        torch.testing.assert_close((q * sampled(log_q, log_p)).sum(), exact(log_q, log_p))


@settings(deadline=None)
@given(log_r=st.lists(st.floats(-30, 30), min_size=1, max_size=20))
def test_ess_is_a_share(log_r: list[float]) -> None:
    log_p = torch.tensor(log_r, dtype=torch.float64)
    mask = torch.ones_like(log_p, dtype=torch.bool)
    share = dv.ess_share(torch.zeros_like(log_p), log_p, mask).item()
    assert 1 / len(log_r) - 1e-9 <= share <= 1 + 1e-9


def test_ess_of_equal_weights_one_heavy_weight_and_nothing() -> None:
    mask = torch.tensor([[True] * 4 + [False]] * 2 + [[False] * 5])
    log_p = torch.tensor([[-1.0] * 4 + [9.0], [0.0, -30, -30, -30, 9.0], [0.0] * 5])
    share = dv.ess_share(torch.zeros(3, 5), log_p, mask)
    torch.testing.assert_close(share, torch.tensor([1.0, 0.25, 1.0]))
