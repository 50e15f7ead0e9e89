"""The whole cycle, from feedback to release.

    take in -> look -> credit -> propose -> bound -> gate -> decide -> announce -> tidy

Every verb is a module. The ledger is the only commit point: whatever happens before ``decide``
leaves no trace after a crash, and whatever comes after it is repeated until it is done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from moorline import metrics
from moorline.adapter_format import OPTIMIZER_STATE, PARITY_FILE
from moorline.events import ArtifactFile, Decision, Divergence, Reason, Release, Verdict
from moorline.failpoints import failpoint
from moorline.settings import Settings
from moorline.store import ArtifactStore, PinInvalid, StoreUnavailable
from moorline.stream import StreamUnavailable
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
    optimizer_bytes,
)
from updater.ledger import Ledger, LedgerUnavailable
from updater.parity import parity_bytes
from updater.progress import Phase, Progress
from updater.quarantine import OF_THE_MACHINE, Quarantine, cause_of
from updater.releases import Manifests
from updater.retention import collect_garbage
from updater.safety import Gate
from updater.safety.trust_region import BoundedStep, Refused, TrustRegion, moved_from_live_nats
from updater.values import Batch, Candidate, Example, uncredited

logger = logging.getLogger("moorline.loop")


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
        self._quarantine = Quarantine(settings, ledger, trainer, trust_region, self._credited)
        self._base_model_digest = base_model_digest
        self._base_adapter = trainer.live_adapter
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
        logger.info("resumed", extra={"policy_version": version, "epoch": self._ledger.epoch})
        self._show_version(version)

    def cycle(self) -> None:
        """Take in what there is; learn from it if it is enough; announce what was decided.

        A disk that refuses pauses the updater, and so does a pin that cannot be read: nothing was
        committed, and the next cycle tries again, with writes of its own.
        """
        before = self.phase
        try:
            self._cycle(before)
        except (LedgerUnavailable, StoreUnavailable) as error:
            where = "store" if isinstance(error, StoreUnavailable) else "ledger"
            metrics.DISK_REFUSALS.labels(where=where).inc()
            self._trainer.restore()
            self._wait(Phase.DISK_UNAVAILABLE, before, f"{where} unavailable, will retry", error)
        except PinInvalid as error:
            self._wait(Phase.PIN_INVALID, before, "pin unreadable, nothing is trained", error)

    def _cycle(self, before: Phase) -> None:
        reading = self._take_in(before)
        self._revoke()
        self._announce()
        pinned = self._store.pinned(self._settings.alias) is not None
        if pinned or not self._enough():
            if reading:
                self._progress.enter(Phase.PINNED if pinned else Phase.WAITING)
            return
        self._store.check_room(self._candidate_bytes)
        start = time.monotonic()
        outcome = self._learn()
        metrics.UPDATES.labels(outcome=outcome).inc()
        metrics.UPDATE_SECONDS.observe(time.monotonic() - start)
        self._announce()
        collect_garbage(
            self._store, self._ledger, self._settings.alias, self._settings.learning.keep_releases
        )

    # --- the verbs --------------------------------------------------------------------------

    def _take_in(self, before: Phase) -> bool:
        """Stream to ledger, until nothing is waiting or a batch is full; then the horizon.

        Returns:
            Whether the stream can be read on.
        """
        reading = True
        try:
            while (step := self._ingest.step(self._settings.updater.poll_seconds)).records:
                self._progress.note()
                if self._ledger.count_ready() >= self._settings.learning.batch_examples:
                    break
            if step.stalled:  # it holds what no dead-letter topic takes, and has said so
                self._progress.enter(Phase.STREAM_UNAVAILABLE)
                reading = False
        except StreamUnavailable as error:
            self._wait(Phase.STREAM_UNAVAILABLE, before, "stream unavailable, will retry", error)
            reading = False
        self._ledger.expire()
        metrics.READY_EXAMPLES.set(self._ledger.count_ready())
        return reading

    def _revoke(self) -> None:
        """An erasure may want it: back to the last policy that has nothing of its subject."""
        ancestor = self._ledger.revocation_wanted()
        if ancestor is None:
            return
        release = self._manifests.revoking(ancestor)
        self._ledger.commit_revocation(release)
        failpoint("loop.after_revocation")
        logger.warning("releases revoked", extra={"back_to": release.revokes_after})
        self.resume()
        self._announce()
        collect_garbage(
            self._store, self._ledger, self._settings.alias, self._settings.learning.keep_releases
        )

    def _enough(self) -> bool:
        """A full batch, a smaller one that has waited long enough, or one that the process died of;
        and no erasure lies unread."""
        learning = self._settings.learning
        ready = self._ledger.count_ready()
        oldest = self._ledger.oldest_ready_at()
        waited = time.time() - oldest if oldest is not None else 0.0
        long_enough = ready >= learning.min_batch_examples and waited >= learning.max_wait_seconds
        full = ready >= learning.batch_examples
        due = self._quarantine.due(full or long_enough)
        return due and not self._ingest.erasures_unread()

    def _learn(self) -> str:
        """One batch to its decision, suspects first; returns the outcome's name."""
        self._progress.enter(Phase.TRAINING)
        suspects = self._quarantine.suspects()
        if suspects and not self._quarantine.teaches(suspects):
            cause = self._quarantine.verdict(suspects)
            return self._reject_for(Reason.UPDATE_CRASHED, suspects, cause) if cause else "trial"
        examples = suspects or self._ledger.ready_examples(self._settings.learning.batch_examples)
        with self._quarantine.watch(examples):
            return self._update(examples)

    def _update(self, examples: Sequence[Example]) -> str:
        try:
            batch, baselines, seen = self._credited(examples)
            logger.info("batch", extra={**batch.credit, **seen.diagnostics})
            proposal = self._trainer.propose(batch, seen)
        except NothingToLearn:
            return self._make_no_update(batch, baselines)
        except NonFiniteUpdate as error:
            return self._reject(batch, baselines, Reason.NON_FINITE_UPDATE, cause=str(error))
        except OF_THE_MACHINE:
            raise
        except Exception as error:  # whatever it is, this batch must not come back for ever
            guilty = self._quarantine.culprits(examples, error)
            return self._reject_for(Reason.UPDATE_FAILED, guilty, cause_of(error))
        export_metrics(proposal.diagnostics)
        failpoint("loop.after_training")

        self._progress.enter(Phase.MEASURING)
        step = self._bound(batch, proposal)
        if isinstance(step, Refused):
            return self._reject(
                batch,
                baselines,
                Reason.DIVERGENCE_BOUND,
                divergences=step.divergences,
                diagnostics=proposal.diagnostics,
            )
        candidate, files = self._write(batch, proposal, step)

        self._progress.enter(Phase.GATING)
        verdict = self._gate.judge(candidate.artifact_digest, files, self._trainer.live_adapter)
        failpoint("loop.after_gate")
        if verdict.decision is not Decision.PASS:
            return self._reject(
                batch,
                baselines,
                Reason.GATE_BLOCKED,
                divergences=candidate.divergences,
                diagnostics=candidate.diagnostics,
                verdict=verdict,
            )
        self._accept(batch, baselines, candidate, files, verdict)
        self._trainer.accept(step.adapter, proposal.optimizer)
        return "released"

    def _credited(self, examples: Sequence[Example]) -> tuple[Batch, Baselines, StalenessReport]:
        """Rated replies near enough to learn from, with credit."""
        live_version = self._ledger.live_version()
        seen = self._trainer.measure_staleness(examples, live_version)
        credited, baselines, stats = assign_credit(
            [example for example in examples if example.example_id not in seen.set_aside],
            self._ledger.baselines(),
            signals=self._settings.learning.signals,
            moved_nats=moved_from_live_nats(self._last_divergences),
            ess_share=seen.ess_share,
        )
        batch = Batch(
            credited,
            live_version,
            seen.set_aside,
            stats.as_dict(),
            behaviour_policies_unavailable(seen.behaviours),
        )
        return batch, baselines, seen

    def _make_no_update(self, batch: Batch, baselines: Baselines) -> str:
        """The policy stays, and every example ends with the reason why it taught nothing."""
        reasons = dict.fromkeys(batch.example_ids, Reason.NO_ADVANTAGE) | dict(batch.set_aside)
        learned = baselines if batch.examples else None
        self._ledger.commit_no_update(self._circumstances(batch), reasons, learned)
        return self._say("no update", batch, next(iter(reasons.values())))

    def _reject_for(self, reason: Reason, guilty: Sequence[Example], cause: str) -> str:
        """No update survives these: they end here, whatever was with them stays ready."""
        return self._reject(
            uncredited(guilty, self._ledger.live_version()), None, reason, cause=cause
        )

    def _bound(self, batch: Batch, proposal: Proposal) -> BoundedStep | Refused:
        """The largest step inside the divergence bound, measured on traffic outside the batch."""
        traffic = self._ledger.held_out_traffic(
            self._settings.bound.traffic_examples,
            exclude=batch.handed_out,
            max_tokens=self._settings.learning.max_example_tokens,
        )
        step = self._trust_region.largest_step(
            self._trainer.live_adapter, proposal.adapter, traffic
        )
        export_divergences(step.divergences)
        return step

    def _write(
        self, batch: Batch, proposal: Proposal, step: BoundedStep
    ) -> tuple[Candidate, tuple[ArtifactFile, ...]]:
        """The candidate's bytes, durable under their hash."""
        contents = {
            **self._policy.adapter_files(step.adapter),
            OPTIMIZER_STATE: optimizer_bytes(proposal.optimizer),
            PARITY_FILE: parity_bytes(
                self._trust_region.probes,
                step.probe_logprobs,
                self._trust_region.live_probe_logprobs(self._trainer.live_adapter),
            ),
        }
        self._candidate_bytes = sum(map(len, contents.values()))
        digest, files = self._store.put(contents)
        failpoint("loop.after_artifact")
        metrics.STEP_SCALE.set(step.scale)
        candidate = Candidate(
            parent=batch.live_version,
            artifact_digest=digest,
            artifact_dir=self._store.open(digest, files),
            step_scale=step.scale,
            divergences=step.divergences,
            diagnostics=proposal.diagnostics,
        )
        return candidate, files

    def _accept(
        self,
        batch: Batch,
        baselines: Baselines,
        candidate: Candidate,
        files: tuple[ArtifactFile, ...],
        verdict: Verdict,
    ) -> None:
        """One transaction: the examples are trained, and the release is in the outbox."""
        release = self._manifests.accepted(batch, candidate, files, verdict)
        failpoint("loop.before_release")
        self._ledger.commit_release(release, batch.handed_out, baselines, set_aside=batch.set_aside)
        failpoint("loop.after_release")
        self._last_divergences = release.divergences
        self._show_version(release.version)
        self._say("released", batch, Reason.NONE, version=release.version)

    def _reject(
        self,
        batch: Batch,
        baselines: Baselines | None,
        reason: Reason,
        *,
        divergences: Sequence[Divergence] = (),
        diagnostics: Mapping[str, float] | None = None,
        verdict: Verdict | None = None,
        cause: str = "",
    ) -> str:
        """One transaction: the examples end with their candidate, and the policy goes back."""
        record = {
            "divergences": [divergence.model_dump() for divergence in divergences],
            "diagnostics": dict(diagnostics or {}),
            "verdict": verdict.model_dump(mode="json") if verdict else None,
            "cause": cause,
            **self._circumstances(batch),
        }
        self._trainer.restore()
        self._ledger.commit_rejection(
            record, batch.handed_out, reason, baselines, set_aside=batch.set_aside
        )
        return self._say("rejected", batch, reason)

    def _circumstances(self, batch: Batch) -> dict[str, object]:
        """What a batch depended on besides its examples: with it, its end can be made again."""
        return {
            "offsets": self._ledger.release_offsets(),
            "behaviour_policies_unavailable": dict(batch.behaviour_policies_unavailable),
        }

    def _announce(self) -> None:
        """The outbox: manifests into the store, which servers follow, then onto the topic."""
        for release in self._ledger.unpublished():
            self._store.record_release(release)
            failpoint("loop.after_manifest")
            try:
                self._publish(release)
            except StreamUnavailable as error:
                logger.warning("release not announced yet", extra={"cause": str(error)})
                return
            self._ledger.mark_published(release.version)
            metrics.RELEASES_PUBLISHED.inc()

    # --- details ----------------------------------------------------------------------------

    def _wait(self, phase: Phase, before: Phase, what: str, error: Exception) -> None:
        """Not ready; said once, however often it is tried."""
        if before is not phase:
            logger.error(what, extra={"cause": str(error)})
        self._progress.enter(phase)

    def _show_version(self, version: int) -> None:
        metrics.POLICY_VERSION.labels(role="updater").set(version)
        if self._last_divergences:
            metrics.ANCHOR_BUDGET_LEFT_NATS.set(
                self._trust_region.anchor_budget_left_nats(self._last_divergences)
            )

    def _say(self, what: str, batch: Batch, reason: Reason, **fields: int) -> str:
        logger.info(what, extra={"reason": str(reason), "examples": len(batch.examples), **fields})
        return what if reason is Reason.NONE else str(reason)
