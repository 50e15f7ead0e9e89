"""Archived behaviour policies: the exact ratio at any lag, and what happens when one is gone."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moorline.events import Interaction, PolicySpan, SamplingSettings
from moorline.store import ArtifactStore
from tests.updater.learning.fixtures import archived, perturbed, recorded, some_sequences, written
from updater.learning import divergence
from updater.learning.behaviour import (
    Archive,
    Behaviour,
    BehaviourPolicies,
    BehaviourUnavailable,
    Fallback,
    Rerun,
    behaviour_policies_unavailable,
    token_divergence,
)
from updater.learning.policy import AdapterState, Policy
from updater.learning.sampling import processed_distribution, processed_logprobs
from updater.values import as_sequence

TRUNCATIONS = [
    SamplingSettings(temperature=0.7, top_p=0.9),
    SamplingSettings(temperature=1.3, top_k=7),
    SamplingSettings(min_p=0.05),
    SamplingSettings(temperature=0.9, top_p=0.8, top_k=40, min_p=0.01),
]
LIVE_VERSION = 2


class Shelf:
    """Two releases in a store: the first wrote the replies, the second is live."""

    def __init__(self, policy: Policy, root: Path) -> None:
        self.store = ArtifactStore(root)
        self.first, self.live = perturbed(policy, 0.06, 1), perturbed(policy, 0.06, 2)
        self.releases = {1: archived(policy, self.store, 1, self.first)}
        self.archive = Archive(policy, self.store, self.releases.get)
        self.behaviours = BehaviourPolicies(policy, self.archive)

    def rerun(self, *interactions: Interaction) -> list[Rerun]:
        return self.behaviours.rerun(interactions, LIVE_VERSION, self.live)


@pytest.fixture
def policy(tiny_model_dir: Path) -> Policy:
    return Policy(tiny_model_dir, rank=4, alpha=8, seed=0)


@pytest.fixture
def shelf(policy: Policy, tmp_path: Path) -> Shelf:
    return Shelf(policy, tmp_path / "store")


def reply_of(
    policy: Policy, state: AdapterState, sampling: SamplingSettings, version: int = 1
) -> Interaction:
    prompt = some_sequences(1)[0].prompt_token_ids
    with policy.using(state):
        sequence = written(policy, prompt, 6, sampling)
        return recorded(policy, sequence, "chatcmpl-0", sampling, version)


def logits_under(policy: Policy, state: AdapterState, interaction: Interaction) -> Tensor:
    with torch.no_grad(), policy.using(state):
        return policy.completion_logits([as_sequence(interaction)])[0]


def support_by_hand(logits: Tensor, sampling: SamplingSettings) -> set[int]:
    """Temperature, min_p, top_k, top_p in vLLM's order, one token after the other."""
    chances = (logits.double() / sampling.temperature).softmax(-1)
    floor = sampling.min_p * float(chances.max())
    ranked = [int(t) for t in chances.argsort(descending=True) if chances[t] >= floor]
    if sampling.top_k > 0:
        ranked = ranked[: sampling.top_k]
    total, reached, kept = sum(float(chances[t]) for t in ranked), 0.0, set()
    for token in ranked:
        if reached >= sampling.top_p * total:
            break
        kept.add(token)
        reached += float(chances[token])
    return kept


@pytest.mark.parametrize("sampling", TRUNCATIONS, ids=str)
def test_a_stale_ratio_is_the_one_worked_out_on_the_behaviour_policys_support(
    policy: Policy, shelf: Shelf, sampling: SamplingSettings
) -> None:
    reply = reply_of(policy, shelf.first, sampling)
    then, now = (logits_under(policy, state, reply) for state in (shelf.first, shelf.live))
    by_hand = []
    for position, token in enumerate(reply.completion_token_ids):
        kept = sorted(support_by_hand(then[position], sampling))
        assert token in kept
        q, p = (
            (rows[position].double() / sampling.temperature)[kept].softmax(-1)[kept.index(token)]
            for rows in (then, now)
        )
        by_hand.append(float(p / q))

    (rerun,) = shelf.rerun(reply)
    behaviour = Behaviour.from_rerun(rerun, reply, top_k=None)
    sampled = torch.tensor(reply.completion_token_ids)
    log_p = processed_logprobs(now, sampled, sampling, behaviour.possible(now, sampling))
    ratios = (log_p - torch.tensor(reply.completion_logprobs)).exp()
    assert ratios.tolist() == pytest.approx(by_hand, rel=1e-3)
    assert behaviour.mismatch_nats(reply) == pytest.approx(0.0, abs=1e-4)


def test_on_its_own_support_a_stale_policy_would_give_other_ratios(
    policy: Policy, shelf: Shelf
) -> None:
    sampling = TRUNCATIONS[0]
    reply = reply_of(policy, shelf.first, sampling)
    now = logits_under(policy, shelf.live, reply)
    sampled = torch.tensor(reply.completion_token_ids)
    possible = Behaviour.from_rerun(shelf.rerun(reply)[0], reply, None).possible(now, sampling)
    exact = processed_logprobs(now, sampled, sampling, possible)
    own = processed_logprobs(now, sampled, sampling)
    assert not torch.allclose(exact, own, atol=1e-2)


def test_the_policy_computes_as_before_after_a_rerun(policy: Policy, shelf: Shelf) -> None:
    before = policy.state()
    shelf.rerun(reply_of(policy, shelf.first, SamplingSettings()))
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state().items())


def test_each_token_is_compared_with_the_version_that_wrote_it(
    policy: Policy, shelf: Shelf
) -> None:
    reply = reply_of(policy, shelf.first, SamplingSettings(temperature=0.8))
    reply = reply.model_copy(
        update={
            "policy_spans": (
                PolicySpan(version=0, start=0, end=2),
                PolicySpan(version=1, start=2, end=4),
                PolicySpan(version=LIVE_VERSION, start=4, end=6),
            )
        }
    )
    (rerun,) = shelf.rerun(reply)
    sampled = torch.tensor(reply.completion_token_ids)
    with torch.no_grad(), policy.using(None):
        base = policy.completion_logits([as_sequence(reply)])[0]
    rows = [base, *(logits_under(policy, state, reply) for state in (shelf.first, shelf.live))]
    wanted = [processed_distribution(r, sampled, reply.sampling) for r in rows]
    assert bool(rerun.known.all())
    assert torch.allclose(rerun.logprobs[:2], wanted[0][:2], atol=1e-4)
    assert torch.allclose(rerun.logprobs[2:4], wanted[1][2:4], atol=1e-4)
    assert torch.allclose(rerun.logprobs[4:], wanted[2][4:], atol=1e-4)


def test_what_is_gone_or_damaged_falls_back_and_is_counted(policy: Policy, shelf: Shelf) -> None:
    reply = reply_of(policy, shelf.first, TRUNCATIONS[0])
    unknown = reply.model_copy(update={"policy_spans": (PolicySpan(version=9, start=0, end=6),)})
    (rerun,) = shelf.rerun(unknown)
    assert not rerun.known.any()
    assert rerun.fallbacks == {(9, Fallback.GONE): 6}
    now = logits_under(policy, shelf.live, unknown)
    sampled = torch.tensor(unknown.completion_token_ids)
    behaviour = Behaviour.from_rerun(rerun, unknown, None)
    log_p = processed_logprobs(
        now, sampled, unknown.sampling, behaviour.possible(now, unknown.sampling)
    )
    assert torch.allclose(log_p, processed_logprobs(now, sampled, unknown.sampling), atol=1e-6)
    assert behaviour.mismatch_nats(unknown) is None
    assert behaviour_policies_unavailable({unknown.key: behaviour}) == {9: "gone"}

    release = shelf.releases[1]
    weights = shelf.store.open(str(release.artifact_digest), release.files)
    path = weights / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.chmod(0o644)
    path.write_bytes(content)
    (rerun,) = shelf.rerun(reply)
    assert rerun.fallbacks == {(1, Fallback.DAMAGED): 6}


def test_an_adapter_is_read_once_and_the_oldest_of_many_is_let_go(
    policy: Policy, shelf: Shelf
) -> None:
    for version in range(2, 7):
        state = perturbed(policy, 0.01, version)
        shelf.releases[version] = archived(policy, shelf.store, version, state)
    assert shelf.archive.adapter(1) is shelf.archive.adapter(1)
    first = shelf.archive.adapter(1)
    for version in range(2, 7):
        shelf.archive.adapter(version)
    again = shelf.archive.adapter(1)
    assert again is not first
    assert all(torch.equal(again[name], first[name]) for name in first)


def test_an_archive_does_not_know_versions_that_were_never_released(shelf: Shelf) -> None:
    with pytest.raises(BehaviourUnavailable, match="version 5 is gone"):
        shelf.archive.adapter(5)


@pytest.mark.parametrize("kind", ["kl", "tv"])
@pytest.mark.parametrize("sampling", [SamplingSettings(temperature=0.8), *TRUNCATIONS[:2]], ids=str)
def test_binary_is_below_top_k_is_below_exact(
    policy: Policy, shelf: Shelf, kind: str, sampling: SamplingSettings
) -> None:
    reply = reply_of(policy, shelf.first, sampling)
    (rerun,) = shelf.rerun(reply)
    now = logits_under(policy, shelf.live, reply)
    sampled = torch.tensor(reply.completion_token_ids)
    kept = {k: Behaviour.from_rerun(rerun, reply, k) for k in (1, 8, 60_000)}
    log_p = processed_distribution(now, sampled, sampling, kept[1].possible(now, sampling))
    measure = divergence.binary_kl if kind == "kl" else divergence.binary_tv
    chosen = log_p.gather(-1, sampled[:, None])[:, 0]
    measured = [
        measure(kept[1].log_q, chosen),
        *(token_divergence(kind, log_p, kept[k]) for k in (1, 8, 60_000)),  # type: ignore[arg-type]
        token_divergence(kind, log_p, kept[1], rerun),  # type: ignore[arg-type]
    ]
    assert float(measured[-1].mean()) > 1e-3
    for lower, upper in itertools.pairwise(measured):
        assert bool((lower <= upper + 1e-4).all())
    assert torch.allclose(measured[-2], measured[-1], atol=1e-3)  # k of the whole vocabulary
