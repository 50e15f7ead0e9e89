"""A backup is whole or not there, and what is restored goes on where it stood."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moorline.failpoints import FAILPOINTS_VARIABLE
from moorline.pseudonyms import Pseudonyms
from moorline.store import ArtifactStore
from tests.updater.harness import Tape, Updater
from tests.updater.learning.fixtures import ALIAS
from tests.updater.ledger.test_inspection import moorline
from updater import backup
from updater.ledger import Ledger


@pytest.fixture
def updater(tiny_model_dir: Path, tmp_path: Path) -> Updater:
    """One release, and replies that wait."""
    state = tmp_path / "state"
    Pseudonyms.from_file(state / "pseudonym.key")
    updater = Updater(tiny_model_dir, state)
    updater.interact(4)
    updater.loop.cycle()
    updater.interact(3, seed=2)
    updater.loop.cycle()
    assert updater.ledger.live_version() == 1
    return updater


def restored(updater: Updater, tmp_path: Path) -> Path:
    """The state of a backup made while the updater holds its ledger, on a new machine."""
    code, told = moorline("backup", str(tmp_path / "copy"), state=updater.settings.state_dir)
    assert code == 0, told
    code, told = moorline("restore", str(tmp_path / "copy"), state=tmp_path / "new")
    assert code == 0, told
    assert "assistant@v000001" in told
    return tmp_path / "new"


def test_a_whole_machine_is_restored_and_learns_on(
    updater: Updater, tiny_model_dir: Path, tmp_path: Path
) -> None:
    new = restored(updater, tmp_path)
    fates = updater.fates()
    again = Updater(tiny_model_dir, new, Tape())
    assert again.ledger.audit() == []
    assert again.fates() == fates
    key = Pseudonyms.from_file(new / "pseudonym.key")
    old = Pseudonyms.from_file(updater.settings.state_dir / "pseudonym.key")
    assert key.pseudonym_of("ana") == old.pseudonym_of("ana")
    again.tape.continue_after(updater.tape)
    again.interact(1, seed=3)  # with the three that waited, a batch
    again.loop.cycle()
    assert [release.version for release in again.published] == [2]
    assert [r.version for r in ArtifactStore(new / "store").releases(ALIAS)] == [1, 2]
    assert (new / "ledger.sqlite.keys").stat().st_mode & 0o077 == 0


def test_a_backup_is_of_one_version_whatever_is_released_meanwhile(
    updater: Updater, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_store = backup._copy_store

    def released_meanwhile(*arguments: object) -> None:
        updater.interact(1, seed=4)
        updater.loop.cycle()
        assert updater.ledger.live_version() == 2
        copy_store(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(backup, "_copy_store", released_meanwhile)
    new = restored(updater, tmp_path)
    with Ledger.open_readonly(new / "ledger.sqlite") as ledger:
        assert ledger.live_version() == 1
    assert ArtifactStore(new / "store").versions(ALIAS) == [1]


@pytest.mark.parametrize(
    "where", ["artifacts.before_rename", "backup.before_contents", "backup.before_rename"]
)
def test_a_crash_half_way_leaves_nothing_that_passes_as_a_backup(
    updater: Updater, tmp_path: Path, where: str
) -> None:
    command = [sys.executable, "-m", "daemon.cli", "backup", str(tmp_path / "copy")]
    died = subprocess.run(
        [*command, "--state-dir", str(updater.settings.state_dir)],
        env={**os.environ, FAILPOINTS_VARIABLE: f"{where}=kill"},
        check=False,
    )
    assert died.returncode == -signal.SIGKILL
    assert not (tmp_path / "copy").exists()
    assert moorline("restore", str(tmp_path / "copy"), state=tmp_path / "new")[0] == 1
    restored(updater, tmp_path)  # what was left is in nobody's way


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_a_restore_cut_off_is_never_taken_for_whole(
    updater: Updater, tiny_model_dir: Path, tmp_path: Path, parts: int
) -> None:
    code, told = moorline("backup", str(tmp_path / "copy"), state=updater.settings.state_dir)
    assert code == 0, told
    command = [sys.executable, "-m", "daemon.cli", "restore", str(tmp_path / "copy")]
    died = subprocess.run(
        [*command, "--state-dir", str(tmp_path / "new")],
        env={**os.environ, FAILPOINTS_VARIABLE: f"restore.part=kill@{parts}"},
        check=False,
    )
    assert died.returncode == -signal.SIGKILL
    code, told = moorline("restore", str(tmp_path / "copy"), state=tmp_path / "new")
    assert code == 1
    assert "is not empty" in told
    if parts > 1:  # the ledger is there: it is refused without its keys
        with pytest.raises(Exception, match="keys is missing"):
            Updater(tiny_model_dir, tmp_path / "new")


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_backup_is_refused_before_anything_changes(
    updater: Updater, tmp_path: Path, damage: str
) -> None:
    copy = tmp_path / "copy"
    assert moorline("backup", str(copy), state=updater.settings.state_dir)[0] == 0
    victim = sorted((copy / "store" / "artifacts").rglob("*.safetensors"))[0]
    content = victim.read_bytes()
    if damage == "remove":
        victim.unlink()
    else:
        victim.write_bytes(content[:-1] + (bytes([content[-1] ^ 1]) if damage == "flip" else b""))
    code, told = moorline("restore", str(copy), state=tmp_path / "new")
    assert code == 1
    assert "this backup is damaged" in told
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten(updater: Updater, tmp_path: Path) -> None:
    copy, state = tmp_path / "copy", updater.settings.state_dir
    assert moorline("backup", str(copy), state=state)[0] == 0
    before = (copy / "backup.json").read_bytes()
    code, told = moorline("backup", str(copy), state=state)
    assert (code, "is there already" in told) == (1, True)
    assert (copy / "backup.json").read_bytes() == before
    code, told = moorline("restore", str(copy), state=state)
    assert (code, "is not empty" in told) == (1, True)
    code, told = moorline("backup", str(tmp_path / "other"), state=tmp_path / "nowhere")
    assert (code, "no ledger" in told) == (1, True)
