"""The comparison of estimators: its numbers, worked out by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.estimators import as_markdown, compare


def test_bias_decisions_and_misses_are_those_worked_out_by_hand() -> None:
    estimates = {
        "binary": torch.tensor([0.00, 0.04, 0.10, 0.20]),
        "exact": torch.tensor([0.02, 0.08, 0.10, 0.20]),
    }
    binary, exact = compare(estimates, limit=0.05)
    assert binary["bias"] == pytest.approx(-0.015)
    assert binary["bias_share"] == pytest.approx(-0.15)
    assert binary["error_sd"] == pytest.approx(0.0191485, rel=1e-4)
    assert binary["over_limit_share"] == 0.5
    assert binary["decision_agreement"] == 0.75
    assert binary["missed_share"] == pytest.approx(1 / 3)
    assert exact["bias"] == exact["error_sd"] == exact["missed_share"] == 0.0
    assert exact["decision_agreement"] == 1.0


def test_the_report_has_a_row_for_every_estimator_and_cost() -> None:
    estimates = {name: torch.tensor([0.1, 0.2]) for name in ("binary", "top-8", "exact")}
    table = {
        "divergence": "kl",
        "limit": 0.05,
        "temperature": 1.0,
        "top_p": 1.0,
        "tokens": 2,
        "rows": compare(estimates, 0.05),
    }
    text = as_markdown(
        {
            "model": "m",
            "config": {"before": 1, "later": 2, "batch": 3},
            "tables": [table],
            "cpu_seconds_of_an_update": {"binary": 2.0, "exact": 3.0},
        }
    )
    assert "| top-8 | 0.1500 | +0.0000 |" in text
    assert "| exact | 3.0 | 1.50x |" in text
