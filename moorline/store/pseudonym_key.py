"""Which key the pseudonyms of a fleet are made with: its fingerprint, where every server sees it."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from moorline.durable import make_directory, write_file
from moorline.store.artifacts import ArtifactStore, disk_errors


class _Known(BaseModel):
    model_config = ConfigDict(frozen=True)

    fingerprint: str


class FleetKey:
    """The fingerprint in the store; the updater writes it, as it reads it in interactions."""

    def __init__(self, store: ArtifactStore) -> None:
        self._root = store.root

    @property
    def _path(self) -> Path:
        return self._root / "pseudonym_key.json"

    def read(self) -> str | None:
        """The fingerprint; None where none is known."""
        try:
            return _Known.model_validate_json(self._path.read_bytes()).fingerprint
        except (OSError, ValidationError):
            return None

    def write(self, fingerprint: str) -> None:
        """Make it known, durably.

        Raises:
            StoreUnavailable: the disk refused.
        """
        with disk_errors(self._root):
            make_directory(self._root)
            known = _Known(fingerprint=fingerprint)
            write_file(self._path, known.model_dump_json().encode(), "artifacts.pseudonym_key")
