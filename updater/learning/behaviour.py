"""Behaviour policies: those that wrote the replies, run again from their archived adapters.

The recorded logprob of a sampled token is all that a ratio needs while nothing was truncated. Two
things need the whole distribution, under the sampling settings of the reply:

* with top_p, top_k or min_p, the support on which p must be renormalised;
* a divergence over more than the sampled token (``learning.divergence_estimator``).

Where an adapter is gone or damaged, the recorded logprob is used alone, and it is counted.

Notation: T completion tokens of one reply, V vocabulary, k + 1 the sampled token and k others.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from moorline.errors import MoorlineError
from moorline.events import Interaction, PolicySpan, Release, ReleaseKind, SamplingSettings
from moorline.store import ArtifactMissing, ArtifactStore, StoreError
from updater.learning import divergence
from updater.learning.policy import AdapterState, Policy
from updater.learning.sampling import processed_distribution, support
from updater.values import TokenSequence, as_sequence

_ADAPTERS_IN_MEMORY = 4


class Fallback(StrEnum):
    """Why a behaviour policy could not be run again."""

    GONE = "gone"
    """Its adapter is no longer kept, or was never made here."""
    DAMAGED = "damaged"
    """Its bytes are not the ones that were released."""


Fallbacks = Mapping[tuple[int, Fallback], int]
"""Tokens of one reply whose policy could not be run again, by its version and why."""


class BehaviourUnavailable(MoorlineError):
    """A behaviour policy cannot be run again; ``why`` is counted."""

    def __init__(self, version: int, why: Fallback) -> None:
        super().__init__(f"the adapter of version {version} is {why}")
        self.why = why


class Archive:
    """Adapters of earlier releases, every byte checked when it is read; a few stay in memory."""

    def __init__(
        self, policy: Policy, store: ArtifactStore, release_of: Callable[[int], Release | None]
    ) -> None:
        self._policy = policy
        self._store = store
        self._release_of = release_of
        self._recent: OrderedDict[int, AdapterState] = OrderedDict()

    def adapter(self, version: int) -> AdapterState | None:
        """The adapter of a release; None: it is the base model.

        Raises:
            BehaviourUnavailable: gone or damaged.
        """
        if version in self._recent:
            self._recent.move_to_end(version)
            return self._recent[version]
        release = self._release_of(version)
        if release is not None and release.kind is ReleaseKind.BASE:
            return None
        if release is None or release.artifact_digest is None:
            raise BehaviourUnavailable(version, Fallback.GONE)
        try:
            directory = self._store.open(release.artifact_digest, release.files)
            self._recent[version] = self._policy.read_adapter(directory)
        except ArtifactMissing:
            raise BehaviourUnavailable(version, Fallback.GONE) from None
        except (StoreError, OSError):
            raise BehaviourUnavailable(version, Fallback.DAMAGED) from None
        while len(self._recent) > _ADAPTERS_IN_MEMORY:
            self._recent.popitem(last=False)
        return self._recent[version]


@dataclass(frozen=True)
class Rerun:
    """The distributions that one reply was sampled from."""

    logprobs: Tensor
    """[T, V] nats, under the reply's sampling settings; -inf outside the support; 0 where not
    ``known``."""
    known: Tensor
    """[T] bool: this token's behaviour policy could be run again."""
    fallbacks: Fallbacks


class BehaviourPolicies:
    """Runs archived policies on what they wrote."""

    def __init__(self, policy: Policy, archive: Archive | None) -> None:
        """``archive`` None: only the live policy and the anchor are there."""
        self._policy = policy
        self._archive = archive

    @torch.no_grad()
    def rerun(
        self, interactions: Sequence[Interaction], live_version: int, live: AdapterState
    ) -> list[Rerun]:
        """The behaviour policy's distributions, one pass for each version; [T, V] for each reply.

        The policy computes as what it was afterwards. Bounding memory is up to the caller.
        """
        sequences = [as_sequence(interaction) for interaction in interactions]
        logprobs = [self._blank(sequence) for sequence in sequences]
        known = [torch.zeros(s.tokens, dtype=torch.bool) for s in sequences]
        fallbacks: list[dict[tuple[int, Fallback], int]] = [defaultdict(int) for _ in sequences]
        for version, parts in _spans_by_version(interactions).items():
            try:
                adapter = live if version == live_version else self._adapter(version)
            except BehaviourUnavailable as unavailable:
                for index, span in parts:
                    fallbacks[index][version, unavailable.why] += span.end - span.start
                continue
            indices = sorted({index for index, _ in parts})
            with self._policy.using(adapter):
                logits, sampled = self._policy.completion_logits([sequences[i] for i in indices])
            sizes = [sequences[index].tokens for index in indices]
            found = {
                index: processed_distribution(rows, tokens, interactions[index].sampling)
                for index, rows, tokens in zip(
                    indices, torch.split(logits, sizes), torch.split(sampled, sizes), strict=True
                )
            }
            for index, span in parts:
                logprobs[index][span.start : span.end] = found[index][span.start : span.end]
                known[index][span.start : span.end] = True
        return [
            Rerun(rows, which.to(rows.device), dict(why))
            for rows, which, why in zip(logprobs, known, fallbacks, strict=True)
        ]

    def _blank(self, sequence: TokenSequence) -> Tensor:
        shape = sequence.tokens, self._policy.vocabulary_size
        return torch.zeros(shape, device=self._policy.device)

    def _adapter(self, version: int) -> AdapterState | None:
        if version == 0:
            return None  # the anchor
        if self._archive is None:
            raise BehaviourUnavailable(version, Fallback.GONE)
        return self._archive.adapter(version)


@dataclass(frozen=True)
class Behaviour:
    """What is kept of a re-run until the update is over: bits and bins instead of [T, V] floats."""

    log_q: Tensor
    """[T] of the sampled tokens, re-run; meaningless where not ``known``."""
    known: Tensor
    """[T] bool"""
    fallbacks: Fallbacks
    packed_support: np.ndarray[tuple[int, int], np.dtype[np.uint8]] | None
    """[T, V / 8]; None where nothing was truncated."""
    bins: tuple[Tensor, Tensor] | None
    """Token ids and log q, [T, k + 1] each: the sampled token and the k likeliest others."""

    @classmethod
    def from_rerun(cls, rerun: Rerun, interaction: Interaction, top_k: int | None) -> Behaviour:
        """``top_k`` None: no bins."""
        sampled = torch.tensor(interaction.completion_token_ids, device=rerun.logprobs.device)
        log_q = rerun.logprobs.gather(-1, sampled.unsqueeze(-1)).squeeze(-1)
        packed = None
        if interaction.sampling.truncated:
            packed = np.packbits(rerun.logprobs.isfinite().cpu().numpy(), axis=-1)
        bins = None if top_k is None else likeliest_bins(rerun.logprobs, sampled, top_k)
        return cls(log_q, rerun.known, rerun.fallbacks, packed, bins)

    def possible(
        self,
        logits: Tensor,  # [T, V] of the policy being trained
        sampling: SamplingSettings,
    ) -> Tensor | None:  # [T, V] bool
        """The support to renormalise p on; the policy's own where the behaviour's is not known."""
        if self.packed_support is None:
            return None
        bits = np.unpackbits(self.packed_support, axis=-1, count=logits.shape[-1])
        kept = torch.from_numpy(bits).to(logits.device, torch.bool)
        if bool(self.known.all()):
            return kept
        own = support(logits.detach() / sampling.temperature, sampling)
        return torch.where(self.known.unsqueeze(-1), kept, own)

    def mismatch_nats(self, interaction: Interaction) -> float | None:
        """Mean abs(log q re-run - log q recorded); None where nothing could be run again."""
        recorded = torch.tensor(interaction.completion_logprobs, device=self.log_q.device)
        if not bool(self.known.any()):
            return None
        return float((self.log_q - recorded).abs()[self.known].mean())


def behaviour_policies_unavailable(behaviours: Mapping[str, Behaviour]) -> dict[int, Fallback]:
    """Behaviour policies of a batch whose recorded logprobs had to be enough, and why."""
    return dict(sorted(key for one in behaviours.values() for key in one.fallbacks))


def likeliest_bins(
    log_q: Tensor,  # [T, V]
    sampled: Tensor,  # [T]
    k: int,
) -> tuple[Tensor, Tensor]:  # ids and log q, two of [T, k + 1]
    """The sampled token and the ``k`` likeliest others."""
    first = log_q.scatter(-1, sampled.unsqueeze(-1), torch.inf)
    ids = first.topk(min(k + 1, log_q.shape[-1]), dim=-1).indices
    return ids, log_q.gather(-1, ids)


def token_divergence(
    kind: Literal["kl", "tv"],
    log_p: Tensor,  # [T, V], on the behaviour policy's support
    behaviour: Behaviour,
    full: Rerun | None = None,
) -> Tensor:  # [T], nats or a share
    """The divergence of mu and pi at each token: exact where ``full`` is given, else by its bins.

    Meaningless where the behaviour policy is not ``known``.
    """
    measure = divergence.exact_kl if kind == "kl" else divergence.exact_tv
    if full is not None:
        return measure(full.logprobs, log_p)
    assert behaviour.bins is not None
    ids, log_q = behaviour.bins
    return measure(divergence.add_tail_bin(log_q), divergence.add_tail_bin(log_p.gather(-1, ids)))


def _spans_by_version(
    interactions: Sequence[Interaction],
) -> dict[int, list[tuple[int, PolicySpan]]]:
    found: dict[int, list[tuple[int, PolicySpan]]] = defaultdict(list)
    for index, interaction in enumerate(interactions):
        for span in interaction.policy_spans:
            found[span.version].append((index, span))
    return found
