"""A disk that is really full: a small file system in memory, filled to its last block."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from daemon.cli.app import app
from moorline.store import ArtifactStore, StoreUnavailable
from tests.moorline.store.test_artifacts import ALIAS, kill_at, release


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """256 KiB."""
    directory = tmp_path / "disk"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(directory)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount).returncode:
        pytest.skip("no right to mount a small disk")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


def fill(directory: Path) -> None:
    with (directory / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 512)
        except OSError:
            pass
    assert shutil.disk_usage(directory).free == 0


def test_a_rollback_needs_no_room_on_the_disk(small_disk: Path) -> None:
    store = ArtifactStore(small_disk / "store")
    for version in (1, 2):
        release(store, version)
    fill(small_disk)
    kill_at("artifacts.pin.before_rename", store, "pin")  # its room is still there
    assert store.pinned(ALIAS) is None
    command = ["rollback", "--to", "1", "--wait", "0", "--state-dir", str(small_disk)]
    assert CliRunner().invoke(app, command).exit_code == 0
    pin = store.pinned(ALIAS)
    assert pin is not None
    assert pin.version == 1
    assert store.unpin(ALIAS)
    assert store.pinned(ALIAS) is None
    (small_disk / "filler").unlink()
    release(store, 3)  # makes a new reserve
    store.pin(ALIAS, 3, "there is room")
    fill(small_disk)
    for version in (2, 1, 0):
        store.pin(ALIAS, version, "in the room of the pin before")
        again = store.pinned(ALIAS)
        assert again is not None
        assert again.version == version
    assert [path.name for path in store.root.rglob(".tmp-*")] == []


def test_without_a_reserve_a_full_disk_is_one_line_and_changes_nothing(small_disk: Path) -> None:
    store = ArtifactStore(small_disk / "store")
    store.pin(ALIAS, 0, "before there was a release")
    fill(small_disk)
    with pytest.raises(StoreUnavailable, match=r"No space left on device.*free space"):
        store.pin(ALIAS, 0, "again")
    pin = store.pinned(ALIAS)
    assert pin is not None
    assert pin.reason == "before there was a release"
