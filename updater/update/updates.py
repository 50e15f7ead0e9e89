"""One update: a batch to its decision. Each verb is a module, here or in its own room:

    choose a batch     batches.py                   what this update learns from
    measure staleness  learning/staleness.py        how far those who acted are from this policy
    assign credit      learning/advantages.py       ratings become advantages
    propose            learning/trainer.py          one update of the live adapter
    bound              safety/trust_region.py       its largest step inside the divergence bound
    write              candidates.py                the candidate's bytes, under their hash
    judge              safety/gate.py               a verdict on exactly those bytes
    decide             outcomes.py                  one transaction: fates, offsets, release

What comes before ``decide`` leaves no trace after a crash.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from moorline import metrics
from moorline.errors import cause_of
from moorline.events import Decision, Divergence, Reason
from moorline.failpoints import failpoint
from moorline.settings import Settings
from moorline.store import ArtifactStore
from updater.learning.advantages import assign_credit
from updater.learning.baselines import Baselines
from updater.learning.behaviour import behaviour_policies_unavailable
from updater.learning.diagnostics import export_divergences, export_metrics
from updater.learning.policy import Policy
from updater.learning.staleness import StalenessReport
from updater.learning.trainer import NonFiniteUpdate, NothingToLearn, Proposal, Trainer
from updater.ledger import Ledger
from updater.progress import Phase, Progress
from updater.safety import Gate
from updater.safety.trust_region import BoundedStep, Refused, TrustRegion, moved_from_live_nats
from updater.update.batches import Batches
from updater.update.candidates import write_candidate
from updater.update.outcomes import Outcomes
from updater.update.quarantine import OF_THE_MACHINE, Quarantine
from updater.values import Batch, Candidate, Example

logger = logging.getLogger("moorline.loop")


class Updates:
    """Makes updates of the live policy, one at a time."""

    def __init__(
        self,
        settings: Settings,
        *,
        ledger: Ledger,
        store: ArtifactStore,
        policy: Policy,
        trainer: Trainer,
        trust_region: TrustRegion,
        gate: Gate,
        outcomes: Outcomes,
        progress: Progress,
    ) -> None:
        self._settings = settings
        self._ledger = ledger
        self._store = store
        self._policy = policy
        self._trainer = trainer
        self._trust_region = trust_region
        self._gate = gate
        self._outcomes = outcomes
        self._progress = progress
        self._quarantine = Quarantine(settings, ledger, trainer, trust_region, self._credited)
        self._batches = Batches(settings.learning, ledger, self._quarantine)
        self._last_divergences: tuple[Divergence, ...] = ()
        self._candidate_bytes = 0
        self._exhausted_at: int | None = None

    def start_from(self, divergences: Sequence[Divergence]) -> None:
        """The live policy, whose divergences these are, or the anchor is another one now."""
        self._last_divergences = tuple(divergences)
        self._exhausted_at = None

    def why_not(self) -> Phase | None:
        """What the next update waits for; None: it is due."""
        if self._exhausted_at == self._ledger.live_version():
            return Phase.ANCHOR_EXHAUSTED
        return None if self._batches.due() else Phase.WAITING

    def make(self) -> str:
        """One batch to its decision, suspects first; returns the outcome's name."""
        self._store.check_room(self._candidate_bytes)
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
