"""SQLite, opened safely: one writer, whole transactions, errors that say what to do."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from moorline.durable import make_directory
from moorline.errors import MoorlineError
from moorline.failpoints import failpoint
from moorline.locks import FileLock, LockHeld
from updater.ledger.migration import NEWEST_FORMAT, create_tables, migrate, why_unreadable

CACHE_KIB = 64 * 1024
"""Pages held in memory, whatever the file's size."""
_WAL_KEPT_BYTES = 64 * 2**20
_BUSY_WAIT_MS = 30_000
_WIPE_WAIT_MS = 1_000
_FREE_SHARE = 4
"""One page in four of the file may be free, to be used again."""
_PAGES_GIVEN_BACK = 2_000
"""At a time: about 8 MB, so that nobody waits for it."""
_OF_THE_DISK = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_READONLY,
}
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}


class LedgerError(MoorlineError):
    """The ledger cannot do this; the message says what happened and what to do."""


class LedgerLocked(LedgerError):
    """Another updater holds this ledger."""


class RecordInvalid(LedgerError):
    """One record cannot be taken in for what it is; nothing of what came with it was committed."""

    def __init__(self, index: int, error: Exception) -> None:
        super().__init__(f"record {index} cannot be taken in ({type(error).__name__})")
        self.index = index
        """Its place in what the ledger was given."""
        self.error = error


class LeaseLost(LedgerError):
    """Another updater has opened this ledger since; this one must stop."""


class LedgerUnavailable(LedgerError):
    """The disk refused (full, read-only, failing). Nothing changed; the call may be repeated."""


def lock_for_writing(path: Path) -> FileLock:
    """Take the one writer's lock, a file beside the ledger.

    Raises:
        LedgerLocked: somebody has it.
        LedgerUnavailable: the lock file cannot be made.
    """
    try:
        return FileLock(path)
    except LockHeld as error:
        raise LedgerLocked(
            f"another updater ({error.holder}) is using {path.parent}: stop it, or give this one "
            "its own state_dir"
        ) from error
    except OSError as error:
        raise LedgerUnavailable(
            f"cannot open {path}: {error.strerror}: make the state directory writable"
        ) from error


class Database:
    """One connection. Reads see one moment (``snapshot``); writes are whole (``transaction``)."""

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        """Open, and create, migrate or check the tables.

        Unless ``readonly``, the caller holds the writer lock.

        Raises:
            LedgerError: the file is missing (read-only), not a ledger, or of another version.
            LedgerUnavailable: the disk refused.
        """
        self.path = path
        self._mutex = threading.RLock()
        self.epoch = 0
        if readonly and not path.exists():
            raise LedgerError(f"there is no ledger at {path}: has the updater run yet?")
        with translated_errors(path):
            uri = f"file:{quote(str(path.absolute()))}?mode={'ro' if readonly else 'rwc'}"
            # Calls are serialised by the mutex, so that a status thread may read.
            self._connection = sqlite3.connect(
                uri,
                uri=True,
                isolation_level=None,
                check_same_thread=False,
                timeout=_BUSY_WAIT_MS / 1000,
            )
            try:
                self._prepare(readonly)
            except BaseException:
                self._connection.close()
                raise

    def _prepare(self, readonly: bool) -> None:
        execute = self._connection.execute
        execute(f"PRAGMA cache_size = -{CACHE_KIB if not readonly else 2048}")
        number = execute("PRAGMA user_version").fetchone()[0]
        if number == 0 and not readonly:
            if execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                raise LedgerError(f"{self.path} is not a Moorline ledger: move it away")
            execute("PRAGMA auto_vacuum = INCREMENTAL")
        elif (refusal := why_unreadable(self.path, number, readonly=readonly)) is not None:
            raise LedgerError(refusal)
        if readonly:
            execute("PRAGMA query_only = 1")
            return
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA synchronous = FULL")
        execute(f"PRAGMA journal_size_limit = {_WAL_KEPT_BYTES}")
        if number == 0:
            create_tables(self._connection)
        elif number != NEWEST_FORMAT:
            try:
                migrate(self._connection, self.path, number)
            except OSError as error:
                raise LedgerUnavailable(
                    f"cannot copy {self.path} before its migration ({error}): check free space "
                    "and permissions"
                ) from error

    def close(self) -> None:
        """Close the connection."""
        with self._mutex:
            self._connection.close()

    def begin_lease(self) -> int:
        """Count the lease up by one and make it ours."""
        with self._mutex, translated_errors(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute(
                "UPDATE meta SET value = CAST(value AS INTEGER) + 1 WHERE name = 'lease_epoch'"
            )
            self.epoch = self._stored_epoch()
            self._connection.execute("COMMIT")
        return self.epoch

    def _stored_epoch(self) -> int:
        row = self._connection.execute(
            "SELECT value FROM meta WHERE name = 'lease_epoch'"
        ).fetchone()
        return int(row[0])

    @contextlib.contextmanager
    def transaction(self, step: str) -> Iterator[sqlite3.Connection]:
        """All or nothing, durable on leaving.

        Args:
            step: names the failpoints ``ledger.<step>.begun``, ``.before_commit`` and
                ``.committed``.

        Raises:
            LeaseLost: another updater has opened this ledger since.
            LedgerUnavailable: the disk refused; nothing changed.
        """
        with self._mutex, translated_errors(self.path):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                if self._stored_epoch() != self.epoch:
                    raise LeaseLost(
                        f"another updater took over {self.path} (lease {self._stored_epoch()}, "
                        f"ours was {self.epoch}): this one must stop"
                    )
                failpoint(f"ledger.{step}.begun")
                yield self._connection
                failpoint(f"ledger.{step}.before_commit")
                self._connection.execute("COMMIT")
            except BaseException:
                self._connection.rollback()  # nothing to do where SQLite has done it already
                raise
        failpoint(f"ledger.{step}.committed")

    def give_back(self) -> None:
        """Shrink the file by a bounded step, where too much of it is free."""
        with self._mutex, translated_errors(self.path):
            (pages,) = self._connection.execute("PRAGMA page_count").fetchone()
            (free,) = self._connection.execute("PRAGMA freelist_count").fetchone()
            surplus = min(free - pages // _FREE_SHARE, _PAGES_GIVEN_BACK)
            if surplus > 0:
                # As a script: each page is a step of the statement, and `execute` takes only one.
                self._connection.executescript(f"PRAGMA incremental_vacuum({surplus});")

    def wipe(self) -> bool:
        """Leave no old page in the WAL; False: a reader needs one. Ends ``secure_delete``."""
        with self._mutex, translated_errors(self.path):
            self._connection.execute(f"PRAGMA busy_timeout = {_WIPE_WAIT_MS}")
            try:
                (busy, *_) = self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            finally:
                self._connection.execute(f"PRAGMA busy_timeout = {_BUSY_WAIT_MS}")
            if not busy:
                self._connection.execute("PRAGMA secure_delete = OFF")
            return not busy

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """Several reads of one and the same moment."""
        with self._mutex, translated_errors(self.path):
            if self._connection.in_transaction:
                yield self._connection
                return
            self._connection.execute("BEGIN")
            try:
                yield self._connection
            finally:
                self._connection.rollback()

    def rows(self, sql: str, *parameters: Any) -> list[tuple[Any, ...]]:
        """All rows of one read; bound it with LIMIT unless the table is small."""
        with self._mutex, translated_errors(self.path):
            return self._connection.execute(sql, parameters).fetchall()

    def meta(self, name: str) -> str | None:
        """A value of ``meta``."""
        found = self.rows("SELECT value FROM meta WHERE name = ?", name)
        return str(found[0][0]) if found else None


def read_meta(connection: sqlite3.Connection, name: str) -> str | None:
    """A value of ``meta``, inside a transaction."""
    row = connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
    return None if row is None else str(row[0])


def set_meta(connection: sqlite3.Connection, name: str, value: str | None) -> None:
    """Write or remove a value of ``meta``, inside a transaction."""
    if value is None:
        connection.execute("DELETE FROM meta WHERE name = ?", (name,))
    else:
        connection.execute(
            "INSERT INTO meta VALUES (?, ?) ON CONFLICT DO UPDATE SET value = excluded.value",
            (name, value),
        )


@contextlib.contextmanager
def translated_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into ours: one line, with the remedy."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        code = _code(error)
        if code in _OF_THE_DISK:
            raise LedgerUnavailable(
                f"the ledger {path} cannot be used now ({error}): check free space and permissions"
            ) from error
        if code in _DAMAGED:
            raise LedgerError(
                f"the ledger {path} is damaged ({error}): restore it from a backup"
            ) from error
        raise  # a defect of ours: shown as it is


def is_of_the_file(error: Exception) -> bool:
    """Whether the disk or the file is at fault, and not what was asked of it."""
    return isinstance(error, OSError) or (
        isinstance(error, sqlite3.DatabaseError) and _code(error) in _OF_THE_DISK | _DAMAGED
    )


def _code(error: sqlite3.DatabaseError) -> int:
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF  # the rest are details of it


def make_home(path: Path) -> None:
    """Create the directory that the ledger lies in.

    Raises:
        LedgerUnavailable: it cannot be created.
    """
    try:
        make_directory(path.parent)
    except OSError as error:
        raise LedgerUnavailable(
            f"cannot create {path.parent}: {error.strerror}: choose another state_dir"
        ) from error
