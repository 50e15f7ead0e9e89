"""The memory that this process may still use: of the machine, and of every container around it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_OWN_GROUPS = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


def available_memory_bytes(
    meminfo: Path = _MEMINFO, own_groups: Path = _OWN_GROUPS, mount: Path = _MOUNT
) -> int | None:
    """What can be allocated without swapping and within every limit; None: nothing says so."""
    known = [free for free in (_machine(meminfo), *_groups(own_groups, mount)) if free is not None]
    return max(0, min(known)) if known else None


def _machine(meminfo: Path) -> int | None:
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _groups(own_groups: Path, mount: Path) -> Iterator[int | None]:
    """What each control group that this process is in leaves, from its own up to the root.

    Inside a container its own group may be mounted as the root, and its path lead nowhere.
    """
    for line in _lines(own_groups):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage = mount, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root = mount / "memory"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for directory in (group, *group.parents):
            if directory == root or root in directory.parents:
                yield _left(directory, limit, usage)


def _left(group: Path, limit: str, usage: str) -> int | None:
    """The group's limit less what it uses; its page cache of files can be given up again."""
    most, used = _lines(group / limit), _lines(group / usage)
    if not most or not used or most[0] == "max":
        return None
    cache = 0
    for line in _lines(group / "memory.stat"):
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            cache = int(value)
    return int(most[0]) - int(used[0]) + cache


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
