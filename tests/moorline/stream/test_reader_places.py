"""Where reading begins, and what is told of records that are gone: every side of each limit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from moorline.settings import StreamSettings
from moorline.stream import Gap, GapCause, StreamInvalid, Topic
from moorline.stream.reader import Reader
from moorline.stream.topics import TopicState

WORDS = Topic.FEEDBACK


class Consumer:
    """A client of a broker whose partitions begin at this offset."""

    def __init__(self, beginning: int) -> None:
        self._beginning = beginning
        self.sought: dict[int, int] = {}

    def assign(self, partitions: list[Any]) -> None:
        self._partitions = partitions

    def beginning_offsets(self, partitions: list[Any], **_: Any) -> dict[Any, int]:
        return dict.fromkeys(partitions, self._beginning)

    def seek(self, partition: Any, offset: int) -> None:
        self.sought[partition.partition] = offset


def placed(
    beginning: int, wanted: dict[tuple[Topic, int], tuple[str, int]], **settings: Any
) -> tuple[dict[int, int], list[Gap]]:
    """Where a reader with these positions goes in a topic of two partitions, and its gaps."""
    reader = Reader(StreamSettings(bootstrap="127.0.0.1:1", **settings), [WORDS])
    reader.seek(wanted)
    consumer = Consumer(beginning)
    reader._consumer = SimpleNamespace(client=consumer, alive=True)  # type: ignore[assignment]
    reader._place({WORDS: TopicState(WORDS, "now", 2)})
    return consumer.sought, reader.gaps()


@pytest.mark.parametrize("beginning", [4, 5])
def test_a_position_that_is_still_there_is_gone_to_without_a_gap(beginning: int) -> None:
    sought, gaps = placed(beginning, {(WORDS, n): ("now", 5) for n in range(2)})
    assert sought == {0: 5, 1: 5}
    assert gaps == []


def test_records_that_retention_took_are_a_gap_of_each_partition() -> None:
    sought, gaps = placed(6, {(WORDS, 0): ("now", 5), (WORDS, 1): ("now", 2)})
    assert sought == {0: 6, 1: 6}
    assert gaps == [
        Gap(WORDS, 0, 5, 6, GapCause.RETENTION),
        Gap(WORDS, 1, 2, 6, GapCause.RETENTION),
    ]


def test_a_new_partition_of_a_known_topic_was_expected_from_its_first_record() -> None:
    sought, gaps = placed(3, {(WORDS, 0): ("now", 5)})
    assert sought == {0: 5, 1: 3}
    assert gaps == [Gap(WORDS, 1, 0, 3, GapCause.RETENTION)]


def test_what_was_gone_before_the_first_read_was_never_expected() -> None:
    assert placed(7, {}) == ({0: 7, 1: 7}, [])


def test_a_topic_made_again_is_read_from_its_start_only_where_that_is_accepted() -> None:
    wanted = {(WORDS, n): ("old", 5) for n in range(2)}
    with pytest.raises(StreamInvalid, match="ACCEPT_NEW_TOPICS"):
        placed(0, wanted)
    sought, gaps = placed(0, wanted, accept_new_topics=True)
    assert sought == {0: 0, 1: 0}
    assert gaps == [Gap(WORDS, n, 5, 0, GapCause.TOPIC_RECREATED) for n in range(2)]


def test_a_gap_is_told_once() -> None:
    reader = Reader(StreamSettings(bootstrap="127.0.0.1:1"), [WORDS])
    gap = Gap(WORDS, 0, 1, 2, GapCause.RETENTION)
    reader._record_gaps([gap])
    reader._record_gaps([gap])
    assert reader.gaps() == [gap, gap]
    assert reader.gaps() == []
