"""The artifact store: release bytes under their hash, manifests, and the operator's pin."""

from moorline.store.artifacts import (
    ArtifactCorrupt,
    ArtifactMissing,
    ArtifactStore,
    Pin,
    PinUnreadable,
    ReleaseConflict,
    ReleaseMissing,
    ReleaseUnreadable,
    StoreError,
    StoreUnavailable,
)
from moorline.store.withdrawals import Withdrawals

__all__ = [
    "ArtifactCorrupt",
    "ArtifactMissing",
    "ArtifactStore",
    "Pin",
    "PinUnreadable",
    "ReleaseConflict",
    "ReleaseMissing",
    "ReleaseUnreadable",
    "StoreError",
    "StoreUnavailable",
    "Withdrawals",
]
