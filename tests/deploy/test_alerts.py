"""The alerting rules: about metrics that exist, with a remedy each, true to their own tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from moorline import metrics

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/prometheus"
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_every_alert_is_about_metrics_that_exist_and_says_what_to_do(rule: dict[str, Any]) -> None:
    named = set(re.findall(r"moorline_\w+", rule["expr"]))
    assert named
    assert named <= {row.name for row in metrics.TABLE}
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    headings = re.findall(r"^## (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert anchor in {re.sub(r"[^\w ]", "", one).lower().replace(" ", "-") for one in headings}


def test_the_rules_fire_when_they_should() -> None:
    beside_python = Path(sys.executable).parent
    promtool = shutil.which("promtool", path=f"{beside_python}{os.pathsep}{os.environ['PATH']}")
    if promtool is None:
        pytest.skip("promtool is missing: run deploy/promtool.sh, or install Prometheus")
    done = subprocess.run(
        [promtool, "test", "rules", "alerts_test.yml"], cwd=FOLDER, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_is_tried_on_pods_that_were_deleted() -> None:
    groups = yaml.safe_load((FOLDER / "alerts_test.yml").read_text())["tests"]
    (deleted,) = [one for one in groups if one["name"] == "pods that were deleted alert nobody"]
    tried = {case["alertname"] for case in deleted["alert_rule_test"]}
    assert {rule["alert"] for rule in RULES} <= tried
