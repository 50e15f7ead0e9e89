"""Locks: one holder at a time, named in the refusal, and none left behind by the dead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moorline.locks import FileLock, LockHeld


def test_a_second_holder_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    with FileLock(tmp_path / "lock"):
        with pytest.raises(LockHeld, match=f"pid {os.getpid()}") as refusal:
            FileLock(tmp_path / "lock")
        assert "\n" not in str(refusal.value)
    FileLock(tmp_path / "lock").close()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    program = (
        "import sys; from pathlib import Path; from moorline.locks import FileLock; "
        f"lock = FileLock(Path({str(path)!r})); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LockHeld, match=f"pid {holder.pid}"):
            FileLock(path)
        holder.kill()
    FileLock(path).close()


def test_a_shorter_pid_leaves_no_digits_of_a_longer_one(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.write_text("99999999999999\n")
    FileLock(path).close()
    assert path.read_text() == f"{os.getpid()}\n"


def test_closing_twice_does_no_harm(tmp_path: Path) -> None:
    lock = FileLock(tmp_path / "lock")
    lock.close()
    lock.close()
