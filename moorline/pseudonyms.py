"""Pseudonyms: what every recorded interaction holds in place of a user's name."""

from __future__ import annotations

import hashlib
import os
import secrets
import unicodedata
from pathlib import Path

from moorline.durable import make_directory, sync_directory, temporary_beside
from moorline.events import composed


class Pseudonyms:
    """Turns a user's name into a stable pseudonym that nobody can compute without the key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def from_file(cls, path: Path) -> Pseudonyms:
        """Read the key, or make it (mode 0600) at the first start."""
        if not path.exists():
            make_directory(path.parent)
            fresh = temporary_beside(path)
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(32))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(fresh, path)  # unlike rename, this loses against a server that was first
            except FileExistsError:
                pass
            finally:
                fresh.unlink()
            sync_directory(path.parent)
        return cls(path.read_bytes())

    def pseudonym_of(self, user: str) -> str:
        """32 hexadecimal digits; the same for a name composed and decomposed. Case counts."""
        return self._hash(composed(user))

    def pseudonyms_of(self, user: str) -> tuple[str, ...]:
        """Also those that an earlier Moorline gave, which took a name as its bytes."""
        return tuple(dict.fromkeys(self._hash(name) for name in spellings(user)))

    def _hash(self, name: str) -> str:
        data = name.encode("utf-8", "surrogatepass")  # JSON can spell half a surrogate pair
        return hashlib.blake2b(data, key=self._key, digest_size=16).hexdigest()


def spellings(name: str) -> tuple[str, ...]:
    """A name as it is given, composed (as it is stored) and decomposed, each once."""
    return tuple(dict.fromkeys((composed(name), unicodedata.normalize("NFD", name), name)))
