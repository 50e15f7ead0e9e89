"""Which releases' bytes stay in the store, and the removal of the others."""

from __future__ import annotations

import logging

from moorline import metrics
from moorline.store import ArtifactStore, StoreError
from updater.ledger import LedgerReader

logger = logging.getLogger("moorline.retention")


def versions_to_keep(ledger: LedgerReader, keep_releases: int) -> set[int]:
    """The newest releases, to roll back to; the live policy and the anchor; and whoever wrote a
    reply that may still be trained on. None that was revoked for an erasure."""
    newest = ledger.newest_version()
    last = range(max(1, newest - keep_releases + 1), newest + 1)
    wanted = {*last, ledger.live_version(), ledger.anchor().version}
    wanted |= ledger.policy_versions_referenced()
    return wanted - ledger.revoked_versions() - {0}


def collect_garbage(
    store: ArtifactStore, ledger: LedgerReader, alias: str, keep_releases: int
) -> None:
    """Remove the bytes that nobody can ask for any more. What goes wrong is tried again later."""
    if ledger.newest_version() == 0:
        return
    kept = versions_to_keep(ledger, keep_releases)
    releases = [ledger.release(version) for version in sorted(kept)]
    digests = {r.artifact_digest for r in releases if r is not None and r.artifact_digest}
    try:
        removed = store.collect_garbage(alias, digests)
    except (StoreError, OSError) as error:
        logger.warning(
            "old artifacts could not be removed, will retry after the next update",
            extra={"event": "garbage_not_collected", "error": type(error).__name__},
        )
        return
    metrics.ARTIFACTS_REMOVED.inc(len(removed))
    if removed:
        logger.info(
            "old artifacts removed from the store",
            extra={"event": "garbage_collected", "count": len(removed)},
        )
