"""The anchor of the line: the base model, or the release that `moorline reanchor` chose."""

from __future__ import annotations

import logging
import time

from moorline.store import AnchorRequest, AnchorRequests, ArtifactStore, StoreError
from updater.learning.policy import AdapterState, Policy
from updater.ledger import Anchor, Ledger, LedgerError, LedgerUnavailable

logger = logging.getLogger("moorline.anchor")


class Anchors:
    """Carries out what was asked for, and reads the adapter that it comes to."""

    def __init__(self, alias: str, ledger: Ledger, store: ArtifactStore, policy: Policy) -> None:
        self._alias = alias
        self._ledger = ledger
        self._store = store
        self._policy = policy
        self._requests = AnchorRequests(store)
        self._logged: str | None = None

    def requested(self) -> AnchorRequest | None:
        """A request that was not carried out yet; None: there is none that can be read."""
        try:
            request = self._requests.read(self._alias)
        except StoreError as error:
            self._log_once(str(error))
            return None
        done = [one.requested_at for one in self._ledger.anchors()]
        return None if request is None or request.requested_at in done else request

    def apply(self, request: AnchorRequest) -> bool:
        """Make the release the anchor, in the ledger; whether that could be done.

        Raises:
            LedgerUnavailable: the disk refused; call again.
        """
        anchor = Anchor(
            request.version,
            request.reason,
            request.requested_by,
            request.requested_at,
            applied_at=time.time(),
        )
        try:
            if anchor.version:
                self._read(anchor.version)
            self._ledger.commit_anchor(anchor)
        except LedgerUnavailable:
            raise
        except (LedgerError, StoreError) as error:
            self._log_once(str(error))
            return False
        logger.warning(
            "the anchor is another policy now, and its budget begins anew: %s",
            anchor.reason,
            extra={"event": "anchor_moved", "version": anchor.version},
        )
        return True

    def current(self) -> tuple[int, AdapterState | None]:
        """The version of the anchor and its adapter (None: that of the base model).

        Raises:
            StoreError: its bytes are missing or changed.
        """
        version = self._ledger.anchor().version
        return version, self._read(version) if version else None

    def _read(self, version: int) -> AdapterState | None:
        release = self._ledger.release(version)
        if release is None or release.artifact_digest is None:
            return None
        return self._policy.read_adapter(self._store.open(release.artifact_digest, release.files))

    def _log_once(self, error: str) -> None:
        if error != self._logged:
            logger.error(
                "the anchor stays as it was, the request cannot be carried out: %s",
                error,
                extra={"event": "anchor_not_moved", "error": error},
            )
        self._logged = error
