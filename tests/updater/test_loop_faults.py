"""The whole cycle against bad numbers, a stream that pushes one way, repeated events, odd pins."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moorline import metrics
from moorline.events import Fate, Feedback, FeedbackKind, Reason
from moorline.stream import Topic
from tests.updater.harness import Tape, Updater
from tests.updater.learning.fixtures import ALIAS, recorded, some_sequences
from updater.learning.policy import Policy
from updater.progress import Phase

NOT_FINITE = (math.nan, math.inf)


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state"


def bad_loss(_: Policy, value: float) -> Callable[[], None]:
    """From now on, what the model says while it is trained is not finite."""

    def spoil(module: torch.nn.Module, given: object, output: Tensor) -> Tensor:
        del given
        head = isinstance(module, torch.nn.Linear) and module.out_features > 10_000
        return output * value if head and torch.is_grad_enabled() else output

    return torch.nn.modules.module.register_module_forward_hook(spoil).remove


def bad_gradient(policy: Policy, value: float) -> Callable[[], None]:
    """From now on, the gradient of one adapter matrix is not finite."""
    _, parameter = policy.parameters[0]
    return parameter.register_hook(lambda gradient: gradient + value).remove


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("spoil", [bad_loss, bad_gradient])
def test_numbers_that_are_not_finite_end_the_batch_and_change_nothing(
    tiny_model_dir: Path,
    state_dir: Path,
    spoil: Callable[[Policy, float], Callable[[], None]],
    value: float,
) -> None:
    updater = Updater(tiny_model_dir, state_dir)
    updater.interact(4)
    updater.loop.cycle()
    live = {name: tensor.clone() for name, tensor in updater.trainer.live_adapter.items()}
    updater.interact(4, seed=1)
    repair = spoil(updater.policy, value)
    updater.loop.cycle()
    repair()
    assert [release.version for release in updater.published] == [1]
    assert updater.store.versions(ALIAS) == [1]
    assert updater.fates() == {Fate.TRAINED: 4, Fate.REJECTED: 4}
    (rejection,) = updater.ledger.rejections()
    assert rejection["reason"] == Reason.NON_FINITE_UPDATE
    assert updater.ledger.offsets()[str(Topic.FEEDBACK), 0][1] == 8
    for state in (updater.policy.state(), updater.trainer.live_adapter):
        assert all(torch.equal(state[name], tensor) for name, tensor in live.items())
    updater.interact(4, seed=2)
    updater.loop.cycle()
    assert [release.version for release in updater.published] == [1, 2], "the next batch teaches"
    updater.close()


def test_a_learning_rate_a_thousand_times_too_large_releases_nothing_outside_the_bound(
    tiny_model_dir: Path, state_dir: Path
) -> None:
    limits = {"bound.live_kl_nats": 0.05, "bound.anchor_kl_nats": 0.1}
    updater = Updater(
        tiny_model_dir,
        state_dir,
        **{"learning.learning_rate": 2.0, "learning.passes": 3, "learning.max_tries": 1},
        **limits,
    )
    before = updater.policy.state()
    for seed in range(3):
        updater.interact(4, seed)
        updater.loop.cycle()
    assert updater.published == []
    assert updater.fates() == {Fate.REJECTED: 12}
    reasons = {rejection["reason"] for rejection in updater.ledger.rejections()}
    assert reasons <= {Reason.DIVERGENCE_BOUND, Reason.NON_FINITE_UPDATE}
    assert all(torch.equal(before[name], t) for name, t in updater.policy.state().items())
    assert updater.ledger.offsets()[str(Topic.FEEDBACK), 0][1] == 12
    updater.close()


def test_a_stream_that_pushes_one_way_is_stopped_by_the_anchor_bound(
    tiny_model_dir: Path, state_dir: Path
) -> None:
    """Every release is inside its own bound; together they would be far outside."""
    live_limit, anchor_limit = 0.02, 0.05
    updater = Updater(
        tiny_model_dir,
        state_dir,
        **{
            "bound.live_kl_nats": live_limit,
            "bound.anchor_kl_nats": anchor_limit,
            "bound.min_step_scale": 0.3,
            "learning.learning_rate": 3e-3,
            "learning.anchor_weight": 0.0,
        },
    )
    sequences = some_sequences(4)
    for push in range(40):
        for index, sequence in enumerate(sequences):
            name = f"chatcmpl-{push}-{index}"
            version = updater.ledger.live_version()
            reply = recorded(updater.policy, sequence, name, version=version)
            thumb = Feedback(
                feedback_id=f"fb-{push}-{index}",
                interaction_id=name,
                value=1 if index % 2 else -1,
                rater=f"rater-{index}",
                created_at=1_750_000_000.0,
            )
            updater.tape.add(Topic.INTERACTIONS, reply.to_bytes())
            updater.tape.add(Topic.FEEDBACK, thumb.to_bytes())
        updater.loop.cycle()
        if updater.loop.phase is Phase.ANCHOR_EXHAUSTED:
            break
    assert updater.loop.phase is Phase.ANCHOR_EXHAUSTED
    fates = updater.fates()
    assert set(fates) == {Fate.TRAINED, Fate.PENDING}, "none is burnt for it"
    assert sum(fates.values()) == 4 * (push + 1)
    assert len(updater.published) >= 3, "a line of releases"
    for release in updater.published:
        for one in release.divergences:
            assert one.mean_kl_nats <= (live_limit if one.measured_from == "live" else anchor_limit)
    from_anchor = [one.mean_kl_nats for one in release.divergences if one.measured_from == "anchor"]
    assert max(from_anchor) > 0.7 * anchor_limit, "it was the bound that stopped it"
    left = metrics.ANCHOR_BUDGET_LEFT_NATS._value.get()
    assert left == pytest.approx(anchor_limit - max(from_anchor))
    updater.close()


def learned(model_dir: Path, state_dir: Path, values: list[tuple[Topic, bytes]]) -> Any:
    tape = Tape()
    for topic, value in values:
        tape.add(topic, value)
    updater = Updater(model_dir, state_dir, tape, **{"learning.batch_examples": 6})
    updater.loop.cycle()
    (release,) = updater.published
    fates = updater.fates()
    updater.close()
    return release.artifact_digest, release.examples_digest, fates


def test_every_event_three_times_shuffled_and_feedback_first_gives_the_same_weights(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    policy = Policy(tiny_model_dir, rank=4, alpha=8, seed=0)
    replies, words = [], []
    for index, sequence in enumerate(some_sequences(9)):
        reply = recorded(policy, sequence, f"chatcmpl-{index}")
        replies.append(reply.model_copy(update={"created_at": 1_750_000_000.0 + index}).to_bytes())
        kind: dict[str, Any] = {"value": 1 if index % 2 else -1}
        if index == 3:
            kind = {"kind": FeedbackKind.CORRECTION, "text": "A glacier is a river of ice."}
        if index < 6:
            said = Feedback(
                feedback_id=f"fb-{index}",
                interaction_id=f"chatcmpl-{index}",
                rater=f"rater-{index}",
                created_at=1_750_001_000.0,
                **kind,
            )
            words.append(said.to_bytes())
    interactions = [(Topic.INTERACTIONS, value) for value in replies]
    feedback = [(Topic.FEEDBACK, value) for value in words]
    plain = learned(tiny_model_dir, tmp_path / "plain", interactions + feedback)
    mixed = (interactions + feedback) * 3
    random.Random(7).shuffle(mixed)
    ways = {"feedback first": (feedback + interactions) * 3, "shuffled": mixed}
    for name, events in ways.items():
        weights, examples, fates = learned(tiny_model_dir, tmp_path / name, events)
        assert (weights, examples) == plain[:2], name
        assert fates == {Fate.TRAINED: 6, Fate.DUPLICATE: 12}
    torch.set_num_threads(threads)


def test_a_pin_that_cannot_be_read_trains_nothing_is_said_once_and_passes(
    tiny_model_dir: Path, state_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    updater = Updater(tiny_model_dir, state_dir)
    updater.store.pin(ALIAS, 0, "a test")
    (pin,) = state_dir.rglob("pin.json")
    pin.write_bytes(b'{"version": ')
    updater.interact(4)
    for _ in range(3):
        updater.loop.cycle()
        assert updater.loop.phase is Phase.PIN_INVALID
    assert updater.fates() == {Fate.PENDING: 4}, "read, not trained"
    (said,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "moorline resume" in vars(said)["error"]
    updater.store.pin(ALIAS, 0, "again")
    updater.loop.cycle()
    assert updater.loop.phase is Phase.PINNED
    updater.store.unpin(ALIAS)
    updater.loop.cycle()
    assert [release.version for release in updater.published] == [1]
    updater.close()
