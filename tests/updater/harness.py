"""An updater in the test's own process, assembled as the product does it, around records in memory.

Model, ledger, store and gate are real; the topics are lists. Whoever imports this drives
``Updater.loop`` cycle by cycle.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

from moorline.events import Fate, Feedback, FeedbackKind, Reason, Release, SamplingSettings
from moorline.settings import load_settings
from moorline.store import ArtifactStore
from moorline.stream import Gap, Record, StreamUnavailable, Topic
from tests.updater.learning.fixtures import recorded, some_sequences
from updater.assembly import assemble, open_ledger


class Tape:
    """Records in order, as the reader would give them."""

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._all: list[Record] = []
        self.at = 1_750_000_000.0
        self._offsets: dict[Topic, Iterator[int]] = {topic: itertools.count() for topic in Topic}

    def add(self, topic: Topic, value: bytes, at: float | None = None) -> None:
        """The next record of its topic, as if it had arrived then (``self.at``), Unix seconds."""
        offset = next(self._offsets[topic])
        self._records.append(
            Record(topic, "id", 0, offset, int((at or self.at) * 1000), None, value)
        )
        self._all.append(self._records[-1])

    def begin_anew(self) -> None:
        """Count offsets from 0, as in a topic that was made again."""
        self._offsets = {topic: itertools.count() for topic in Topic}

    def play_again(self, other: Tape) -> None:
        """Give what another tape has given, from its start, as to a reader without positions."""
        self._records += other._all
        self._all += other._all

    def continue_after(self, other: Tape) -> None:
        """Give records the offsets that follow those of another tape, as one stream."""
        self._offsets = other._offsets

    def poll(self, max_records: int, timeout_seconds: float) -> list[Record]:
        del timeout_seconds
        taken, self._records = self._records[:max_records], self._records[max_records:]
        return taken

    def gaps(self) -> list[Gap]:
        return []

    def lag(self) -> Mapping[tuple[Topic, int], int]:
        return {}

    def positions(self) -> Mapping[tuple[Topic, int], tuple[str, int]]:
        return {}

    def commit(self, positions: Mapping[tuple[Topic, int], tuple[str, int]]) -> None:
        del positions  # advisory


class Letters:
    """A dead-letter topic that may be away."""

    def __init__(self) -> None:
        self.offsets: list[int] = []
        self.away = False

    def send(self, record: Record, reason: Reason, stage: str, error: str = "") -> None:
        del reason, stage, error
        if self.away:
            raise StreamUnavailable("the dead-letter topic is gone")
        self.offsets.append(record.offset)


class Updater:
    """One updater's parts around a tape; the state directory outlives it."""

    def __init__(
        self, model_dir: Path, state_dir: Path, tape: Tape | None = None, **overrides: object
    ) -> None:
        """``overrides``: of the settings below, and of any other."""
        self.settings = load_settings(
            overrides={
                "state_dir": str(state_dir),
                "model.path": str(model_dir),
                "learning.batch_examples": 4,
                "learning.min_batch_examples": 4,
                "learning.lora_rank": 4,
                "learning.lora_alpha": 8,
                "learning.learning_rate": 2e-3,
                "learning.horizon_seconds": 10**10,
                "stream.retention_seconds": 10**10,
                "updater.poll_seconds": 0.01,
                "bound.live_kl_nats": 0.5,
                "gate.live_kl_mean_nats": 1.0,
                "gate.live_kl_max_prompt_nats": 5.0,
                "gate.perplexity_rise_share": 1.0,
                "gate.perplexity_rise_share_from_anchor": 1.0,
                **overrides,
            },
        )
        self.tape = tape or Tape()
        self.letters = Letters()
        self.published: list[Release] = []
        self.broker_up = True
        self.ledger = open_ledger(self.settings)
        self.store = ArtifactStore(self.settings.store_dir)
        parts = assemble(
            self.settings,
            ledger=self.ledger,
            store=self.store,
            reader=self.tape,
            dead_letters=self.letters,
            publish=self.publish,
        )
        self.loop, self.policy, self.trainer = parts.loop, parts.policy, parts.trainer
        self.trust_region = parts.trust_region
        self.loop.resume()

    def publish(self, release: Release) -> None:
        """What the loop announces a release by."""
        if not self.broker_up:
            raise StreamUnavailable("no broker")
        self.published.append(release)

    def interact(self, number: int, seed: int = 0, *, rated: bool = True) -> None:
        """Put this many replies of the live policy on the tape, rated down and up in turn."""
        for index, sequence in enumerate(some_sequences(number, seed)):
            name = f"chatcmpl-{seed}-{index}"
            version = self.ledger.live_version()
            reply = recorded(self.policy, sequence, name, SamplingSettings(), version)
            self.tape.add(Topic.INTERACTIONS, reply.to_bytes())
            if rated:
                self._rate(seed, index)

    def rate(self, number: int, seed: int = 0) -> None:
        """Rate the replies of ``interact`` with this seed, down and up in turn."""
        for index in range(number):
            self._rate(seed, index)

    def _rate(self, seed: int, index: int) -> None:
        thumb = Feedback(
            feedback_id=f"fb-{seed}-{index}",
            interaction_id=f"chatcmpl-{seed}-{index}",
            kind=FeedbackKind.THUMBS,
            value=1 if index % 2 else -1,
            rater=f"rater-{index}",
            created_at=1_750_000_000.0,
        )
        self.tape.add(Topic.FEEDBACK, thumb.to_bytes())

    def fates(self, topic: Topic = Topic.FEEDBACK) -> dict[Fate, int]:
        """How many events of the topic have each fate; the ledger's accounting must balance."""
        accounting = self.ledger.accounting()
        assert accounting.balanced
        return {fate: n for fate, n in accounting.fates.get(str(topic), {}).items() if n}

    def close(self) -> None:
        self.ledger.close()
