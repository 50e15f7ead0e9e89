"""The look at a batch: free when fresh, right about what is stale, too far, or not as it says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moorline.events import Feedback, FeedbackKind, Interaction, Reason, SamplingSettings
from moorline.settings import LearningSettings
from moorline.store import ArtifactStore
from tests.updater.learning.fixtures import (
    archived,
    credited,
    perturbed,
    recorded,
    some_sequences,
    written,
)
from updater.learning.behaviour import Archive
from updater.learning.policy import Policy
from updater.learning.trainer import Trainer
from updater.values import Batch, Example, as_sequence

SETTINGS = LearningSettings(
    lora_rank=4, lora_alpha=8, learning_rate=5e-3, anchor_weight=0.0, micro_batch_tokens=64
)
EVERY_SAMPLING = [
    SamplingSettings(temperature=0.7),
    SamplingSettings(temperature=0.7, top_p=0.9),
    SamplingSettings(top_k=5),
    SamplingSettings(min_p=0.02),
    SamplingSettings(temperature=1.2, top_p=0.95, top_k=20, min_p=0.01),
]


@pytest.fixture
def policy(tiny_model_dir: Path) -> Policy:
    return Policy(tiny_model_dir, rank=4, alpha=8, seed=0)


def count_passes(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one entry, the number of sequences, at every forward pass."""
    passes: list[int] = []
    forward = policy.completion_logits

    def counted(sequences):  # type: ignore[no-untyped-def]
        passes.append(len(sequences))
        return forward(sequences)

    monkeypatch.setattr(policy, "completion_logits", counted)
    return passes


class Lineage:
    """A trainer at version 2; version 1 is in the archive."""

    def __init__(self, policy: Policy, root: Path, size: float = 0.03, **changes: Any) -> None:
        self.policy = policy
        self.first, live = perturbed(policy, size, 1), perturbed(policy, size, 2)
        store = ArtifactStore(root)
        releases = {1: archived(policy, store, 1, self.first), 2: archived(policy, store, 2, live)}
        archive = Archive(policy, store, releases.get)
        self.trainer = Trainer(policy, SETTINGS.model_copy(update=changes), archive)
        self.trainer.accept(live, {})

    def replies(
        self, number: int, version: int, sampling: SamplingSettings | None = None, seed: int = 0
    ) -> list[Interaction]:
        state = {1: self.first, 2: self.trainer.live_adapter}[version]
        plain = sampling or SamplingSettings()
        with self.policy.using(state):
            sequences = [
                written(self.policy, one.prompt_token_ids, 3 + index % 3, plain, index)
                for index, one in enumerate(some_sequences(number, seed))
            ]
            return [
                recorded(self.policy, sequence, f"chatcmpl-{version}-{index}", plain, version)
                for index, sequence in enumerate(sequences)
            ]


@pytest.fixture
def lineage(policy: Policy, tmp_path: Path) -> Callable[..., Lineage]:
    start = policy.state()

    def make(**changes: Any) -> Lineage:
        policy.load_state(start)
        return Lineage(policy, tmp_path / "store", **changes)

    return make


def batch_of(replies: list[Interaction], live_version: int = 2) -> Batch:
    examples = tuple(credited(reply, (-1.0) ** n) for n, reply in enumerate(replies))
    return Batch(examples, live_version)


def examples_of(replies: list[Interaction]) -> list[Example]:
    return [one.example for one in batch_of(replies).examples]


@pytest.mark.parametrize("anchor_weight", [0.0, 0.05])
@pytest.mark.parametrize("sampling", EVERY_SAMPLING[:2], ids=str)
def test_an_update_of_fresh_thumbs_costs_one_pass_a_micro_batch(
    lineage: Callable[..., Lineage],
    policy: Policy,
    monkeypatch: pytest.MonkeyPatch,
    anchor_weight: float,
    sampling: SamplingSettings,
) -> None:
    line = lineage(anchor_weight=anchor_weight, micro_batch_tokens=10_000)
    replies = line.replies(6, 2, sampling)
    passes = count_passes(policy, monkeypatch)
    line.trainer.propose(batch_of(replies))
    assert passes == [6] * (2 if anchor_weight else 1)


@pytest.mark.parametrize("estimator", ["binary", "topk", "exact"])
@pytest.mark.parametrize("sampling", EVERY_SAMPLING, ids=str)
def test_at_lag_zero_every_path_has_ratio_one(
    lineage: Callable[..., Lineage], sampling: SamplingSettings, estimator: str
) -> None:
    # Several passes: then the live policy's distributions are kept as a behaviour policy's too.
    for passes in (1, 2):
        line = lineage(divergence_estimator=estimator, passes=passes)
        found = line.trainer.propose(batch_of(line.replies(6, 2, sampling))).diagnostics
        assert found["mean_ratio"] == pytest.approx(1.0, abs=0.02)
        assert found["max_ratio"] == pytest.approx(1.0, abs=0.05)
        assert found["ess_share"] == pytest.approx(1.0, abs=0.02)
        assert found["mismatch_nats"] < 0.02
        assert found["masked_share"] == 0.0
        assert found["ess_lr_scale"] == pytest.approx(1.0, abs=0.02)
        exact, plain = found["behaviour_exact_share"], found["behaviour_recorded_share"]
        assert exact + plain == pytest.approx(1.0)
        if sampling.truncated:
            assert exact == 1.0


@pytest.mark.parametrize("estimator", ["binary", "topk", "exact"])
def test_stale_truncated_replies_are_learned_from_with_the_exact_ratio(
    lineage: Callable[..., Lineage], estimator: str
) -> None:
    line = lineage(divergence_estimator=estimator)
    replies = line.replies(6, 1, SamplingSettings(temperature=0.8, top_k=50))
    found = line.trainer.propose(batch_of(replies)).diagnostics
    assert found["behaviour_exact_share"] == 1.0
    assert found["behaviour_mismatch_nats"] < 0.02
    assert found["staleness_versions_mean"] == 1.0
    assert abs(found["mean_ratio"] - 1.0) > 1e-3
    assert "mismatch_nats" not in found


def test_without_the_archive_the_share_that_fell_back_is_said(
    policy: Policy, lineage: Callable[..., Lineage]
) -> None:
    line = lineage()
    replies = line.replies(4, 1, SamplingSettings(top_p=0.9))
    alone = Trainer(policy, SETTINGS)
    alone.accept(line.trainer.live_adapter, {})
    found = alone.propose(batch_of(replies)).diagnostics
    assert found["behaviour_gone_share"] == 1.0
    assert found["behaviour_exact_share"] == 0.0


def test_stale_plain_replies_need_no_archive(lineage: Callable[..., Lineage]) -> None:
    line = lineage()
    found = line.trainer.propose(batch_of(line.replies(4, 1))).diagnostics
    assert found["behaviour_recorded_share"] == 1.0


def test_pace_and_look_are_the_share_worked_out_from_the_ratios(
    lineage: Callable[..., Lineage], policy: Policy
) -> None:
    line = lineage()
    replies = [*line.replies(4, 1), *line.replies(4, 2, seed=1)]
    report = line.trainer.measure_staleness(examples_of(replies), 2)
    ratios = []
    for reply in replies:
        logits, sampled = policy.completion_logits([as_sequence(reply)])
        log_p = logits.detach().log_softmax(-1).gather(-1, sampled[:, None])[:, 0]
        ratios += (log_p - torch.tensor(reply.completion_logprobs)).exp().tolist()
    by_hand = sum(ratios) ** 2 / (len(ratios) * sum(r * r for r in ratios))
    assert report.ess_share == pytest.approx(by_hand, rel=1e-3)
    assert report.ess_share < 0.999
    found = line.trainer.propose(batch_of(replies), report).diagnostics
    assert found["ess_lr_scale"] == report.ess_share
    assert found["ess_share"] == pytest.approx(report.ess_share, rel=1e-3)


def test_the_pace_scales_this_batchs_step_only(lineage: Callable[..., Lineage]) -> None:
    line = lineage()
    stale, fresh = batch_of(line.replies(4, 1)), batch_of(line.replies(4, 2))
    slow = line.trainer.propose(stale)
    line.trainer.restore()
    full = lineage(scale_lr_by_ess=False).trainer.propose(stale)
    # Adam's first step has the size of the learning rate, whatever the gradient.
    ratio = slow.diagnostics["step_norm_share"] / full.diagnostics["step_norm_share"]
    assert ratio == pytest.approx(slow.diagnostics["ess_lr_scale"], rel=1e-3)
    line.trainer.restore()
    after = line.trainer.propose(fresh).diagnostics["step_norm_share"]
    anew = lineage().trainer.propose(fresh).diagnostics["step_norm_share"]
    assert after == pytest.approx(anew, rel=1e-4)


def test_what_is_too_far_is_set_aside_by_measurement_not_by_age(
    lineage: Callable[..., Lineage],
) -> None:
    line = lineage(max_off_policy_kl_nats=1e-5)
    near, far = line.replies(3, 2), line.replies(3, 1, seed=1)
    # As old as the others, but the policy still writes like that.
    old = [
        reply.model_copy(
            update={
                "interaction_id": f"chatcmpl-old-{n}",
                "policy_spans": (reply.policy_spans[0].model_copy(update={"version": 0}),),
                "created_at": 1.0,
            }
        )
        for n, reply in enumerate(near)
    ]
    report = line.trainer.measure_staleness(examples_of([*near, *old, *far]), 2)
    assert report.set_aside == {reply.interaction_id: Reason.OFF_POLICY for reply in far}
    assert report.ess_share == pytest.approx(1.0, abs=1e-3)  # of what is left
    assert report.diagnostics["set_aside_off_policy"] == 3.0


def test_a_correction_is_never_too_far(lineage: Callable[..., Lineage]) -> None:
    line = lineage(max_off_policy_kl_nats=1e-6)
    (reply,) = line.replies(1, 1)
    correction = Feedback(
        interaction_id=reply.interaction_id, kind=FeedbackKind.CORRECTION, text="better"
    )
    rated, corrected = (
        Example("rated", reply, (credited(reply, 1.0).example.feedback[0],)),
        Example("corrected", reply, (correction,)),
    )
    assert set(line.trainer.measure_staleness([rated, corrected], 2).set_aside) == {"rated"}


def test_a_reply_that_its_policy_did_not_write_is_set_aside(
    lineage: Callable[..., Lineage],
) -> None:
    line = lineage()
    sampling = SamplingSettings(temperature=0.9, top_k=1000)
    honest, forged = line.replies(2, 1, sampling)
    lies = tuple(float(value) - 0.5 for value in forged.completion_logprobs if value is not None)
    forged = forged.model_copy(update={"completion_logprobs": lies})
    report = line.trainer.measure_staleness(examples_of([honest, forged]), 2)
    assert report.set_aside == {forged.interaction_id: Reason.MISMATCH}
    assert report.diagnostics["set_aside_mismatch"] == 1.0


def test_a_stale_token_is_masked_by_what_the_estimator_measures(
    lineage: Callable[..., Lineage],
) -> None:
    shares = []
    for estimator in ("binary", "topk", "exact"):
        line = lineage(size=0.05, divergence_estimator=estimator, max_off_policy_kl_nats=100.0)
        found = line.trainer.propose(batch_of(line.replies(8, 1))).diagnostics
        shares.append(found["masked_share"])
    # Each is a lower bound of the next, so each masks at least what the one before it does.
    assert shares[0] <= shares[1] <= shares[2]
    assert shares[0] < shares[2]
