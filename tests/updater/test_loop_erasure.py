"""An erasure through the whole cycle: the policy goes back, and learns again from the others."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from moorline.events import Erasure, Fate, ReleaseKind
from moorline.store import ArtifactMissing
from moorline.stream import Topic
from tests.updater.harness import Tape, Updater
from tests.updater.learning.fixtures import ALIAS
from updater.learning.policy import AdapterState


def erase(updater: Updater, interaction_id: str, *, revoke: bool = True) -> Erasure:
    asked = Erasure(interaction_id=interaction_id, revoke=revoke)
    updater.tape.add(Topic.ERASURES, asked.to_bytes())
    return asked


def same(left: AdapterState, right: AdapterState) -> bool:
    return all(torch.equal(left[name], tensor) for name, tensor in right.items())


def test_a_replay_returns_to_the_clean_release_and_learns_the_rest_anew(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    updater = Updater(tiny_model_dir, tmp_path / "state")
    updater.interact(4, seed=1)
    updater.loop.cycle()
    clean = updater.trainer.live_adapter
    updater.interact(4, seed=2)
    updater.loop.cycle()
    assert not same(updater.trainer.live_adapter, clean)
    asked = erase(updater, "chatcmpl-2-1")
    updater.loop.cycle()

    found = updater.ledger.erasure(asked.erasure_id)
    assert found is not None
    assert (found.releases, found.last_clean_version, found.revocation_version) == ((2,), 1, 3)
    first, second, third = updater.published
    assert (third.version, third.parent, third.revokes_after) == (3, 1, 1)
    assert third.artifact_digest == first.artifact_digest
    assert third == updater.store.release(ALIAS, 3)
    assert same(updater.trainer.live_adapter, clean)
    with pytest.raises(ArtifactMissing):
        updater.store.open(str(second.artifact_digest), second.files)
    assert updater.ledger.count_ready() == 3
    assert updater.fates() == {Fate.TRAINED: 4, Fate.PENDING: 3, Fate.ERASED: 1}
    tape = updater.tape
    updater.close()

    updater = Updater(tiny_model_dir, tmp_path / "state", tape)
    assert same(updater.trainer.live_adapter, clean)
    updater.interact(1, seed=3)
    updater.loop.cycle()
    (fourth,) = updater.published
    assert (fourth.version, fourth.parent, fourth.examples) == (4, 3, 4)
    assert updater.fates() == {Fate.TRAINED: 8, Fate.ERASED: 1}
    assert updater.ledger.audit() == []
    assert {key for _, key in updater.ledger.trained_examples(4)} == {
        *(f"chatcmpl-2-{index}/0" for index in (0, 2, 3)),
        "chatcmpl-3-0/0",
    }
    updater.close()


def test_back_to_the_base_model_and_on_from_there(tiny_model_dir: Path, tmp_path: Path) -> None:
    updater = Updater(tiny_model_dir, tmp_path / "state")
    base = updater.trainer.live_adapter
    updater.interact(4, seed=1)
    updater.loop.cycle()
    erase(updater, "chatcmpl-1-0")
    updater.loop.cycle()
    second = updater.published[-1]
    assert (second.version, second.revokes_after, second.kind) == (2, 0, ReleaseKind.BASE)
    assert same(updater.trainer.live_adapter, base)
    updater.interact(1, seed=2)
    updater.loop.cycle()
    assert (updater.published[-1].version, updater.published[-1].parent) == (3, 2)
    assert updater.fates() == {Fate.TRAINED: 4, Fate.ERASED: 1}
    updater.close()


def test_where_the_clean_bytes_are_gone_it_goes_further_back(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    updater = Updater(tiny_model_dir, tmp_path / "state")
    for seed in (1, 2):
        updater.interact(4, seed=seed)
        updater.loop.cycle()
    updater.store.collect_garbage(ALIAS, set())
    erase(updater, "chatcmpl-2-0")
    updater.loop.cycle()
    assert updater.published[2].revokes_after == 0
    assert updater.published[3].parent == 3, "seven wait again: enough for the next release at once"
    assert updater.ledger.revoked_versions() == {1, 2}
    assert updater.fates() == {Fate.TRAINED: 4, Fate.PENDING: 3, Fate.ERASED: 1}
    updater.close()


def test_without_replay_the_release_stays_and_says_so(tiny_model_dir: Path, tmp_path: Path) -> None:
    updater = Updater(tiny_model_dir, tmp_path / "state")
    updater.interact(4, seed=1)
    updater.loop.cycle()
    asked = erase(updater, "chatcmpl-1-0", revoke=False)
    updater.loop.cycle()
    found = updater.ledger.erasure(asked.erasure_id)
    assert found is not None
    assert (found.releases, found.last_clean_version, found.revoke) == ((1,), 0, False)
    assert len(updater.published) == 1
    assert updater.fates() == {Fate.TRAINED: 4}
    updater.close()


class Behind(Tape):
    """A tape on which somebody's erasure was not read yet."""

    unread = 1

    def lag(self) -> Mapping[tuple[Topic, int], int]:
        return {(Topic.ERASURES, 0): self.unread, (Topic.FEEDBACK, 0): 3}


def test_nothing_is_learned_while_an_erasure_lies_unread(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    tape = Behind()
    updater = Updater(tiny_model_dir, tmp_path / "state", tape)
    updater.interact(4)
    updater.loop.cycle()
    assert updater.published == []
    tape.unread = 0
    updater.loop.cycle()
    assert len(updater.published) == 1
    updater.close()
