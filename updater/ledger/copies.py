"""Copies a ledger and its keys while an updater writes them: each as of one moment, whole."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from updater.ledger.database import LedgerError, translated_errors

_PAGES_AT_A_TIME = 2_000
_BUSY_WAIT_SECONDS = 30.0


def keys_path(ledger: Path) -> Path:
    """Where the keys of a ledger lie."""
    return ledger.with_name(f"{ledger.name}.keys")


def copy_ledger(source: Path, target: Path, progress: Callable[[int, int], None]) -> None:
    """Copy ledger and keys, durably: the ledger first, because its keys are older than its bodies.

    A key that is destroyed in between is that of somebody erased: the copy treats them as erased.

    Args:
        target: must not exist; its keys are written beside it.
        progress: is told pages done and pages in all.

    Raises:
        LedgerError: there is no ledger, or the copy is not sound.
        LedgerUnavailable: a disk refused.
    """
    if not source.exists():
        raise LedgerError(f"there is no ledger at {source}: is this the right --state-dir?")
    copy_database(source, target, progress)
    if keys_path(source).exists():
        copy_database(keys_path(source), keys_path(target), progress)


def copy_database(source: Path, target: Path, progress: Callable[[int, int], None]) -> None:
    """Copy one SQLite file, as it was when the copy began, into one file without a WAL."""
    with translated_errors(source), contextlib.ExitStack() as opened:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        original = opened.enter_context(contextlib.closing(_open(source, "ro")))
        copy = opened.enter_context(contextlib.closing(_open(target, "rw")))
        original.execute("BEGIN")  # pins the moment: a writer would make the copy begin anew
        original.execute("SELECT count(*) FROM sqlite_master").fetchone()
        original.backup(
            copy,
            pages=_PAGES_AT_A_TIME,
            progress=lambda _, remaining, total: progress(total - remaining, total),
        )
        original.rollback()
        copy.execute("PRAGMA journal_mode = DELETE")
        (sound,) = copy.execute("PRAGMA integrity_check(1)").fetchone()
        if sound != "ok":
            raise LedgerError(f"the copy of {source} is not sound ({sound}): is the disk failing?")
    descriptor = os.open(target, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?mode={mode}",
        uri=True,
        isolation_level=None,
        timeout=_BUSY_WAIT_SECONDS,
    )
