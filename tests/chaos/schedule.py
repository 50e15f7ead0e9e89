"""The schedule of faults: a pure function of a seed, so that a failing seed can be tried again.

A fault is data: what it is, when it begins, how long it lasts. New rows belong here; how each is
done to a process lies in ``tests/chaos/world.py``.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

UPDATER_FAILPOINTS = (
    "reader.after_fetch",
    "ingest.polled",
    "ingest.dead_lettered",
    "ingest.before_ledger",
    "ingest.after_ledger",
    "ledger.ingest.begun",
    "ledger.ingest.before_commit",
    "ledger.ingest.committed",
    "ledger.attempt.begun",
    "ledger.attempt.before_commit",
    "ledger.attempt.committed",
    "ledger.release.begun",
    "ledger.release.before_commit",
    "ledger.release.committed",
    "ledger.no_update.before_commit",
    "ledger.no_update.committed",
    "dead_letters.before_send",
    "dead_letters.after_acknowledgement",
    "loop.after_training",
    "loop.after_artifact",
    "loop.after_gate",
    "loop.before_release",
    "loop.after_release",
    "loop.after_manifest",
    "artifacts.before_file",
    "artifacts.before_rename",
    "artifacts.after_rename",
    "artifacts.after_put",
    "artifacts.garbage_removed",
)
SERVER_FAILPOINTS = (
    "swap.verified",
    "swap.paused",
    "swap.reloaded",
    "publisher.before_send",
    "publisher.before_spool_sync",
    "spool.before_append",
    "spool.before_cursor_rename",
)
FIRST_FAULT_SECONDS = 5.0


@dataclass(frozen=True)
class Fault:
    """One fault of the schedule."""

    at_seconds: float
    """After the load began."""
    kind: str
    lasts_seconds: float = 0.0
    failpoint: str = ""


@dataclass(frozen=True)
class Kind:
    """How often a kind of fault comes, and how long it lasts."""

    name: str
    every_seconds: float
    """On average."""
    lasts_seconds: tuple[float, float] = (0.0, 0.0)
    needs: frozenset[str] = frozenset()
    """What the machine must have: "durable broker", "proxy", "mount"."""


KINDS = (
    Kind("server killed", 100.0),
    Kind("server stopped and continued", 90.0, (1.0, 4.0)),
    Kind("server terminated", 240.0),
    Kind("server killed at a failpoint", 120.0),
    Kind("broker killed", 80.0, (1.0, 6.0), frozenset({"durable broker"})),
    Kind("broker silent", 60.0, (2.0, 8.0)),
    Kind("connections cut", 30.0, (0.0, 0.0), frozenset({"proxy"})),
    Kind("connections stalled", 50.0, (2.0, 8.0), frozenset({"proxy"})),
    Kind("connections refused", 50.0, (2.0, 8.0), frozenset({"proxy"})),
    Kind("connections slow", 60.0, (5.0, 15.0), frozenset({"proxy"})),
    Kind("disk full", 80.0, (2.0, 6.0), frozenset({"mount"})),
    Kind("a bit flipped in the newest artifact", 60.0, (1.0, 4.0)),
    Kind("clients that do not read, and a rollback", 150.0),
    Kind("ledger lost", 200.0),
    Kind("an older ledger put back", 200.0),
    Kind("anchor budget spent", 150.0),
    Kind("supervisor stopped and continued", 150.0, (9.0, 14.0)),
)


def schedule(
    seed: int, duration_seconds: float, has: frozenset[str], only: frozenset[str] = frozenset()
) -> list[Fault]:
    """All faults but those of the updater, in order of time; with ``only``, of these kinds."""
    generator = random.Random(f"schedule {seed}")
    found = []
    for kind in KINDS:
        # Each kind has its own generator: a kind that cannot be done here changes no other.
        own = random.Random(generator.getrandbits(64))
        if not kind.needs <= has or (only and kind.name not in only):
            continue
        at = FIRST_FAULT_SECONDS + own.uniform(0.0, kind.every_seconds)
        while at < duration_seconds:
            failpoint = own.choice(SERVER_FAILPOINTS) if kind.name.endswith("failpoint") else ""
            found.append(Fault(at, kind.name, own.uniform(*kind.lasts_seconds), failpoint))
            at += own.expovariate(1.0 / kind.every_seconds)
    return sorted(found, key=lambda fault: fault.at_seconds)


def updater_lives(seed: int) -> Iterator[Fault]:
    """How each run of the updater ends, one after the other, for ever.

    After ``lasts_seconds`` an updater that its failpoint has not killed yet is killed wherever it
    is.
    """
    generator = random.Random(f"updater {seed}")
    while True:
        draw = generator.random()
        lasts = generator.uniform(6.0, 15.0)
        point = f"{generator.choice(UPDATER_FAILPOINTS)}=kill@{generator.choice((1, 1, 1, 1, 2))}"
        if draw < 0.92:
            yield Fault(0.0, "updater killed at a failpoint", lasts, point)
        elif draw < 0.96:
            yield Fault(0.0, "updater stopped and continued", lasts)
        else:
            yield Fault(0.0, "updater terminated", lasts)
