"""Watches whether all servers make pseudonyms with one key, so that a person can be found."""

from __future__ import annotations

import logging

from moorline import metrics
from moorline.store import ArtifactStore
from moorline.store.pseudonym_key import FleetKey
from updater.ledger import LedgerReader

logger = logging.getLogger("moorline.pseudonyms")

RECENT_SECONDS = 86400.0
"""So long before the newest reply a key counts as one in use."""


class PseudonymKeys:
    """Says when servers differ, and tells those that start which key is in use."""

    def __init__(self, ledger: LedgerReader, store: ArtifactStore) -> None:
        self._ledger = ledger
        self._fleet_key = FleetKey(store)
        self._seen: tuple[str, ...] = ()

    def in_use(self) -> tuple[str, ...]:
        """The fingerprints in the replies of the last day, oldest first."""
        seen = self._ledger.pseudonym_keys()
        newest = max(seen.values(), default=0.0)
        return tuple(one for one, at in seen.items() if at >= newest - RECENT_SECONDS)

    def look(self) -> None:
        """Export the metric; log a change to several; write the one key into the store.

        Raises:
            LedgerUnavailable, StoreUnavailable: a disk refused.
        """
        in_use = self.in_use()
        metrics.PSEUDONYM_KEYS.set(len(in_use))
        if in_use == self._seen:
            return
        if len(in_use) == 1 and self._fleet_key.read() != in_use[0]:
            self._fleet_key.write(in_use[0])
        if len(in_use) > 1:
            logger.error(
                "servers make pseudonyms with different keys: a person has several, and is not"
                " found by one; give every server the same serving.pseudonym_key_file",
                extra={
                    "event": "pseudonym_keys_differ",
                    "count": len(in_use),
                    "setting": "serving.pseudonym_key_file",
                },
            )
        self._seen = in_use
