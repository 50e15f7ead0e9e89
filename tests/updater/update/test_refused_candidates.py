"""What becomes of ratings whose candidate may not be released: they wait, and are tried again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moorline.events import Decision, Fate, Reason, Verdict
from moorline.store import AnchorRequests
from tests.updater.harness import Updater
from updater.progress import Phase
from updater.safety import Gate
from updater.update.updates import Updates
from updater.values import Batch

ALIAS = "assistant"
SMALL = {"learning.batch_examples": 8, "learning.min_batch_examples": 2}


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many replies each candidate was made of, in order."""
    found: list[int] = []
    bound = Updates._bound

    def noted(self: Updates, batch: Batch, proposal: object) -> object:
        found.append(len(batch.examples))
        return bound(self, batch, proposal)  # type: ignore[arg-type]

    monkeypatch.setattr(Updates, "_bound", noted)
    return found


def test_ratings_of_a_refused_candidate_are_tried_again_smaller_and_end_after_their_tries(
    tiny_model_dir: Path, state_dir: Path, sizes: list[int]
) -> None:
    updater = Updater(tiny_model_dir, state_dir, **SMALL, **{"gate.live_kl_mean_nats": 1e-12})
    updater.interact(8)
    updater.loop.cycle()
    assert updater.fates() == {Fate.PENDING: 8}
    (rejection,) = updater.ledger.rejections()
    assert (rejection["examples"], rejection["returned"]) == (0, 8)
    while updater.fates() != {Fate.REJECTED: 8}:
        updater.loop.cycle()
        assert len(sizes) < 50
    # The batch, its halves, and so on: each reply four times.
    assert sizes == [8, 4, 2, 2, 2, 2, 4, 2, 2, 2, 2]
    assert sum(sizes) == 4 * 8
    reasons = updater.ledger.accounting().events["feedback.v1"][Fate.REJECTED]
    assert reasons == {Reason.GATE_BLOCKED: 8}
    assert updater.published == []
    updater.close()


def test_the_good_half_of_a_refused_batch_teaches(
    tiny_model_dir: Path, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gate that blocks whatever learned from one reply."""
    updater = Updater(tiny_model_dir, state_dir, **SMALL)
    poison = "chatcmpl-0-7"
    in_batch: list[bool] = []
    bound, judge = Updates._bound, Gate.judge

    def noted(self: Updates, batch: Batch, proposal: object) -> object:
        names = {one.example.interaction.interaction_id for one in batch.examples}
        in_batch.append(poison in names)
        return bound(self, batch, proposal)  # type: ignore[arg-type]

    def blocking(self: Gate, *what: object) -> Verdict:
        verdict = judge(self, *what)  # type: ignore[arg-type]
        decision = Decision.BLOCK if in_batch[-1] else verdict.decision
        return verdict.model_copy(update={"decision": decision})

    monkeypatch.setattr(Updates, "_bound", noted)
    monkeypatch.setattr(Gate, "judge", blocking)
    updater.interact(8)
    for _ in range(12):
        updater.loop.cycle()
    assert updater.fates() == {Fate.TRAINED: 6, Fate.REJECTED: 2}
    assert len(updater.published) == 2
    assert updater.ledger.audit() == []
    updater.close()


def test_a_refused_rating_is_tried_again_after_a_restart(
    tiny_model_dir: Path, state_dir: Path, sizes: list[int]
) -> None:
    strict = {"gate.live_kl_mean_nats": 1e-12}
    first = Updater(tiny_model_dir, state_dir, **SMALL, **strict)
    first.interact(8)
    first.loop.cycle()
    first.close()
    second = Updater(tiny_model_dir, state_dir, first.tape, **SMALL)
    for _ in range(2):
        second.loop.cycle()
    assert sizes == [8, 4, 4]
    assert second.fates() == {Fate.TRAINED: 8}
    assert [release.step_scale for release in second.published] == [0.5, 0.5]
    second.close()


def exhausted(model_dir: Path, state_dir: Path) -> Updater:
    """An updater whose line has no distance left from its anchor, with a batch that waits."""
    updater = Updater(model_dir, state_dir)
    updater.interact(4)
    updater.loop.cycle()
    (release,) = updater.published
    updater.close()
    far = max(one.mean_kl_nats for one in release.divergences if one.measured_from == "anchor")
    narrow = {"bound.anchor_kl_nats": far * 1.0001, "bound.min_step_scale": 0.9}
    updater = Updater(model_dir, state_dir, updater.tape, **narrow)
    updater.interact(4, seed=1)
    updater.loop.cycle()
    return updater


def test_a_line_without_distance_left_consumes_nothing_and_says_so(
    tiny_model_dir: Path, state_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    updater = exhausted(tiny_model_dir, state_dir)
    for _ in range(3):
        updater.loop.cycle()
        assert updater.loop.phase is Phase.ANCHOR_EXHAUSTED
    assert updater.fates() == {Fate.TRAINED: 4, Fate.PENDING: 4}
    assert updater.ledger.rejections() == []
    said = [one for one in caplog.records if getattr(one, "event", "") == "anchor_exhausted"]
    assert len(said) == 1
    updater.close()
    again = Updater(tiny_model_dir, state_dir, updater.tape)  # with the distance of before
    again.loop.cycle()
    assert again.fates() == {Fate.TRAINED: 8}
    again.close()


def test_a_person_makes_the_live_policy_the_anchor_and_learning_goes_on(
    tiny_model_dir: Path, state_dir: Path
) -> None:
    updater = exhausted(tiny_model_dir, state_dir)
    AnchorRequests(updater.store).write(ALIAS, 1, reason="evaluated", requested_by="ana")
    updater.loop.cycle()
    (second,) = updater.published
    assert (second.version, second.anchor) == (2, 1)
    from_anchor = [d.mean_kl_nats for d in second.divergences if d.measured_from == "anchor"]
    from_live = [d.mean_kl_nats for d in second.divergences if d.measured_from == "live"]
    assert from_anchor == pytest.approx(from_live), "the anchor is what was live"
    (anchor,) = updater.ledger.anchors()
    assert (anchor.version, anchor.reason, anchor.requested_by) == (1, "evaluated", "ana")
    updater.loop.cycle()
    assert len(updater.ledger.anchors()) == 1, "one request is carried out once"
    updater.close()
    again = Updater(tiny_model_dir, state_dir, updater.tape)
    again.interact(4, seed=2)
    again.loop.cycle()
    assert [release.anchor for release in again.published] == [1]
    again.close()


@pytest.mark.parametrize("version", [1, 7])
def test_a_request_that_cannot_be_carried_out_changes_nothing(
    tiny_model_dir: Path, state_dir: Path, version: int, caplog: pytest.LogCaptureFixture
) -> None:
    updater = Updater(tiny_model_dir, state_dir)
    directory = state_dir / "store/releases" / ALIAS
    directory.mkdir(parents=True)
    request = f'{{"version": {version}, "reason": "r", "requested_by": "b", "requested_at": 1}}'
    (directory / "anchor.json").write_text(request if version == 7 else request[:20])
    updater.interact(4)
    for _ in range(2):
        updater.loop.cycle()
    assert updater.fates() == {Fate.TRAINED: 4}
    assert updater.ledger.anchors() == []
    said = [one for one in caplog.records if getattr(one, "event", "") == "anchor_not_moved"]
    assert len(said) == 1
    updater.close()


def test_the_anchor_is_kept_in_the_store(tiny_model_dir: Path, state_dir: Path) -> None:
    few = {"learning.keep_releases": 2, "learning.keep_decided_seconds": 0.001}
    updater = Updater(tiny_model_dir, state_dir, **few)
    for seed in range(5):
        updater.interact(4, seed=seed)
        updater.loop.cycle()
        if seed == 0:
            AnchorRequests(updater.store).write(ALIAS, 1, reason="r", requested_by="b")
    assert [release.version for release in updater.published] == [1, 2, 3, 4, 5]
    first = updater.published[0]
    directory = updater.store.open(str(first.artifact_digest), first.files)
    adapter = updater.policy.read_adapter(directory)
    anchor = updater.trust_region._anchor
    assert anchor is not None
    assert all(torch.equal(adapter[name], tensor) for name, tensor in anchor.items())
    updater.close()
