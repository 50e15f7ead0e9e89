"""Alarms: when they ring, and that they can be seen."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path

import pytest

from moorline.metrics import UPDATE_ALARM, UPDATE_DIAGNOSTIC
from updater.learning.diagnostics import ALARMS, Alarm, export_metrics, ringing_alarms

GOOD = {"mean_ratio": 1.0, "ess_share": 1.0, "k1_nats": 0.0, "chi2": 0.0, "mismatch_nats": 0.04}


def shown(metric: object, name: str) -> float:
    return metric.labels(name=name)._value.get()  # type: ignore[attr-defined,no-any-return]


def test_a_fresh_batch_rings_nothing() -> None:
    assert set(ringing_alarms(GOOD)) == {alarm.name for alarm in ALARMS}
    assert not any(ringing_alarms(GOOD).values())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mean_ratio", 0.49),
        ("mean_ratio", 2.01),
        ("ess_share", 0.29),
        ("k1_nats", 0.11),
        ("k1_nats", -0.11),
        ("chi2", 1.1),
        ("mismatch_nats", 0.11),
        ("mismatch_nats", math.nan),
    ],
)
def test_each_alarm_rings_outside_its_levels_and_is_logged_when_it_rings_and_when_it_clears(
    name: str, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    measured = {**GOOD, name: value}
    assert [alarm for alarm, rings in ringing_alarms(measured).items() if rings] == [name]
    with caplog.at_level(logging.WARNING, logger="moorline.diagnostics"):
        export_metrics(measured)
    (record,) = caplog.records
    assert (record.__dict__["event"], record.__dict__["check"]) == ("update_alarm_rings", name)
    assert shown(UPDATE_ALARM, name) == 1.0
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="moorline.diagnostics"):
        export_metrics(GOOD)
        export_metrics(GOOD)
    (record,) = caplog.records
    assert (record.__dict__["event"], record.__dict__["check"]) == ("update_alarm_cleared", name)
    assert shown(UPDATE_ALARM, name) == 0.0


def test_what_was_not_measured_this_time_is_not_shown_from_last_time() -> None:
    export_metrics(GOOD)
    export_metrics({name: value for name, value in GOOD.items() if name != "mismatch_nats"})
    names = {labels["name"] for _, labels, *_ in UPDATE_DIAGNOSTIC.collect()[0].samples}
    assert "ess_share" in names
    assert "mismatch_nats" not in names


def test_the_documented_levels_are_those_that_ring() -> None:
    text = (Path(__file__).parents[3] / "docs" / "concepts.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\S*) ?\| (\S*) ?\| (.+) \|$", text, re.MULTILINE)
    documented = {
        name: (float(low or -math.inf), float(high or math.inf), meaning)
        for name, low, high, meaning in rows
    }
    assert documented == {one.name: (one.low, one.high, one.meaning) for one in ALARMS}


@pytest.mark.parametrize("alarm", ALARMS, ids=lambda alarm: alarm.name)
def test_exactly_at_a_level_nothing_rings_and_a_hair_beyond_it_does(alarm: Alarm) -> None:
    for level, beyond in ((alarm.low, -math.inf), (alarm.high, math.inf)):
        assert not alarm.rings(level)
        if math.isfinite(level):
            assert alarm.rings(math.nextafter(level, beyond))
    assert alarm.rings(math.nan)
