"""The audit: every record of the stream compared with its one fate in the ledger.

What the broker still has is read again and compared offset by offset. What it no longer has is
explained: removed by retention after it was read, a recorded gap, or an offset that holds no
record (a transaction's marker).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from moorline.settings import StreamSettings
from moorline.stream import StreamUnavailable, Topic, topic_name
from moorline.stream.client import admin_session
from moorline.stream.scan import RangeGone, Scanner
from moorline.stream.topics import JOINED, TopicState, describe
from updater.ledger.inspection import Consumed, LedgerInspector

_EXAMPLES = 5
_ATTEMPTS = 5
"""Most tries at a partition whose first records retention deletes while they are read."""


@dataclass
class Offsets:
    """A number of offsets, and the first few of them."""

    count: int = 0
    first: list[int] = field(default_factory=list)

    def add(self, offset: int) -> None:
        self.count += 1
        if len(self.first) < _EXAMPLES:
            self.first.append(offset)

    def __str__(self) -> str:
        more = ", ..." if self.count > len(self.first) else ""
        return ", ".join(map(str, self.first)) + more


@dataclass
class PartitionAudit:
    """One partition, compared over the offsets [start, stop)."""

    topic: Topic
    partition: int
    start: int
    """The first offset that retention has left."""
    stop: int
    """The ledger's next offset."""
    records: int = 0
    """On the broker."""
    events: int = 0
    """In the ledger."""
    empty: int = 0
    """Offsets that hold no record on the broker and have no fate: transaction markers."""
    before: int = 0
    """Events whose records retention has removed since; each has its fate in the ledger."""
    missed: int = 0
    """Offsets that retention had removed before they were read (recorded gaps)."""
    unknown: int = 0
    """Offsets before ``start`` without record, fate or gap; the broker cannot tell any more."""
    unread: int = 0
    """Offsets from ``stop`` to the broker's end."""
    without_fate: Offsets = field(default_factory=Offsets)
    without_record: Offsets = field(default_factory=Offsets)

    @property
    def differences(self) -> list[str]:
        """One line each; empty when stream and ledger agree."""
        where = f"{self.topic} partition {self.partition}"
        found = []
        if self.without_fate.count:
            found.append(
                f"{where}: records passed over without a fate: {self.without_fate.count} "
                f"(offsets {self.without_fate})"
            )
        if self.without_record.count:
            found.append(
                f"{where}: events that have no record on the broker: {self.without_record.count} "
                f"(offsets {self.without_record}); it lost data, or the topic is compacted"
            )
        return found


@dataclass(frozen=True)
class StreamAudit:
    """The whole comparison."""

    partitions: list[PartitionAudit]
    notes: list[str]
    """What could not be compared, and why nothing is lost by that."""

    @property
    def differences(self) -> list[str]:
        return [line for partition in self.partitions for line in partition.differences]


def audit_stream(
    settings: StreamSettings,
    inspector: LedgerInspector,
    progress: Callable[[int, int], None] | None = None,
) -> StreamAudit:
    """Read again everything that the ledger has consumed and the broker still has.

    The updater may go on meanwhile: only what it had consumed at the start is compared.

    Args:
        progress: called with the offsets done and the total.

    Raises:
        StreamUnavailable: the broker cannot be read.
    """
    with admin_session(settings) as admin:
        states = describe(admin, settings, JOINED)
    present, notes = _present(inspector.consumed(), states)
    partitions = []
    with Scanner(settings, "audit") as scanner:
        starts = {
            one.topic_partition: scanner.beginning(topic_name(settings, one.topic), one.partition)
            for one in present
        }
        total = sum(max(0, one.next_offset - starts[one.topic_partition]) for one in present)
        done = 0
        for one in present:

            def report(so_far: int, base: int = done) -> None:
                if progress is not None:
                    progress(base + so_far, total)

            partitions.append(_audit_partition(settings, scanner, inspector, one, report))
            done += max(0, one.next_offset - starts[one.topic_partition])
    return StreamAudit(partitions, notes + _unreadable(partitions))


def _present(
    consumed: Iterable[Consumed], states: dict[Topic, TopicState]
) -> tuple[list[Consumed], list[str]]:
    """The partitions that the broker still has, and a note for each topic that is gone."""
    present, gone = [], dict[tuple[Topic, str], int]()
    for one in consumed:
        state = states.get(one.topic)
        if state is not None and state.topic_id == one.topic_id:
            present.append(one)
        else:
            gone[one.topic, one.topic_id] = gone.get((one.topic, one.topic_id), 0) + one.events
    notes = [
        f"{topic} was deleted or made again since: {events} events of the old one are only in the "
        "ledger"
        for (topic, _), events in gone.items()
    ]
    return present, notes


def _unreadable(partitions: Iterable[PartitionAudit]) -> list[str]:
    return [
        f"{one.topic} partition {one.partition}: {one.unknown} offsets before {one.start} have "
        "neither a fate nor a gap: transaction markers, as far as anybody can tell by now"
        for one in partitions
        if one.unknown
    ]


def _audit_partition(
    settings: StreamSettings,
    scanner: Scanner,
    inspector: LedgerInspector,
    one: Consumed,
    progress: Callable[[int], None],
) -> PartitionAudit:
    name = topic_name(settings, one.topic)
    for _ in range(_ATTEMPTS):
        start = scanner.beginning(name, one.partition)
        found = PartitionAudit(one.topic, one.partition, start, one.next_offset)
        try:
            _compare(
                found, _records(scanner, name, found, progress), inspector, one.topic_partition
            )
            break
        except RangeGone:
            if scanner.beginning(name, one.partition) <= start:
                raise
    else:
        raise StreamUnavailable(
            f"topic {name} partition {one.partition}: retention removes records faster than they "
            "can be read: audit with --offline"
        )
    found.unread = max(0, scanner.end(name, one.partition) - max(start, one.next_offset))
    found.before = inspector.count_events(one.topic_partition, start)
    gaps = inspector.missed(one.topic, one.partition)
    found.missed = sum(max(0, resumed - expected) for expected, resumed in gaps)
    first = inspector.first_offset(one.topic_partition)
    # What was never expected (retention had passed before the first read) is no gap.
    expected_from = min([first, *(gap[0] for gap in gaps)]) if first is not None else start
    before_start = max(0, min(start, one.next_offset) - expected_from)
    missed_before = sum(max(0, min(resumed, start) - expected) for expected, resumed in gaps)
    found.unknown = max(0, before_start - found.before - missed_before)
    return found


def _records(
    scanner: Scanner, name: str, found: PartitionAudit, progress: Callable[[int], None]
) -> Iterator[int]:
    """Offsets of the records in the range, as the broker gives them."""
    if found.start >= found.stop:
        return
    for batch in scanner.read(name, found.partition, found.start, found.stop):
        progress(batch[-1].offset + 1 - found.start if batch else 0)
        yield from (raw.offset for raw in batch)


def _compare(
    found: PartitionAudit, records: Iterator[int], inspector: LedgerInspector, topic_partition: int
) -> None:
    """Merge two ascending lists of offsets; what is in one only is a difference."""
    events = inspector.event_offsets(topic_partition, found.start, found.stop)
    nothing_left = found.stop
    record, event = next(records, nothing_left), next(events, nothing_left)
    seen = 0
    while record < nothing_left or event < nothing_left:
        seen += 1
        if record <= event:
            found.records += 1
        if event <= record:
            found.events += 1
        if record < event:
            found.without_fate.add(record)
            record = next(records, nothing_left)
        elif event < record:
            found.without_record.add(event)
            event = next(events, nothing_left)
        else:
            record, event = next(records, nothing_left), next(events, nothing_left)
    found.empty = max(0, found.stop - found.start) - seen
