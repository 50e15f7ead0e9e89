"""Watches whether all servers make pseudonyms with one key, so that a person can be found."""

from __future__ import annotations

import contextlib
import logging

from moorline import metrics
from moorline.store import ArtifactStore, StoreUnavailable
from moorline.store.pseudonym_keys import RecordedKeys
from updater.ledger import LedgerReader

logger = logging.getLogger("moorline.pseudonyms")

RECENT_SECONDS = 86400.0
"""A key counts as in use if it made a pseudonym so long before the newest one or later."""


class PseudonymKeys:
    """Tells servers that start which keys there are, and operators when there are several."""

    def __init__(self, ledger: LedgerReader, store: ArtifactStore, alias: str) -> None:
        self._ledger = ledger
        self._recorded = RecordedKeys(store)
        self._alias = alias
        self._differ = False

    def export(self) -> None:
        """Copy the ledger's list to the store; set the metric; log when servers begin to differ.

        Raises:
            LedgerUnavailable: the disk refused.
        """
        keys = self._ledger.pseudonym_keys()
        fingerprints = tuple(sorted(keys))
        if self._recorded.read(self._alias) != fingerprints:
            with contextlib.suppress(StoreUnavailable):  # a later cycle copies it
                self._recorded.write(self._alias, fingerprints)
        in_use = keys_in_use(keys)
        metrics.PSEUDONYM_KEYS.set(len(in_use))
        if self._differ != (len(in_use) > 1):
            self._differ = not self._differ
            self._log(in_use)

    def _log(self, in_use: tuple[str, ...]) -> None:
        if self._differ:
            logger.error(
                "servers make pseudonyms with different keys (%s): an erasure by name needs each;"
                " give all servers the same serving.pseudonym_key_file",
                ", ".join(in_use),
                extra={"event": "pseudonym_keys_differ", "count": len(in_use)},
            )
        else:
            logger.warning(
                "all servers make pseudonyms with one key again (%s)",
                ", ".join(in_use),
                extra={"event": "pseudonym_keys_agree", "count": len(in_use)},
            )


def keys_in_use(keys: dict[str, float]) -> tuple[str, ...]:
    """The fingerprints of the last day, sorted; replies that do not name theirs say nothing.

    Args:
        keys: fingerprint -> when the last reply with a pseudonym by it arrived, Unix seconds.
    """
    named = {fingerprint: at for fingerprint, at in keys.items() if fingerprint}
    newest = max(named.values(), default=0.0)
    return tuple(sorted(one for one, at in named.items() if at >= newest - RECENT_SECONDS))
