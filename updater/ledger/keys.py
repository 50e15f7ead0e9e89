"""The keys that bodies are encrypted under, in a file beside the ledger.

To destroy a key is to erase what it encrypts wherever copies of the ledger lie: its WAL, its freed
pages, its backups. That is why keys are in a file of their own, which is backed up for no longer
than an erasure may take to become true.

Their order is the protocol. A key is durable before the ledger commits a body under it, and it is
destroyed after the ledger has committed that nobody needs it (``doomed_keys``). A kill in between
leaves a key too many, never one too few, and the next start goes on from there.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from moorline.failpoints import failpoint
from updater.ledger.database import LedgerError, translated_errors

_KEY_BITS = 256
_NONCE_BYTES = 12
"""Random, as SP 800-38D allows for up to 2^32 messages of one key: nobody chats so much."""
_CIPHERS_KEPT = 4096
DAMAGED = "a stored body is damaged: restore the ledger from a backup"


class KeyDestroyed(LedgerError):
    """What this key encrypted was erased."""


class KeyRing:
    """AES-256-GCM under numbered keys. A number is never used twice."""

    def __init__(self, path: Path, *, needed: bool = False) -> None:
        """Open, or create with mode 0600.

        Args:
            needed: something was encrypted: a missing file is not made, but missed.

        Raises:
            LedgerError: missing though needed, damaged, or not a key ring.
            LedgerUnavailable: the disk refused.
        """
        self._path = path
        self._fresh: dict[int, bytes] = {}
        self._ciphers: OrderedDict[int, AESGCM] = OrderedDict()
        if needed and not path.exists():
            raise LedgerError(
                f"{path} is missing, and without it nothing in the ledger can be read: restore it "
                "from a backup, or start with a new state_dir"
            )
        with translated_errors(path):
            try:
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            except OSError as error:
                raise LedgerError(
                    f"cannot open {path}: {error.strerror}: make the state directory writable"
                ) from error
            self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            try:
                self._connection.executescript(
                    "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;"
                    "PRAGMA secure_delete = ON;"  # zeros over the key, not only a free page
                    "CREATE TABLE IF NOT EXISTS keys (id INTEGER PRIMARY KEY AUTOINCREMENT,"
                    " key BLOB NOT NULL) STRICT;"
                )
                row = self._connection.execute("SELECT max(seq) FROM sqlite_sequence").fetchone()
            except BaseException:
                self._connection.close()
                raise
        self._last: int = row[0] or 0

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def new(self) -> int:
        """A new key's number; ``save`` makes it durable."""
        self._last += 1
        self._fresh[self._last] = AESGCM.generate_key(_KEY_BITS)
        return self._last

    def save(self) -> None:
        """Make the new keys durable; before the ledger commits what they encrypt.

        Raises:
            LedgerUnavailable: the disk refused; the new keys are forgotten.
        """
        fresh, self._fresh = self._fresh, {}
        if not fresh:
            return
        with translated_errors(self._path):
            self._write("INSERT INTO keys VALUES (?, ?)", list(fresh.items()))
        failpoint("keys.saved")

    def discard(self) -> None:
        """Forget the new keys that were not saved: what they encrypt was rolled back."""
        self._fresh.clear()

    def destroy(self, numbers: Sequence[int]) -> None:
        """Destroy these keys; those that are gone already are no error."""
        for number in numbers:
            self._ciphers.pop(number, None)
        with translated_errors(self._path):
            self._write("DELETE FROM keys WHERE id = ?", [(number,) for number in numbers])
        failpoint("keys.destroyed")

    def wipe(self) -> None:
        """Return only when the bytes of destroyed keys are in no file of the ring."""
        with translated_errors(self._path):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        failpoint("keys.wiped")

    def seal(self, number: int, plain: bytes, row: str) -> bytes:
        """Encrypt.

        Args:
            row: where it will lie; ``open`` must name the same.
        """
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._cipher(number).encrypt(nonce, plain, row.encode())

    def open(self, number: int, sealed: bytes, row: str) -> bytes:
        """Decrypt.

        Raises:
            KeyDestroyed: there is no such key any more.
            LedgerError: these are not the bytes that were sealed for this row.
        """
        cipher = self._cipher(number)
        try:
            return cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], row.encode())
        except InvalidTag:
            raise LedgerError(DAMAGED) from None

    def _cipher(self, number: int) -> AESGCM:
        if number in self._ciphers:
            self._ciphers.move_to_end(number)
            return self._ciphers[number]
        if number in self._fresh:
            return AESGCM(self._fresh[number])  # not kept: it may be discarded yet
        with translated_errors(self._path):
            row = self._connection.execute(
                "SELECT key FROM keys WHERE id = ?", (number,)
            ).fetchone()
        if row is None:
            raise KeyDestroyed(f"key {number} was destroyed: what it encrypted is erased")
        self._ciphers[number] = AESGCM(row[0])
        if len(self._ciphers) > _CIPHERS_KEPT:
            self._ciphers.popitem(last=False)
        return self._ciphers[number]

    def _write(self, sql: str, rows: Sequence[tuple[int | bytes, ...]]) -> None:
        """All or nothing."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            self._connection.executemany(sql, rows)
            self._connection.execute("COMMIT")
        except BaseException:
            self._connection.rollback()
            raise
