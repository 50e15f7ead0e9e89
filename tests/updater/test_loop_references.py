"""What the loop hands from one verb to the next: the verdict, the memory, the policy before."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from moorline.events import Decision, Fate, Reason
from tests.updater.learning.fixtures import some_sequences
from tests.updater.test_loop import Updater
from updater.learning.baselines import HALF_LIFE_NATS, KEEP_LEAST, KEEP_MOST
from updater.safety.trust_region import moved_from_live_nats


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state"


def test_a_candidate_that_could_not_be_judged_is_not_released(
    tiny_model_dir: Path, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updater = Updater(tiny_model_dir, state_dir)
    before = updater.policy.state()

    def unreadable(_: Path) -> Any:
        raise OSError("the disk is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(updater.policy, "read_adapter", unreadable)  # the gate reads it back
        updater.interact(4)
        updater.loop.cycle()
    assert updater.published == []
    assert updater.store.newest("assistant") is None
    assert updater.fates() == {Fate.PENDING: 4}, "they wait for another try"
    (rejection,) = updater.ledger.rejections()
    assert rejection["reason"] == Reason.GATE_BLOCKED
    assert json.loads(rejection["record"])["verdict"]["decision"] == Decision.HOLD
    assert all(torch.equal(before[n], t) for n, t in updater.policy.state().items())
    updater.close()


@pytest.mark.parametrize("restarted", [False, True])
def test_the_memory_of_credit_shortens_by_what_the_last_release_moved(
    tiny_model_dir: Path, state_dir: Path, restarted: bool
) -> None:
    changes = {"learning.learning_rate": 2e-2, "bound.live_kl_nats": 0.07}
    updater = Updater(tiny_model_dir, state_dir, **changes)
    updater.interact(4)
    updater.loop.cycle()
    (release,) = updater.published
    moved = moved_from_live_nats(release.divergences)
    keep = 2 ** (-moved / HALF_LIFE_NATS)
    assert KEEP_LEAST < keep < KEEP_MOST, "else this test tells nothing"
    assert updater.ledger.baselines().cell("").count == pytest.approx(4.0)
    if restarted:
        updater.close()
        updater = Updater(tiny_model_dir, state_dir, updater.tape, **changes)
    updater.interact(4, seed=1)
    updater.loop.cycle()
    assert updater.fates() == {Fate.TRAINED: 8}
    assert updater.ledger.baselines().cell("").count == pytest.approx(4.0 * keep + 4.0)
    updater.close()


def test_the_second_release_is_measured_from_the_first_and_from_the_anchor(
    tiny_model_dir: Path, state_dir: Path
) -> None:
    updater = Updater(tiny_model_dir, state_dir)
    for seed in (0, 1):
        updater.interact(4, seed=seed)
        updater.loop.cycle()
    first, second = updater.published
    assert (second.version, second.parent) == (2, 1)
    found = {(d.measured_from, d.tokens_from): d.mean_kl_nats for d in second.divergences}
    adapters = [
        updater.policy.read_adapter(updater.store.open(str(one.artifact_digest), one.files))
        for one in (first, second)
    ]
    region = updater.trust_region
    before, after = (region.logprobs(one, region.probes) for one in adapters)
    anchor = region.logprobs(None, region.probes)

    def kl(q: list[torch.Tensor], p: list[torch.Tensor]) -> float:
        sums = [float((a.exp() * (a - b)).sum()) for a, b in zip(q, p, strict=True)]
        return sum(sums) / sum(len(one) for one in q)

    assert found["live", "probes"] == pytest.approx(kl(before, after), rel=0.02)
    assert found["anchor", "probes"] == pytest.approx(kl(anchor, after), rel=0.02)
    assert found["live", "probes"] != pytest.approx(found["anchor", "probes"], rel=0.1)
    checks = {check.name: check.measured for check in second.verdict.checks}  # type: ignore[union-attr]
    assert checks["kl_live_mean_nats"] != pytest.approx(checks["kl_anchor_mean_nats"], rel=0.1)
    updater.close()


@pytest.mark.parametrize(
    ("rated", "waited_seconds", "trained"),
    [(4, 0.0, True), (3, 0.0, False), (3, 90.0, False), (3, 110.0, True), (2, 110.0, False)],
)
def test_an_update_is_due_with_a_full_batch_or_a_small_one_that_waited(
    tiny_model_dir: Path,
    state_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    rated: int,
    waited_seconds: float,
    trained: bool,
) -> None:
    changes = {"learning.min_batch_examples": 3, "learning.max_wait_seconds": 100.0}
    updater = Updater(tiny_model_dir, state_dir, **changes)
    updater.interact(rated)
    now = time.time()
    monkeypatch.setattr(updater.ledger, "oldest_ready_at", lambda: now - waited_seconds)
    updater.loop.cycle()
    assert (updater.fates() == {Fate.TRAINED: rated}) is trained
    updater.close()


def test_traffic_that_bounds_an_update_is_not_what_it_learned_from(
    tiny_model_dir: Path, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updater = Updater(tiny_model_dir, state_dir, **{"bound.traffic_examples": 2})
    region = updater.trust_region
    seen: list[Any] = []
    search = region.largest_step

    def noted(live: Any, proposed: Any, traffic: Any, whole: float) -> Any:
        seen.append((live, traffic))
        return search(live, proposed, traffic, whole)

    monkeypatch.setattr(region, "largest_step", noted)
    updater.interact(3, seed=9, rated=False)
    updater.interact(4)
    live = updater.trainer.live_adapter
    updater.loop.cycle()
    ((measured_from, traffic),) = seen
    assert measured_from is live
    assert len(traffic) == 2
    unrated = {(one.prompt_token_ids, one.completion_token_ids) for one in some_sequences(3, 9)}
    assert {(one.prompt_token_ids, one.completion_token_ids) for one in traffic} <= unrated
    updater.close()
