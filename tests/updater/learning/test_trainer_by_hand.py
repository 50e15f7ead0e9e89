"""One update on a model whose gradients can be worked out by hand: each term, sign and scale."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from moorline.events import SamplingSettings
from moorline.settings import LearningSettings
from tests.updater.learning.bigram import ROWS, BigramPolicy, Rows, reply, rows, with_advantage
from updater.learning.trainer import NonFiniteUpdate, Trainer, optimizer_bytes
from updater.values import Batch, Correction, CreditedExample

SETTINGS = LearningSettings(anchor_weight=0.0, learning_rate=0.01)
EVEN: Rows = [[0.5, 0.5], [0.5, 0.5]]
NEARLY_NOTHING = 1e-12
"""An advantage that makes a batch worth an update and leaves its gradient to the other terms."""


def trainer(anchor: Rows = EVEN, live: Rows | None = None, **changes: Any) -> Trainer:
    made = Trainer(BigramPolicy(anchor), SETTINGS.model_copy(update=changes))
    if live is not None:
        made.accept(rows(*live), {})
    return made


def first_gradient(made: Trainer, *examples: CreditedExample) -> torch.Tensor:
    """The gradient of the first step, from Adam's first moment."""
    moments = made.propose(Batch(examples, live_version=0)).optimizer[f"{ROWS}.exp_avg"]
    return moments / (1 - 0.9)


def test_the_gradient_is_that_of_the_mean_over_all_tokens_of_the_batch() -> None:
    long, short = reply("a", [0, 0, 0], [0.5] * 3), reply("b", [1], [0.5], prompt=1)
    found = first_gradient(trainer(), with_advantage(long, 1.0), with_advantage(short, -0.5))
    # -A (onehot - p) / 4 tokens: three of row 0, one of row 1.
    assert found[0].tolist() == pytest.approx([-3 * 0.5 / 4, 3 * 0.5 / 4])
    assert found[1].tolist() == pytest.approx([-0.5 * 0.5 / 4, 0.5 * 0.5 / 4])


@pytest.mark.parametrize("micro_batch_tokens", [64, 2])
def test_the_anchors_pull_is_kl_of_policy_from_anchor_per_token(micro_batch_tokens: int) -> None:
    live, anchor = [0.8, 0.2], [0.3, 0.7]
    made = trainer(
        [anchor, anchor],
        [live, live],
        anchor_weight=0.5,
        micro_batch_tokens=micro_batch_tokens,
    )
    replies = [reply(name, [0, 0], [0.8, 0.8]) for name in "ab"]
    found = first_gradient(made, *(with_advantage(one, NEARLY_NOTHING) for one in replies))
    log_r = [math.log(p / a) for p, a in zip(live, anchor, strict=True)]
    kl = sum(p * r for p, r in zip(live, log_r, strict=True))
    # d KL(p || anchor) / d logit i = p_i (log p_i / anchor_i - KL), the same at each of 4 tokens
    by_hand = [0.5 * p * (r - kl) for p, r in zip(live, log_r, strict=True)]
    assert found[0].tolist() == pytest.approx(by_hand, rel=1e-4)
    assert found[1].tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("limit", "expected"), [(0.1, 0.1), (10.0, math.sqrt(0.5))])
def test_a_gradient_is_clipped_to_its_limit_and_reported_as_it_was(
    limit: float, expected: float
) -> None:
    made = trainer(gradient_clip=limit)
    batch = Batch((with_advantage(reply("a", [0], [0.5]), 1.0),), live_version=0)
    proposal = made.propose(batch)
    assert proposal.diagnostics["gradient_norm"] == pytest.approx(math.sqrt(0.5))
    clipped = proposal.optimizer[f"{ROWS}.exp_avg"] / (1 - 0.9)
    assert float(clipped.norm()) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("limit", "masked"), [(None, 0.0), (0.05, 0.0), (0.01, 1.0)])
def test_the_divergence_limit_of_the_settings_is_the_objectives(
    limit: float | None, masked: float
) -> None:
    # Binary KL(0.5 || 0.6) = 0.0204 nats, moving away: inside the default of 0.05.
    stale = with_advantage(reply("a", [0], [0.5]), 1.0)
    made = trainer(live=[[0.6, 0.4], [0.5, 0.5]], divergence_limit=limit)
    found = made.propose(Batch((stale,), live_version=3)).diagnostics
    assert found["masked_share"] == masked


def test_an_update_that_turns_non_finite_half_way_leaves_no_trace() -> None:
    made = trainer(minibatch_examples=1)
    good, bad = reply("a", [0], [0.5]), reply("b", [0], [0.5])
    with pytest.raises(NonFiniteUpdate):
        made.propose(
            Batch((with_advantage(good, 1.0), with_advantage(bad, math.inf)), live_version=0)
        )
    assert torch.equal(made._policy.state()[ROWS], made.live_adapter[ROWS])
    # The first example alone then learns as if nothing had been tried, moments included.
    batch = Batch((with_advantage(good, 1.0),), live_version=0)
    again, fresh = made.propose(batch), trainer(minibatch_examples=1).propose(batch)
    assert torch.equal(again.adapter[ROWS], fresh.adapter[ROWS])
    assert torch.equal(again.optimizer[f"{ROWS}.exp_avg"], fresh.optimizer[f"{ROWS}.exp_avg"])


@pytest.mark.parametrize("minibatch_examples", [1, 2, 3])
def test_every_example_of_a_batch_teaches_whatever_the_minibatch(minibatch_examples: int) -> None:
    even = [[1 / 3] * 3] * 3
    made = trainer(even, minibatch_examples=minibatch_examples)
    examples = [with_advantage(reply(f"e{n}", [n], [1 / 3], prompt=n), 1.0) for n in range(3)]
    moved = made.propose(Batch(tuple(examples), live_version=0)).adapter[ROWS]
    assert [float(row[n]) > float(row[n - 1]) for n, row in enumerate(moved)] == [True] * 3


@pytest.mark.parametrize("passes", [1, 2, 3])
def test_a_batch_is_passed_over_as_often_as_the_settings_say(passes: int) -> None:
    made = trainer(passes=passes, minibatch_examples=1)
    examples = tuple(with_advantage(reply(name, [0], [0.5]), 1.0) for name in "ab")
    steps = made.propose(Batch(examples, live_version=0)).optimizer[f"{ROWS}.step"]
    assert float(steps) == 2 * passes


def test_the_gradient_norm_reported_is_the_largest_of_the_steps() -> None:
    made = trainer(minibatch_examples=1)
    examples = [with_advantage(reply(f"e{a}", [0], [0.5]), a) for a in (0.1, 2.0, 0.1)]
    found = made.propose(Batch(tuple(examples), live_version=0)).diagnostics
    assert found["gradient_norm"] == pytest.approx(2.0 * math.sqrt(0.5), rel=0.05)


def test_micro_batches_are_one_mean() -> None:
    """Two replies, each in a micro-batch of its own: half of each one's mean."""
    found = first_gradient(
        trainer(micro_batch_tokens=2),
        with_advantage(reply("a", [0], [0.5]), 1.0),
        with_advantage(reply("b", [1], [0.5], prompt=1), 1.0),
    )
    assert found.abs().flatten().tolist() == pytest.approx([0.25] * 4)


class Corrector:
    """A chat template of single tokens: the correction ends the prompt with token 1."""

    def prompt_with_correction(
        self, prompt: tuple[int, ...], _text: str, _prefix: str
    ) -> tuple[int, ...]:
        return (*prompt, 1)

    def reply(self, _text: str) -> tuple[int, ...]:
        return (1,)


@pytest.mark.parametrize(("weight", "distillation_weight"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.5)])
def test_what_a_correction_says_is_added_to_what_the_rating_says(
    weight: float, distillation_weight: float
) -> None:
    # Told the correction, the model gives token 0 a chance of 0.6 in place of 0.5.
    chances = [[0.5, 0.5], [0.6, 0.4]]
    settings = {"correction_weight": 0.0, "distillation_weight": distillation_weight}
    policy = BigramPolicy(chances)
    made = Trainer(policy, SETTINGS.model_copy(update=settings), chat=Corrector())  # type: ignore[arg-type]
    rated = with_advantage(reply("a", [0], [0.5]), 1.0)
    both = CreditedExample(
        rated.example, 1.0, 1.0, corrections=(Correction("f", "ann", "text", weight),)
    )
    told = weight * distillation_weight * math.log(0.6 / 0.5)
    found = first_gradient(made, both)
    assert found[0].tolist() == pytest.approx([-(1.0 + told) * 0.5, (1.0 + told) * 0.5], rel=1e-4)


class Shelf:
    """Archived adapters by version."""

    def __init__(self, adapters: dict[int, Rows]) -> None:
        self._adapters = adapters

    def adapter(self, version: int) -> dict[str, torch.Tensor]:
        return rows(*self._adapters[version])


TOP_TWO = SamplingSettings(top_k=2)
WROTE, NOW = [0.4, 0.3, 0.2, 0.1], [0.1, 0.2, 0.3, 0.4]
"""Under the two likeliest only, {0, 1} is what the first can say and {2, 3} what the second can."""


def test_a_truncated_reply_is_compared_on_what_its_own_policy_could_say() -> None:
    policy = BigramPolicy([[0.25] * 4] * 4)
    made = Trainer(policy, SETTINGS, Shelf({1: [WROTE] * 4}))  # type: ignore[arg-type]
    made.accept(rows(*[NOW] * 4), {})
    stale = reply("a", [0, 1], [4 / 7, 3 / 7], version=1, sampling=TOP_TWO)
    ratios = [(1 / 3) / (4 / 7), (2 / 3) / (3 / 7)]
    seen = made.measure_staleness([with_advantage(stale, 1.0).example], 2)
    share = sum(ratios) ** 2 / (2 * sum(r * r for r in ratios))
    assert seen.ess_share == pytest.approx(share, rel=1e-4)
    found = made.propose(Batch((with_advantage(stale, 1.0),), 2), seen).diagnostics
    assert found["mean_ratio"] == pytest.approx(sum(ratios) / 2, rel=1e-4)
    assert found["max_ratio"] == pytest.approx(max(ratios), rel=1e-4)


def test_the_learning_rate_is_scaled_by_the_ess_share_of_the_batch() -> None:
    # r = 3, 1, 1, 1: an effective sample of 36 / (4 * 12) = 0.75 of the tokens.
    stale = reply("a", [0, 0, 0, 0], [0.2, 0.6, 0.6, 0.6])
    live = [[0.6, 0.4], [0.5, 0.5]]
    batch = Batch((with_advantage(stale, 1.0),), live_version=3)
    scaled = trainer(live=live).propose(batch)
    full = trainer(live=live, scale_lr_by_ess=False).propose(batch)
    assert scaled.diagnostics["ess_lr_scale"] == pytest.approx(0.75, rel=1e-4)
    assert full.diagnostics["ess_lr_scale"] == 1.0
    steps = [float((one.adapter[ROWS] - rows(*live)[ROWS]).norm()) for one in (scaled, full)]
    assert steps[0] / steps[1] == pytest.approx(0.75, rel=1e-3)


def test_step_norm_share_is_the_step_over_the_adapter_it_left() -> None:
    live = [[0.9, 0.1], [0.5, 0.5]]
    made = trainer(live=live)
    batch = Batch((with_advantage(reply("a", [0], [0.9]), 1.0),), live_version=0)
    proposal = made.propose(batch)
    step = float((proposal.adapter[ROWS] - made.live_adapter[ROWS]).norm())
    before = float(made.live_adapter[ROWS].norm())
    assert proposal.diagnostics["step_norm_share"] == pytest.approx(step / before, rel=1e-5)


def test_what_no_token_speaks_of_does_not_move_and_the_moments_are_adams() -> None:
    made = trainer()
    batch = Batch((with_advantage(reply("a", [0], [0.5]), 1.0),), live_version=0)
    proposal = made.propose(batch)
    assert torch.equal(proposal.adapter[ROWS][1], made.live_adapter[ROWS][1]), "no weight decay"
    # Of a gradient of -+0.5: 0.1 of it, and 0.05 of its square.
    first, second = (proposal.optimizer[f"{ROWS}.{name}"][0] for name in ("exp_avg", "exp_avg_sq"))
    assert first.tolist() == pytest.approx([-0.05, 0.05])
    assert second.tolist() == pytest.approx([0.0125, 0.0125])


def test_a_release_is_continued_from_with_its_moments() -> None:
    made = trainer()
    batch = Batch((with_advantage(reply("a", [0], [0.5]), 1.0),), live_version=0)
    once = made.propose(batch)
    made.accept(once.adapter, once.optimizer)
    twice = made.propose(batch)
    other = trainer()
    other.resume(once.adapter, optimizer_bytes(once.optimizer))
    assert torch.equal(other.propose(batch).adapter[ROWS], twice.adapter[ROWS])
    assert float(twice.optimizer[f"{ROWS}.step"]) == 2.0
    other.resume(once.adapter, None)
    assert float(other.propose(batch).optimizer[f"{ROWS}.step"]) == 1.0
