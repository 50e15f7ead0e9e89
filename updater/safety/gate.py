"""The gate's judgement of one candidate, on the bytes that servers would load.

It reads the artifact back from the store (which checks every hash), scores the probes under it,
and compares with the live policy and the anchor. Anything that goes wrong on the way is a HOLD, and
only a PASS is released: the gate fails closed.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from moorline import metrics
from moorline.events import ArtifactFile, Check, Decision, Divergence, Verdict
from moorline.settings import GateSettings
from moorline.store import ArtifactStore
from updater.learning.policy import AdapterState, Policy
from updater.safety.probes import ProbeSet
from updater.safety.trust_region import TrustRegion, measure_divergence

logger = logging.getLogger("moorline.gate")


class Gate:
    """Judges candidates by fixed probes."""

    def __init__(
        self,
        policy: Policy,
        probes: ProbeSet,
        trust_region: TrustRegion,
        store: ArtifactStore,
        limits: GateSettings,
    ) -> None:
        """``trust_region`` holds the anchor's answers to ``probes.sequences``."""
        self._policy = policy
        self._probes = probes
        self._trust_region = trust_region
        self._store = store
        self._limits = limits

    def judge(self, digest: str, files: tuple[ArtifactFile, ...], live: AdapterState) -> Verdict:
        """The verdict on the artifact ``digest``, compared with ``live`` and the anchor."""
        start = time.monotonic()
        try:
            checks = self._checks(digest, files, live)
            passed = all(check.passed for check in checks)
            decision = Decision.PASS if passed else Decision.BLOCK
        except Exception as error:  # whatever it was, this candidate was not shown to be safe
            logger.exception(
                "the gate could not judge a candidate: it is held, not released",
                extra={"event": "gate_failed", "artifact": digest},
            )
            checks = (_failed("completed", f"{type(error).__name__}"),)
            decision = Decision.HOLD
        for check in checks:
            outcome = "passed" if check.passed else "failed"
            metrics.GATE_CHECKS.labels(check=check.name, outcome=outcome).inc()
        return Verdict(
            decision=decision,
            artifact_digest=digest,
            checks=checks,
            seconds=time.monotonic() - start,
        )

    def _checks(
        self, digest: str, files: tuple[ArtifactFile, ...], live: AdapterState
    ) -> tuple[Check, ...]:
        adapter = self._policy.read_adapter(self._store.open(digest, files))
        if set(adapter) != set(live):
            return (_failed("layout", "the adapter's tensors are not those of the live policy"),)
        if not all(torch.isfinite(tensor).all() for tensor in adapter.values()):
            return (_failed("finite", "a weight is NaN or infinite"),)
        sequences = self._probes.sequences
        candidate = self._trust_region.logprobs(adapter, sequences)
        if not all(torch.isfinite(logprobs).all() for logprobs in candidate):
            return (_failed("finite", "a logprob on the probes is NaN or infinite"),)
        before = self._trust_region.live_probe_logprobs(live)
        anchor = self._trust_region.anchor_probe_logprobs
        return (
            Check(name="hash", measured=None, limit=None, passed=True),
            Check(name="finite", measured=None, limit=None, passed=True),
            *self._divergence_checks(before, anchor, candidate),
            *self._perplexity_checks(before, anchor, candidate),
        )

    def _divergence_checks(
        self, live: Sequence[Tensor], anchor: Sequence[Tensor], candidate: Sequence[Tensor]
    ) -> tuple[Check, ...]:
        chats = len(self._probes.chats)
        from_live = measure_divergence(live[:chats], candidate[:chats], "live", "probes")
        from_anchor = measure_divergence(anchor[:chats], candidate[:chats], "anchor", "probes")
        limits = self._limits
        return (
            *_kl_checks(from_live, limits.live_kl_mean_nats, limits.live_kl_max_prompt_nats),
            *_kl_checks(from_anchor, limits.anchor_kl_mean_nats, limits.anchor_kl_max_prompt_nats),
        )

    def _perplexity_checks(
        self, live: Sequence[Tensor], anchor: Sequence[Tensor], candidate: Sequence[Tensor]
    ) -> tuple[Check, ...]:
        reached = self._text_perplexity(candidate)
        return tuple(
            _at_most(
                f"perplexity_rise_from_{name}", reached / self._text_perplexity(than) - 1.0, at
            )
            for name, than, at in (
                ("live", live, self._limits.perplexity_rise_share),
                ("anchor", anchor, self._limits.perplexity_rise_share_from_anchor),
            )
        )

    def _text_perplexity(self, logprobs: Sequence[Tensor]) -> float:
        """exp of the mean negative log-likelihood per token of the held-out texts."""
        chosen = [
            part.gather(-1, torch.tensor(text.completion_token_ids, device=part.device)[:, None])
            for text, part in zip(
                self._probes.texts, logprobs[len(self._probes.chats) :], strict=True
            )
        ]
        return math.exp(-float(torch.cat(chosen).mean()))


def _kl_checks(divergence: Divergence, mean_limit: float, prompt_limit: float) -> tuple[Check, ...]:
    name = f"kl_{divergence.measured_from}"
    return (
        _at_most(f"{name}_mean_nats", divergence.mean_kl_nats, mean_limit),
        _at_most(f"{name}_max_prompt_nats", divergence.max_prompt_kl_nats, prompt_limit),
    )


def _at_most(name: str, measured: float, limit: float) -> Check:
    # Written so that NaN does not pass.
    return Check(name=name, measured=measured, limit=limit, passed=measured <= limit)


def _failed(name: str, detail: str) -> Check:
    return Check(name=name, measured=None, limit=None, passed=False, detail=detail)
