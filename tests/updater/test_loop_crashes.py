"""kill -9 at every failpoint of the cycle and the intake: the same fates, releases and weights."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
import torch

from moorline import failpoints
from moorline.events import Erasure, Feedback, Release
from moorline.store import ArtifactStore
from moorline.stream import Topic
from tests.updater.harness import Tape, Updater
from tests.updater.learning.fixtures import ALIAS, recorded, some_sequences
from updater.ledger import Ledger

POINTS = (
    "ingest.polled",
    "ingest.dead_lettered",
    "ingest.before_ledger",
    "ingest.after_ledger",
    "ledger.attempt.committed",
    "ledger.measured.committed",
    "loop.after_training",
    "loop.after_artifact",
    "loop.after_gate",
    "loop.before_release",
    "loop.after_release",
    "loop.after_manifest",
)


class Announcing(Updater):
    """Its releases topic is a file, which outlives it."""

    outbox: Path

    def publish(self, release: Release) -> None:
        with self.outbox.open("a") as topic:
            topic.write(f"{release.name} {release.artifact_digest}\n")


def stream(updater: Updater) -> Tape:
    """Replies of the base model, rated and corrected; the later half is stale by then."""
    tape = Tape()
    tape.add(Topic.FEEDBACK, b"unreadable")
    for index, sequence in enumerate(some_sequences(11)):
        name = f"chatcmpl-{index}"
        tape.add(Topic.INTERACTIONS, recorded(updater.policy, sequence, name).to_bytes())
        about = {
            "interaction_id": name,
            "feedback_id": f"fb-{index}",
            "created_at": 1_750_000_000.0,
        }
        said = {"value": 1 if index % 2 else -1}
        if index % 4 == 3:
            said = {"kind": "correction", "text": "A glacier is a river of ice."}
        if index < 8:
            tape.add(Topic.FEEDBACK, Feedback.model_validate(about | said).to_bytes())
    return tape


def update(model_dir: Path, state_dir: Path, armed: str) -> None:
    """What an updater does, from wherever its state stands to the end of the stream."""
    torch.set_num_threads(1)
    updater = Announcing(model_dir, state_dir)
    updater.outbox = state_dir / "announced"
    with updater.policy.using(None):  # read again from the start: the ledger knows what it has
        updater.tape._records = stream(updater)._records
    os.environ[failpoints.FAILPOINTS_VARIABLE] = armed
    for _ in range(4):
        updater.loop.cycle()
    asked = Erasure(erasure_id="er-1", interaction_id="chatcmpl-5", revoke=True)
    updater.tape.add(Topic.ERASURES, asked.to_bytes())
    updater.loop.cycle()
    updater.close()


@pytest.fixture(scope="module")
def run(tiny_model_dir: Path) -> Callable[[Path, str], int]:
    """``update`` in a process of its own; its exit code."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])

    def start(state_dir: Path, armed: str = "") -> int:
        process = processes.Process(target=update, args=(tiny_model_dir, state_dir, armed))
        process.start()
        process.join(120)
        assert process.exitcode is not None
        return process.exitcode

    return start


def outcome(state_dir: Path) -> dict[str, Any]:
    """Everything that must be the same after any crash."""
    store = ArtifactStore(state_dir / "store")
    with Ledger.open_readonly(state_dir / "ledger.sqlite") as reader:
        assert reader.audit() == []
        assert reader.unpublished() == []
        releases = reader.releases()
        assert [store.release(ALIAS, version) for version in store.versions(ALIAS)] == releases
        return {
            "accounting": reader.accounting().as_dict(),
            "offsets": reader.offsets(),
            "releases": [(r.version, r.artifact_digest, r.examples_digest) for r in releases],
            "baselines": reader.baselines(),
            "erased": (reader.erasure("er-1"), reader.revoked_versions()),
            # Announced again after a kill is the same release again.
            "announced": list(dict.fromkeys((state_dir / "announced").read_text().splitlines())),
        }


@pytest.fixture(scope="module")
def reference(
    run: Callable[[Path, str], int], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The end of a run without faults."""
    state_dir = tmp_path_factory.mktemp("reference")
    assert run(state_dir, "") == 0
    found = outcome(state_dir)
    assert len(found["releases"]) == len(found["announced"]) == 3
    assert found["erased"][1] == {2}
    return found


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_anywhere_in_a_cycle_changes_nothing_of_the_end(
    run: Callable[[Path, str], int], reference: dict[str, Any], tmp_path: Path, point: str
) -> None:
    for _ in range(2):  # the second time at what the first has left
        assert run(tmp_path, f"{point}=kill@1") == -SIGKILL
    assert run(tmp_path, "") == 0
    assert outcome(tmp_path) == reference


def test_a_kill_between_a_withdrawal_and_its_announcement_changes_nothing_of_the_end(
    run: Callable[[Path, str], int], reference: dict[str, Any], tmp_path: Path
) -> None:
    assert run(tmp_path, "loop.after_revocation=kill@1") == -SIGKILL
    assert run(tmp_path, "") == 0
    assert outcome(tmp_path) == reference
