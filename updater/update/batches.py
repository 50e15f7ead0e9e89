"""What the next update learns from, and whether one is due.

In this order: replies that crashed the process (``quarantine.py``), replies of a refused candidate,
which are tried again in smaller batches, and then whatever waits, old and fresh.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from moorline.settings import LearningSettings
from updater.ledger import Ledger
from updater.update.quarantine import Quarantine
from updater.values import Batch, Example


class Batches:
    """Chooses examples; they stay ready until an outcome decides them."""

    def __init__(self, settings: LearningSettings, ledger: Ledger, quarantine: Quarantine) -> None:
        self._settings = settings
        self._ledger = ledger
        self._quarantine = quarantine
        # One alone teaches nothing: its reward is what is expected of it.
        self._fewest = max(2, settings.min_batch_examples)

    def due(self) -> bool:
        """Whether an update is due: with a full batch, with a smaller one that has waited long
        enough, with one to try again, or with suspects of a crash."""
        ready = self._ledger.count_ready()
        oldest = self._ledger.oldest_ready_at()
        waited = time.time() - oldest if oldest is not None else 0.0
        long_enough = (
            ready >= self._settings.min_batch_examples and waited >= self._settings.max_wait_seconds
        )
        full = ready >= self._settings.batch_examples
        again = ready >= self._fewest and bool(self._ledger.most_refused(1))
        return self._quarantine.due(full or long_enough or again)

    def step_share(self, batch: Batch) -> float:
        """Share of the proposed step that is tried first: half of it after each refusal."""
        return 0.5 ** self._ledger.refusals(batch.handed_out)

    def take(self) -> Sequence[Example]:
        """The examples of the next update."""
        size = self._settings.batch_examples
        refused = self._ledger.most_refused(size)
        if not refused:
            return self._ledger.ready_examples(size)
        smaller = max(self._fewest, size >> refused[0].refused)
        keys = [one.key for one in refused[:smaller]]
        if len(keys) < self._fewest:  # too few to teach: together with others
            ready = self._ledger.ready_examples(2 * self._fewest)
            others = [one.interaction.key for one in ready if one.interaction.key not in keys]
            keys += others[: self._fewest - len(keys)]
        return self._ledger.examples_of(keys)
