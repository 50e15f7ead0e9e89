"""Writes and checks the files that pin every package of an installation.

python deploy/constraints/pins.py check    does this environment equal its pins, and pyproject.toml?
python deploy/constraints/pins.py write    pin what this environment has
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

FOLDER = Path(__file__).parent
PYPROJECT = FOLDER.parents[1] / "pyproject.toml"
# Moorline itself, and the tool that installs: each environment brings its own.
UNPINNED = {"moorline", "pip"}
EXTRAS = ("demo", "dev")


def read_pins(text: str) -> dict[str, Requirement]:
    """Gives the pins that hold for this interpreter and machine, by normalized name."""
    lines = (line.strip() for line in text.splitlines())
    pins = (Requirement(line) for line in lines if line and not line.startswith("#"))
    return {
        canonicalize_name(pin.name): pin
        for pin in pins
        if pin.marker is None or pin.marker.evaluate()
    }


def declared_dependencies(pyproject: str, hardware: str) -> list[Requirement]:
    """Gives what pyproject.toml asks for on that hardware, with the extras of `make setup`."""
    project = tomllib.loads(pyproject)["project"]
    optional = project["optional-dependencies"]
    groups = [project["dependencies"], *(optional[extra] for extra in (hardware, *EXTRAS))]
    return [Requirement(text) for group in groups for text in group]


def find_drift(
    pins: Mapping[str, Requirement],
    installed: Mapping[str, str],
    declared: Iterable[Requirement],
) -> list[str]:
    """Says each way in which the pins differ from the environment or from pyproject.toml."""
    found = []
    for name, version in sorted(installed.items()):
        if name not in pins:
            found.append(f"{name} {version} is installed and not pinned")
        elif not pins[name].specifier.contains(version, prereleases=True):
            found.append(f"{name} {version} is installed, and {pins[name]} is pinned")
    for wanted in declared:
        pin = pins.get(canonicalize_name(wanted.name))
        if pin is None:
            found.append(f"{wanted} is in pyproject.toml and not pinned")
            continue
        versions = [one.version for one in pin.specifier if one.operator == "=="]
        if len(versions) != 1:
            found.append(f"{pin} does not pin one version")
        elif not wanted.specifier.contains(versions[0], prereleases=True):
            found.append(f"{wanted} is in pyproject.toml, and {pin} is pinned")
    return found


def render(head: str, installed: Mapping[str, str], kept: Iterable[str]) -> str:
    """Gives the text of a constraints file: the head, a pin for each package, the kept lines."""
    # Without the local part: torch is 2.13.0+cpu here and has another build elsewhere.
    pins = [f"{name}=={Version(version).public}" for name, version in installed.items()]
    return "\n".join([head, *sorted(pins), *kept]) + "\n"


def read_environment() -> dict[str, str]:
    """Gives the version of every package that this interpreter finds, by normalized name."""
    found = {canonicalize_name(one.name): one.version for one in metadata.distributions()}
    return {name: version for name, version in found.items() if name not in UNPINNED}


def main(command: str) -> int:
    """Does what the command line asks for; gives the exit status."""
    installed = read_environment()
    hardware = "gpu" if "vllm" in installed else "cpu"
    path = FOLDER / f"{hardware}.txt"
    text = path.read_text()
    if command == "write":
        # The head and the pins for other interpreters are written by hand, and kept.
        lines = text.splitlines()
        head = "\n".join(line for line in lines if line.startswith("#"))
        kept = [line for line in lines if ";" in line and not line.startswith("#")]
        path.write_text(render(head, installed, kept))
        print(f"{path}: {len(installed)} packages pinned")
        return 0
    drift = find_drift(
        read_pins(text), installed, declared_dependencies(PYPROJECT.read_text(), hardware)
    )
    for line in drift:
        print(f"constraints: {line}", file=sys.stderr)
    if drift:
        print("constraints: `make constraints` pins what a fresh installation gets")
    return 1 if drift else 0


if __name__ == "__main__":
    if sys.argv[1:] not in (["check"], ["write"]):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))
