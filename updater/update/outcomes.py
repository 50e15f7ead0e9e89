"""How a batch ends: released, rejected or without an update. Each end is one transaction.

Whatever the ledger has committed here is decided for good; what a crash interrupts before the
commit leaves no trace.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from moorline import metrics
from moorline.events import Divergence, Reason, Release, Verdict
from moorline.failpoints import failpoint
from updater.learning.baselines import Baselines
from updater.learning.trainer import Trainer
from updater.ledger import BatchDecision, Ledger
from updater.releases import Manifests
from updater.safety.trust_region import TrustRegion
from updater.values import Batch, Candidate, Example, uncredited

logger = logging.getLogger("moorline.loop")


class Outcomes:
    """Writes the ends of batches into the ledger."""

    def __init__(
        self,
        ledger: Ledger,
        manifests: Manifests,
        trainer: Trainer,
        trust_region: TrustRegion,
        max_tries: int,
    ) -> None:
        """``max_tries``: so often a rating may be in a candidate that is refused."""
        self._max_tries = max_tries
        self._ledger = ledger
        self._manifests = manifests
        self._trainer = trainer
        self._trust_region = trust_region

    def release(
        self, batch: Batch, baselines: Baselines, candidate: Candidate, verdict: Verdict
    ) -> Release:
        """The examples are trained, and the release is in the outbox."""
        release = self._manifests.accepted(batch, candidate, verdict)
        failpoint("loop.before_release")
        self._ledger.commit_release(
            release, BatchDecision(batch.handed_out, set_aside=batch.set_aside, baselines=baselines)
        )
        failpoint("loop.after_release")
        self.export_version(release.version, release)
        logger.info(
            "update released as a new version",
            extra={
                "event": "update_released",
                "version": release.version,
                "examples": len(batch.examples),
            },
        )
        return release

    def refuse(
        self,
        batch: Batch,
        reason: Reason,
        *,
        divergences: Sequence[Divergence],
        diagnostics: Mapping[str, float],
        verdict: Verdict | None = None,
    ) -> str:
        """The candidate may not be released, which says little of each rating: they are tried again
        in smaller batches, ``learning.max_tries`` times in all.

        What they say of the baselines counts when they have taught.

        Returns:
            The outcome's name, as ``moorline_updates_total`` labels it; so do the others below.
        """
        record = {
            "divergences": [divergence.model_dump() for divergence in divergences],
            "diagnostics": dict(diagnostics),
            "verdict": verdict.model_dump(mode="json") if verdict else None,
        }
        return self._reject(batch, reason, record, max_tries=self._max_tries)

    def reject(self, batch: Batch, baselines: Baselines | None, reason: Reason, cause: str) -> str:
        """The examples end here, and the policy goes back."""
        return self._reject(batch, reason, {"cause": cause}, baselines)

    def anchor_exhausted(self, batch: Batch) -> str:
        """The line has used up its distance from the anchor: nothing is consumed, all waits."""
        self._trainer.restore()
        self._ledger.crashes.remove_marks()
        logger.error(
            "the line has used up its distance from the anchor: ratings wait, nothing is learned;"
            " roll back, raise bound.anchor_kl_nats, or `moorline reanchor`",
            extra={"event": "anchor_exhausted", "version": batch.live_version},
        )
        return "anchor_exhausted"

    def _reject(
        self,
        batch: Batch,
        reason: Reason,
        record: Mapping[str, object],
        baselines: Baselines | None = None,
        max_tries: int = 1,
    ) -> str:
        self._trainer.restore()
        self._ledger.commit_rejection(
            reason,
            BatchDecision(
                batch.handed_out,
                set_aside=batch.set_aside,
                baselines=baselines,
                record={**record, **self._circumstances(batch)},
            ),
            max_tries=max_tries,
        )
        return _log_no_release(batch, reason)

    def reject_alone(self, reason: Reason, guilty: Sequence[Example], cause: str) -> str:
        """No update survives these: they end here, whatever was with them stays ready."""
        batch = uncredited(guilty, self._ledger.live_version())
        return self.reject(batch, None, reason, cause)

    def no_update(self, batch: Batch, baselines: Baselines) -> str:
        """The policy stays, and every example ends with the reason why it taught nothing."""
        reasons = dict.fromkeys(batch.example_ids, Reason.NO_ADVANTAGE) | dict(batch.set_aside)
        learned = baselines if batch.examples else None
        self._ledger.commit_no_update(
            BatchDecision(
                list(reasons), reasons, baselines=learned, record=self._circumstances(batch)
            )
        )
        return _log_no_release(batch, next(iter(reasons.values())))

    def export_version(self, version: int, release: Release | None) -> None:
        """Set the metrics of the live policy."""
        metrics.POLICY_VERSION.labels(role="updater").set(version)
        left = self._trust_region.budget_left_nats(release) if release else None
        if left is not None:
            metrics.ANCHOR_BUDGET_LEFT_NATS.set(left)

    def _circumstances(self, batch: Batch) -> dict[str, object]:
        """What a batch depended on besides its examples: with it, its end can be made again."""
        return {
            "offsets": self._ledger.release_offsets(),
            "behaviour_policies_unavailable": dict(batch.behaviour_policies_unavailable),
        }


def _log_no_release(batch: Batch, reason: Reason) -> str:
    logger.info(
        "update made no release: %s",
        reason,
        extra={
            "event": "update_unreleased",
            "reason": str(reason),
            "examples": len(batch.examples),
        },
    )
    return str(reason)
