"""Migrates a ledger of an older format to the newest: what was learned survives every upgrade.

The file is copied first, durably; then one transaction runs the numbered scripts of the folder
``migrations``.
After a kill anywhere the ledger is the old one or the new one, and the next start goes on from it.
The format's number is in ``PRAGMA user_version``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
from importlib.resources import files
from pathlib import Path

from moorline.durable import sync_directory
from moorline.failpoints import failpoint

logger = logging.getLogger("moorline.ledger")

NEWEST_FORMAT = 6
OLDEST_FORMAT = 4
"""Older ones were never released."""


def create_tables(connection: sqlite3.Connection) -> None:
    """Make an empty file a ledger of the newest format, in one transaction."""
    tables = files("updater.ledger").joinpath("schema.sql").read_text("utf-8")
    _run(connection, tables)
    connection.execute("COMMIT")


def copy_of(path: Path, number: int) -> Path:
    """Where the ledger at ``path`` is copied to before it leaves format ``number``."""
    return path.with_name(f"{path.name}.format{number}")


def why_unreadable(path: Path, number: int, *, readonly: bool) -> str | None:
    """Why a ledger of this format cannot be opened, and what to do; None: it can be.

    Args:
        readonly: nothing may be written, so that an older format cannot be migrated either.
    """
    if number == NEWEST_FORMAT:
        return None
    which = f"{path} has ledger format {number}, and this Moorline reads {NEWEST_FORMAT}"
    if number > NEWEST_FORMAT:
        copy = copy_of(path, NEWEST_FORMAT)
        kept = f"; or stop the updater and put {copy}, from before the upgrade, in its place"
        return f"{which}: run the newer Moorline that wrote it{kept if copy.exists() else ''}"
    if number < OLDEST_FORMAT:
        return f"{which}, and {OLDEST_FORMAT} at the oldest: start with a new state_dir"
    if readonly:
        return f"{which}: start the updater once (`moorline update`), which migrates the ledger"
    return None


def migrate(connection: sqlite3.Connection, path: Path, number: int) -> None:
    """Copy the ledger and bring it from format ``number`` to the newest.

    The caller holds the writer lock.

    Raises:
        OSError: the disk refused the copy. Nothing changed.
        sqlite3.Error: the disk refused. Nothing changed.
    """
    failpoint("ledger.migration.before_copy")
    copy = copy_of(path, number)
    _copy(connection, path, copy)
    failpoint("ledger.migration.after_copy")
    try:
        _run(connection, "".join(map(_script, range(number + 1, NEWEST_FORMAT + 1))))
        failpoint("ledger.migration.before_commit")
        connection.execute("COMMIT")
    except BaseException:
        connection.rollback()
        raise
    failpoint("ledger.migration.after_commit")
    logger.warning(
        "ledger migrated from format %d to %d; delete the copy of the old one, %s, when this "
        "version has proven itself: it holds names that a later erasure does not reach",
        number,
        NEWEST_FORMAT,
        copy,
        extra={"event": "ledger_migrated", "path": str(copy)},
    )


def _copy(connection: sqlite3.Connection, path: Path, copy: Path) -> None:
    """A whole, durable copy, with what lies in the WAL; over the copy of an interrupted attempt."""
    temporary = copy.with_name(f"{copy.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        with contextlib.closing(sqlite3.connect(temporary)) as target:
            connection.backup(target)
        shutil.copymode(path, temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(copy)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_directory(copy.parent)


def _script(number: int) -> str:
    """The statements that make format ``number`` of the one before."""
    folder = files("updater.ledger").joinpath("migrations")
    (script,) = (one for one in folder.iterdir() if one.name.startswith(f"{number:04d}_"))
    return script.read_text("utf-8")


def _run(connection: sqlite3.Connection, statements: str) -> None:
    """Run them, and note the newest format, in a transaction that is left open."""
    connection.executescript(
        f"BEGIN IMMEDIATE;\n{statements}\nPRAGMA user_version = {NEWEST_FORMAT};"
    )
