"""Pseudonyms: what every recorded interaction holds in place of a user's name."""

from __future__ import annotations

import hashlib
import os
import secrets
import unicodedata
from pathlib import Path

from moorline.durable import make_directory, sync_directory, temporary_beside
from moorline.errors import MoorlineError
from moorline.events import composed
from moorline.settings import Settings

_SHORTEST_KEY = 16


class PseudonymKeyInvalid(MoorlineError):
    """The key is missing, of a wrong length, or not the one of the other servers."""


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

    @classmethod
    def of(cls, settings: Settings) -> Pseudonyms:
        """With the declared key, which is never made; else that of the state directory.

        Raises:
            PseudonymKeyInvalid: the declared file cannot be read or is no key.
        """
        declared = settings.serving.pseudonym_key_file
        return (
            cls.from_file(settings.pseudonym_key_path) if declared is None else cls.read(declared)
        )

    @classmethod
    def read(cls, path: Path) -> Pseudonyms:
        """Read a key that must be there.

        Raises:
            PseudonymKeyInvalid: it is not, or is no key.
        """
        try:
            key = path.read_bytes()
        except OSError as error:
            raise PseudonymKeyInvalid(
                f"the pseudonym key {path} cannot be read ({error.strerror}): put the fleet's key "
                "there, or correct serving.pseudonym_key_file"
            ) from None
        if not _SHORTEST_KEY <= len(key) <= hashlib.blake2b.MAX_KEY_SIZE:
            raise PseudonymKeyInvalid(
                f"the pseudonym key {path} has {len(key)} bytes, and must have 16 to 64: make one "
                "with `head -c 32 /dev/urandom`"
            )
        return cls(key)

    @property
    def fingerprint(self) -> str:
        """Names the key and does not give it away."""
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


def check_fleet_key(settings: Settings, known: str | None) -> None:
    """Check that a server without a declared key would use the one that the others use.

    Args:
        known: the fingerprint in the store; None where nobody has recorded anything yet.

    Raises:
        PseudonymKeyInvalid: it would not.
    """
    if known is None or settings.serving.pseudonym_key_file is not None:
        return
    path = settings.pseudonym_key_path
    if path.exists() and Pseudonyms.read(path).fingerprint == known:
        return
    what = "is another key" if path.exists() else "is not there"
    raise PseudonymKeyInvalid(
        f"the replies in this store have pseudonyms by key {known}, and {path} {what}: copy the key "
        "of the other servers (or of a backup) there, or declare a new one for all servers with "
        "serving.pseudonym_key_file"
    )


def spellings(name: str) -> tuple[str, ...]:
    """A name as it is given, composed (as it is stored) and decomposed, each once."""
    return tuple(dict.fromkeys((composed(name), unicodedata.normalize("NFD", name), name)))
