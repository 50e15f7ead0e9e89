"""A candidate on disk: the adapter, its optimiser state and its parity file under one hash."""

from __future__ import annotations

from moorline.adapter_format import OPTIMIZER_STATE, PARITY_FILE
from moorline.store import ArtifactStore
from updater.learning.policy import AdapterState, Policy
from updater.learning.trainer import Proposal, optimizer_bytes
from updater.safety.trust_region import BoundedStep, TrustRegion
from updater.update.parity import parity_bytes
from updater.values import Candidate


def write_candidate(
    store: ArtifactStore,
    policy: Policy,
    trust_region: TrustRegion,
    *,
    live: AdapterState,
    parent: int,
    proposal: Proposal,
    step: BoundedStep,
) -> Candidate:
    """Make a bounded step durable, with what a server needs to check that it serves it.

    Args:
        live: the adapter of ``parent``, the live version.

    Raises:
        StoreUnavailable: the disk refused; nothing became visible.
    """
    digest, files = store.put(
        {
            **policy.adapter_files(step.adapter),
            OPTIMIZER_STATE: optimizer_bytes(proposal.optimizer),
            PARITY_FILE: parity_bytes(
                trust_region.probes, step.probe_logprobs, trust_region.live_probe_logprobs(live)
            ),
        }
    )
    return Candidate(
        parent=parent,
        artifact_digest=digest,
        files=files,
        step_scale=step.scale,
        divergences=step.divergences,
        diagnostics=proposal.diagnostics,
    )
