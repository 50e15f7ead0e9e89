"""The artifact store: release bytes under their hash, manifests, and the operator's pin."""

from moorline.store.anchor_request import AnchorRequest, AnchorRequests
from moorline.store.artifacts import (
    ArtifactCorrupt,
    ArtifactMissing,
    ArtifactStore,
    ManifestInvalid,
    Pin,
    PinInvalid,
    ReleaseConflict,
    ReleaseMissing,
    StoreError,
    StoreUnavailable,
)
from moorline.store.revoked import RevokedReleases

__all__ = [
    "AnchorRequest",
    "AnchorRequests",
    "ArtifactCorrupt",
    "ArtifactMissing",
    "ArtifactStore",
    "Pin",
    "PinInvalid",
    "ReleaseConflict",
    "ReleaseMissing",
    "ManifestInvalid",
    "StoreError",
    "StoreUnavailable",
    "RevokedReleases",
]
