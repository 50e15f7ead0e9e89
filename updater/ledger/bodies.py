"""What people wrote, as the ledger keeps it: compressed, encrypted, bound to its row."""

from __future__ import annotations

import sqlite3
import zlib
from typing import Literal, TypeVar

from pydantic import ValidationError

from moorline.events import Feedback, Interaction
from updater.ledger.database import LedgerError
from updater.ledger.keys import DAMAGED, KeyDestroyed, KeyRing

Kind = Literal["interaction", "feedback"]
"""Which rows: ``<kind>_bodies``."""

_COMPRESSION_LEVEL = 1  # half of what 9 saves at a tenth of its cost
_Model = TypeVar("_Model", Interaction, Feedback)


class BodyErased(LedgerError):
    """A body whose key was destroyed although its row is here: the ledger is an older copy."""

    def __init__(self, kind: Kind, identity: int) -> None:
        super().__init__(f"the body of {kind} {identity} was erased")
        self.kind = kind
        self.identity = identity


class WordInvalid(LedgerError):
    """Feedback that an earlier Moorline took, and that the rules of today refuse."""

    def __init__(self, identity: int) -> None:
        super().__init__(f"feedback {identity} was taken by an earlier version, and is refused now")
        self.identity = identity


class Bodies:
    """Reads and writes bodies, inside a transaction of the caller."""

    def __init__(self, connection: sqlite3.Connection, keys: KeyRing) -> None:
        self._execute = connection.execute
        self._keys = keys

    def write_body(self, kind: Kind, identity: int, value: bytes, key: int) -> None:
        """Compress, encrypt and store a record's value."""
        self._execute(
            f"INSERT INTO {kind}_bodies (id, key, body) VALUES (?, ?, ?)",
            (identity, key, self._sealed(kind, identity, value, key)),
        )

    def change_key(self, kind: Kind, identity: int, key: int) -> None:
        """Encrypt a body anew: its subject keeps it while others under the old key are erased."""
        value = self._read_body(kind, identity)
        self._execute(
            f"UPDATE {kind}_bodies SET key = ?, body = ? WHERE id = ?",
            (key, self._sealed(kind, identity, value, key), identity),
        )

    def interaction(self, identity: int) -> Interaction:
        """The reply of a row.

        Raises:
            BodyErased: its key was destroyed.
            LedgerError: it is damaged.
        """
        found = _parse(Interaction, self._read_body("interaction", identity))
        if found is None:
            raise LedgerError(DAMAGED)
        return found

    def feedback(self, identity: int) -> Feedback:
        """The feedback of a row; errors as ``interaction``.

        Raises:
            WordInvalid: it is whole, but says nothing by the rules of today.
        """
        found = _parse(Feedback, self._read_body("feedback", identity))
        if found is None:
            raise WordInvalid(identity)
        return found

    def _sealed(self, kind: Kind, identity: int, value: bytes, key: int) -> bytes:
        packed = zlib.compress(value, _COMPRESSION_LEVEL)
        return self._keys.seal(key, packed, f"{kind}/{identity}")

    def _read_body(self, kind: Kind, identity: int) -> bytes:
        key, body = self._execute(
            f"SELECT key, body FROM {kind}_bodies WHERE id = ?", (identity,)
        ).fetchone()
        try:
            return zlib.decompress(self._keys.open(key, body, f"{kind}/{identity}"))
        except KeyDestroyed:
            raise BodyErased(kind, identity) from None


def _parse(model: type[_Model], value: bytes) -> _Model | None:
    """The event that the intake parsed once already; its row holds the bytes that arrived.

    Validating them again costs what reading their JSON costs (38 and 37 us for a reply of 1,000
    tokens), and it catches bytes that are intact and that this version does not understand: None
    then, not an error, whose cause would carry what somebody wrote.
    """
    try:
        return model.model_validate_json(value)
    except ValidationError:
        return None
