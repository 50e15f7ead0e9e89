"""The whole cycle, from feedback to release. Each verb is a module:

    take in            ingest.py                    the stream's records become rows of the ledger
    revoke             ledger/revocation.py         what learned from an erased person is taken back
    reanchor           anchors.py                   distances are measured from where a person says
    choose a batch     batches.py                   what the next update learns from
    measure staleness  learning/staleness.py        how far those who acted are from this policy
    assign credit      learning/advantages.py       ratings become advantages
    propose            learning/trainer.py          one update of the live adapter
    bound              safety/trust_region.py       its largest step inside the divergence bound
    write              candidates.py                the candidate's bytes, under their hash
    judge              safety/gate.py               a verdict on exactly those bytes
    decide             outcomes.py                  one transaction: fates, offsets, release
    publish            releases.py                  manifest to the store, announcement to the topic
    collect garbage    retention.py                 bytes that nobody can ask for any more

The ledger is the only commit point: what happens before ``decide`` leaves no trace after a crash,
and what comes after it is repeated until it is done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from moorline import metrics
from moorline.adapter_format import OPTIMIZER_STATE
from moorline.events import Decision, Divergence, Reason, Release
from moorline.failpoints import failpoint
from moorline.settings import Settings
from moorline.store import ArtifactStore, PinInvalid, StoreUnavailable
from moorline.stream import StreamUnavailable
from updater.anchors import Anchors
from updater.batches import Batches
from updater.candidates import write_candidate
from updater.ingest import Ingest
from updater.learning.advantages import assign_credit
from updater.learning.baselines import Baselines
from updater.learning.behaviour import behaviour_policies_unavailable
from updater.learning.diagnostics import export_divergences, export_metrics
from updater.learning.policy import Policy, check_continues
from updater.learning.staleness import StalenessReport
from updater.learning.trainer import (
    NonFiniteUpdate,
    NothingToLearn,
    Proposal,
    Trainer,
)
from updater.ledger import Ledger, LedgerUnavailable
from updater.outcomes import Outcomes
from updater.progress import Phase, Progress
from updater.quarantine import OF_THE_MACHINE, Quarantine, cause_of
from updater.releases import Manifests, publish_decided
from updater.retention import collect_garbage
from updater.safety import Gate
from updater.safety.trust_region import BoundedStep, Refused, TrustRegion, moved_from_live_nats
from updater.values import Batch, Candidate, Example

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
        self._gate = gate
        self._publish = publish
        self._manifests = Manifests(settings, ledger, store, base_model_digest, software)
        self._outcomes = Outcomes(
            ledger, self._manifests, trainer, trust_region, settings.learning.max_tries
        )
        self._quarantine = Quarantine(settings, ledger, trainer, trust_region, self._credited)
        self._base_model_digest = base_model_digest
        self._batches = Batches(settings.learning, ledger, self._quarantine)
        self._anchors = Anchors(settings.alias, ledger, store, policy)
        self._base_adapter = trainer.live_adapter
        self._exhausted_at: int | None = None
        self._progress = progress
        self._last_divergences: tuple[Divergence, ...] = ()
        self._candidate_bytes = 0

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
        self._last_divergences = release.divergences if release is not None else ()
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
        self._progress.end_cycle()

    def _cycle(self) -> None:
        reading = self._take_in()
        self._revoke()
        self._reanchor()
        self._publish_decided()
        waits_in = self._why_no_update()
        if waits_in is not None:
            if reading:
                self._progress.enter(waits_in)
            return
        self._store.check_room(self._candidate_bytes)
        start = time.monotonic()
        outcome = self._learn()
        metrics.UPDATES.labels(outcome=outcome).inc()
        metrics.UPDATE_SECONDS.observe(time.monotonic() - start)
        self._publish_decided()
        self._collect_garbage()

    def _why_no_update(self) -> Phase | None:
        """What an update waits for; None: it is due. Never while an erasure is unread."""
        if self._store.pinned(self._settings.alias) is not None:
            return Phase.PINNED
        if self._exhausted_at == self._ledger.live_version():
            return Phase.ANCHOR_EXHAUSTED
        if self._batches.due() and not self._ingest.erasures_unread():
            return None
        return Phase.WAITING

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
        self._ledger.expire()
        metrics.READY_EXAMPLES.set(self._ledger.count_ready())
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
            self._load_anchor()
            self._collect_garbage()

    def _load_anchor(self) -> None:
        version, adapter = self._anchors.current()
        self._trainer.set_anchor(adapter)
        self._trust_region.set_anchor(adapter, version)
        self._exhausted_at = None

    def _learn(self) -> str:
        """One batch to its decision, suspects first; returns the outcome's name."""
        self._progress.enter(Phase.TRAINING)
        suspects = self._quarantine.suspects()
        if suspects and not self._quarantine.enough_to_teach(suspects):
            cause = self._quarantine.bisect(suspects)
            return (
                self._outcomes.reject_alone(Reason.UPDATE_CRASHED, suspects, cause)
                if cause
                else "trial"
            )
        examples = suspects or self._batches.take()
        with self._quarantine.watch(examples):
            return self._update(examples)

    def _update(self, examples: Sequence[Example]) -> str:
        try:
            batch, baselines, staleness = self._credited(examples)
            logger.info(
                "training batch prepared",
                extra={
                    "event": "batch_prepared",
                    "examples": len(batch.examples),
                    "diagnostics": {**batch.credit, **staleness.diagnostics},
                },
            )
            proposal = self._trainer.propose(batch, staleness)
        except NothingToLearn:
            return self._outcomes.no_update(batch, baselines)
        except NonFiniteUpdate as error:
            return self._outcomes.reject(batch, baselines, Reason.NON_FINITE_UPDATE, str(error))
        except OF_THE_MACHINE:
            raise
        except Exception as error:  # whatever it is, this batch must not come back for ever
            guilty = self._quarantine.culprits(examples, error)
            return self._outcomes.reject_alone(Reason.UPDATE_FAILED, guilty, cause_of(error))
        export_metrics(proposal.diagnostics)
        failpoint("loop.after_training")

        self._progress.enter(Phase.MEASURING)
        step = self._bound(batch, proposal)
        if isinstance(step, Refused):
            if step.anchor_exhausted:
                self._exhausted_at = batch.live_version
                return self._outcomes.anchor_exhausted(batch)
            return self._outcomes.refuse(
                batch,
                Reason.DIVERGENCE_BOUND,
                divergences=step.divergences,
                diagnostics=proposal.diagnostics,
            )
        candidate = self._write(batch, proposal, step)

        self._progress.enter(Phase.GATING)
        verdict = self._gate.judge(
            candidate.artifact_digest, candidate.files, self._trainer.live_adapter
        )
        failpoint("loop.after_gate")
        if verdict.decision is not Decision.PASS:
            return self._outcomes.refuse(
                batch,
                Reason.GATE_BLOCKED,
                divergences=candidate.divergences,
                diagnostics=candidate.diagnostics,
                verdict=verdict,
            )
        release = self._outcomes.release(batch, baselines, candidate, verdict)
        self._last_divergences = release.divergences
        self._trainer.accept(step.adapter, proposal.optimizer)
        return "released"

    def _credited(self, examples: Sequence[Example]) -> tuple[Batch, Baselines, StalenessReport]:
        """Rated replies near enough to learn from, with credit."""
        live_version = self._ledger.live_version()
        staleness = self._trainer.measure_staleness(examples, live_version)
        credited, baselines, stats = assign_credit(
            [example for example in examples if example.example_id not in staleness.set_aside],
            self._ledger.baselines(),
            signals=self._settings.learning.signals,
            moved_nats=moved_from_live_nats(self._last_divergences),
            ess_share=staleness.ess_share,
        )
        batch = Batch(
            credited,
            live_version,
            staleness.set_aside,
            stats.as_dict(),
            behaviour_policies_unavailable(staleness.behaviours),
        )
        return batch, baselines, staleness

    def _bound(self, batch: Batch, proposal: Proposal) -> BoundedStep | Refused:
        """The largest step inside the divergence bound, measured on traffic outside the batch."""
        traffic = self._ledger.held_out_traffic(
            self._settings.bound.traffic_examples,
            exclude=batch.handed_out,
            max_tokens=self._settings.learning.max_example_tokens,
        )
        step = self._trust_region.largest_step(
            self._trainer.live_adapter, proposal.adapter, traffic, self._batches.step_share(batch)
        )
        export_divergences(step.divergences)
        return step

    def _write(self, batch: Batch, proposal: Proposal, step: BoundedStep) -> Candidate:
        """Make the candidate's bytes durable under their hash."""
        candidate = write_candidate(
            self._store,
            self._policy,
            self._trust_region,
            live=self._trainer.live_adapter,
            parent=batch.live_version,
            proposal=proposal,
            step=step,
        )
        self._candidate_bytes = sum(file.size_bytes for file in candidate.files)
        failpoint("loop.after_artifact")
        metrics.STEP_SCALE.set(step.scale)
        return candidate

    def _publish_decided(self) -> None:
        """Publish what the ledger has decided and nobody was told of yet."""
        publish_decided(self._ledger, self._store, self._publish)

    def _collect_garbage(self) -> None:
        keep = self._settings.learning.keep_releases
        collect_garbage(self._store, self._ledger, self._settings.alias, keep)
