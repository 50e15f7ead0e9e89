"""The diagnostics of one update: every measurement by name, and the levels of its alarms.

The names are those of the metric ``moorline_update_diagnostic``, of a release's ``diagnostics`` and
of the status page. A name is absent where it does not apply (no fresh reply, no correction...).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moorline import metrics
from moorline.events import Divergence, Interaction
from updater.learning.behaviour import Behaviour, Fallback
from updater.learning.objectives import ObjectiveOutput, measure
from updater.values import Batch

logger = logging.getLogger("moorline.diagnostics")


@dataclass(frozen=True)
class Alarm:
    """A measurement that should lie between two levels."""

    name: str
    """The diagnostic's name."""
    low: float
    high: float
    meaning: str
    """What to think of first when it does not."""

    def rings(self, value: float) -> bool:
        """Whether the value lies outside the levels, or is NaN."""
        return not self.low <= value <= self.high


ALARMS = (
    Alarm("mean_ratio", 0.5, 2.0, "the batch was written by policies far from the live one"),
    Alarm("ess_share", 0.3, math.inf, "a few tokens carry the batch: its data is too stale"),
    Alarm("k1_nats", -0.1, 0.1, "the live policy has moved far from those that wrote the batch"),
    Alarm("chi2", -math.inf, 1.0, "importance weights vary too much to average over"),
    Alarm("mismatch_nats", -math.inf, 0.1, "server and trainer compute different policies"),
)
"""Levels to start from (``moorline_update_alarm``). bfloat16 serving has a mismatch of 0.04."""
_logged: set[str] = set()
"""Alarms whose ringing is the last that the log says of them."""


def ringing_alarms(diagnostics: Mapping[str, float]) -> dict[str, bool]:
    """Whether each alarm rings; False where its diagnostic was not measured."""
    return {
        alarm.name: alarm.name in diagnostics and alarm.rings(diagnostics[alarm.name])
        for alarm in ALARMS
    }


def export_divergences(divergences: Sequence[Divergence]) -> None:
    """Set the metrics that say how far the last candidate was from each reference."""
    for one in divergences:
        metrics.KL_NATS.labels(measured_from=one.measured_from, tokens_from=one.tokens_from).set(
            one.mean_kl_nats
        )


def export_metrics(diagnostics: Mapping[str, float]) -> None:
    """Set the metrics of this update's measurements and alarms; log what rings and what stopped."""
    metrics.UPDATE_DIAGNOSTIC.clear()
    for name, value in diagnostics.items():
        metrics.UPDATE_DIAGNOSTIC.labels(name=name).set(value)
    rings = ringing_alarms(diagnostics)
    for alarm in ALARMS:
        metrics.UPDATE_ALARM.labels(name=alarm.name).set(rings[alarm.name])
        if rings[alarm.name]:
            value = diagnostics[alarm.name]
            logger.warning(
                "a measurement of this update is outside its levels",
                extra={
                    "event": "update_alarm_rings",
                    "check": alarm.name,
                    "measured": value,
                    "limit": alarm.low if value < alarm.low else alarm.high,
                    "reason": alarm.meaning,
                },
            )
            _logged.add(alarm.name)
        elif alarm.name in _logged and alarm.name in diagnostics:
            logger.warning(
                "a measurement of this update is within its levels again",
                extra={
                    "event": "update_alarm_cleared",
                    "check": alarm.name,
                    "measured": diagnostics[alarm.name],
                },
            )
            _logged.discard(alarm.name)


class Observation:
    """What the first pass over a batch shows, gathered minibatch by minibatch."""

    def __init__(self, batch: Batch, now: float) -> None:
        """``now``: Unix seconds."""
        self.from_live = True
        """Until the first optimiser step, the policy that looks is the live one."""
        self._live_version = batch.live_version
        interactions = [credited.example.interaction for credited in batch.examples]
        self._versions = [
            float(batch.live_version - interaction.policy_version) for interaction in interactions
        ]
        self._seconds = [now - interaction.created_at for interaction in interactions]
        self._tokens: list[tuple[Tensor, ...]] = []
        self._entropy_nats = 0.0
        self._mismatch: list[Tensor] = []
        self._sources = dict.fromkeys(("exact", "recorded", *Fallback), 0)

    def add_tokens(self, output: ObjectiveOutput, logits: Tensor) -> None:
        """An objective's answer for one micro-batch, and the logits of its N tokens, [N, V]."""
        columns = output.log_p, output.log_q, output.advantage, output.mask, output.kept
        self._tokens.append(tuple(column[output.mask] for column in columns))
        logprobs = logits.detach().log_softmax(dim=-1)
        self._entropy_nats -= float((logprobs.exp() * logprobs).sum())

    def add_reply(
        self,
        interaction: Interaction,
        log_p: Tensor,  # [tokens]
        log_q: Tensor,  # [tokens]
        behaviour: Behaviour | None,
    ) -> None:
        """One reply of it: what its behaviour policy was taken from, and the mismatch at lag 0.

        At lag 0 server and trainer are one policy: what differs is numerical noise or a bug.
        """
        if behaviour is not None:
            self._sources["exact"] += int(behaviour.known.sum())
            for (_, why), tokens in behaviour.fallbacks.items():
                self._sources[why] += tokens
        else:  # not truncated, or the policy that looks wrote it and knows the support
            source = "exact" if interaction.sampling.truncated else "recorded"
            self._sources[source] += log_q.numel()
        if self.from_live and is_fresh(interaction, self._live_version):
            self._mismatch.append((log_p.detach() - log_q).abs())

    def diagnostics(self) -> dict[str, float]:
        """All of it by name."""
        log_p, log_q, advantage, mask, kept = (
            torch.cat(column).unsqueeze(0) for column in zip(*self._tokens, strict=True)
        )
        tokens = mask.numel()
        found = dict(measure(log_p, log_q, advantage, mask, kept))
        found |= {f"behaviour_{name}_share": n / tokens for name, n in self._sources.items()}
        found |= {
            "entropy_nats": self._entropy_nats / tokens,
            "completion_tokens_mean": tokens / len(self._versions),
            "staleness_versions_mean": _mean(self._versions),
            "staleness_versions_max": max(self._versions),
            "staleness_seconds_mean": _mean(self._seconds),
            "staleness_seconds_max": max(self._seconds),
        }
        if self._mismatch:
            found["mismatch_nats"] = float(torch.cat(self._mismatch).mean())
        return {name: float(value) for name, value in found.items()}


def is_fresh(interaction: Interaction, live_version: int) -> bool:
    """Whether the live policy wrote all of it."""
    return all(span.version == live_version for span in interaction.policy_spans)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
