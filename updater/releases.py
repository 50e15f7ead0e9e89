"""Releases: their manifests, and their way from the ledger's outbox to servers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from moorline import metrics
from moorline.events import Release, ReleaseKind, Verdict
from moorline.failpoints import failpoint
from moorline.settings import Settings
from moorline.store import ArtifactCorrupt, ArtifactMissing, ArtifactStore
from moorline.stream import StreamUnavailable
from updater.ledger import Ledger, examples_digest
from updater.values import Batch, Candidate

logger = logging.getLogger("moorline.releases")


class Outbox:
    """Releases that the ledger has decided and nobody was told of yet."""

    def __init__(
        self, ledger: Ledger, store: ArtifactStore, publish: Callable[[Release], None]
    ) -> None:
        """``publish`` writes a release to its topic, and returns when it is acknowledged."""
        self._ledger = ledger
        self._store = store
        self._publish = publish
        self._refused_version: int | None = None
        """The last one that the log says its topic does not take."""

    def send(self) -> None:
        """Put each unpublished release into the store, which servers follow, then onto its topic.

        Safe to repeat: a release that the topic does not take now stays unpublished in the ledger.
        """
        for release in self._ledger.unpublished():
            self._store.record_release(release)
            failpoint("loop.after_manifest")
            try:
                self._publish(release)
            except StreamUnavailable as error:
                self._log_once(release.version, error)
                return
            self._ledger.mark_published(release.version)
            metrics.RELEASES_PUBLISHED.inc()
            logger.info(
                "release is published",
                extra={"event": "release_published", "version": release.version},
            )

    def _log_once(self, version: int, error: StreamUnavailable) -> None:
        """Log that a release waits for its topic once, not at every attempt."""
        if version != self._refused_version:
            self._refused_version = version
            logger.warning(
                "release is in the store, but its topic does not take it: will retry",
                extra={"event": "release_not_announced", "version": version, "error": str(error)},
            )


class Manifests:
    """Makes the manifest of a release to come, from the ledger as it stands."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        store: ArtifactStore,
        base_model_digest: str,
        software: dict[str, str],
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._store = store
        self._base_model_digest = base_model_digest
        self._software = software

    def accepted(self, batch: Batch, candidate: Candidate, verdict: Verdict) -> Release:
        """Make the manifest of a candidate that the gate has passed."""
        return self._release(
            parent=candidate.parent,
            kind=ReleaseKind.ADAPTER,
            artifact_digest=candidate.artifact_digest,
            files=candidate.files,
            examples=len(batch.examples),
            examples_digest=examples_digest(batch.example_ids),
            step_scale=candidate.step_scale,
            divergences=candidate.divergences,
            verdict=verdict,
            diagnostics=dict(candidate.diagnostics),
            behaviour_policies_unavailable=dict(batch.behaviour_policies_unavailable),
            anchor=self._ledger.anchor().version,
        )

    def revoking(self, ancestor: int) -> Release:
        """Make a release of the bytes of ``ancestor`` again, with the verdict that it had on them.

        Where they are no longer kept, or damaged, those of the newest before it that are sound; the
        base model needs none. Its divergence from the live policy is not measured: as with a
        rollback, that it may be far is what is wanted.
        """
        while ancestor:
            old = self._ledger.release(ancestor)
            if old is None or old.kind is ReleaseKind.BASE or old.artifact_digest is None:
                break
            try:
                self._store.open(old.artifact_digest, old.files)
            except (ArtifactMissing, ArtifactCorrupt):
                ancestor = old.parent or 0
                continue
            return self._release(
                parent=ancestor,
                revokes_after=ancestor,
                kind=ReleaseKind.ADAPTER,
                artifact_digest=old.artifact_digest,
                files=old.files,
                divergences=tuple(d for d in old.divergences if d.measured_from == "anchor"),
                anchor=old.anchor,
                verdict=old.verdict,
            )
        return self._release(
            parent=ancestor,
            revokes_after=ancestor,
            kind=ReleaseKind.BASE,
            artifact_digest=None,
            files=(),
            anchor=0,
        )

    def _release(self, **what: Any) -> Release:
        return Release(
            alias=self._settings.alias,
            version=self._ledger.next_version(),
            base_model_digest=self._base_model_digest,
            created_at=time.time(),
            offsets=self._ledger.release_offsets(),
            lease_epoch=self._ledger.epoch,
            settings_digest=self._settings.digest(),
            software=self._software,
            **what,
        )
