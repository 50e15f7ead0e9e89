"""The updater as a process: parts put together, status pages, signals, and an orderly end."""

from __future__ import annotations

import importlib.metadata
import logging
import signal
import threading
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from daemon.artifacts import ArtifactStore
from daemon.base_model import check_model_dir, model_digest
from daemon.http import StatusServer
from daemon.settings import Settings
from daemon.stream import (
    DeadLetters,
    Reader,
    StreamUnavailable,
    Topic,
    ensure_topics,
    publish_release,
)
from daemon.systemd import Notifier
from updater.behaviour import Archive
from updater.diagnostics import ringing
from updater.gate import Gate, load_canaries
from updater.hints import ChatTokens
from updater.ingest import Ingest
from updater.ledger import Ledger
from updater.loop import Loop
from updater.phase import UNAVAILABLE, Phase
from updater.policy import Policy
from updater.trainer import Trainer
from updater.trust_region import TrustRegion

logger = logging.getLogger("moorline.updater")

_RETRY_SECONDS = 5.0


class Updater:
    """Everything that one updater process owns."""

    def __init__(self, settings: Settings) -> None:
        """Load the model, take the ledger, stand where it stands.

        Raises:
            UnsafeModel, LedgerError, StoreError, CanaryError, PortUnavailable, UnknownObjective,
                ReleaseUnfit: with one line that says what to do.
        """
        self._settings = settings
        self._stop = threading.Event()
        self._snapshot: dict[str, Any] = {"alias": settings.alias}
        self._loop: Loop | None = None
        self._server = StatusServer(
            settings.updater.host,
            settings.updater.port,
            status=self._shown,
            ready=self._why_not_ready,
        )
        self._server.start()
        learning = settings.learning
        if learning.threads:
            torch.set_num_threads(learning.threads)
        model_dir = check_model_dir(settings.model.path)
        self._ledger = Ledger(settings.ledger_path, horizon_seconds=learning.horizon_seconds)
        self._store = ArtifactStore(settings.store_dir)
        disable_progress_bar()  # a log is no terminal
        policy = Policy(
            model_dir, rank=learning.lora_rank, alpha=learning.lora_alpha, seed=learning.seed
        )
        canaries = load_canaries(settings.gate.canaries, model_dir)
        trainer = Trainer(
            policy,
            learning,
            Archive(policy, self._store, self._ledger.release),
            ChatTokens(model_dir),
        )
        self._trust_region = TrustRegion(
            policy, canaries.sequences, settings.bound, learning.micro_batch_tokens
        )
        self._reader = Reader(settings.stream, (Topic.INTERACTIONS, Topic.FEEDBACK))
        self._reader.seek(
            {(Topic(topic), part): at for (topic, part), at in self._ledger.offsets().items()}
        )
        self._dead_letters = DeadLetters(settings.stream)
        loop = Loop(
            settings,
            ingest=Ingest(
                self._reader,
                self._dead_letters,
                self._ledger,
                alias=settings.alias,
                vocab_size=policy.vocabulary_size,
                max_tokens=learning.max_example_tokens,
                signals=learning.signals,
                max_event_bytes=settings.stream.max_event_bytes,
            ),
            ledger=self._ledger,
            store=self._store,
            policy=policy,
            trainer=trainer,
            trust_region=self._trust_region,
            gate=Gate(policy, canaries, self._trust_region, self._store, settings.gate),
            publish=lambda release: publish_release(settings.stream, release),
            base_model_digest=model_digest(model_dir),
            software=_software(),
        )
        loop.resume()
        self._loop = loop

    def run(self) -> None:
        """Cycle until SIGTERM or SIGINT; an update that is under way is finished first."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        assert self._loop is not None
        loop = self._loop
        notifier = Notifier()
        notifier.ready("learning")
        topics_exist = False
        while not self._stop.is_set():
            if not topics_exist:
                topics_exist = self._ensure_topics(loop)
            loop.cycle()
            self._snapshot = self._status(loop)
            notifier.ping()
            if loop.phase in UNAVAILABLE:
                self._stop.wait(_RETRY_SECONDS)
        notifier.stopping()
        self.close()

    def close(self) -> None:
        """Give back the lock, the sockets and the port."""
        self._reader.close()
        self._dead_letters.close()
        self._ledger.close()
        self._server.close()
        logger.info("stopped")

    def _ensure_topics(self, loop: Loop) -> bool:
        try:
            ensure_topics(self._settings.stream, self._settings.learning.horizon_seconds)
        except StreamUnavailable as error:
            logger.error("stream unavailable, will retry", extra={"cause": str(error)})
            loop.phase = Phase.STREAM_UNAVAILABLE
            return False
        return True

    def _shown(self) -> dict[str, Any]:
        """The last cycle's numbers under the phase of this moment."""
        phase = str(self._loop.phase) if self._loop is not None else str(Phase.STARTING)
        return {**self._snapshot, "phase": phase}

    def _why_not_ready(self) -> str | None:
        phase = self._shown()["phase"]
        return phase if phase in (Phase.STARTING, *UNAVAILABLE) else None

    def _status(self, loop: Loop) -> dict[str, Any]:
        """What ``/status`` shows until the next cycle."""
        version = self._ledger.live_version()
        release = self._ledger.release(version) if version else None
        shown: dict[str, Any] = {
            "alias": self._settings.alias,
            "phase": str(loop.phase),
            "live_version": version,
            "pinned": _version_of(self._store.pinned(self._settings.alias)),
            "ready_examples": self._ledger.count_ready(),
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
                "alarms": [name for name, rings in ringing(release.diagnostics).items() if rings],
                **release.diagnostics,
            }
            for divergence in release.divergences:
                if divergence.tokens_from == "traffic":
                    shown[f"kl_{divergence.reference}_nats"] = divergence.mean_kl_nats
            shown["anchor_budget_left_nats"] = self._trust_region.anchor_budget_left_nats(
                release.divergences
            )
        return shown

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


def _version_of(pin: Any) -> int | None:
    return pin.version if pin is not None else None


def _software() -> dict[str, str]:
    names = ("moorline", "torch", "transformers", "peft")
    return {name: importlib.metadata.version(name) for name in names}
