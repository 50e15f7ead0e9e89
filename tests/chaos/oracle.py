"""Compares the accounting after the chaos with that of a run without faults.

Two things do not follow from the log: how much of it had arrived when a batch was made, and which
archived policies were damaged. So the reference run is given both, as the end of every batch
records them: the offsets up to which the stream had been read, and the behaviour policies that
could not be run again. Everything else it computes anew: it reads the same log from its beginning
with a new ledger, store and policy, without a fault, and must end with the same fates, the same
offsets, the same decisions and the same bytes of weights.

Where a ledger was lost, or an older copy put back, the reference run loses its own at the same
decision, and what both learn from then on must be the same too. Likewise it moves its anchor where
a person has moved the other's.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moorline.events import Feedback, Reason, Release
from moorline.settings import Settings, StreamSettings
from moorline.store import AnchorRequests, ArtifactStore
from moorline.stream import Gap, Reader, Record, Topic
from tests.chaos.world import damaged
from tests.integration.streams import announced
from updater.ledger import Anchor, Ledger, LedgerReader

if TYPE_CHECKING:
    from updater.loop import Loop

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


NOTHING_DECIDED = Decision(math.inf, "", {}, frozenset())


@dataclass(frozen=True)
class Loss:
    """A ledger that was lost."""

    at: float
    """Unix time."""
    ledger: Path
    """The ledger as it was."""
    copy: Path | None
    """The older copy that took its place; None: an empty one did."""


@dataclass(frozen=True)
class Era:
    """The life of one ledger: until it was lost, or until the end."""

    made: Sequence[Decision]
    in_copy: int | None = None
    """It began with an older copy of the ledger before, with so many of that era's decisions;
    None: it began empty."""


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


def ledger_files(ledger: Path) -> list[Path]:
    """All files of a ledger that nobody has open for writing."""
    return sorted(ledger.parent.glob(f"{ledger.name}*"))


def copy_ledger(ledger: Path, directory: Path) -> Path:
    """Copy it there; what was there is replaced. Returns the copy."""
    directory.mkdir(parents=True, exist_ok=True)
    drop_ledger(directory / ledger.name)
    for path in ledger_files(ledger):
        shutil.copy2(path, directory)
    return directory / ledger.name


def drop_ledger(ledger: Path) -> None:
    for path in ledger_files(ledger):
        path.unlink()


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

    def __init__(
        self,
        log: Sequence[Record],
        cuts: Sequence[Mapping[Place, int]],
        read: Mapping[Place, int] | None = None,
    ) -> None:
        """``read``: where it begins."""
        self._portions: list[list[Record]] = []
        read = dict(read or {})
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


class Reference:
    """An updater without faults, in this process, in a state directory of its own."""

    def __init__(
        self, settings: Settings, log: Sequence[Record], anchors: Sequence[Anchor] = ()
    ) -> None:
        import torch

        torch.set_num_threads(settings.learning.threads or torch.get_num_threads())
        self._settings = settings
        self._log = log
        self._anchors = sorted(anchors, key=lambda anchor: anchor.applied_at)
        settings.state_dir.mkdir(parents=True)
        self._store = ArtifactStore(settings.store_dir)
        self._copy = settings.state_dir / "copy"

    def live(self, eras: Sequence[Era]) -> list[Outcome]:
        """One ledger after the other; what each of them held in the end."""
        found = []
        before: Era | None = None
        for era, after in zip_longest(eras, eras[1:]):
            read: Mapping[Place, int] = {}
            if before is not None:
                drop_ledger(self._settings.ledger_path)
                if era.in_copy is not None:
                    copy_ledger(
                        self._copy / self._settings.ledger_path.name, self._settings.state_dir
                    )
                    read = before.made[era.in_copy - 1].offsets if era.in_copy else {}
            found.append(self._one(era, after, read))
            before = era
        return found

    def _one(self, era: Era, after: Era | None, read: Mapping[Place, int]) -> Outcome:
        from updater.assembly import open_ledger

        script = Script(self._log, [one.offsets for one in era.made], read)
        ledger = open_ledger(self._settings)
        try:
            loop = self._started(ledger, script)
            for number, decision in enumerate([*era.made, *([] if after else [NOTHING_DECIDED])]):
                if after is not None and after.in_copy == number:
                    copy_ledger(self._settings.ledger_path, self._copy)
                self._move_anchor(decision.at)
                with ExitStack() as faults:
                    if decision.behaviour_policies_unavailable:
                        # An updater that has them in memory would not notice.
                        loop = self._started(ledger, script)
                    for version in decision.behaviour_policies_unavailable:
                        faults.enter_context(damaged(self._store, ledger.release(version)))
                    loop.cycle()
        finally:
            ledger.close()
        with Ledger.open_readonly(self._settings.ledger_path) as reader:
            return outcome(reader)

    def _started(self, ledger: Ledger, script: Script) -> Loop:
        from updater.assembly import assemble

        loop = assemble(
            self._settings,
            ledger=ledger,
            store=self._store,
            reader=script,
            dead_letters=Discarded(),
            publish=lambda _: None,
        ).loop
        loop.resume()
        return loop

    def _move_anchor(self, until: float) -> None:
        """What a person had asked for, and what was carried out, by that time."""
        requests = AnchorRequests(self._store)
        while self._anchors and self._anchors[0].applied_at < until:
            anchor = self._anchors.pop(0)
            requests.write(
                self._settings.alias,
                anchor.version,
                reason=anchor.reason,
                requested_by=anchor.requested_by,
            )


def run_reference(settings: Settings, log: Sequence[Record], made: Sequence[Decision]) -> Outcome:
    """The same for one ledger that was never lost.

    Args:
        made: where its batches are cut, and which behaviour policies it must do without.
    """
    (found,) = Reference(settings, log).live([Era(made)])
    return found


def judge(
    settings: Settings,
    reference_dir: Path,
    acknowledged: set[str],
    versions_seen: set[int],
    losses: Sequence[Loss] = (),
) -> Verdict:
    """Compare the outcome with that of a run without faults, and check what must hold.

    Args:
        settings: of the updater that ran under faults; it must have ended.
        acknowledged: ids of ratings that the server or the broker acknowledged.
        versions_seen: policy versions that replies named.
        losses: the ledgers that were lost meanwhile, oldest first.
    """
    violations: list[str] = []
    log = read_log(settings.stream)
    eras, held, anchors = _history(settings, losses)
    found = held[-1]
    with Ledger.open_readonly(settings.ledger_path) as ledger:
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
    expected = Reference(reference, log, anchors).live(eras)
    for number, (ours, theirs) in enumerate(zip(held, expected, strict=True)):
        different = _differences(ours, theirs, accounts=number == len(held) - 1)
        violations += [f"ledger {number + 1} of {len(held)}: {line}" for line in different]
    weights = [(one.decisions, one.weights) for one in held]
    made = [one.name for era in eras for one in era.made]
    return Verdict(
        accounting_equal=found.accounting == expected[-1].accounting,
        offsets_equal=found.offsets == expected[-1].offsets,
        weights_equal=weights == [(one.decisions, one.weights) for one in expected],
        releases=len(releases),
        rejections=sum(name.startswith("rejected") for name in made),
        events=len(log),
        violations=tuple(violations),
    )


def _history(
    settings: Settings, losses: Sequence[Loss]
) -> tuple[list[Era], list[Outcome], list[Anchor]]:
    """Each ledger's life, what it held in the end, and all anchors that were chosen meanwhile."""
    eras: list[Era] = []
    held: list[Outcome] = []
    anchors: dict[float, Anchor] = {}
    began, copy = 0.0, None

    def made_in(path: Path) -> list[Decision]:
        with Ledger.open_readonly(path) as ledger:
            return [one for one in decisions(ledger) if one.at > began]

    for path, loss in [*((one.ledger, one) for one in losses), (settings.ledger_path, None)]:
        eras.append(Era(made_in(path), copy))
        with Ledger.open_readonly(path) as ledger:
            held.append(outcome(ledger))
            for anchor in ledger.anchors():
                anchors.setdefault(anchor.requested_at, anchor)
        if loss is not None:
            copy = None if loss.copy is None else len(made_in(loss.copy))
            began = loss.at
    return eras, held, list(anchors.values())


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


def _differences(found: Outcome, expected: Outcome, *, accounts: bool = True) -> list[str]:
    """``accounts``: fates and offsets too, which follow from a log that was read to its end."""
    violations = []
    if accounts and found.accounting != expected.accounting:
        violations.append(f"accounting {found.accounting}, without faults {expected.accounting}")
    if accounts and found.offsets != expected.offsets:
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
