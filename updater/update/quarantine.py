"""Finds the examples that no update survives: their batch would otherwise come back for ever.

An example that makes an update raise is found at once, by trying each of the batch alone.

One that crashes the process is found over several of its lives: the ledger counts the crashes
(``updater/ledger/crashes.py``). Below ``updater.suspect_after_crashes`` of them nothing changes:
most processes crash of something else. From then on the suspects, the replies common to all these
crashes, are bisected: half a batch of them goes first, and with each further crash half of that.
What is still a batch (``learning.min_batch_examples``) teaches; a smaller group is only tried, and
is queued again when its trial succeeds. The last suspect has to crash the process as often again,
alone, and each time after another reply has succeeded in the same process.

A machine at fault (memory, disk, stream, ledger) must not cost anybody's feedback: it ends the
process instead, and the batch waits.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from moorline.errors import cause_of
from moorline.settings import Settings
from moorline.store import StoreError
from moorline.stream import StreamUnavailable
from updater.learning.baselines import Baselines
from updater.learning.staleness import StalenessReport
from updater.learning.trainer import NonFiniteUpdate, NothingToLearn, Trainer
from updater.ledger import Ledger, LedgerError, Suspect
from updater.safety.trust_region import TrustRegion
from updater.values import Batch, Example

logger = logging.getLogger("moorline.quarantine")

OUTSIDE = (LedgerError, StoreError, StreamUnavailable, OSError)
"""Errors from outside the process: no crash is counted for what is in the update."""
OF_THE_MACHINE = (*OUTSIDE, MemoryError, torch.OutOfMemoryError)
"""Errors that end the update without a decision."""


class Quarantine:
    """Tells examples that no update survives from the others in their batch."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        trainer: Trainer,
        trust_region: TrustRegion,
        credit: Callable[[Sequence[Example]], tuple[Batch, Baselines, StalenessReport]],
    ) -> None:
        """``credit`` turns examples into a batch, as an update does first."""
        self._ledger = ledger
        self._crashes = ledger.crashes
        self._trainer = trainer
        self._trust_region = trust_region
        self._credit = credit
        self._suspect_after = settings.updater.suspect_after_crashes
        self._batch = settings.learning.batch_examples
        self._logged_pause = False
        # A reply that was in more crashes than bisection takes is no comparison.
        self._too_suspect = 2 * self._suspect_after + self._batch.bit_length()
        # One alone teaches nothing: its reward is what is expected of it.
        self._fewest_to_teach = max(2, settings.learning.min_batch_examples)

    # --- examples that raise ----------------------------------------------------------------

    def culprits(self, examples: Sequence[Example], error: Exception) -> list[Example]:
        """Find the examples that make an update raise when they are alone in it.

        Returns:
            Those; the whole batch where none raises alone.

        Raises:
            Exception: the machine is at fault, not the batch.
        """
        self._trainer.restore()
        self._compute_probes()
        found = [one for one in examples if self._raises([one])] or list(examples)
        logger.error(
            "an update raised an error: the examples at fault are rejected, please report it",
            extra={
                "event": "update_failed",
                "error": cause_of(error),
                "examples": len(examples),
                "count": len(found),
            },
        )
        return found

    def _raises(self, examples: Sequence[Example]) -> bool:
        try:
            self._trial_update(examples)
        except OF_THE_MACHINE:
            raise
        except Exception:  # whatever it is: that is the question
            return True
        return False

    def _trial_update(self, examples: Sequence[Example]) -> None:
        """Make an update of these and discard it."""
        try:
            batch, _, staleness = self._credit(examples)
            # A reply alone is as good as expected: with an advantage of 0 nothing would be tried.
            ones = tuple(replace(one, advantage=one.advantage or 1.0) for one in batch.examples)
            self._trainer.propose(replace(batch, examples=ones), staleness)
        except (NothingToLearn, NonFiniteUpdate):
            pass
        finally:
            self._trainer.restore()

    def _compute_probes(self) -> None:
        """Compute the probes: raises where the process can compute nothing any more."""
        self._trust_region.logprobs(self._trainer.live_adapter, self._trust_region.probes)

    # --- examples that crash the process ----------------------------------------------------

    @contextlib.contextmanager
    def watch(self, examples: Sequence[Example], *, alone: bool = False) -> Iterator[None]:
        """Count a crash inside for these; ``alone``: after another reply has succeeded."""
        self._crashes.mark_update([one.example_id for one in examples], alone=alone)
        try:
            yield
        except OUTSIDE:
            with contextlib.suppress(LedgerError):
                self._crashes.remove_marks()
            raise

    def due(self, batch: bool) -> bool:
        """Whether to go on to an update, where a ``batch`` is due or is not.

        Suspects go first. One alone waits until there is a reply to compare it with: where there is
        none, every other queued reply was in a crash too.
        """
        suspects = self._worst()
        if not suspects:
            return batch
        if len(suspects) > 1 or self._another(suspects[0].key) is not None:
            return True
        if not self._logged_pause:
            logger.error(
                "training paused: every queued example was in an update that crashed; waiting for"
                " a new rating to compare with",
                extra={"event": "training_paused_by_crashes"},
            )
        self._logged_pause = True
        return False

    def suspects(self) -> list[Example]:
        """The examples common to all crashes, as many as go into the next update; often none."""
        worst = self._worst()
        if worst:
            logger.warning(
                "the updater crashed %d times while training; bisecting the examples common to all"
                " crashes",
                worst[0].crash_count,
                extra={
                    "event": "bisecting_crashes",
                    "examples": len(worst),
                    "crashes": worst[0].crash_count,
                },
            )
        return self._ledger.examples_of([one.key for one in worst])

    def _worst(self) -> list[Suspect]:
        """Those in the most crashes, half as many with each crash more."""
        found = self._crashes.suspects()
        if not found:
            return []
        most = found[0].crash_count
        size = max(1, self._batch >> (most - self._suspect_after + 1))
        return [one for one in found if one.crash_count == most][:size]

    def enough_to_teach(self, examples: Sequence[Example]) -> bool:
        """Whether these suspects are enough for an update that is kept."""
        return len(examples) >= self._fewest_to_teach

    def bisect(self, suspects: Sequence[Example]) -> str | None:
        """Try an update of these, too few to teach; when it returns, they are queued again.

        Returns:
            Why the one suspect is the culprit, where nothing need be tried any more; else None.

        Raises:
            Exception: the machine is at fault, not these.
        """
        alone = len(suspects) == 1
        if alone:
            key = suspects[0].interaction.key
            crashes = self._crashes.crashes_alone(key)
            if crashes >= self._suspect_after:
                logger.error(
                    "one example crashes the updater: it is rejected, please report it; if memory"
                    " ran out, lower learning.max_example_tokens or learning.micro_batch_tokens",
                    extra={"event": "update_crashed", "request_id": key, "crashes": crashes},
                )
                return (
                    f"the process crashed {crashes} times in an update of it alone; others did not"
                )
            other = self._another(but=key)
            compared = self._ledger.examples_of([] if other is None else [other])
            if not compared:
                return None
            self._trial(compared)
        self._trial(suspects, alone=alone)
        logger.info(
            "trial update succeeded; its examples are queued again",
            extra={"event": "trial_succeeded", "examples": len(suspects)},
        )
        return None

    def _another(self, but: str) -> str | None:
        """The key of the reply to compare a suspect with: the one in the fewest crashes."""
        return self._crashes.least_suspect(but, self._too_suspect)

    def _trial(self, examples: Sequence[Example], *, alone: bool = False) -> None:
        with self.watch(examples, alone=alone):
            if self._raises(examples):
                self._compute_probes()  # an error may leave a device that computes no more
        self._crashes.clear_counts()
