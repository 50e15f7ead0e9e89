"""The line goes on from what servers serve, also where the ledger was lost or is an older copy.

The store's manifests say which releases there are. Each start adopts those that its ledger does not
know, without being asked: servers serve them already, and any other start would give their numbers
to other policies.
"""

from __future__ import annotations

import logging

from moorline.events import Release
from moorline.logs import describe
from moorline.store import ArtifactStore, ManifestInvalid, ReleaseConflict, ReleaseMissing
from moorline.store.artifacts import disk_errors
from updater.learning.policy import ReleaseInvalid
from updater.ledger import Ledger

logger = logging.getLogger("moorline.adoption")


def adopt_lineage(
    ledger: Ledger, store: ArtifactStore, alias: str, base_model_digest: str
) -> list[int]:
    """Take the store's releases that the ledger does not know into it; returns their versions.

    A manifest that cannot be read is passed over, by name, as servers do; its number stays taken.

    Raises:
        ReleaseInvalid: one of them is of another base model. Nothing changed.
    """
    in_store = store.versions(alias)
    unknown = [version for version in in_store if ledger.release(version) is None]
    found = [release for version in unknown if (release := _readable(store, alias, version))]
    for release in found:
        if release.base_model_digest != base_model_digest:
            raise ReleaseInvalid(
                f"the store {store.root} has {release.name}, of another base model "
                f"({release.base_model_digest[:12]}) than model.path has "
                f"({base_model_digest[:12]}), and this ledger does not know it: set model.path "
                "back, or choose another alias or state_dir"
            )
    if unknown:
        ledger.adopt(found, taken=in_store[-1])
    if found:
        logger.warning(
            "releases of the store that the ledger did not know were adopted: it was lost, or is an"
            " older copy; learning goes on from the newest",
            extra={"event": "releases_adopted", "version": found[-1].version, "count": len(found)},
        )
    return [release.version for release in found]


def _readable(store: ArtifactStore, alias: str, version: int) -> Release | None:
    try:
        return store.release(alias, version)
    except (ManifestInvalid, ReleaseMissing) as error:
        logger.error(
            "a manifest in the store cannot be read and is not adopted; its number stays taken",
            extra={
                "event": "manifest_not_adopted",
                "alias": alias,
                "version": version,
                "error": describe(error),
            },
        )
        return None


def check_only_writer(ledger: Ledger, store: ArtifactStore, alias: str) -> None:
    """Check that nobody else has put releases into the store since this updater started.

    Raises:
        ReleaseConflict: somebody has.
        StoreUnavailable: the disk refused.
    """
    with disk_errors(store.root):
        versions = store.versions(alias)
    if versions and versions[-1] >= ledger.next_version():
        raise ReleaseConflict(
            f"the store {store.root} has version {versions[-1]} of {alias!r}, which this updater "
            "did not make: another one writes there; stop one of them, then restart the other, "
            "which goes on from that version"
        )
