"""The cycle on stale data: what is set aside, and whose bytes are kept for it."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from moorline.events import Fate, Feedback, Reason, SamplingSettings
from moorline.store import ArtifactMissing, ArtifactStore
from moorline.stream import Topic
from tests.updater.harness import Tape, Updater
from tests.updater.learning.fixtures import ALIAS, recorded, some_sequences
from updater.retention import collect_garbage


class LateTape(Tape):
    """Says that nothing is unread; records may also be of today."""

    def add_now(self, topic: Topic, value: bytes) -> None:
        self.add(topic, value)
        self._records[-1] = dataclasses.replace(
            self._records[-1], timestamp_ms=int(time.time() * 1000)
        )

    def lag(self) -> Mapping[tuple[Topic, int], int]:
        return {(topic, 0): 0 for topic in Topic}


def let_horizon_move(updater: Updater) -> None:
    """The ingest notes its progress every few seconds; let it do so in the next cycle."""
    updater.loop._ingest._progress_noted_at = float("-inf")


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return tmp_path / "state"


def stale(updater: Updater, number: int) -> None:
    """Rated replies of version 0 as it never was: the live policy finds them most unlikely."""
    for index, sequence in enumerate(some_sequences(number, seed=7)):
        name = f"chatcmpl-stale-{index}"
        reply = recorded(updater.policy, sequence, name, SamplingSettings(), 0)
        sure = reply.model_copy(update={"completion_logprobs": (-0.01,) * sequence.tokens})
        updater.tape.add(Topic.INTERACTIONS, sure.to_bytes())
        thumb = Feedback(
            interaction_id=name,
            value=1 if index % 2 else -1,
            rater=f"r{index}",
            created_at=1_750_000_000.0,
        )
        updater.tape.add(Topic.FEEDBACK, thumb.to_bytes())


def test_replies_too_far_to_learn_from_are_set_aside_and_the_others_trained(
    tiny_model_dir: Path, state_dir: Path
) -> None:
    updater = Updater(tiny_model_dir, state_dir)
    updater.interact(4)
    updater.loop.cycle()
    stale(updater, 2)
    updater.interact(2, seed=3)
    updater.loop.cycle()
    release = updater.published[-1]
    assert (release.version, release.examples) == (2, 2)
    assert release.diagnostics["set_aside_off_policy"] == 2.0
    assert release.diagnostics["credit_examples"] == 2.0
    assert updater.fates() == {Fate.TRAINED: 6, Fate.NOT_TRAINABLE: 2}
    updater.close()


def test_a_batch_of_which_all_is_too_far_makes_no_update_and_says_so(
    tiny_model_dir: Path, state_dir: Path
) -> None:
    updater = Updater(tiny_model_dir, state_dir)
    updater.interact(4)
    updater.loop.cycle()
    before = updater.policy.state()
    stale(updater, 4)
    updater.loop.cycle()
    assert len(updater.published) == 1
    reasons = updater.ledger.accounting().events[str(Topic.FEEDBACK)][Fate.NOT_TRAINABLE]
    assert reasons == {Reason.OFF_POLICY: 4}
    assert all(torch.equal(before[n], t) for n, t in updater.policy.state().items())
    updater.close()


def test_only_what_can_still_be_asked_for_stays_in_the_store(
    tiny_model_dir: Path, state_dir: Path
) -> None:
    short = {"learning.keep_releases": 2, "learning.horizon_seconds": 3600.0}
    tape = LateTape()
    updater = Updater(tiny_model_dir, state_dir, tape, **short)

    def kept(store: ArtifactStore) -> set[int]:
        held = set()
        for release in store.releases(ALIAS):
            with contextlib.suppress(ArtifactMissing):
                store.open(str(release.artifact_digest), release.files)
                held.add(release.version)
        return held

    updater.interact(4, seed=1)
    updater.loop.cycle()
    # A reply of version 1 that may still be rated: it is of today, all others are long ago.
    waiting = recorded(updater.policy, some_sequences(1)[0], "chatcmpl-waiting", version=1)
    waiting = waiting.model_copy(update={"created_at": time.time()})
    tape.add_now(Topic.INTERACTIONS, waiting.to_bytes())
    for seed in (2, 3):
        let_horizon_move(updater)
        updater.interact(4, seed=seed)
        updater.loop.cycle()
    assert kept(updater.store) == {1, 2, 3}
    updater.close()

    after = Updater(tiny_model_dir, state_dir, tape, **short)
    for seed in (4, 5):
        let_horizon_move(after)
        after.interact(4, seed=seed)
        after.loop.cycle()
    assert kept(after.store) == {1, 4, 5}  # the newest two, and who wrote the waiting reply
    thumb = Feedback(interaction_id="chatcmpl-waiting", value=1, rater="late")
    tape.add_now(Topic.FEEDBACK, thumb.to_bytes())
    after.interact(3, seed=6)
    after.loop.cycle()
    (release,) = after.published[2:]
    assert release.examples == 4
    assert release.diagnostics["staleness_versions_max"] == 4.0
    after.close()


def test_a_store_that_cannot_be_tidied_stops_nothing(
    tiny_model_dir: Path, state_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    updater = Updater(tiny_model_dir, state_dir)
    updater.interact(4)
    updater.loop.cycle()
    pin = updater.settings.store_dir / "releases" / ALIAS / "pin.json"
    pin.write_text("{")
    collect_garbage(updater.store, updater.ledger, ALIAS, keep_releases=2)
    assert any("could not be removed" in said for said in caplog.messages)
    assert updater.store.newest(ALIAS) is not None
    updater.close()
