"""Which keys the servers made pseudonyms with: fingerprints, where every server can read them."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from moorline.durable import make_directory, write_file
from moorline.store.artifacts import ArtifactStore, disk_errors


class _Content(BaseModel):
    model_config = ConfigDict(frozen=True)

    fingerprints: tuple[str, ...]


class RecordedKeys:
    """The updater's list of each alias, in the store; a copy of what its ledger knows."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def read(self, alias: str) -> tuple[str, ...] | None:
        """The fingerprints ("": of replies that do not name their key); None: nobody wrote any."""
        try:
            return _Content.model_validate_json(self._path(alias).read_bytes()).fingerprints
        except (OSError, ValidationError):
            return None

    def write(self, alias: str, fingerprints: tuple[str, ...]) -> None:
        """Replace the list, durably.

        Raises:
            StoreUnavailable: the disk refused.
        """
        content = _Content(fingerprints=fingerprints).model_dump_json().encode()
        with disk_errors(self._store.root):
            make_directory(self._path(alias).parent)
            write_file(self._path(alias), content, "artifacts.pseudonym_keys")

    def _path(self, alias: str) -> Path:
        return self._store.alias_dir(alias) / "pseudonym_keys.json"
