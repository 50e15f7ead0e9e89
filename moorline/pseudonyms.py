"""Pseudonyms: what every recorded interaction holds in place of a user's name."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import unicodedata
from pathlib import Path

from moorline.durable import make_directory, sync_directory, temporary_beside
from moorline.errors import MoorlineError
from moorline.events import composed

_KEY_BYTES = 32
"""Length of the keys that Moorline makes."""
_LINE = re.compile(rb"(?:\xef\xbb\xbf)?([!-~]{32,64})[\r\n]*")
"""A key as text, with what an editor puts around it."""


class PseudonymKeyInvalid(MoorlineError):
    """A key is missing, cannot be read, or is none."""


class Pseudonyms:
    """Turns a user's name into a stable pseudonym that nobody can compute without the key."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    @classmethod
    def from_file(cls, path: Path) -> Pseudonyms:
        """Read the key, or make it (mode 0600) where there is none.

        Raises:
            PseudonymKeyInvalid: there is a file, but it cannot be read or is no key.
        """
        if not path.exists():
            make_directory(path.parent)
            fresh = temporary_beside(path)
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(_KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(fresh, path)  # unlike rename, this loses against a server that was first
            except FileExistsError:
                pass
            finally:
                fresh.unlink()
            sync_directory(path.parent)
        return cls.read(path)

    @classmethod
    def read(cls, path: Path) -> Pseudonyms:
        """Read a key: 32 bytes as they are, or a line of 32 to 64 characters without its end.

        Raises:
            PseudonymKeyInvalid: there is none, or it cannot be read.
        """
        try:
            with path.open("rb") as file:
                content = file.read(1024)
        except OSError as error:
            raise PseudonymKeyInvalid(
                f"the pseudonym key {path} cannot be read ({error.strerror}): put the key of the "
                "servers there, readable for this user, or name the right file"
            ) from None
        if len(content) == _KEY_BYTES:
            return cls(content)
        line = _LINE.fullmatch(content)
        if line is None:
            raise PseudonymKeyInvalid(
                f"{path} holds no pseudonym key: it must be {_KEY_BYTES} bytes, or one line of 32 "
                "to 64 characters without blanks (`openssl rand -hex 32` makes one); put a copy of "
                "the right file there"
            )
        return cls(line[1])

    @property
    def fingerprint(self) -> str:
        """Names the key, and does not give it away: 16 hexadecimal digits."""
        return hashlib.blake2b(b"moorline", key=self._key, digest_size=8).hexdigest()

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
