"""Disks that are really full, one at a time: the ledger's, the store's, the spool's.

Each script runs in a mount namespace of its own, on a file system in memory of a few megabytes.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NAMESPACE = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
MOUNT = 'mount -t tmpfs -o "size=$1" tmpfs "$2" && shift 2 && exec "$@"'

DISK = """
import json, os, shutil, sys, time
from pathlib import Path

def fill(disk):
    with (disk / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 512)
        except OSError:
            pass
    assert shutil.disk_usage(disk).free == 0

def make_room(disk):
    (disk / "filler").unlink()
"""


@functools.cache
def may_mount() -> bool:
    try:
        tried = subprocess.run([*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", "/mnt"])
    except FileNotFoundError:
        return False
    return tried.returncode == 0


def on_a_small_disk(disk: Path, size: str, script: str, *arguments: object) -> Any:
    """Run a script on a small disk, its first argument; returns the JSON that it prints."""
    if not may_mount():
        pytest.skip("no right to mount a small disk (unshare -Urm)")
    disk.mkdir(parents=True)
    mounted = [*NAMESPACE, "sh", "-c", MOUNT, "sh", size, str(disk)]
    done = subprocess.run(
        [*mounted, sys.executable, "-c", DISK + script, str(disk), *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    report["log"] = done.stderr
    return report


UPDATER = """
from tests.updater.harness import Updater
import torch

torch.set_num_threads(1)
disk, model_dir, state_dir, elsewhere = map(Path, sys.argv[1:])
plain = Updater(model_dir, elsewhere / "plain")
for seed in (0, 1):
    plain.interact(2, seed)
plain.loop.cycle()
plain.close()
expected = plain.published[0].artifact_digest
updater = Updater(model_dir, state_dir)

def run_cycles(number=1):
    report = []
    for _ in range(number):
        updater.loop.cycle()
        accounting = updater.ledger.accounting()
        assert accounting.balanced
        report.append([updater.loop.phase, accounting.total, updater.ledger.count_ready()])
    return report
"""

LEDGER_FULL = (
    UPDATER
    + """
updater.interact(2, 0)
before = run_cycles()
fill(disk)
updater.interact(2, 1)
full = run_cycles(3)
make_room(disk)
run_cycles()
same = updater.published[0].artifact_digest == expected
print(json.dumps({"before": before, "full": full, "same": same, "fates": updater.fates()}))
"""
)

STORE_FULL = (
    UPDATER
    + """
for seed in (0, 1):
    updater.interact(2, seed)
fill(disk)
full = run_cycles(3)
visible = [path.name for path in (disk / "artifacts").iterdir()]
make_room(disk)
run_cycles()
same = updater.published[0].artifact_digest == expected
print(json.dumps({"full": full, "visible": visible, "same": same, "fates": updater.fates()}))
"""
)


def test_a_full_disk_under_the_ledger_pauses_intake_and_nothing_is_lost(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    state_dir, store = tmp_path / "state", tmp_path / "store"
    store.mkdir()
    script = "Path(sys.argv[1], 'store').symlink_to(Path(sys.argv[4]) / 'store')\n" + LEDGER_FULL
    report = on_a_small_disk(state_dir, "4m", script, tiny_model_dir, state_dir, tmp_path)
    assert report["before"] == [["waiting", 4, 2]]
    assert report["full"] == [["disk_unavailable", 4, 2]] * 3
    assert report["fates"] == {"trained": 4}
    assert report["same"]
    assert report["log"].count("it will retry: disk_unavailable") == 1


def test_a_full_disk_under_the_store_costs_one_update_and_nothing_is_lost(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    state_dir = tmp_path / "state"
    report = on_a_small_disk(
        state_dir / "store", "4m", STORE_FULL, tiny_model_dir, state_dir, tmp_path
    )
    assert report["full"] == [["disk_unavailable", 8, 4]] * 3
    assert report["visible"] == []
    assert report["fates"] == {"trained": 4}
    assert report["same"]
    assert report["log"].count("it will retry: disk_unavailable") == 1


SPOOL_FULL = """
from moorline import metrics
from moorline.settings import StreamSettings
from moorline.stream import Topic
from moorline.stream.publisher import Publisher

settings = StreamSettings(bootstrap="127.0.0.1:1", queue_max_events=20)
publisher = Publisher(settings, Path(sys.argv[1]))
publisher.start()

def publish(number):
    slowest, taken = 0.0, 0
    for _ in range(number):
        start = time.monotonic()
        taken += publisher.publish(Topic.INTERACTIONS, "k", b"x" * 900)
        slowest = max(slowest, time.monotonic() - start)
    time.sleep(2.5)
    stats = publisher.stats
    return [taken, stats.spooled, stats.queued, stats.dropped, slowest]

disk = Path(sys.argv[1])
before = publish(5)
fill(disk)
full = publish(30)
make_room(disk)
time.sleep(1.5)
after = publish(5)
refusals = metrics.DISK_REFUSALS.labels(where="spool")._value.get()
publisher.close(0.1)
print(json.dumps({"before": before, "full": full, "after": after, "refusals": refusals}))
"""


def test_a_full_disk_under_the_spool_is_counted_and_delays_nobody(tmp_path: Path) -> None:
    report = on_a_small_disk(tmp_path / "spool", "64k", SPOOL_FULL)
    assert report["before"][:4] == [5, 5, 0, 0]
    taken, spooled, queued, dropped, _ = report["full"]
    assert taken + dropped == 30
    assert spooled + queued == 5 + taken
    assert queued > 0, "memory holds what the disk does not"
    assert report["refusals"] >= 1
    assert report["after"][:4] == [5, 5 + taken + 5, 0, dropped], "it goes on by itself"
    slowest_seconds = max(
        moment[4] for moment in (report["before"], report["full"], report["after"])
    )
    assert slowest_seconds < 0.5, "a reply waits for none of this"
