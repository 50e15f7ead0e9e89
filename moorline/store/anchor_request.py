"""An operator's request to make a released policy the anchor of the line."""

from __future__ import annotations

import time

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moorline.durable import make_directory, write_file
from moorline.logs import describe
from moorline.store.artifacts import ArtifactStore, ManifestInvalid, disk_errors


class AnchorRequest(BaseModel):
    """What somebody asked for; the updater carries it out and writes it into its ledger."""

    model_config = ConfigDict(frozen=True)

    version: int = Field(ge=0)
    reason: str = Field(min_length=1)
    requested_by: str
    requested_at: float = Field(description="Unix seconds")


class AnchorRequests:
    """The newest request of each alias, in the store, where every operator's machine can write."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def write(self, alias: str, version: int, *, reason: str, requested_by: str) -> AnchorRequest:
        """Ask for it, durably; a request that was not carried out yet is replaced.

        Raises:
            StoreError: there is no such release, or its bytes are not sound; or the disk refused.
        """
        if version > 0:
            release = self._store.release(alias, version)
            if release.artifact_digest is not None:
                self._store.open(release.artifact_digest, release.files)
        request = AnchorRequest(
            version=version, reason=reason, requested_by=requested_by, requested_at=time.time()
        )
        path = self._store.alias_dir(alias) / "anchor.json"
        with disk_errors(self._store.root):
            make_directory(path.parent)
            write_file(path, request.model_dump_json().encode(), "artifacts.anchor")
        return request

    def read(self, alias: str) -> AnchorRequest | None:
        """The newest request, carried out or not.

        Raises:
            ManifestInvalid: there is one that nobody can read.
        """
        path = self._store.alias_dir(alias) / "anchor.json"
        try:
            return AnchorRequest.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise ManifestInvalid(
                f"{path} cannot be read ({describe(error)}): `moorline reanchor` again, or remove "
                "the file"
            ) from None
