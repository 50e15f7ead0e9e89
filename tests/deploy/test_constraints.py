"""The pins: each dependency has one that fits, and a drift of any kind is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement

from deploy.constraints import pins

ROOT = Path(__file__).parents[2]
FILE = """# a head
torch==2.13.0
prometheus-client==0.26.0
six==1.17.0; python_version > "3.11"
colorama==0.4.6; sys_platform == "none"
"""
INSTALLED = {"torch": "2.13.0+cpu", "prometheus-client": "0.26.0"}
DECLARED = [Requirement("torch>=2.11"), Requirement("prometheus_client>=0.22")]


@pytest.mark.parametrize("hardware", ["cpu", "gpu"])
def test_every_declared_dependency_is_pinned_to_a_version_it_admits(hardware: str) -> None:
    text = (ROOT / f"deploy/constraints/{hardware}.txt").read_text()
    declared = pins.declared_dependencies((ROOT / "pyproject.toml").read_text(), hardware)
    assert len(declared) > 25
    assert pins.find_drift(pins.read_pins(text), {}, declared) == []


@pytest.mark.parametrize("hardware", ["cpu", "gpu"])
def test_every_line_pins_one_version_of_one_package(hardware: str) -> None:
    text = (ROOT / f"deploy/constraints/{hardware}.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    found = [Requirement(line) for line in lines]
    assert len({pin.name for pin in found}) == len(found) > 150
    assert all(len(pin.specifier) == 1 and "==" in str(pin.specifier) for pin in found)


def test_an_environment_that_equals_its_pins_has_no_drift() -> None:
    assert pins.find_drift(pins.read_pins(FILE), INSTALLED, DECLARED) == []


@pytest.mark.parametrize(
    ("installed", "declared", "said"),
    [
        ({"torch": "2.14.0"}, [], "torch 2.14.0 is installed, and torch==2.13.0 is pinned"),
        ({"ipdb": "0.13"}, [], "ipdb 0.13 is installed and not pinned"),
        ({"colorama": "0.4.6"}, [], "colorama 0.4.6 is installed and not pinned"),
        ({}, ["torch>=2.14"], "torch>=2.14 is in pyproject.toml, and torch==2.13.0 is pinned"),
        ({}, ["numpy>=2"], "numpy>=2 is in pyproject.toml and not pinned"),
    ],
)
def test_a_drift_is_named(installed: dict[str, str], declared: list[str], said: str) -> None:
    found = pins.find_drift(pins.read_pins(FILE), installed, [Requirement(one) for one in declared])
    assert found == [said]


def test_a_pin_that_leaves_a_choice_is_named() -> None:
    found = pins.find_drift(pins.read_pins("torch>=2.13\n"), {}, DECLARED[:1])
    assert found == ["torch>=2.13 does not pin one version"]


def test_a_written_file_pins_what_is_installed_for_every_build_of_it() -> None:
    kept = ['six==1.17.0; python_version > "3.11"']
    text = pins.render("# a head", INSTALLED, kept)
    assert text == f"# a head\nprometheus-client==0.26.0\ntorch==2.13.0\n{kept[0]}\n"
    assert pins.find_drift(pins.read_pins(text), INSTALLED, DECLARED) == []
