"""The stream against the ledger, offset by offset: each difference in a figure of its own."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from moorline.settings import StreamSettings
from moorline.stream import StreamUnavailable, Topic
from moorline.stream.scan import RangeGone
from updater.audit import PartitionAudit, _audit_partition, _present, _unreadable
from updater.ledger.inspection import Consumed

WORDS = Topic.FEEDBACK


class Broker:
    """A partition whose records are at these offsets; retention overtakes ``passes`` reads."""

    def __init__(self, records: list[int], start: int, end: int, passes: int = 0) -> None:
        self._records, self._start, self._end, self._passes = records, start, end, passes

    def beginning(self, _topic: str, _partition: int) -> int:
        return self._start

    def end(self, _topic: str, _partition: int) -> int:
        return self._end

    def read(self, _topic: str, _partition: int, start: int, stop: int) -> Iterator[list[Any]]:
        if self._passes:
            self._passes -= 1
            self._start += 1
            raise RangeGone("passed")
        inside = [one for one in self._records if start <= one < stop]
        for place in range(0, len(inside), 2):
            yield [SimpleNamespace(offset=one) for one in inside[place : place + 2]]


class Books:
    """A ledger with events at these offsets and these gaps."""

    def __init__(self, events: list[int], gaps: list[tuple[int, int]] | None = None) -> None:
        self._events, self._gaps = events, gaps or []

    def event_offsets(self, _partition: int, start: int, stop: int) -> Iterator[int]:
        return iter([one for one in self._events if start <= one < stop])

    def count_events(self, _partition: int, before: int) -> int:
        return sum(one < before for one in self._events)

    def missed(self, _topic: Topic, _partition: int) -> list[tuple[int, int]]:
        return self._gaps

    def first_offset(self, _partition: int) -> int | None:
        return min(self._events, default=None)


def compared(broker: Broker, books: Books, next_offset: int) -> PartitionAudit:
    one = Consumed(1, WORDS, "t0", 3, next_offset, 0)
    return _audit_partition(StreamSettings(), broker, books, one, lambda _: None)  # type: ignore[arg-type]


def test_books_that_are_right_have_no_difference() -> None:
    found = compared(Broker([0, 1, 2, 3, 4], 0, 5), Books([0, 1, 2, 3, 4]), 5)
    assert found.differences == []
    assert (found.records, found.events, found.empty, found.unread) == (5, 5, 0, 0)
    assert (found.before, found.missed, found.unknown) == (0, 0, 0)


def test_a_record_without_fate_and_an_event_without_record_are_told_apart() -> None:
    found = compared(Broker([0, 1, 3, 5], 0, 9), Books([0, 2, 3, 4]), 6)
    assert (found.without_fate.count, found.without_fate.first) == (2, [1, 5])
    assert (found.without_record.count, found.without_record.first) == (2, [2, 4])
    assert (found.records, found.events, found.empty, found.unread) == (4, 4, 0, 3)
    passed_over, invented = found.differences
    assert passed_over.startswith("feedback.v1 partition 3: records passed over without a fate: 2")
    assert "(offsets 1, 5)" in passed_over
    assert invented.startswith("feedback.v1 partition 3: events that have no record on the broker")
    assert "(offsets 2, 4)" in invented


def test_one_difference_alone_is_a_difference() -> None:
    (line,) = compared(Broker([0, 1], 0, 2), Books([0]), 2).differences
    assert "without a fate: 1 (offsets 1)" in line
    (line,) = compared(Broker([0], 0, 2), Books([0, 1]), 2).differences
    assert "no record on the broker: 1 (offsets 1)" in line


def test_many_offsets_are_counted_and_the_first_five_named() -> None:
    found = compared(Broker(list(range(7)), 0, 7), Books([]), 7)
    assert found.without_fate.count == 7
    assert str(found.without_fate) == "0, 1, 2, 3, 4, ..."
    assert str(compared(Broker(list(range(5)), 0, 5), Books([]), 5).without_fate) == "0, 1, 2, 3, 4"


def test_a_transaction_marker_is_an_empty_offset() -> None:
    found = compared(Broker([0, 2], 0, 4), Books([0, 2]), 4)
    assert (found.empty, found.differences) == (2, [])


def test_what_retention_removed_is_before_missed_or_unknown() -> None:
    # Read from 10 on: 10-12 have fates, 13-15 were a gap, 16 is nobody's, 17-19 have fates.
    books = Books([10, 11, 12, 17, 18, 19, 20], gaps=[(13, 16)])
    found = compared(Broker([20], 20, 21), books, 21)
    assert (found.before, found.missed, found.unknown, found.differences) == (6, 3, 1, [])
    (note,) = _unreadable([found])
    assert note.startswith("feedback.v1 partition 3: 1 offsets before 20")
    assert _unreadable([compared(Broker([], 0, 0), Books([]), 0)]) == []


def test_a_gap_that_reaches_beyond_the_start_counts_before_it_only() -> None:
    found = compared(Broker([], 15, 30), Books([10, 11], gaps=[(12, 20)]), 20)
    assert (found.before, found.missed, found.unknown) == (2, 8, 0)
    assert found.unread == 10


def test_a_gap_that_reaches_beyond_the_start_hides_no_offset_before_it() -> None:
    # 12 and 13 are nobody's; of the gap 14-19 only 14 is before the start.
    found = compared(Broker([], 15, 30), Books([10, 11], gaps=[(14, 20)]), 20)
    assert (found.before, found.missed, found.unknown) == (2, 6, 2)


def test_a_gap_before_the_first_event_was_expected_too() -> None:
    found = compared(Broker([20], 20, 21), Books([20], gaps=[(5, 18)]), 21)
    assert (found.missed, found.unknown) == (13, 2)


def test_a_partition_that_retention_emptied_behind_the_ledger_reads_nothing() -> None:
    found = compared(Broker([30], 30, 31), Books(list(range(20))), 20)
    assert (found.records, found.events, found.empty) == (0, 0, 0)
    assert (found.before, found.unread, found.unknown) == (20, 1, 0)


@pytest.mark.parametrize("passes", [0, 1, 4])
def test_a_read_that_retention_overtakes_begins_again(passes: int) -> None:
    found = compared(Broker(list(range(9)), 0, 9, passes), Books(list(range(9))), 9)
    assert (found.start, found.records, found.before) == (passes, 9 - passes, passes)


def test_a_read_that_retention_always_overtakes_ends_with_the_remedy() -> None:
    with pytest.raises(StreamUnavailable, match="--offline"):
        compared(Broker(list(range(99)), 0, 99, passes=99), Books([]), 99)


def test_a_topic_that_was_made_again_is_a_note_with_its_events() -> None:
    old = [Consumed(n, WORDS, "old", n, 5, 4) for n in range(2)]
    new = Consumed(3, WORDS, "new", 0, 5, 7)
    states: Any = {WORDS: SimpleNamespace(topic_id="new")}
    present, notes = _present([*old, new], states)
    assert present == [new]
    (note,) = notes
    assert note.startswith("feedback.v1 was deleted or made again since: 8 events")
    assert _present([new], {}) == ([], [note.replace("8 events", "7 events")])
