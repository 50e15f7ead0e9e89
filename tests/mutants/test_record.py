"""The recorded faults still fit the code that they are in."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.record import Mutant, read_mutants


def test_every_recorded_fault_can_still_be_put_in_and_its_tests_are_there() -> None:
    assert [why for mutant in read_mutants() if (why := mutant.why_stale())] == []


def test_no_fault_is_recorded_twice() -> None:
    mutants = read_mutants()
    assert len({mutant.what for mutant in mutants}) == len(mutants)
    assert len({(one.file, one.old, one.new) for one in mutants}) == len(mutants)
    assert all(one.old != one.new for one in mutants)


@pytest.mark.parametrize(
    ("source", "tests", "why"),
    [
        ("a = 1\n", "def test_a() -> None: ...", None),
        ("a = 2\n", "def test_a() -> None: ...", "0 times"),
        ("a = 1\na = 1\n", "def test_a() -> None: ...", "2 times"),
        ("a = 1\n", "def test_b() -> None: ...", "no test"),
    ],
)
def test_a_stale_record_is_told_with_its_reason(
    tmp_path: Path, source: str, tests: str, why: str | None
) -> None:
    (tmp_path / "a.py").write_text(source)
    (tmp_path / "test_a.py").write_text(tests)
    mutant = Mutant("wrong", "a.py", "a = 1", "a = 3", ("test_a.py::test_a",))
    found = mutant.why_stale(tmp_path)
    assert found is None if why is None else why in str(found)
