"""The whole cycle, from feedback to release, on the tiny model."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moorline.events import Fate, Feedback, Reason
from moorline.store import ArtifactMissing
from moorline.stream import Topic
from tests.updater.harness import Updater
from tests.updater.learning.fixtures import ALIAS, recorded, some_sequences
from tests.updater.ledger.fixtures import score
from updater.learning.policy import ReleaseInvalid
from updater.learning.staleness import StalenessReport
from updater.learning.trainer import Proposal, Trainer
from updater.ledger import LedgerUnavailable
from updater.progress import Phase
from updater.values import Batch


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state"


def test_feedback_becomes_a_release_that_accounts_for_it(
    tiny_model_dir: Path, state_dir: Path
) -> None:
    updater = Updater(tiny_model_dir, state_dir)
    updater.interact(3, seed=9, rated=False)
    updater.interact(4)
    updater.loop.cycle()
    (release,) = updater.published
    assert release.version == 1
    assert release.parent == 0
    assert release.examples == 4
    assert release == updater.store.release(ALIAS, 1)
    assert updater.fates() == {Fate.TRAINED: 4}
    assert updater.fates(Topic.INTERACTIONS) == {Fate.TRAINED: 4, Fate.PENDING: 3}
    assert {(one.measured_from, one.tokens_from) for one in release.divergences} == {
        (reference, tokens) for reference in ("live", "anchor") for tokens in ("traffic", "probes")
    }
    assert all(one.mean_kl_nats <= 0.5 for one in release.divergences)
    directory = updater.store.open(str(release.artifact_digest), release.files)
    adapter = updater.policy.read_adapter(directory)
    assert all(torch.equal(adapter[n], t) for n, t in updater.trainer.live_adapter.items())
    parity = json.loads((directory / "parity.json").read_text())["sequences"]
    assert any(s["candidate_logprobs"] != s["parent_logprobs"] for s in parity)
    updater.close()


def test_every_kind_of_feedback_teaches_in_one_release(
    tiny_model_dir: Path, state_dir: Path
) -> None:
    updater = Updater(tiny_model_dir, state_dir, **{"learning.batch_examples": 5})
    updater.interact(3, seed=9, rated=False)
    updater.interact(5, rated=False)
    (winner,) = some_sequences(1)
    loser = replace(winner, completion_token_ids=winner.completion_token_ids[::-1])
    lost = recorded(updater.policy, loser, "chatcmpl-lost")
    kinds: list[dict[str, object]] = [
        {"kind": "preference", "over": "chatcmpl-lost"},
        {"kind": "correction", "text": "A glacier is a river of ice."},
        {"kind": "signal", "signal": "regenerated"},
        {"kind": "score", "value": 0.9, "score_min": 0, "score_max": 1},
        {"kind": "thumbs", "value": -1},
        {"kind": "signal", "signal": "sneezed"},
    ]
    for index, fields in enumerate(kinds):
        name = f"chatcmpl-0-{min(index, 4)}"
        said = Feedback.model_validate(
            {"interaction_id": name, "rater": f"r{index}", "created_at": 1_750_000_000.0, **fields}
        )
        updater.tape.add(Topic.FEEDBACK, said.to_bytes())
    updater.tape.add(Topic.INTERACTIONS, lost.to_bytes())
    updater.loop.cycle()
    (release,) = updater.published
    assert release.examples == 5
    assert updater.fates() == {Fate.TRAINED: 5, Fate.NOT_TRAINABLE: 1}
    assert updater.fates(Topic.INTERACTIONS) == {Fate.TRAINED: 6, Fate.PENDING: 3}
    for kind in ("corrections", "preferences", "signals"):
        assert release.diagnostics[f"credit_{kind}"] == 1
    updater.close()


def test_a_reply_to_no_prompt_is_counted_and_measured_on_by_nobody(
    tiny_model_dir: Path, state_dir: Path
) -> None:
    updater = Updater(tiny_model_dir, state_dir)
    updater.interact(3, seed=9, rated=False)
    (sequence,) = some_sequences(1, seed=8)
    reply = recorded(updater.policy, sequence, "chatcmpl-no-prompt")
    updater.tape.add(
        Topic.INTERACTIONS, reply.model_copy(update={"prompt_token_ids": ()}).to_bytes()
    )
    updater.interact(4)
    updater.loop.cycle()
    assert [release.version for release in updater.published] == [1]
    fates = updater.fates(Topic.INTERACTIONS)
    assert fates == {Fate.TRAINED: 4, Fate.PENDING: 3, Fate.NOT_TRAINABLE: 1}
    updater.close()


def test_too_little_feedback_waits(tiny_model_dir: Path, state_dir: Path) -> None:
    updater = Updater(tiny_model_dir, state_dir)
    updater.interact(3)
    updater.loop.cycle()
    assert updater.published == []
    assert updater.loop.phase is Phase.WAITING
    assert updater.fates() == {Fate.PENDING: 3}
    updater.close()


def test_a_dead_letter_that_is_not_accepted_stops_intake_and_is_shown(
    tiny_model_dir: Path, state_dir: Path
) -> None:
    updater = Updater(tiny_model_dir, state_dir)
    updater.letters.away = True
    updater.tape.add(Topic.FEEDBACK, b"not json")
    updater.interact(1)
    for _ in range(2):
        updater.loop.cycle()
        assert updater.loop.phase is Phase.STREAM_UNAVAILABLE, "not ready: somebody must look"
    assert updater.ledger.accounting().total == 0
    updater.letters.away = False
    updater.loop.cycle()
    assert updater.loop.phase is Phase.WAITING
    assert updater.letters.offsets == [0]
    assert updater.ledger.accounting().total == 3
    assert updater.ledger.count_ready() == 1
    updater.close()


def test_a_full_disk_is_shown_as_what_it_is_said_once_and_passes(
    tiny_model_dir: Path,
    state_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    updater = Updater(tiny_model_dir, state_dir)
    updater.interact(3)

    def full(*_: object) -> None:
        raise LedgerUnavailable("the disk is full: make room")

    with monkeypatch.context() as patch:
        patch.setattr(updater.ledger, "ingest", full)
        for _ in range(3):
            updater.loop.cycle()
            assert updater.loop.phase is Phase.DISK_UNAVAILABLE
    assert [record.levelname for record in caplog.records].count("ERROR") == 1
    updater.loop.cycle()
    assert updater.loop.phase is Phase.WAITING
    assert updater.fates() == {Fate.PENDING: 3}
    updater.close()


def test_a_restart_continues_with_the_same_weights_and_the_next_version(
    tiny_model_dir: Path, state_dir: Path
) -> None:
    first = Updater(tiny_model_dir, state_dir)
    first.interact(4)
    first.loop.cycle()
    live = first.trainer.live_adapter
    first.close()

    second = Updater(tiny_model_dir, state_dir, first.tape)
    assert all(torch.equal(second.trainer.live_adapter[n], t) for n, t in live.items())
    assert all(torch.equal(second.policy.state()[n], t) for n, t in live.items())
    second.interact(4, seed=1)
    second.loop.cycle()
    (release,) = second.published
    assert (release.version, release.parent) == (2, 1)
    assert release.lease_epoch == 2
    second.close()


@pytest.mark.parametrize(
    ("rank", "changes", "why"),
    [
        (8, {}, r"has rank 4.*learning\.lora_rank"),
        (4, {"rms_norm_eps": 1e-4}, "another base model"),
    ],
)
def test_a_release_of_another_rank_or_base_model_is_not_continued_from(
    tiny_model_dir: Path,
    state_dir: Path,
    tmp_path: Path,
    rank: int,
    changes: dict[str, float],
    why: str,
) -> None:
    model_dir = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model_dir)
    first = Updater(model_dir, state_dir)
    first.interact(4)
    first.loop.cycle()
    first.close()
    if changes:
        config = model_dir / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(ReleaseInvalid, match=why):
        Updater(model_dir, state_dir, **{"learning.lora_rank": rank})


def test_a_release_decided_while_the_broker_is_away_is_announced_later_and_once(
    tiny_model_dir: Path, state_dir: Path
) -> None:
    updater = Updater(tiny_model_dir, state_dir)
    updater.broker_up = False
    updater.interact(4)
    updater.loop.cycle()
    assert updater.published == []
    newest = updater.store.newest(ALIAS)
    assert newest is not None  # servers that follow the store have it already
    assert newest.version == 1
    updater.broker_up = True
    updater.loop.cycle()
    updater.loop.cycle()
    assert [release.version for release in updater.published] == [1]
    updater.close()


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ({"bound.live_kl_nats": 1e-9}, Reason.DIVERGENCE_BOUND),
        ({"gate.live_kl_mean_nats": 1e-9}, Reason.GATE_BLOCKED),
        ({"gate.anchor_kl_max_prompt_nats": 1e-9}, Reason.GATE_BLOCKED),
    ],
)
def test_a_refused_candidate_leaves_the_policy_and_says_why(
    tiny_model_dir: Path, state_dir: Path, override: dict[str, float], reason: Reason
) -> None:
    updater = Updater(tiny_model_dir, state_dir, **override, **{"learning.max_tries": 1})
    before = updater.policy.state()
    updater.interact(4)
    updater.loop.cycle()
    assert updater.published == []
    assert updater.store.newest(ALIAS) is None
    assert updater.fates() == {Fate.REJECTED: 4}
    (rejection,) = updater.ledger.rejections()
    assert rejection["reason"] == reason
    assert json.loads(rejection["record"])["divergences"]
    assert all(torch.equal(before[n], t) for n, t in updater.policy.state().items())
    updater.close()


def test_a_batch_without_signal_makes_no_update_and_says_so(
    tiny_model_dir: Path, state_dir: Path
) -> None:
    updater = Updater(tiny_model_dir, state_dir)
    for index, sequence in enumerate(some_sequences(4)):
        name = f"chatcmpl-{index}"
        updater.tape.add(Topic.INTERACTIONS, recorded(updater.policy, sequence, name).to_bytes())
        updater.tape.add(Topic.FEEDBACK, score(name, 0.5, rater=f"r{index}").to_bytes())
    updater.loop.cycle()
    assert updater.published == []
    reasons = updater.ledger.accounting().events[str(Topic.FEEDBACK)][Fate.NOT_TRAINABLE]
    assert reasons == {Reason.NO_ADVANTAGE: 4}
    updater.close()


class Refusing(Trainer):
    """Raises at whatever it is told to raise at."""

    poison: frozenset[str] = frozenset()
    together = 10**9
    error: Exception = ValueError("somebody's words")

    def propose(
        self, batch: Batch, staleness: StalenessReport | None = None, **options: Any
    ) -> Proposal:
        proposal = super().propose(batch, staleness, **options)
        names = {one.example.interaction.interaction_id for one in batch.examples}
        if names & self.poison or len(names) >= self.together:
            raise self.error
        return proposal


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> type[Refusing]:
    monkeypatch.setattr("updater.assembly.Trainer", Refusing)
    return Refusing


def test_an_example_that_makes_an_update_raise_is_rejected_and_the_others_teach(
    tiny_model_dir: Path,
    state_dir: Path,
    refusing: type[Refusing],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(refusing, "poison", frozenset({"chatcmpl-0-2"}))
    updater = Updater(tiny_model_dir, state_dir)
    before = updater.ledger.baselines()
    updater.interact(5)
    updater.loop.cycle()
    (rejection,) = updater.ledger.rejections()
    assert rejection["reason"] == Reason.UPDATE_FAILED
    assert rejection["examples"] == 1
    assert updater.ledger.baselines() == before
    assert updater.fates() == {Fate.REJECTED: 1, Fate.PENDING: 4}
    (loud,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "ValueError in" in loud.__dict__["error"]
    assert "propose" in json.loads(rejection["record"])["cause"]
    assert "somebody" not in rejection["record"] + caplog.text + str(loud.__dict__)
    updater.loop.cycle()
    assert [release.examples for release in updater.published] == [4]
    assert updater.fates() == {Fate.REJECTED: 1, Fate.TRAINED: 4}
    updater.close()


def test_a_batch_of_which_no_example_is_at_fault_alone_is_rejected_whole(
    tiny_model_dir: Path, state_dir: Path, refusing: type[Refusing], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusing, "together", 2)
    updater = Updater(tiny_model_dir, state_dir)
    before = updater.policy.state()
    updater.interact(4)
    updater.loop.cycle()
    assert updater.fates() == {Fate.REJECTED: 4}
    assert all(torch.equal(before[n], t) for n, t in updater.policy.state().items())
    updater.close()


@pytest.mark.parametrize("error", [MemoryError(), OSError("no"), ArtifactMissing("gone")])
def test_a_machine_at_fault_costs_no_feedback(
    tiny_model_dir: Path,
    state_dir: Path,
    refusing: type[Refusing],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    monkeypatch.setattr(refusing, "together", 1)
    monkeypatch.setattr(refusing, "error", error)
    updater = Updater(tiny_model_dir, state_dir)
    updater.interact(4)
    with pytest.raises(type(error)):
        updater.loop.cycle()
    assert updater.fates() == {Fate.PENDING: 4}
    updater.close()


def test_a_model_that_computes_nothing_any_more_costs_no_feedback(
    tiny_model_dir: Path, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    updater = Updater(tiny_model_dir, state_dir)
    updater.interact(4)

    def broken(*_: Any) -> None:
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(updater.policy, "completion_logits", broken)
    with pytest.raises(RuntimeError, match="device-side"):
        updater.loop.cycle()
    assert updater.fates() == {Fate.PENDING: 4}
    updater.close()


def test_while_pinned_events_are_taken_in_and_nothing_is_trained(
    tiny_model_dir: Path, state_dir: Path
) -> None:
    updater = Updater(tiny_model_dir, state_dir)
    updater.store.pin(ALIAS, 0, "test")
    updater.interact(4)
    updater.loop.cycle()
    assert updater.loop.phase is Phase.PINNED
    assert updater.fates() == {Fate.PENDING: 4}
    updater.store.unpin(ALIAS)
    updater.loop.cycle()
    assert [release.version for release in updater.published] == [1]
    updater.close()
