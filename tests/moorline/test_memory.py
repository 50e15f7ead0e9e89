"""Free memory is what the tightest of machine and containers leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from moorline.memory import available_memory_bytes

MIB = 2**20


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """1,000 MiB are available on the machine."""
    (tmp_path / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:  {1000 * 1024} kB\n")
    return tmp_path


def group(path: Path, limit: str | int, used: int, cache: int = 0, *, v1: bool = False) -> None:
    path.mkdir(parents=True, exist_ok=True)
    names = ("limit_in_bytes", "usage_in_bytes") if v1 else ("max", "current")
    for name, value in zip(names, (limit, used), strict=True):
        (path / f"memory.{name}").write_text(f"{value}\n")
    word = "total_inactive_file" if v1 else "inactive_file"
    (path / "memory.stat").write_text(f"anon 1\n{word} {cache}\n")


def available(machine: Path, groups: str) -> int | None:
    (machine / "own").write_text(groups)
    return available_memory_bytes(machine / "meminfo", machine / "own", machine / "cgroup")


def test_without_a_limit_it_is_the_machine(machine: Path) -> None:
    group(machine / "cgroup/a", "max", 5 * MIB)
    assert available(machine, "0::/a\n") == 1000 * MIB


def test_the_tightest_of_nested_groups_counts(machine: Path) -> None:
    group(machine / "cgroup/a/b", "max", 5 * MIB)
    group(machine / "cgroup/a", 300 * MIB, 100 * MIB, cache=50 * MIB)
    assert available(machine, "0::/a/b\n") == 250 * MIB
    group(machine / "cgroup/a/b", 120 * MIB, 100 * MIB)
    assert available(machine, "0::/a/b\n") == 20 * MIB


def test_a_container_that_sees_its_own_group_as_the_root(machine: Path) -> None:
    group(machine / "cgroup", 64 * MIB, 4 * MIB)
    for path in ("/", "/docker/of-the-host", "/../.."):
        assert available(machine, f"0::{path}\n") == 60 * MIB


def test_version_1(machine: Path) -> None:
    own = "5:cpu,cpuacct:/a\n4:memory:/a\n1:name=systemd:/a\n"
    group(machine / "cgroup/memory/a", 80 * MIB, 30 * MIB, v1=True)
    assert available(machine, own) == 50 * MIB
    group(machine / "cgroup/memory/a", 2**63 - 4096, 30 * MIB, v1=True)  # its "no limit"
    assert available(machine, own) == 1000 * MIB


def test_a_group_over_its_limit_has_nothing_left(machine: Path) -> None:
    group(machine / "cgroup", 10 * MIB, 12 * MIB)
    assert available(machine, "0::/\n") == 0


def test_a_system_that_says_nothing(tmp_path: Path) -> None:
    nothing = tmp_path / "nothing"
    assert available_memory_bytes(nothing, nothing, nothing) is None
