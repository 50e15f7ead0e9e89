"""Which versions were revoked for an erasure: their manifests stay, and nobody serves them."""

from __future__ import annotations

import contextlib

from moorline.store import ArtifactStore, StoreError


class RevokedReleases:
    """Reads each manifest once: they never change."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._revokes_after: dict[tuple[str, int], int | None] = {}

    def among(self, alias: str, versions: list[int]) -> set[int]:
        """Those of these versions that a later one of them revoked."""
        for version in versions:
            if (alias, version) not in self._revokes_after:
                with contextlib.suppress(StoreError):  # a broken one is read again next time
                    release = self._store.release(alias, version)
                    self._revokes_after[alias, version] = release.revokes_after
        went_back = [
            (ancestor, later)
            for later in versions
            if (ancestor := self._revokes_after.get((alias, later))) is not None
        ]
        return {
            version
            for version in versions
            if any(ancestor < version < later for ancestor, later in went_back)
        }
