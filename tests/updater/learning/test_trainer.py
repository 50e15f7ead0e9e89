"""One update: it learns the right way, measures honestly, and can be undone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from moorline.events import SamplingSettings
from moorline.settings import LearningSettings
from tests.updater.learning.fixtures import credited, recorded, some_sequences
from updater.learning.policy import Policy
from updater.learning.trainer import (
    NonFiniteUpdate,
    NothingToLearn,
    ObjectiveInvalid,
    Trainer,
    optimizer_bytes,
)
from updater.values import Batch, TokenSequence

SETTINGS = LearningSettings(
    lora_rank=4, lora_alpha=8, learning_rate=5e-3, anchor_weight=0.0, micro_batch_tokens=64
)
SAMPLING = [SamplingSettings(temperature=t, top_p=p) for t in (0.7, 1.0) for p in (0.9, 1.0)]


@pytest.fixture
def policy(tiny_model_dir: Path) -> Policy:
    return Policy(tiny_model_dir, rank=4, alpha=8, seed=0)


def total_logprob(policy: Policy, sequence: TokenSequence) -> float:
    (logprobs,) = policy.full_logprobs([sequence], 256)
    chosen = torch.tensor(sequence.completion_token_ids)[:, None]
    return float(logprobs.gather(-1, chosen).sum())


def batch_of(policy: Policy, advantages: list[float]) -> tuple[Batch, list[TokenSequence]]:
    sequences = some_sequences(len(advantages))
    examples = tuple(
        credited(recorded(policy, sequence, f"chatcmpl-{index}"), advantage)
        for index, (sequence, advantage) in enumerate(zip(sequences, advantages, strict=True))
    )
    return Batch(examples, live_version=0), sequences


@pytest.mark.parametrize("objective", ["dppo_kl", "dppo_tv", "ppo_clip", "drpo"])
def test_what_was_praised_becomes_likelier_and_what_was_not_rarer(
    policy: Policy, objective: str
) -> None:
    trainer = Trainer(policy, SETTINGS.model_copy(update={"objective": objective}))
    batch, (praised, blamed) = batch_of(policy, [1.0, -1.0])
    before = total_logprob(policy, praised), total_logprob(policy, blamed)
    trainer.propose(batch)
    assert total_logprob(policy, praised) > before[0]
    assert total_logprob(policy, blamed) < before[1]


@pytest.mark.parametrize("sampling", SAMPLING)
def test_at_lag_zero_the_ratio_is_one_for_every_sampling_setting(
    policy: Policy, sampling: SamplingSettings
) -> None:
    trainer = Trainer(policy, SETTINGS)
    sequences = some_sequences(6)
    examples = tuple(
        credited(recorded(policy, sequence, f"chatcmpl-{index}", sampling), (-1.0) ** index)
        for index, sequence in enumerate(sequences)
    )
    found = trainer.propose(Batch(examples, live_version=0)).diagnostics
    assert found["mismatch_nats"] < 0.02
    assert found["mean_ratio"] == pytest.approx(1.0, abs=0.02)
    assert found["ess_share"] == pytest.approx(1.0, abs=0.02)
    assert found["masked_share"] == 0.0


def test_stale_replies_are_measured_as_stale(policy: Policy) -> None:
    trainer = Trainer(policy, SETTINGS)
    batch, _ = batch_of(policy, [1.0, -1.0, 1.0])
    proposal = trainer.propose(batch)
    trainer.accept(proposal.adapter, proposal.optimizer)
    found = trainer.propose(Batch(batch.examples, live_version=3), now=1_750_000_060.0).diagnostics
    assert found["staleness_versions_mean"] == 3.0
    assert found["staleness_seconds_mean"] == pytest.approx(60.0)
    assert abs(found["mean_ratio"] - 1.0) > 1e-4
    assert "mismatch_nats" not in found


def test_restore_leaves_no_trace_of_a_proposal(policy: Policy) -> None:
    trainer = Trainer(policy, SETTINGS)
    batch, _ = batch_of(policy, [1.0, -1.0, 1.0, -1.0])
    accepted = trainer.propose(batch)
    trainer.accept(accepted.adapter, accepted.optimizer)
    once = trainer.propose(batch)
    trainer.restore()
    again = trainer.propose(batch)
    assert all(torch.equal(once.adapter[name], again.adapter[name]) for name in once.adapter)
    assert optimizer_bytes(once.optimizer) == optimizer_bytes(again.optimizer)


def test_resuming_from_files_continues_as_if_never_stopped(
    policy: Policy, tiny_model_dir: Path
) -> None:
    trainer = Trainer(policy, SETTINGS)
    batch, _ = batch_of(policy, [1.0, -1.0, 1.0, -1.0])
    first = trainer.propose(batch)
    trainer.accept(first.adapter, first.optimizer)
    onward = trainer.propose(batch)

    other = Trainer(Policy(tiny_model_dir, rank=4, alpha=8, seed=7), SETTINGS)
    other.resume(first.adapter, optimizer_bytes(first.optimizer))
    resumed = other.propose(batch)
    assert all(torch.equal(onward.adapter[n], resumed.adapter[n]) for n in onward.adapter)


def test_pulled_to_the_anchor_the_policy_moves_less(policy: Policy, tiny_model_dir: Path) -> None:
    batch, sequences = batch_of(policy, [1.0, -1.0, 1.0, -1.0])

    def moved_nats(anchor_weight: float) -> float:
        own = Policy(tiny_model_dir, rank=4, alpha=8, seed=0)
        settings = SETTINGS.model_copy(update={"anchor_weight": anchor_weight, "passes": 4})
        Trainer(own, settings).propose(batch)
        here = own.full_logprobs(sequences, 256)
        with own.using(None):
            there = own.full_logprobs(sequences, 256)
        return sum(float((h.exp() * (h - t)).sum()) for h, t in zip(here, there, strict=True))

    assert moved_nats(5.0) < moved_nats(0.0)


def test_a_gradient_that_is_not_finite_changes_nothing(policy: Policy) -> None:
    trainer = Trainer(policy, SETTINGS)
    batch, _ = batch_of(policy, [math.inf, -1.0])
    before = policy.state()
    with pytest.raises(NonFiniteUpdate):
        trainer.propose(batch)
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state().items())


@pytest.mark.parametrize(
    ("logprob", "why"),
    [(math.nan, "not_finite"), (-math.inf, "not_finite"), (0.5, "positive_logprob")],
)
def test_bad_logprobs_are_refused_before_a_gradient_by_name(
    policy: Policy, logprob: float, why: str
) -> None:
    trainer = Trainer(policy, SETTINGS)
    batch, _ = batch_of(policy, [1.0, -1.0])
    good, bad = batch.examples
    reply = bad.example.interaction
    logprobs = (logprob, *reply.completion_logprobs[1:])
    bad = credited(reply.model_copy(update={"completion_logprobs": logprobs}), -1.0)
    before = policy.state()
    with pytest.raises(NonFiniteUpdate, match=why):
        trainer.propose(Batch((good, bad), live_version=0))
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state().items())
    assert all(parameter.grad is None for _, parameter in policy.parameters)


def test_a_batch_of_zero_advantages_makes_no_update(policy: Policy) -> None:
    batch, _ = batch_of(policy, [0.0, 0.0])
    before = policy.state()
    with pytest.raises(NothingToLearn):
        Trainer(policy, SETTINGS).propose(batch)
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state().items())


def test_micro_batches_add_up_to_one_batch(policy: Policy, tiny_model_dir: Path) -> None:
    batch, _ = batch_of(policy, [1.0, -0.5, 0.25, -1.0, 1.0])
    whole = Trainer(policy, SETTINGS.model_copy(update={"micro_batch_tokens": 10_000}))
    split = Trainer(Policy(tiny_model_dir, rank=4, alpha=8, seed=0), SETTINGS)
    ours, theirs = whole.propose(batch), split.propose(batch)
    assert ours.diagnostics["gradient_norm"] == pytest.approx(
        theirs.diagnostics["gradient_norm"], rel=1e-3
    )


def test_an_unknown_objective_is_refused_with_the_known_ones(policy: Policy) -> None:
    with pytest.raises(ObjectiveInvalid, match="dppo_kl"):
        Trainer(policy, SETTINGS.model_copy(update={"objective": "dpo_kl"}))
