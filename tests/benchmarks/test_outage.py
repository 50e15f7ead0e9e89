"""The outage benchmark: its report says what was measured."""

from __future__ import annotations

from dataclasses import asdict

from benchmarks.outage import Phase, report


def test_the_report_compares_the_two_servers_in_every_phase() -> None:
    phase = Phase("gone", 10, 0, 1.5, 1.0, 3.0, 4.0, 7, 2)
    result = {
        "model": "tiny",
        "cores": 2,
        "clients": 2,
        "reply_tokens": 16,
        "seconds": 60.0,
        "load_at_end": 1.0,
        "phases": [
            asdict(phase) | {"p50_ratio": phase.p50_ratio, "p95_ratio": phase.p95_ratio},
        ],
    }
    assert report(result).splitlines()[-1] == (
        "| gone | 1.50 | 0.75 | 10 | 0 | 1.500 | 3.000 | 7 | 2 |"
    )
