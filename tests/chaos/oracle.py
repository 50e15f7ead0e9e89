"""Compares the accounting after the chaos with that of a run without faults.

Two things do not follow from the log: how much of it had arrived when a batch was made, and which
archived policies were damaged. So the reference run is given both, as the end of every batch
records them: the offsets up to which the stream had been read, and the behaviour policies that
could not be run again. Everything else it computes anew: it reads the same log from its beginning
with a new ledger, store and policy, without a fault, and must end with the same fates, the same
offsets, the same decisions and the same bytes of weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moorline.events import Feedback, Reason, Release
from moorline.settings import Settings, StreamSettings
from moorline.store import ArtifactStore
from moorline.stream import Gap, Reader, Record, Topic
from tests.chaos.world import damaged
from tests.integration.streams import announced
from updater.ledger import Ledger, LedgerReader

READ_SECONDS = 60.0
Place = tuple[Topic, int]


@dataclass(frozen=True)
class Decision:
    """How one batch ended."""

    at: float
    name: str
    """What became of it: "v7 <artifact> <examples>", a rejection's reason, or "no update"."""
    offsets: Mapping[Place, int]
    """Next offset of each partition when it was decided."""
    behaviour_policies_unavailable: frozenset[int]
    """Versions of behaviour policies whose adapters were gone or damaged."""


NOTHING_DECIDED = Decision(0.0, "", {}, frozenset())


@dataclass(frozen=True)
class Outcome:
    """What an updater left behind, to be compared."""

    accounting: dict[str, Any]
    offsets: dict[str, int]
    decisions: list[str]
    weights: list[str]
    """Artifact digests of the releases: adapter and optimiser state."""


@dataclass(frozen=True)
class Verdict:
    """The result of the comparison."""

    accounting_equal: bool
    offsets_equal: bool
    weights_equal: bool
    releases: int
    rejections: int
    events: int
    violations: tuple[str, ...]


def read_log(stream: StreamSettings) -> list[Record]:
    """Everything in both topics, partition by partition."""
    reader = Reader(stream, (Topic.INTERACTIONS, Topic.FEEDBACK))
    records: list[Record] = []
    try:
        records += reader.poll(1000, READ_SECONDS)
        while any(events > 0 for events in reader.lag().values()):
            records += reader.poll(1000, 5.0)
    finally:
        reader.close()
    return records


def decisions(ledger: LedgerReader) -> list[Decision]:
    """How every batch ended, in order."""

    def places(offsets: Mapping[str, Mapping[Any, int]]) -> dict[Place, int]:
        return {
            (Topic(topic), int(partition)): offset
            for topic, partitions in offsets.items()
            for partition, offset in partitions.items()
        }

    everything = 10**9
    found = [
        Decision(
            one.created_at,
            _name(one),
            places(one.offsets),
            frozenset(one.behaviour_policies_unavailable),
        )
        for one in ledger.releases(everything)
    ]
    others = [
        *((f"rejected: {one['reason']}", one) for one in ledger.rejections(everything)),
        *(("no update", one) for one in ledger.no_updates(everything)),
    ]
    for name, one in others:
        record = json.loads(one["record"])
        lost = frozenset(map(int, record["behaviour_policies_unavailable"]))
        found.append(Decision(one["at"], name, places(record["offsets"]), lost))
    return sorted(found, key=lambda one: one.at)


def _name(release: Release) -> str:
    return f"v{release.version} {release.artifact_digest} {release.examples_digest}"


def outcome(ledger: LedgerReader) -> Outcome:
    return Outcome(
        accounting=json.loads(json.dumps(ledger.accounting().as_dict(), default=str)),
        offsets={f"{t}/{p}": offset for (t, p), (_, offset) in sorted(ledger.offsets().items())},
        decisions=[one.name for one in decisions(ledger)],
        weights=[str(release.artifact_digest) for release in ledger.releases(10**9)],
    )


class Script:
    """A reader that returns the log in given portions, one a poll."""

    def __init__(self, log: Sequence[Record], cuts: Sequence[Mapping[Place, int]]) -> None:
        self._portions: list[list[Record]] = []
        read: dict[Place, int] = {}
        for cut in [*cuts, None]:
            self._portions.append(
                [
                    record
                    for record in log
                    if record.offset >= read.get((record.topic, record.partition), 0)
                    and (
                        cut is None or record.offset < cut.get((record.topic, record.partition), 0)
                    )
                ]
            )
            read |= cut or {}

    @property
    def left(self) -> int:
        """How many portions were not polled yet."""
        return len(self._portions)

    def poll(self, max_records: int, timeout_seconds: float) -> list[Record]:
        del max_records, timeout_seconds
        return self._portions.pop(0) if self._portions else []

    def gaps(self) -> list[Gap]:
        return []

    def lag(self) -> dict[Place, int]:
        return {}

    def positions(self) -> Mapping[Place, tuple[str, int]]:
        return {}

    def commit(self, positions: Mapping[Place, tuple[str, int]]) -> None:
        del positions


class Discarded:
    """The reference's dead-letter topic: it keeps nothing, only the ledger's counts matter."""

    def send(self, record: Record, reason: Reason, stage: str, error: str = "") -> None:
        del record, reason, stage, error


def run_reference(settings: Settings, log: Sequence[Record], made: Sequence[Decision]) -> Outcome:
    """An updater without faults, in this process, in a state directory of its own.

    Args:
        made: where its batches are cut, and which behaviour policies it must do without.
    """
    import torch

    from updater.assembly import assemble, open_ledger
    from updater.loop import Loop

    torch.set_num_threads(settings.learning.threads or torch.get_num_threads())
    script = Script(log, [one.offsets for one in made])
    settings.state_dir.mkdir(parents=True)
    store = ArtifactStore(settings.store_dir)
    ledger = open_ledger(settings)

    def started() -> Loop:
        loop = assemble(
            settings,
            ledger=ledger,
            store=store,
            reader=script,
            dead_letters=Discarded(),
            publish=lambda _: None,
        ).loop
        loop.resume()
        return loop

    try:
        loop = started()
        for decision in (*made, NOTHING_DECIDED):
            with ExitStack() as faults:
                if decision.behaviour_policies_unavailable:
                    loop = started()  # an updater that has them in memory would not notice
                for version in decision.behaviour_policies_unavailable:
                    faults.enter_context(damaged(store, ledger.release(version)))
                loop.cycle()
    finally:
        ledger.close()
    with Ledger.open_readonly(settings.ledger_path) as reader:
        return outcome(reader)


def judge(
    settings: Settings,
    reference_dir: Path,
    acknowledged: set[str],
    versions_seen: set[int],
) -> Verdict:
    """Compare the outcome with that of a run without faults, and check what must hold.

    Args:
        settings: of the updater that ran under faults; it must have ended.
        acknowledged: ids of ratings that the server or the broker acknowledged.
        versions_seen: policy versions that replies named.
    """
    violations: list[str] = []
    log = read_log(settings.stream)
    with Ledger.open_readonly(settings.ledger_path) as ledger:
        found = outcome(ledger)
        made = decisions(ledger)
        releases = ledger.releases(10**9)
        violations += [f"ledger: {line}" for line in ledger.audit()]
        violations += [f"never announced: v{one.version}" for one in ledger.unpublished()]
    violations += _lost(log, acknowledged)
    violations += _unread(log, found)
    violations += _announcements(settings, releases)
    approved = {0, *(release.version for release in releases)}
    violations += [
        f"a reply claimed to be of v{version}, which was never released"
        for version in sorted(versions_seen - approved)
    ]
    # It keeps every artifact; what was unavailable to the other, the decisions say.
    learning = settings.learning.model_copy(update={"keep_releases": 10**9})
    reference = settings.model_copy(update={"state_dir": reference_dir, "learning": learning})
    expected = run_reference(reference, log, made)
    return Verdict(
        accounting_equal=found.accounting == expected.accounting,
        offsets_equal=found.offsets == expected.offsets,
        weights_equal=(found.decisions, found.weights) == (expected.decisions, expected.weights),
        releases=len(releases),
        rejections=sum(one.name.startswith("rejected") for one in made),
        events=len(log),
        violations=(*violations, *_differences(found, expected)),
    )


def _lost(log: Sequence[Record], acknowledged: set[str]) -> list[str]:
    there = set()
    for record in log:
        if record.topic is Topic.FEEDBACK and record.value:
            try:
                there.add(Feedback.model_validate_json(record.value).feedback_id)
            except ValueError:
                continue
    lost = sorted(acknowledged - there)
    return [f"acknowledged and not in the stream: {len(lost)}, first {lost[0]}"] if lost else []


def _unread(log: Sequence[Record], found: Outcome) -> list[str]:
    ends: dict[str, int] = {}
    for record in log:
        place = f"{record.topic}/{record.partition}"
        ends[place] = max(ends.get(place, 0), record.offset + 1)
    return [
        f"{place}: the log ends at {end}, the ledger stands at {found.offsets.get(place, 0)}"
        for place, end in sorted(ends.items())
        if found.offsets.get(place, 0) != end
    ]


def _announcements(settings: Settings, releases: Sequence[Release]) -> list[str]:
    ours = {release.version: release for release in releases}
    on_topic = {release.version: release for release in announced(settings.stream)}
    # Compaction may leave only the newest.
    violations = [
        f"v{version} on the topic is not what the ledger says"
        for version, release in on_topic.items()
        if ours.get(version) != release
    ]
    if releases and releases[-1].version not in on_topic:
        violations.append(f"v{releases[-1].version} is not on the topic")
    store = ArtifactStore(settings.store_dir)
    violations += [
        f"v{release.version} in the store is not what the ledger says"
        for release in releases
        if store.release(settings.alias, release.version) != release
    ]
    return violations


def _differences(found: Outcome, expected: Outcome) -> list[str]:
    violations = []
    if found.accounting != expected.accounting:
        violations.append(f"accounting {found.accounting}, without faults {expected.accounting}")
    if found.offsets != expected.offsets:
        violations.append(f"offsets {found.offsets}, without faults {expected.offsets}")
    for number, (ours, theirs) in enumerate(zip(found.decisions, expected.decisions, strict=False)):
        if ours != theirs:
            violations.append(f"decision {number}: {ours}, without faults {theirs}")
            break
    if len(found.decisions) != len(expected.decisions):
        violations.append(
            f"{len(found.decisions)} decisions, without faults {len(expected.decisions)}"
        )
    return violations
