"""Objectives: hand-worked examples, gradients derived a second way, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from updater.learning import divergence
from updater.learning.objectives import (
    OBJECTIVES,
    BatchFault,
    find_batch_fault,
    kl_penalty,
    log_ratio_penalty,
    measure,
    sampled_kl_penalty,
    token_mean,
)

BEHAVIOUR_ANCHORED = sorted(OBJECTIVES.keys() - {"pg"})
WHOLE_REPLIES = {"gspo", "m2po", "tapered", "topr", "vespo", "ppo_clip_masked_negatives"}
TOKENWISE = sorted(OBJECTIVES.keys() - WHOLE_REPLIES)

probabilities = st.floats(1e-4, 1 - 1e-4)
advantages = st.floats(-3, 3)


def tensor(*values: float) -> Tensor:
    """One sequence: [1, time]."""
    return torch.tensor([values], dtype=torch.float64)


def gradient(
    name: str, p: Tensor, q: Tensor, advantage: Tensor, **limits: float
) -> tuple[Tensor, Tensor, Tensor]:
    """d loss / d log p, the loss, and the kept mask, per token."""
    log_p = p.log().requires_grad_()
    output = OBJECTIVES[name](log_p, q.log(), advantage, torch.ones_like(p).bool(), **limits)
    (slope,) = torch.autograd.grad(output.loss.sum(), log_p)
    return slope, output.loss.detach(), output.kept


# --- one example by hand for each: q, p, A, then d loss / d log p ---

HAND_WORKED = [
    # dppo_kl: D(0.001 -> 0.002) = 3.1e-4 nats: kept, though r = 2 would be clipped.
    ("dppo_kl", 0.001, 0.002, 1.0, -2.0),
    # D(0.999 -> 0.8) = 0.217 > 0.05, A < 0 and falling: dropped ...
    ("dppo_kl", 0.999, 0.8, -1.0, 0.0),
    # ... but not when A wants it back: r = 0.8 / 0.999.
    ("dppo_kl", 0.999, 0.8, 2.0, -2.0 * 0.8 / 0.999),
    # r = 0.1 / 0.001 = 100 is capped at 20 (A < 0: moving back).
    ("dppo_kl", 0.001, 0.1, -1.0, 20.0),
    ("dppo_tv", 0.3, 0.44, 1.0, -0.44 / 0.3),  # p - q = 0.14 <= 0.15
    ("dppo_tv", 0.3, 0.46, 1.0, 0.0),  # 0.16 > 0.15
    ("dppo_tv", 0.46, 0.3, -1.0, 0.0),
    ("dppo_tv", 0.46, 0.3, 1.0, -0.3 / 0.46),
    # drpo: -A r (1 - sign(A) (p - q) / 0.5)
    ("drpo", 0.2, 0.4, 1.0, -2.0 * (1 - 0.2 / 0.5)),
    ("drpo", 0.2, 0.7, 1.0, 0.0),  # exactly at delta
    ("drpo", 0.2, 0.8, 1.0, 4.0 * 0.2),  # beyond: pulled back
    ("drpo", 0.8, 0.4, -1.0, 0.5 * (1 - 0.4 / 0.5)),
    ("ppo_clip", 0.5, 0.6, 1.0, -1.2),
    ("ppo_clip", 0.5, 0.7, 1.0, 0.0),  # r = 1.4 > 1.28
    ("ppo_clip", 0.5, 0.7, -1.0, 1.4),
    ("ppo_clip", 0.5, 0.3, -1.0, 0.0),  # r = 0.6 < 0.8
    ("gspo", 0.5, 0.5001, 1.0, -1.0002),  # a sequence of one token
    ("gspo", 0.5, 0.51, 1.0, 0.0),
    ("cispo", 0.5, 0.7, 1.0, -1.28),
    ("cispo", 0.5, 0.1, -1.0, 0.2),
    ("icepop", 0.5, 0.3, -1.0, 0.6),
    ("icepop", 0.5, 0.2, -1.0, 0.0),  # r = 0.4 < 0.5
    ("icepop", 0.1, 0.6, -1.0, 0.0),  # r = 6 > 5, though moving back
    ("pg_is", 0.1, 0.6, -1.0, 6.0),
    ("pg_is", 0.01, 0.6, 1.0, -20.0),
    ("pg", 0.01, 0.6, 1.0, -1.0),
    # Replies of one token: the liked count whole, the disliked by r at most 1.
    ("tapered", 0.01, 0.6, 1.0, -1.0),
    ("tapered", 0.6, 0.01, 1.0, -1.0),
    ("tapered", 0.5, 0.1, -1.0, 0.2),
    ("tapered", 0.1, 0.5, -1.0, 1.0),
    ("topr", 0.5, 0.1, -1.0, 0.2),
    ("vespo", 0.5, 0.25, 1.0, -(0.5**2) * math.exp(3 * 0.5)),
    ("vespo", 0.25, 0.5, -1.0, 2.0**3 * math.exp(-2.0)),
    ("ppo_clip_masked_negatives", 0.5, 0.45, -1.0, 0.9),
    ("ppo_clip_masked_negatives", 0.5, 0.3, 1.0, -0.6),  # 0.51 nats, but liked
    ("ppo_clip_masked_negatives", 0.5, 0.7, 1.0, 0.0),  # PPO's clip
    ("prime_rl", 0.5, 0.6, 1.0, -1.2 + 2e-3 * math.log(1.2)),
    ("prime_rl", 0.5, 0.8, -1.0, 1.6 + 2e-3 * math.log(1.6)),
    ("m2po", 0.5, 0.6, 1.0, -1.2),  # log^2 1.2 = 0.033 <= 0.04
    ("m2po", 0.5, 0.625, 1.0, 0.0),  # log^2 1.25 = 0.0498
    ("m2po", 0.5, 0.25, 1.0, -0.5),  # not harmful
]


@pytest.mark.parametrize(("name", "q", "p", "advantage", "expected"), HAND_WORKED)
def test_hand_worked_gradient(
    name: str, q: float, p: float, advantage: float, expected: float
) -> None:
    slope, _, kept = gradient(name, tensor(p), tensor(q), tensor(advantage))
    assert slope.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    if name not in ("drpo", "prime_rl"):
        assert kept.item() == (expected != 0.0)


def test_hand_worked_loss_values() -> None:
    """Only some surrogates have a value that means something; these do."""
    for name, expected in (
        ("drpo", -1.4 + 0.5 * 0.4**2 / (2 * 0.5)),
        ("ppo_clip", -1.28),
        ("gspo", -(1 + 4e-4)),
    ):
        _, loss, _ = gradient(name, tensor(0.7), tensor(0.5), tensor(1.0))
        assert loss.item() == pytest.approx(expected)


def test_m2po_drops_the_fewest_largest_harmful_tokens() -> None:
    log_r = tensor(0.1, 0.3, -0.25, 0.9, -0.9, 0.2)
    advantage = tensor(1.0, 1.0, -1.0, -1.0, -1.0, 1.0)  # the fourth moves back: not harmful
    q = torch.full_like(log_r, 0.2)
    _, _, kept = gradient("m2po", q * log_r.exp(), q, advantage)
    # squares of the harmful: .01 .04 .0625 .09 .81; means of prefixes: .01 .025 .0375 .0506 ...
    assert kept.tolist() == [[True, False, True, True, False, True]]


def test_gspo_judges_the_sequence_as_one() -> None:
    """Two tokens far from their behaviour cancel; padding has no share in the mean."""
    q = torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]], dtype=torch.float64)
    log_r = torch.tensor([[0.5, -0.5, 0.0], [0.0002, 0.0003, 0.3]], dtype=torch.float64)
    log_p = (q.log() + log_r).requires_grad_()
    mask = torch.tensor([[True, True, True], [True, True, False]])
    output = OBJECTIVES["gspo"](log_p, q.log(), torch.ones(2, 1).double(), mask)
    (slope,) = torch.autograd.grad(output.loss.sum(), log_p)
    assert output.kept.tolist() == mask.tolist()
    s = math.exp(0.00025)
    expected = torch.tensor([[-1.0, -1.0, -1.0], [-s, -s, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(slope, expected)


def test_a_disliked_reply_is_tapered_as_a_whole_and_a_long_one_by_its_share() -> None:
    """T0 = 16: four tokens count with their sum, 64 tokens with a quarter of it."""
    for tokens, log_r, expected in ((4, -0.1, math.exp(-0.4)), (64, -0.1, math.exp(-1.6))):
        q = torch.full((1, tokens), 0.5, dtype=torch.float64)
        p = q * math.exp(log_r)
        slope, _, kept = gradient("tapered", p, q, torch.full_like(q, -1.0))
        torch.testing.assert_close(slope, torch.full_like(q, expected))
        assert kept.all()
        whole, _, _ = gradient("topr", p, q, torch.full_like(q, -1.0))
        torch.testing.assert_close(whole, torch.full_like(q, math.exp(tokens * log_r)))


def test_vespo_weighs_a_reply_by_the_product_of_its_ratios() -> None:
    q = torch.full((2, 3), 0.2, dtype=torch.float64)
    p = q * torch.tensor([[0.1, 0.2, -0.4], [0.3, 0.1, 0.2]], dtype=torch.float64).exp()
    advantage = torch.tensor([[1.5], [-0.5]], dtype=torch.float64).expand(2, 3)
    slope, _, _ = gradient("vespo", p, q, advantage)
    liked = math.exp(-0.1) ** 2 * math.exp(3.0 * (1.0 - math.exp(-0.1)))
    disliked = math.exp(0.6) ** 3 * math.exp(2.0 * (1.0 - math.exp(0.6)))
    expected = torch.tensor([[-1.5 * liked] * 3, [0.5 * disliked] * 3], dtype=torch.float64)
    torch.testing.assert_close(slope, expected)


def test_a_negative_reply_that_was_left_behind_is_dropped_whole() -> None:
    """DeepSeek-V3.2's mask: the mean of log(q / p) over the reply decides, not a token."""
    q = torch.full((3, 2), 0.5, dtype=torch.float64)
    p = q * torch.tensor([[-1.0, -0.1], [-0.9, 0.0], [-1.0, -0.1]], dtype=torch.float64).exp()
    advantage = torch.tensor([[-1.0], [-1.0], [1.0]], dtype=torch.float64).expand(3, 2)
    _, _, kept = gradient("ppo_clip_masked_negatives", p, q, advantage)
    assert kept.tolist() == [[False, False], [False, True], [True, True]]


AUTHORS_GRADIENTS = {
    # FloyedShen/VESPO, recipe/vespo/code/core_algos.py at aa1f3045, summed over tokens
    "vespo": [[-1.42339582] * 3, [0.1168682] * 3],
    # PrimeIntellect-ai/prime-rl, default_loss_fn at 559b44772
    "prime_rl": [[0.00081093, -1.57490242, -1.00081093], [-0.00196166, 0.60036464, 0.4641375]],
}
"""What the authors' own code printed for the two replies of the test."""


@pytest.mark.parametrize("name", AUTHORS_GRADIENTS)
def test_the_gradient_is_that_of_the_authors_own_code(name: str) -> None:
    q = torch.tensor([[0.5, 0.2, 0.9], [0.4, 0.05, 0.7]], dtype=torch.float64)
    p = torch.tensor([[0.75, 0.21, 0.6], [0.15, 0.06, 0.65]], dtype=torch.float64)
    advantage = torch.tensor([[1.5], [-0.5]], dtype=torch.float64).expand(2, 3)
    slope, _, _ = gradient(name, p, q, advantage)
    expected = torch.tensor(AUTHORS_GRADIENTS[name], dtype=torch.float64)
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-8)


# --- the gradients again, from each paper's formula, in probabilities and without autograd ---


def binary_kl(q: float, p: float) -> float:
    return q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))


def dppo_kl(q: float, p: float, a: float) -> float:
    away = a * (p - q) > 0
    return 0.0 if away and binary_kl(q, p) > 0.05 else -a * min(p / q, 20.0)


def dppo_tv(q: float, p: float, a: float) -> float:
    out = p - q > 0.15 if a > 0 else q - p > 0.15
    return 0.0 if out else -a * min(p / q, 20.0)


def drpo(q: float, p: float, a: float) -> float:
    return p * (-a / q + abs(a) * (p - q) / (q * 0.5))  # p d/dp of -A p/q + |A| (p-q)^2/(2 q delta)


def ppo_clip(q: float, p: float, a: float) -> float:
    r = p / q
    return 0.0 if (a > 0 and r > 1.28) or (a < 0 and r < 0.8) else -a * r


def cispo(q: float, p: float, a: float) -> float:
    return -a * min(p / q, 1.28)


def icepop(q: float, p: float, a: float) -> float:
    return -a * p / q if 0.5 <= p / q <= 5.0 else 0.0


def pg_is(q: float, p: float, a: float) -> float:
    return -a * min(p / q, 20.0)


def prime_rl(q: float, p: float, a: float) -> float:
    out = p - q > 0.2 if a > 0 else q - p > 0.2
    return (0.0 if out else -a * p / q) + 2e-3 * math.log(p / q)


def pg(q: float, p: float, a: float) -> float:  # noqa: ARG001
    return -a


DERIVED: dict[str, Callable[[float, float, float], float]] = {
    "dppo_kl": dppo_kl,
    "dppo_tv": dppo_tv,
    "drpo": drpo,
    "ppo_clip": ppo_clip,
    "cispo": cispo,
    "icepop": icepop,
    "pg_is": pg_is,
    "prime_rl": prime_rl,
    "pg": pg,
}


@pytest.mark.parametrize("name", TOKENWISE)
@settings(deadline=None)
@given(q=probabilities, p=probabilities, advantage=advantages)
def test_gradient_agrees_with_its_derivation(
    name: str, q: float, p: float, advantage: float
) -> None:
    slope, _, _ = gradient(name, tensor(p), tensor(q), tensor(advantage))
    assert slope.item() == pytest.approx(DERIVED[name](q, p, advantage), rel=1e-6, abs=1e-9)


@settings(deadline=None)
@given(st.lists(st.tuples(probabilities, probabilities, advantages), min_size=1, max_size=12))
def test_m2po_agrees_with_removing_one_by_one(rows: list[tuple[float, float, float]]) -> None:
    squares = {
        i: math.log(p / q) ** 2 for i, (q, p, a) in enumerate(rows) if a * math.log(p / q) > 0
    }
    while squares and sum(squares.values()) / len(squares) > 0.04 + 1e-12:
        del squares[max(squares, key=lambda i: (round(squares[i], 12), i))]  # of equals, the last
    q, p, a = (tensor(*column) for column in zip(*rows, strict=True))
    slope, _, kept = gradient("m2po", p, q, a)
    harmful = [a * math.log(p / q) > 0 for q, p, a in rows]
    expected = [i in squares or not bad for i, bad in enumerate(harmful)]
    assert kept[0].tolist() == expected
    torch.testing.assert_close(slope, torch.where(kept, -a * p / q, torch.zeros_like(q)))


@settings(deadline=None)
@given(
    log_r=st.lists(st.floats(-1e-3, 1e-3), min_size=1, max_size=6),
    advantage=advantages.filter(lambda a: abs(a) > 1e-3),
)
def test_gspo_agrees_with_its_derivation(log_r: list[float], advantage: float) -> None:
    mean = math.exp(sum(log_r) / len(log_r))
    clipped = (advantage > 0 and mean > 1 + 4e-4) or (advantage < 0 and mean < 1 - 3e-4)
    q = torch.full_like(tensor(*log_r), 0.3)
    slope, _, _ = gradient("gspo", q * tensor(*log_r).exp(), q, torch.full_like(q, advantage))
    expected = 0.0 if clipped else -advantage * mean  # mean over the sequence, on each token
    torch.testing.assert_close(slope, torch.full_like(q, expected), rtol=1e-9, atol=1e-9)


# --- what all of them promise ---


@pytest.mark.parametrize("name", BEHAVIOUR_ANCHORED)
@settings(deadline=None)
@given(rows=st.lists(st.tuples(st.floats(1e-9, 1.0), advantages), min_size=1, max_size=8))
def test_on_policy_all_are_the_policy_gradient(name: str, rows: list[tuple[float, float]]) -> None:
    p, a = (tensor(*column) for column in zip(*rows, strict=True))
    slope, _, kept = gradient(name, p, p, a)
    torch.testing.assert_close(slope, -a)
    assert kept.all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_padding_has_no_say_whatever_stands_there(name: str) -> None:
    torch.manual_seed(1)
    log_p, log_q = (torch.rand(4, 6).clamp(0.1, 0.9).log() for _ in range(2))
    advantage = torch.randn(4, 1)
    mask = torch.rand(4, 6) < 0.6
    mask[0] = False
    clean = OBJECTIVES[name](log_p.requires_grad_(), log_q, advantage, mask)
    (expected,) = torch.autograd.grad(token_mean(clean.loss, mask), log_p)
    for rubbish in (math.nan, -math.inf, 0.0, 7.0):
        dirty_p = log_p.detach().masked_fill(~mask, rubbish).requires_grad_()
        dirty_q = log_q.masked_fill(~mask, rubbish)
        dirty_a = advantage.expand(4, 6).masked_fill(~mask, rubbish)
        dirty = OBJECTIVES[name](dirty_p, dirty_q, dirty_a, mask)
        (slope,) = torch.autograd.grad(token_mean(dirty.loss, mask), dirty_p)
        torch.testing.assert_close(slope, expected)
        assert (slope[~mask] == 0).all()
        assert not dirty.kept[~mask].any()
        assert dirty.stats == clean.stats


@pytest.mark.parametrize("name", OBJECTIVES)
def test_finite_at_the_ends_of_probability(name: str) -> None:
    ends = [0.0, 1e-12, 0.5, 1.0 - 1e-7, 1.0]
    grid = torch.tensor([(q, p, a) for q in ends for p in ends for a in (-1.0, 1.0)])
    q, p, a = grid.T.unsqueeze(1)
    log_p = p.log().clamp_min(-90).requires_grad_()
    output = OBJECTIVES[name](log_p, q.log().clamp_min(-90), a, torch.ones_like(q).bool())
    (slope,) = torch.autograd.grad(output.loss.sum(), log_p)
    assert slope.isfinite().all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_leading_dimensions_are_independent_batches(name: str) -> None:
    torch.manual_seed(2)
    log_p, log_q = (torch.rand(3, 4, 5).clamp(0.05, 0.95).log() for _ in range(2))
    advantage, mask = torch.randn(3, 4, 1), torch.rand(3, 4, 5) < 0.7
    together = OBJECTIVES[name](log_p, log_q, advantage, mask)
    for i in range(3):
        alone = OBJECTIVES[name](log_p[i], log_q[i], advantage[i], mask[i])
        torch.testing.assert_close(together.loss[i], alone.loss)
        assert (together.kept[i] == alone.kept).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_only_the_policy_gets_a_gradient(name: str) -> None:
    log_p, log_q, advantage = (torch.rand(2, 3).log().requires_grad_() for _ in range(3))
    output = OBJECTIVES[name](log_p, log_q, advantage, torch.ones(2, 3).bool())
    torch.autograd.backward(output.loss.sum())
    assert log_p.grad is not None
    assert log_q.grad is None
    assert advantage.grad is None


@pytest.mark.parametrize("name", ["dppo_kl", "dppo_tv", "drpo", "m2po"])
@settings(deadline=None)
@given(q=probabilities, p=probabilities, advantage=advantages)
def test_never_pushes_a_token_further_once_it_is_outside(
    name: str, q: float, p: float, advantage: float
) -> None:
    """The default limits, with any of these the token may only stay or come back."""
    outside = {
        "dppo_kl": binary_kl(q, p) > 0.0501,
        "dppo_tv": abs(p - q) > 0.1501,
        "drpo": abs(p - q) > 0.5001,
        "m2po": math.log(p / q) ** 2 > 0.0401,
    }[name]
    slope, _, _ = gradient(name, tensor(p), tensor(q), tensor(advantage))
    if outside:
        assert -slope.item() * (p - q) <= 1e-12  # descent moves log p by -slope


def test_an_unknown_limit_is_refused_by_name() -> None:
    one = tensor(0.5).log()
    with pytest.raises(TypeError, match=r"ppo_clip has no limit 'divergence_limit'; it has: clip_"):
        OBJECTIVES["ppo_clip"](one, one, one, one < 0, divergence_limit=0.1)


def test_limits_replace_the_defaults() -> None:
    slope, _, _ = gradient(
        "dppo_kl", tensor(0.8), tensor(0.999), tensor(-1.0), divergence_limit=0.3
    )
    assert slope.item() == pytest.approx(0.8 / 0.999)


def test_the_registry_cannot_be_changed_by_accident() -> None:
    with pytest.raises(TypeError):
        OBJECTIVES["mine"] = OBJECTIVES["pg"]  # type: ignore[index]
    assert next(iter(OBJECTIVES)) == "dppo_kl"


# --- the reduction, the regularisers ---


def test_token_mean_over_micro_batches_equals_one_large_batch() -> None:
    torch.manual_seed(3)
    loss, mask = torch.randn(6, 4), torch.rand(6, 4) < 0.5
    total = mask.sum()
    pieces = [token_mean(loss[i : i + 2], mask[i : i + 2], total) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.stack(pieces).sum(), token_mean(loss, mask))
    torch.testing.assert_close(token_mean(loss, mask), loss[mask].mean())
    assert token_mean(loss, torch.zeros_like(mask)) == 0


def test_log_ratio_penalty_pulls_toward_the_behaviour_policy() -> None:
    log_p = tensor(0.4, 0.1, 0.5).log().requires_grad_()
    log_q, mask = tensor(0.2, 0.2, 0.5).log(), torch.tensor([[True, True, False]])
    penalty = log_ratio_penalty(log_p, log_q, mask, weight=0.5)
    (slope,) = torch.autograd.grad(penalty.sum(), log_p)
    torch.testing.assert_close(slope, tensor(math.log(2), -math.log(2), 0.0))


def test_sampled_kl_penalty_has_the_exact_gradient_in_expectation() -> None:
    """Weighted by q over every token, its gradient is that of KL(pi || reference)."""
    torch.manual_seed(4)
    raw = torch.randn(5, dtype=torch.float64, requires_grad=True)
    log_q, log_reference = torch.randn(2, 5, dtype=torch.float64).log_softmax(-1)
    everywhere = torch.ones(5, dtype=torch.bool)
    log_p = raw.log_softmax(-1)
    exact = kl_penalty(log_p, log_reference, everywhere[0], weight=0.3)
    (expected,) = torch.autograd.grad(exact, raw, retain_graph=True)
    sampled = sampled_kl_penalty(log_p, log_q, log_reference, everywhere, weight=0.3)
    (slope,) = torch.autograd.grad((log_q.exp() * sampled).sum(), raw)
    torch.testing.assert_close(slope, expected)


# --- what is refused, what is measured ---


def batch(**changes: Tensor) -> dict[str, Tensor]:
    good = {
        "log_p": torch.full((2, 3), -1.0),
        "log_q": torch.full((2, 3), -1.1),
        "advantage": torch.tensor([[1.0], [-1.0]]),
        "mask": torch.tensor([[True, True, False], [True, False, False]]),
    }
    return {**good, **changes}


def spoilt(value: float, *at: int) -> Tensor:
    values = torch.full((2, 3), -1.0)
    values[at] = value
    return values


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"log_p": spoilt(math.nan, 0, 1)}, BatchFault.NOT_FINITE),
        ({"log_q": spoilt(-math.inf, 1, 0)}, BatchFault.NOT_FINITE),
        ({"advantage": torch.tensor([[1.0], [math.inf]])}, BatchFault.NOT_FINITE),
        ({"log_q": spoilt(0.01, 0, 0)}, BatchFault.POSITIVE_LOGPROB),
        ({"log_p": spoilt(0.01, 0, 0)}, BatchFault.POSITIVE_LOGPROB),
        ({"log_q": torch.full((2, 4), -1.0)}, BatchFault.SHAPES_DIFFER),
        ({"advantage": torch.ones(3, 1)}, BatchFault.SHAPES_DIFFER),
        ({"advantage": torch.ones(2, 2)}, BatchFault.SHAPES_DIFFER),
        ({"mask": torch.zeros(2, 3).bool()}, BatchFault.NO_TOKENS),
        ({"advantage": torch.zeros(2, 1)}, BatchFault.NO_SIGNAL),
    ],
)
def test_bad_batches_are_refused_with_a_reason(bad: dict[str, Tensor], reason: BatchFault) -> None:
    assert find_batch_fault(**batch(**bad)) is reason


@pytest.mark.parametrize(
    "fine",
    [
        {},
        {"log_p": spoilt(math.nan, 0, 2)},  # on padding
        {"log_q": spoilt(1e-6, 0, 0)},  # rounding
        {"advantage": torch.tensor([[1.0], [0.0]])},
    ],
)
def test_good_batches_pass(fine: dict[str, Tensor]) -> None:
    assert find_batch_fault(**batch(**fine)) is None


def test_measurements_by_hand() -> None:
    q, p = tensor(0.05, 0.5, 0.5, 0.5), tensor(0.1, 0.25, 0.5, 0.9)
    advantage = tensor(1.0, -1.0, 1.0, 1.0)
    mask = torch.tensor([[True, True, True, False]])
    kept = torch.tensor([[True, False, True, False]])
    stats = measure(p.log(), q.log(), advantage, mask, kept)
    assert stats["mean_ratio"] == pytest.approx(3.5 / 3)
    assert stats["max_ratio"] == pytest.approx(2.0)
    assert stats["k1_nats"] == pytest.approx(0.0, abs=1e-12)
    assert stats["k3_nats"] == pytest.approx(0.5 / 3)
    assert stats["chi2"] == pytest.approx(1.25 / 3)
    assert stats["tv"] == pytest.approx(0.75 / 3)
    assert stats["ess_share"] == pytest.approx(3.5**2 / (3 * 5.25))
    assert stats["binary_kl_nats"] == pytest.approx(
        (binary_kl(0.05, 0.1) + binary_kl(0.5, 0.25)) / 3
    )
    assert stats["masked_share"] == pytest.approx(1 / 3)
    assert (stats["masked_share_rare"], stats["masked_share_common"]) == (0.0, 0.5)
    assert (stats["masked_share_positive"], stats["masked_share_negative"]) == (0.0, 1.0)


def test_output_stats_are_those_of_the_batch() -> None:
    p, q, a = tensor(0.2, 0.7), tensor(0.3, 0.95), tensor(-1.0, -1.0)
    mask = torch.ones_like(p).bool()
    output = OBJECTIVES["dppo_kl"](p.log(), q.log(), a, mask)
    assert output.stats == measure(p.log(), q.log(), a, mask, output.kept)
    assert output.stats["binary_kl_nats"] == pytest.approx(
        divergence.binary_kl(q.log(), p.log()).mean().item()
    )
    assert output.stats["masked_share_common"] == 0.5


# --- a better measurement in the place of the binary one ---


@given(st.lists(st.tuples(probabilities, probabilities, advantages), min_size=1, max_size=6))
def test_given_the_binary_divergence_nothing_changes(rows: list[tuple[float, ...]]) -> None:
    q, p, a = (tensor(*column) for column in zip(*rows, strict=True))
    mask = torch.ones_like(p).bool()
    for name, measured in (("dppo_kl", divergence.binary_kl), ("dppo_tv", divergence.binary_tv)):
        plain = OBJECTIVES[name](p.log(), q.log(), a, mask)
        given_it = OBJECTIVES[name](p.log(), q.log(), a, mask, moved=measured(q.log(), p.log()))
        assert torch.equal(plain.loss, given_it.loss)
        assert torch.equal(plain.kept, given_it.kept)


@pytest.mark.parametrize("name", ["dppo_kl", "dppo_tv"])
def test_a_larger_measured_divergence_drops_a_token_that_moves_away_and_no_other(
    name: str,
) -> None:
    q, p = tensor(0.4, 0.4, 0.4, 0.4), tensor(0.41, 0.39, 0.41, 0.39)
    advantage = tensor(1.0, -1.0, -1.0, 1.0)
    mask = torch.ones_like(p).bool()
    far = torch.full_like(p, 0.9)
    assert OBJECTIVES[name](p.log(), q.log(), advantage, mask).kept.all()
    kept = OBJECTIVES[name](p.log(), q.log(), advantage, mask, moved=far).kept
    assert kept.tolist() == [[False, False, True, True]]


def test_an_objective_that_measures_nothing_takes_no_divergence() -> None:
    one = tensor(0.5)
    with pytest.raises(TypeError, match="measures no divergence"):
        OBJECTIVES["drpo"](one.log(), one.log(), one, one.bool(), moved=one)


@pytest.mark.parametrize("name", ["dppo_kl", "dppo_tv"])
def test_a_divergence_that_is_nan_is_outside_the_limit(name: str) -> None:
    log_q = tensor(0.5, 0.5).log()
    log_p = tensor(0.51, 0.49).log().requires_grad_()
    moved = tensor(math.nan, math.nan)
    output = OBJECTIVES[name](
        log_p, log_q, tensor(1.0, -1.0), torch.ones_like(log_p).bool(), moved=moved
    )
    assert not output.kept.any(), "both would move further away, nobody knows how far they are"
    (slope,) = torch.autograd.grad(output.loss.sum(), log_p)
    assert not slope.any()
