"""One table of metrics: each documented, each once, each with its unit, none a door for words."""

from __future__ import annotations

import re

import pytest
from prometheus_client.parser import text_string_to_metric_families

from moorline import metrics

UNITS = ("_seconds", "_bytes", "_nats", "_events", "_examples", "_total")
UNITLESS = {
    "moorline_broker_connected",
    "moorline_policy_version",
    "moorline_pinned",
    "moorline_pseudonym_keys",
    "moorline_step_scale",
    "moorline_store_newest_version",
    "moorline_update_alarm",
    "moorline_update_crashes",
    "moorline_update_diagnostic",
    "moorline_updater_phase",
}
PRIVATE = {"user", "tenant", "rater", "interaction_id", "prompt", "reply", "text"}


@pytest.mark.parametrize("row", metrics.TABLE, ids=lambda row: row.name)
def test_every_metric_is_named_and_documented(row: metrics.MetricRow) -> None:
    assert re.fullmatch(r"moorline_[a-z0-9_]+", row.name)
    assert len(row.help) > 15
    assert row.name.endswith(UNITS) or row.name in UNITLESS
    assert row.name.endswith("_total") == (row.kind == "counter")
    assert not PRIVATE.intersection(row.labels)


def test_every_metric_is_there_once() -> None:
    names = [row.name for row in metrics.TABLE]
    assert len(names) == len(set(names))


def test_page_is_what_prometheus_reads_and_says_the_same_as_the_table() -> None:
    page = metrics.render().decode()
    families = {family.name: family for family in text_string_to_metric_families(page)}
    for row in metrics.TABLE:
        family = families[row.name.removesuffix("_total")]
        assert family.type == row.kind
        assert family.documentation == row.help
