"""The updater as a process: parts put together, status pages, signals, and an orderly end."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from dataclasses import asdict
from types import FrameType
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers.utils.logging import disable_progress_bar

from moorline.http import StatusServer
from moorline.settings import Settings
from moorline.store import ArtifactStore, PinInvalid
from moorline.stream import (
    DeadLetters,
    Reader,
    StreamUnavailable,
    Topic,
    ensure_topics,
    publish_release,
)
from moorline.systemd import Notifier
from updater.assembly import assemble, open_ledger
from updater.learning.diagnostics import ringing_alarms
from updater.ledger import LedgerError, LedgerUnavailable
from updater.progress import UNAVAILABLE, Phase, Progress
from updater.pseudonym_keys import keys_in_use

logger = logging.getLogger("moorline.updater")

_RETRY_SECONDS = 5.0
_CHECK_SECONDS = 0.1


class Updater:
    """Everything that one updater process owns."""

    def __init__(self, settings: Settings) -> None:
        """Load the model, take the ledger, stand where it stands.

        Raises:
            ModelInvalid, LedgerError, StoreError, ProbesInvalid, PortUnavailable, ObjectiveInvalid,
                ReleaseInvalid: with one line that says what to do.
        """
        self._settings = settings
        self._stopping = False
        self._snapshot: dict[str, Any] = {"alias": settings.alias}
        self._notifier = Notifier()
        self._progress = Progress(settings.updater.stall_seconds, alive=self._alive)
        self._server = StatusServer(
            settings.updater.host,
            settings.updater.port,
            status=self._shown,
            ready=self._why_not_ready,
            alive=self._progress.why_stalled,
        )
        self._server.start()
        if settings.learning.threads:
            torch.set_num_threads(settings.learning.threads)
        self._ledger = open_ledger(settings)
        self._store = ArtifactStore(settings.store_dir)
        disable_progress_bar()  # a log is no terminal
        self._reader = Reader(settings.stream, (Topic.INTERACTIONS, Topic.FEEDBACK, Topic.ERASURES))
        self._reader.seek(
            {(Topic(topic), part): at for (topic, part), at in self._ledger.offsets().items()}
        )
        self._dead_letters = DeadLetters(settings.stream)
        register_module_forward_hook(self._progress.note)
        parts = assemble(
            settings,
            progress=self._progress,
            ledger=self._ledger,
            store=self._store,
            reader=self._reader,
            dead_letters=self._dead_letters,
            publish=lambda release: publish_release(settings.stream, release),
        )
        self._loop, self._trust_region = parts.loop, parts.trust_region
        self._loop.resume()

    def run(self) -> None:
        """Cycle until SIGTERM or SIGINT; an update that is under way is finished first."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        self._notifier.ready("loaded")
        topics_exist = False
        while not self._stopping:
            topics_exist = topics_exist or self._ensure_topics()
            self._loop.cycle()
            with contextlib.suppress(LedgerUnavailable):  # then the page shows what it showed
                self._snapshot = self._status()
            self._notifier.status(str(self._progress.phase))
            if self._progress.phase in UNAVAILABLE:
                self._rest(_RETRY_SECONDS)
        self._notifier.stopping()
        self.close()

    def _alive(self) -> None:
        """Called at every sign of progress of the loop's thread."""
        self._notifier.ping()
        if self._stopping:  # a kill after the grace period is no fault of the batch
            with contextlib.suppress(LedgerError):
                self._ledger.crashes.remove_marks()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # A plain flag: an Event's lock may be held by the very thread that this interrupts.
        del number, frame
        self._stopping = True

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stopping and time.monotonic() < until:
            time.sleep(_CHECK_SECONDS)

    def close(self) -> None:
        """Give back the lock, the sockets and the port."""
        self._reader.close()
        self._dead_letters.close()
        self._ledger.close()
        self._server.close()
        logger.info("the updater has stopped", extra={"event": "updater_stopped"})

    def _ensure_topics(self) -> bool:
        try:
            ensure_topics(self._settings.stream, self._settings.learning.horizon_seconds)
        except StreamUnavailable as error:
            self._progress.wait(Phase.STREAM_UNAVAILABLE, error)
            return False
        return True

    def _shown(self) -> dict[str, Any]:
        """The last cycle's numbers under the phase of this moment."""
        return {**self._snapshot, "phase": str(self._progress.phase)}

    def _why_not_ready(self) -> str | None:
        phase = self._progress.phase
        return str(phase) if phase in (Phase.STARTING, *UNAVAILABLE) else None

    def _status(self) -> dict[str, Any]:
        """What ``/status`` shows until the next cycle."""
        version = self._ledger.live_version()
        release = self._ledger.release(version) if version else None
        horizon_seconds = self._settings.learning.horizon_seconds
        shown: dict[str, Any] = {
            "alias": self._settings.alias,
            "live_version": version,
            "anchor_version": self._ledger.anchor().version,
            "pinned": self._pinned_version(),
            "ready_examples": self._ledger.count_ready(),
            "pseudonym_keys": keys_in_use(self._ledger.pseudonym_keys()),
            "recent_feedback": asdict(self._ledger.recent_feedback(time.time(), horizon_seconds)),
            "updates": {
                "released": self._ledger.newest_version(),
                "rejected": self._ledger.count_rejections(),
            },
            **self._lag(),
            "accounting": self._ledger.accounting().as_dict(),
            "anchor_budget_left_nats": self._settings.bound.anchor_kl_nats,
        }
        if release is not None:
            shown["last_update"] = {
                "version": version,
                "at": release.created_at,
                "examples": release.examples,
                "step_scale": release.step_scale,
                "alarms": [
                    name for name, rings in ringing_alarms(release.diagnostics).items() if rings
                ],
                **release.diagnostics,
            }
            for divergence in release.divergences:
                if divergence.tokens_from == "traffic":
                    shown[f"kl_{divergence.measured_from}_nats"] = divergence.mean_kl_nats
            shown["anchor_budget_left_nats"] = self._trust_region.budget_left_nats(release)
        return shown

    def _pinned_version(self) -> int | None:
        try:
            pin = self._store.pinned(self._settings.alias)
        except PinInvalid:  # the phase says so
            return None
        return pin.version if pin is not None else None

    def _lag(self) -> dict[str, dict[str, float]]:
        """Unread events by topic, and the age of the oldest of each, seconds."""
        events: dict[str, float] = {}
        seconds: dict[str, float] = {}
        if self._reader.connected:
            for (topic, _), count in self._reader.lag().items():
                events[topic] = events.get(topic, 0) + count
            for (topic, _), age in self._reader.lag_seconds().items():
                seconds[topic] = round(max(seconds.get(topic, 0.0), age), 3)
        return {"lag_events": events, "lag_seconds": seconds}
