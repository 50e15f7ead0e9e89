"""What the updater is doing, and when it last made progress.

Status pages answer on threads of their own, so that a long training step does not look dead; a step
that hangs must not look alive for that. So the loop's thread says how it gets on, and ``/healthz``
tells it from standing still.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from moorline import metrics
from moorline.clock import running_seconds

logger = logging.getLogger("moorline.progress")


class Phase(StrEnum):
    """One word for what the loop is doing; shown by ``moorline status``."""

    STARTING = "starting"
    WAITING = "waiting"
    """For enough feedback."""
    TRAINING = "training"
    MEASURING = "measuring"
    GATING = "gating"
    PINNED = "pinned"
    """An operator has pinned a version: events are taken in, nothing is trained."""
    ANCHOR_EXHAUSTED = "anchor_exhausted"
    """The line has used up its distance from the anchor: ratings wait until a person decides."""
    PIN_INVALID = "pin_invalid"
    """There is a pin that nobody can read: as if pinned, until an operator writes it again."""
    RELEASE_CONFLICT = "release_conflict"
    """The store has releases of another updater: events are taken in, nothing is trained."""
    STREAM_UNAVAILABLE = "stream_unavailable"
    DISK_UNAVAILABLE = "disk_unavailable"
    """The disk of the ledger or of the store is full or broken; nothing is lost, learning waits."""


UNAVAILABLE = (
    Phase.STREAM_UNAVAILABLE,
    Phase.DISK_UNAVAILABLE,
    Phase.PIN_INVALID,
    Phase.RELEASE_CONFLICT,
)
"""Not ready: something outside must come back first."""


class Progress:
    """Written by the loop's thread, read by any."""

    def __init__(
        self, stall_seconds: float = math.inf, alive: Callable[[], None] = lambda: None
    ) -> None:
        """``alive`` is called at every sign of life, e.g. to feed a watchdog."""
        self._stall_seconds = stall_seconds
        self._alive = alive
        self._at = running_seconds()
        self._phase = Phase.STARTING
        self._waits_in: Phase | None = None
        self._had_to_wait = False
        metrics.PROGRESS_AGE_SECONDS.set_function(lambda: self.age_seconds)
        self.enter(Phase.STARTING)

    @property
    def phase(self) -> Phase:
        return self._phase

    def enter(self, phase: Phase) -> None:
        """Go on to another thing, or to the next round of the same."""
        self._phase = phase
        for one in Phase:
            metrics.UPDATER_PHASE.labels(phase=one).set(one is phase)
        self.note()

    def wait(self, phase: Phase, error: Exception) -> None:
        """Enter a phase of ``UNAVAILABLE``; logged once, until a whole cycle did not have to."""
        if self._waits_in is not phase:
            logger.error(
                "the updater waits, nothing is lost, it will retry: %s: %s",
                phase,
                error,
                extra={"event": "updater_waits", "phase": str(phase), "error": str(error)},
            )
        self._waits_in, self._had_to_wait = phase, True
        self.enter(phase)

    def end_cycle(self) -> None:
        """Log that what was missing is back, after the first cycle that had not to wait for it."""
        if self._waits_in is not None and not self._had_to_wait:
            logger.warning(
                "what the updater waited for is back, learning goes on: %s",
                self._waits_in,
                extra={"event": "updater_goes_on", "phase": str(self._waits_in)},
            )
            self._waits_in = None
        self._had_to_wait = False

    def note(self, *_: Any) -> None:
        """Note progress: a forward pass, a step of the intake. Usable as a forward hook."""
        self._at = running_seconds()
        self._alive()

    @property
    def age_seconds(self) -> float:
        """Since the last sign of life, without the time in which this process was suspended."""
        return running_seconds() - self._at

    def why_stalled(self) -> str | None:
        """Why it counts as stalled; None while it makes progress."""
        age = self.age_seconds
        if age <= self._stall_seconds:
            return None
        return (
            f"{self._phase} without progress for {age:.0f} s "
            f"(updater.stall_seconds = {self._stall_seconds:g})"
        )
