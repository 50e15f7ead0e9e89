"""The whole cycle, from feedback to release. Each verb is a module:

    take in            ingest.py                    the stream's records become rows of the ledger
    revoke             ledger/revocation.py         what learned from an erased person is taken back
    reanchor           anchors.py                   distances are measured from where a person says
    update             update/updates.py            choose, measure, propose, bound, judge, decide
    publish            releases.py                  manifest to the store, announcement to the topic
    collect garbage    retention.py                 bytes that nobody can ask for any more

The ledger is the only commit point: what happens before an update's ``decide`` leaves no trace
after a crash, and what comes after it is repeated until it is done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from moorline import metrics
from moorline.adapter_format import OPTIMIZER_STATE
from moorline.events import Release
from moorline.failpoints import failpoint
from moorline.settings import Settings
from moorline.store import ArtifactStore, PinInvalid, ReleaseConflict, StoreUnavailable
from moorline.stream import StreamUnavailable
from updater.adoption import check_only_writer
from updater.anchors import Anchors
from updater.ingest import Ingest
from updater.learning.policy import Policy, check_continues
from updater.learning.trainer import (
    Trainer,
)
from updater.ledger import Ledger, LedgerUnavailable
from updater.progress import Phase, Progress
from updater.pseudonym_keys import PseudonymKeys
from updater.releases import Manifests, Outbox
from updater.retention import collect_garbage
from updater.safety import Gate
from updater.safety.trust_region import TrustRegion
from updater.update.outcomes import Outcomes
from updater.update.updates import Updates

logger = logging.getLogger("moorline.loop")

INTAKE_SECONDS = 5.0
"""Longest intake of one cycle: records that never cease must not hold up erasures and expiry."""


class Loop:
    """One updater's life, cycle by cycle. Owned by one thread."""

    def __init__(
        self,
        settings: Settings,
        *,
        ingest: Ingest,
        ledger: Ledger,
        store: ArtifactStore,
        policy: Policy,
        trainer: Trainer,
        trust_region: TrustRegion,
        gate: Gate,
        publish: Callable[[Release], None],
        base_model_digest: str,
        software: dict[str, str],
        progress: Progress,
    ) -> None:
        """``publish`` writes a release to its topic and returns when it is acknowledged."""
        self._settings = settings
        self._ingest = ingest
        self._ledger = ledger
        self._store = store
        self._policy = policy
        self._trainer = trainer
        self._trust_region = trust_region
        self._outbox = Outbox(ledger, store, publish)
        self._manifests = Manifests(settings, ledger, store, base_model_digest, software)
        self._outcomes = Outcomes(
            ledger, self._manifests, trainer, trust_region, settings.learning.max_tries
        )
        self._updates = Updates(
            settings,
            ledger=ledger,
            store=store,
            policy=policy,
            trainer=trainer,
            trust_region=trust_region,
            gate=gate,
            outcomes=self._outcomes,
            progress=progress,
        )
        self._base_model_digest = base_model_digest
        self._anchors = Anchors(settings.alias, ledger, store, policy)
        self._pseudonym_keys = PseudonymKeys(ledger, store, settings.alias)
        self._base_adapter = trainer.live_adapter
        self._progress = progress

    @property
    def phase(self) -> Phase:
        return self._progress.phase

    def resume(self) -> None:
        """Stand where the ledger stands: the live release's adapter and optimiser state.

        Raises:
            StoreError: the live release's bytes are missing or changed.
            ReleaseInvalid: it is of another base model or adapter rank.
        """
        version = self._ledger.live_version()
        release = self._ledger.release(version) if version else None
        if release is not None and release.artifact_digest is not None:
            directory = self._store.open(release.artifact_digest, release.files)
            adapter = self._policy.read_adapter(directory)
            check_continues(release, adapter, self._base_model_digest, self._trainer.live_adapter)
            self._trainer.resume(adapter, (directory / OPTIMIZER_STATE).read_bytes())
        else:
            self._trainer.resume(self._base_adapter, None)
        self._updates.start_from(release.divergences if release is not None else ())
        self._load_anchor()
        logger.info(
            "learning goes on from the live release",
            extra={"event": "learning_resumed", "version": version, "epoch": self._ledger.epoch},
        )
        self._outcomes.export_version(version, release)

    def cycle(self) -> None:
        """Take in what there is; learn from it if it is enough; announce what was decided.

        A disk that refuses pauses the updater, and so does a pin that cannot be read: nothing was
        committed, and the next cycle tries again, with writes of its own.
        """
        try:
            self._cycle()
        except (LedgerUnavailable, StoreUnavailable) as error:
            where = "store" if isinstance(error, StoreUnavailable) else "ledger"
            metrics.DISK_REFUSALS.labels(where=where).inc()
            self._trainer.restore()
            self._progress.wait(Phase.DISK_UNAVAILABLE, error)
        except PinInvalid as error:
            self._progress.wait(Phase.PIN_INVALID, error)
        except ReleaseConflict as error:
            self._progress.wait(Phase.RELEASE_CONFLICT, error)
        self._progress.end_cycle()

    def _cycle(self) -> None:
        reading = self._take_in()
        self._revoke()
        self._reanchor()
        self._publish_decided()
        check_only_writer(self._ledger, self._store, self._settings.alias)
        waits_in = self._why_no_update()
        if waits_in is not None:
            if reading:
                self._progress.enter(waits_in)
            return
        start = time.monotonic()
        outcome = self._updates.make()
        metrics.UPDATES.labels(outcome=outcome).inc()
        metrics.UPDATE_SECONDS.observe(time.monotonic() - start)
        self._publish_decided()
        self._collect_garbage()

    def _why_no_update(self) -> Phase | None:
        """What an update waits for; None: it is due. Never while an erasure is unread."""
        if self._store.pinned(self._settings.alias) is not None:
            return Phase.PINNED
        waits_in = self._updates.why_not()
        return Phase.WAITING if waits_in is None and self._ingest.erasures_unread() else waits_in

    # --- the verbs --------------------------------------------------------------------------

    def _take_in(self) -> bool:
        """Stream to ledger, until nothing is waiting, a batch is full or it took long; then expiry.

        Returns:
            Whether the stream can be read on.
        """
        reading = True
        try:
            until = time.monotonic() + INTAKE_SECONDS
            while (step := self._ingest.step(self._settings.updater.poll_seconds)).records:
                self._progress.note()
                full = self._ledger.count_ready() >= self._settings.learning.batch_examples
                if full or time.monotonic() > until:
                    break
            if step.stalled:  # it holds what no dead-letter topic takes, and has said so
                self._progress.enter(Phase.STREAM_UNAVAILABLE)
                reading = False
        except StreamUnavailable as error:
            self._progress.wait(Phase.STREAM_UNAVAILABLE, error)
            reading = False
        self._pseudonym_keys.export()
        self._ledger.expire()
        metrics.READY_EXAMPLES.set(self._ledger.count_ready())
        recent = self._ledger.recent_feedback(time.time(), self._settings.learning.horizon_seconds)
        metrics.RECENT_FEEDBACK.labels(interaction="found").set(recent.found)
        metrics.RECENT_FEEDBACK.labels(interaction="missing").set(recent.missing)
        return reading

    def _revoke(self) -> None:
        """Go back to the last policy without an erased person, where an erasure asks for it."""
        ancestor = self._ledger.revocation_wanted()
        if ancestor is None:
            return
        release = self._manifests.revoking(ancestor)
        self._ledger.commit_revocation(release)
        failpoint("loop.after_revocation")
        logger.warning(
            "releases that had learned from an erased person are revoked",
            extra={"event": "releases_revoked", "version": release.revokes_after},
        )
        self.resume()
        self._publish_decided()
        self._collect_garbage()

    def _reanchor(self) -> None:
        """Measure distances from another policy, where a person has asked for it."""
        request = self._anchors.requested()
        if request is not None and self._anchors.apply(request):
            self.resume()
            self._collect_garbage()

    def _load_anchor(self) -> None:
        version, adapter = self._anchors.current()
        self._trainer.set_anchor(adapter)
        self._trust_region.set_anchor(adapter, version)

    def _publish_decided(self) -> None:
        """Publish what the ledger has decided and nobody was told of yet."""
        self._outbox.send()

    def _collect_garbage(self) -> None:
        keep = self._settings.learning.keep_releases
        collect_garbage(self._store, self._ledger, self._settings.alias, keep)
