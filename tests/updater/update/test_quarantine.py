"""Examples that kill the process: found over several lives of it, and nobody else is harmed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline import metrics
from moorline.events import Fate, Reason
from moorline.settings import Settings, load_settings
from moorline.store import ArtifactMissing
from moorline.stream import Topic
from tests.updater.harness import Updater
from tests.updater.learning.fixtures import some_sequences
from tests.updater.ledger.fixtures import FAST_DISK, NOW, Log, interaction, rating, release
from updater.learning.staleness import StalenessReport
from updater.learning.trainer import Proposal, Trainer
from updater.ledger import BatchDecision, Ledger
from updater.safety.trust_region import TrustRegion
from updater.update.quarantine import Quarantine
from updater.values import Batch, Example

SUSPECT_AFTER = 3


class Died(BaseException):
    """The process is gone: nothing in it catches this."""


class Mortal(Trainer):
    """Dies of whatever it is told to die of."""

    poison: frozenset[str] = frozenset()
    together = 10**9
    error: BaseException = Died()

    def propose(
        self, batch: Batch, staleness: StalenessReport | None = None, **options: Any
    ) -> Proposal:
        names = {one.example.interaction.interaction_id for one in batch.examples}
        if names & self.poison or len(names) >= self.together:
            raise self.error
        return super().propose(batch, staleness, **options)


@pytest.fixture
def mortal(monkeypatch: pytest.MonkeyPatch) -> type[Mortal]:
    monkeypatch.setattr("updater.assembly.Trainer", Mortal)
    return Mortal


Start = Callable[..., Updater]


@pytest.fixture
def start(tiny_model_dir: Path, tmp_path: Path) -> Start:
    """An updater on the same state; the one before is gone."""
    lives: list[Updater] = []

    def begin(**overrides: object) -> Updater:
        for dead in lives:
            dead.close()
        lives[:] = [Updater(tiny_model_dir, tmp_path / "state", **overrides)]
        return lives[0]

    return begin


def live(start: Start, cycles: int = 3, **overrides: object) -> tuple[Updater, int]:
    """Lives until one goes through its cycles; how many did not."""
    for deaths in range(40):
        updater = start(**overrides)
        try:
            for _ in range(cycles):
                updater.loop.cycle()
        except Died:
            continue
        return updater, deaths
    raise AssertionError("it dies for ever")


def test_an_example_that_kills_the_process_is_rejected_and_the_others_teach(
    start: Start,
    mortal: type[Mortal],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(mortal, "poison", frozenset({"chatcmpl-0-2"}))
    updater = start()
    updater.interact(5)
    with pytest.raises(Died):
        updater.loop.cycle()
    updater, deaths = live(start, cycles=6)
    assert deaths + 1 == 2 * SUSPECT_AFTER + 1, "three of four, one of two, three alone"
    (rejection,) = updater.ledger.rejections()
    assert (rejection["reason"], rejection["examples"]) == (Reason.UPDATE_CRASHED, 1)
    assert "the process crashed 3 times in an update of it alone" in rejection["record"]
    assert [one.examples for one in updater.published] == [4]
    assert updater.fates() == {Fate.REJECTED: 1, Fate.TRAINED: 4}
    assert updater.ledger.crashes.suspects() == []
    assert metrics.UPDATE_CRASHES._value.get() == 0
    assert "lower learning.max_example_tokens" in caplog.text


def test_below_the_setting_a_death_changes_nothing(
    start: Start, mortal: type[Mortal], tiny_model_dir: Path, tmp_path: Path
) -> None:
    reference = Updater(tiny_model_dir, tmp_path / "reference")
    reference.interact(9)
    for _ in range(2):
        reference.loop.cycle()
    reference.close()
    updater = start()
    updater.interact(9)
    for together in (4, 4, 10**9, 4, 4, 10**9):
        mortal.together = together
        try:
            updater.loop.cycle()
        except Died:
            assert metrics.UPDATE_CRASHES._value.get() < SUSPECT_AFTER
            updater = start()
    digests = [one.artifact_digest for one in updater.ledger.releases()]
    assert digests == [one.artifact_digest for one in reference.published]
    assert len(digests) == 2


def test_a_batch_that_is_too_large_for_the_machine_teaches_in_halves(
    start: Start, mortal: type[Mortal], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mortal, "together", 3)
    updater = start(**{"learning.min_batch_examples": 2})
    updater.interact(4)
    with pytest.raises(Died):
        updater.loop.cycle()
    updater, deaths = live(start, **{"learning.min_batch_examples": 2})
    assert deaths + 1 == SUSPECT_AFTER
    assert [one.examples for one in updater.published] == [2, 2]


def test_a_machine_on_which_every_update_dies_costs_no_feedback(
    start: Start, mortal: type[Mortal], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mortal, "together", 1)
    updater = start()
    updater.interact(4)
    for _ in range(SUSPECT_AFTER + 2 + 2 * SUSPECT_AFTER):  # one alone would be found by now
        with pytest.raises(Died):
            updater.loop.cycle()
        updater = start()
    assert updater.fates() == {Fate.PENDING: 4}
    monkeypatch.setattr(mortal, "together", 10**9)  # repaired
    for _ in range(8):
        updater.loop.cycle()
    assert updater.fates() == {Fate.TRAINED: 4}
    assert [one.examples for one in updater.published] == [4], "a full batch again"


@pytest.mark.parametrize(
    ("error", "deaths"),
    [(MemoryError(), 1), (torch.OutOfMemoryError(), 1), (ArtifactMissing("gone"), 0)],
)
def test_an_error_that_ends_the_process_is_a_death_unless_an_operator_can_mend_it(
    start: Start,
    mortal: type[Mortal],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    deaths: int,
) -> None:
    monkeypatch.setattr(mortal, "together", 1)
    monkeypatch.setattr(mortal, "error", error)
    updater = start()
    updater.interact(4)
    with pytest.raises(type(error)):
        updater.loop.cycle()
    start()
    assert metrics.UPDATE_CRASHES._value.get() == deaths


def test_a_reply_that_kills_whoever_measures_on_it_is_not_measured_on(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    updater = start()
    updater.interact(1, seed=1, rated=False)
    updater.interact(4)
    killer = some_sequences(1, seed=1)[0].completion_token_ids
    measure = TrustRegion.largest_step

    def dying(
        self: TrustRegion, live: object, proposal: object, traffic: Any, whole: float
    ) -> object:
        if killer in [one.completion_token_ids for one in traffic]:
            raise Died
        return measure(self, live, proposal, traffic, whole)  # type: ignore[arg-type]

    monkeypatch.setattr(TrustRegion, "largest_step", dying)
    with pytest.raises(Died):
        updater.loop.cycle()
    updater, deaths = live(start)
    assert deaths + 1 == SUSPECT_AFTER
    assert [one.examples for one in updater.published] == [4]
    assert updater.fates() == {Fate.TRAINED: 4}
    assert updater.fates(Topic.INTERACTIONS) == {Fate.TRAINED: 4, Fate.PENDING: 1}


# --- any number of killers, in a ledger and without a model ------------------------------------


class Machine:
    """Stands for trainer and trust region: dies of some replies, in training only."""

    def __init__(self, killers: Sequence[str]) -> None:
        self._killers = killers

    live_adapter = probes = None

    def logprobs(self, *_: object) -> None:
        pass

    def restore(self) -> None:
        pass

    def credit(self, examples: Sequence[Example]) -> tuple[Batch, None, None]:
        if any(one.interaction.interaction_id in self._killers for one in examples):
            raise Died
        return Batch((), 0), None, None

    def propose(self, *_: object) -> None:
        pass


def life(ledger: Ledger, machine: Machine, configured: Settings) -> None:
    """As the loop does it, until nothing that waits is due."""
    found = Quarantine(configured, ledger, machine, machine, machine.credit)  # type: ignore[arg-type]
    while found.due(ledger.count_ready() > 0):
        suspects = found.suspects()
        if suspects and not found.enough_to_teach(suspects):
            if found.bisect(suspects):
                ids = [one.example_id for one in suspects]
                ledger.commit_rejection(Reason.UPDATE_CRASHED, BatchDecision(ids), now=NOW)
            continue
        examples = suspects or ledger.ready_examples(configured.learning.batch_examples)
        with found.watch(examples):
            machine.credit(examples)
            ids = [one.example_id for one in examples]
            ledger.commit_release(release(ledger, ids), BatchDecision(ids))


def rate(ledger: Ledger, log: Log, names: Sequence[str]) -> None:
    records = [log.parsed(event) for name in names for event in (interaction(name), rating(name))]
    ledger.ingest(records, now=NOW)


@settings(max_examples=40, deadline=None)
@given(
    killers=st.lists(st.booleans(), min_size=1, max_size=12),
    batch=st.integers(1, 12),
    fewest=st.integers(1, 12),
    suspect_after=st.integers(1, 3),
)
def test_exactly_the_killers_are_rejected_and_everybody_else_teaches(
    killers: list[bool], batch: int, fewest: int, suspect_after: int
) -> None:
    configured = load_settings(
        overrides={
            "learning.batch_examples": batch,
            "learning.min_batch_examples": fewest,
            "updater.suspect_after_crashes": suspect_after,
        }
    )
    names = [f"r{index}" for index in range(len(killers))]
    guilty = {name for name, kills in zip(names, killers, strict=True) if kills}
    with tempfile.TemporaryDirectory(dir=FAST_DISK) as folder:
        path = Path(folder) / "ledger.sqlite"
        log = Log()
        with Ledger(path) as ledger:
            rate(ledger, log, names)
        for _ in range(100):
            with Ledger(path, suspect_after_crashes=suspect_after) as ledger:
                try:
                    life(ledger, Machine(sorted(guilty)), configured)
                except Died:
                    continue
                if not ledger.count_ready():
                    break
                # What is left kills, and nobody is there to compare it with.
                assert len(ledger.ready_examples(99)) <= len(guilty)
                names.append(f"r{len(names)}")
                rate(ledger, log, names[-1:])
        else:
            pytest.fail("it dies for ever")
        with Ledger.open_readonly(path) as reader:
            events = reader.accounting().events[str(Topic.FEEDBACK)]
            assert reader.audit() == []
        assert events.get(Fate.REJECTED, {}).get(Reason.UPDATE_CRASHED, 0) == len(guilty)
        assert sum(events[Fate.TRAINED].values()) == len(names) - len(guilty)
