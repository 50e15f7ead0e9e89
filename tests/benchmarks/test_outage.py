"""The outage benchmark's arithmetic: a fault against the sound phases around it."""

from __future__ import annotations

import pytest

from benchmarks.outage import Phase, compare, report


def phase(broker: str, p50: float, p95: float) -> Phase:
    return Phase(broker, 10, 0, p50, p95, 0, 0)


def test_each_fault_is_compared_with_what_was_before_and_after_it() -> None:
    phases = [
        phase("sound", 1.0, 2.0),
        phase("gone", 1.5, 2.0),
        phase("sound", 2.0, 2.0),
        phase("slow", 3.0, 6.0),
        phase("sound", 4.0, 4.0),
    ]
    gone, slow = compare(phases)
    assert (gone["broker"], slow["broker"]) == ("gone", "slow")
    assert gone["p50_ratio"] == pytest.approx(1.0)
    assert gone["p50_ratio_of_sound"] == pytest.approx(2.0)
    assert gone["p95_ratio"] == pytest.approx(1.0)
    assert slow["p50_ratio"] == pytest.approx(1.0)
    assert slow["p95_ratio"] == pytest.approx(2.0)


def test_the_report_has_a_row_for_each_fault_and_each_phase() -> None:
    phases = [phase(name, 1.0, 2.0) for name in ("sound", "gone", "sound")]
    result = {
        "model": "tiny",
        "cores": 2,
        "clients": 2,
        "reply_tokens": 16,
        "seconds": 60.0,
        "load_at_end": 1.0,
        "phases": [vars(one) for one in phases],
        "ratios": compare(phases),
    }
    rows = [line for line in report(result).splitlines() if line.startswith("| gone |")]
    assert rows == [
        "| gone | 1.00 | 1.00 | 1.00 | 1.00 |",
        "| gone | 10 | 0 | 1.000 | 2.000 | 0 | 0 |",
    ]
