"""What no update survives: a batch that holds it would otherwise come back for ever.

An example that makes an update raise is found at once, by trying each of the batch alone.

One that kills the process is found over several lives of it: the ledger counts the deaths
(``updater/ledger/attempts.py``). Below ``updater.suspect_after_crashes`` of them nothing changes:
most processes die of something else. From then on the replies that were in each of these deaths go
first: half a batch of them, and with each death half of that. What is still a batch
(``learning.min_batch_examples``) teaches; a smaller group is only tried, and what survives waits
for a full batch again. Who is left at the end has to kill the process as often again, alone, and
each time after another reply has survived the same in the same process.

A machine at fault (memory, disk, stream, ledger) must not cost anybody's feedback: it ends the
process instead, and the batch waits.
"""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

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
"""Errors of what is not the process: no death of whatever is in the update."""
OF_THE_MACHINE = (*OUTSIDE, MemoryError, torch.OutOfMemoryError)
"""Errors that end the update without a decision."""


class Quarantine:
    """Tells the examples at fault from the others."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        trainer: Trainer,
        trust_region: TrustRegion,
        credit: Callable[[Sequence[Example]], tuple[Batch, Baselines, StalenessReport]],
    ) -> None:
        """``credit``: what an update does with examples first."""
        self._ledger = ledger
        self._attempts = ledger.crashes
        self._trainer = trainer
        self._trust_region = trust_region
        self._credit = credit
        self._deaths = settings.updater.suspect_after_crashes
        self._batch = settings.learning.batch_examples
        self._said_to_wait = False
        # In more deaths than it takes to know of one that it kills.
        self._hopeless = 2 * self._deaths + self._batch.bit_length()
        # Of one alone nothing can be learned: its reward is what is expected of it.
        self._teaches = max(2, settings.learning.min_batch_examples)

    # --- examples that raise ----------------------------------------------------------------

    def culprits(self, examples: Sequence[Example], error: Exception) -> list[Example]:
        """Those of a batch, of which an update raised, that make it raise alone; all where none
        does.

        Raises:
            Exception: the machine is at fault, not the batch.
        """
        self._trainer.restore()
        self._compute_probes()
        found = [one for one in examples if self._raises([one])] or list(examples)
        logger.error(
            "an update raised: the examples at fault are rejected, please report it",
            extra={"cause": cause_of(error), "batch": len(examples), "rejected": len(found)},
        )
        return found

    def _raises(self, examples: Sequence[Example]) -> bool:
        try:
            self._try(examples)
        except OF_THE_MACHINE:
            raise
        except Exception:  # whatever it is: that is the question
            return True
        return False

    def _try(self, examples: Sequence[Example]) -> None:
        """An update from these, thrown away."""
        try:
            batch, _, seen = self._credit(examples)
            # A reply alone is as good as expected: with an advantage of 0 nothing would be tried.
            ones = tuple(replace(one, advantage=one.advantage or 1.0) for one in batch.examples)
            self._trainer.propose(replace(batch, examples=ones), seen)
        except (NothingToLearn, NonFiniteUpdate):
            pass
        finally:
            self._trainer.restore()

    def _compute_probes(self) -> None:
        """Raises where the process cannot even compute what it always could."""
        self._trust_region.logprobs(self._trainer.live_adapter, self._trust_region.probes)

    # --- examples that kill -----------------------------------------------------------------

    @contextlib.contextmanager
    def watch(self, examples: Sequence[Example], *, alone: bool = False) -> Iterator[None]:
        """A process that dies in here has died of these; ``alone``: after another has survived."""
        self._attempts.begin([one.example_id for one in examples], alone=alone)
        try:
            yield
        except OUTSIDE:
            with contextlib.suppress(LedgerError):
                self._attempts.end()
            raise

    def due(self, batch: bool) -> bool:
        """Whether to go on to an update, where a ``batch`` is due or is not.

        Suspects go first. One alone waits until there is a reply to compare it with: if none is,
        the process has died with every other one that waits, too.
        """
        suspects = self._worst()
        if not suspects:
            return batch
        if len(suspects) > 1 or self._another(suspects[0].key) is not None:
            return True
        if not self._said_to_wait:
            logger.error("the updater died with every reply that waits: it waits for another one")
        self._said_to_wait = True
        return False

    def suspects(self) -> list[Example]:
        """What the process keeps dying with: as much of it as goes into the next update, if any."""
        worst = self._worst()
        if worst:
            logger.warning(
                "updates kill the updater: the replies that were in each go in smaller batches",
                extra={"examples": len(worst), "deaths": worst[0].deaths},
            )
        return self._ledger.examples_of([one.key for one in worst])

    def _worst(self) -> list[Suspect]:
        """Those in the most deaths, half as many with each one more."""
        found = self._attempts.suspects()
        if not found:
            return []
        deaths = found[0].deaths
        size = max(1, self._batch >> (deaths - self._deaths + 1))
        return [one for one in found if one.deaths == deaths][:size]

    def teaches(self, examples: Sequence[Example]) -> bool:
        """Whether these suspects are enough for an update that is kept."""
        return len(examples) >= self._teaches

    def verdict(self, suspects: Sequence[Example]) -> str | None:
        """Try an update of these, too few to teach. Whoever returns from it has survived.

        Returns:
            Nothing is tried any more: this one kills the process, and that is how it is known.

        Raises:
            Exception: the machine is at fault, not these.
        """
        alone = len(suspects) == 1
        if alone:
            key = suspects[0].interaction.key
            deaths = self._attempts.crashes_alone(key)
            if deaths >= self._deaths:
                logger.error(
                    "the updater dies of one example: it is rejected, please report it; if memory"
                    " ends, lower learning.max_example_tokens or learning.micro_batch_tokens",
                    extra={"interaction": key, "deaths": deaths},
                )
                return f"the process died {deaths} times in an update of it alone; others survived"
            other = self._another(but=key)
            compared = self._ledger.examples_of([] if other is None else [other])
            if not compared:
                return None
            self._succeeded(compared)
        self._succeeded(suspects, alone=alone)
        logger.info("survived: they wait for a batch again", extra={"tried": len(suspects)})
        return None

    def _another(self, but: str) -> str | None:
        """The key of the reply to compare one with: the likeliest to survive."""
        return self._attempts.least_suspect(but, self._hopeless)

    def _succeeded(self, examples: Sequence[Example], *, alone: bool = False) -> None:
        with self.watch(examples, alone=alone):
            if self._raises(examples):
                self._compute_probes()  # an error may leave a device that computes no more
        self._attempts.succeeded()


def cause_of(error: BaseException) -> str:
    """The error's type and where it was raised. Not its words: they may be a user's."""
    frames = traceback.extract_tb(error.__traceback__)
    where = [f"{frame.name}:{frame.lineno}" for frame in frames[-3:]]
    return f"{type(error).__name__} in {' > '.join(where)}"
