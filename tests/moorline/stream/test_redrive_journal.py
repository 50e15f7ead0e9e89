"""Which letters were put back: a set of places that survives in a file, however it came about."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moorline.stream import Topic
from moorline.stream.redrive import REDRIVES_HEADER, Journal, Letter

LETTER = Letter(Topic.FEEDBACK, "feedback.v1.dlq", "id", 0, 0, 0, b"k", b"v", (), {})
places = st.tuples(st.sampled_from(["id", "made again"]), st.integers(0, 1), st.integers(0, 12))


def letter(place: tuple[str, int, int]) -> Letter:
    incarnation, partition, offset = place
    return replace(LETTER, incarnation=incarnation, partition=partition, offset=offset)


@given(st.lists(st.lists(places, max_size=6), max_size=6))
def test_exactly_what_was_noted_is_known_after_a_restart(
    batches: list[list[tuple[str, int, int]]],
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "redriven.json"
        journal = Journal(path)
        for batch in batches:
            journal.note([letter(place) for place in batch])
            journal = Journal(path)
        noted = {place for batch in batches for place in batch}
        for incarnation in ("id", "made again"):
            for partition in (0, 1):
                for offset in range(14):
                    place = (incarnation, partition, offset)
                    assert journal.has(letter(place)) == (place in noted)


def test_neighbours_are_one_range(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "redriven.json")
    for start in range(0, 1000, 100):
        journal.note([letter(("id", 0, offset)) for offset in range(start, start + 100)])
    assert (tmp_path / "redriven.json").stat().st_size < 100


@pytest.mark.parametrize(
    ("value", "times"), [(b"2", 2), (b"", 0), (b"-1", 0), (b"many", 0), (b"\xff", 0)]
)
def test_a_forged_count_of_redrives_is_none(value: bytes, times: int) -> None:
    assert replace(LETTER, original_headers=((REDRIVES_HEADER, value),)).redrives == times


@pytest.mark.parametrize(
    "damage", [b"", b"[", b"[1]", b'{"a": 1}', b'{"a": [[1]]}', b'{"a": [["x", 2]]}']
)
def test_a_damaged_journal_is_refused_with_the_remedy(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "redriven.json"
    path.write_bytes(damage)
    with pytest.raises(ValueError, match="is damaged: remove it"):
        Journal(path)
