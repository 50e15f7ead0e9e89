"""Examples for the learning half, written by the policy that is being tested."""

from __future__ import annotations

import torch

from moorline.events import (
    Decision,
    Feedback,
    FeedbackKind,
    Interaction,
    LogprobConvention,
    PolicySpan,
    Release,
    ReleaseKind,
    SamplingSettings,
    Verdict,
)
from moorline.store import ArtifactStore
from updater.learning.policy import AdapterState, Policy
from updater.learning.sampling import processed_distribution, processed_logprobs
from updater.values import CreditedExample, Example, TokenSequence

ALIAS = "assistant"


def some_sequences(number: int, seed: int = 0, vocabulary: int = 49_000) -> list[TokenSequence]:
    """Random token sequences of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(size: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocabulary, (size,), generator=generator).tolist())

    return [TokenSequence(draw(4 + index % 3), draw(3 + index % 5)) for index in range(number)]


def recorded(
    policy: Policy,
    sequence: TokenSequence,
    name: str,
    sampling: SamplingSettings | None = None,
    version: int = 0,
) -> Interaction:
    """The interaction that a server would have recorded, had ``policy`` written ``sequence``."""
    sampling = sampling or SamplingSettings()
    with torch.no_grad():
        logits, sampled = policy.completion_logits([sequence])
        logprobs = processed_logprobs(logits, sampled, sampling).tolist()
    return Interaction(
        interaction_id=name,
        alias=ALIAS,
        created_at=1_750_000_000.0,
        latency_seconds=0.1,
        prompt_token_ids=sequence.prompt_token_ids,
        completion_token_ids=sequence.completion_token_ids,
        completion_logprobs=tuple(logprobs),
        logprob_convention=LogprobConvention.PROCESSED,
        sampling=sampling,
        policy_spans=(
            PolicySpan(version=version, start=0, end=len(sequence.completion_token_ids)),
        ),
        finish_reason="stop",
    )


def credited(interaction: Interaction, advantage: float) -> CreditedExample:
    """One thumb with this advantage."""
    thumb = Feedback(
        interaction_id=interaction.interaction_id,
        kind=FeedbackKind.THUMBS,
        value=1 if advantage >= 0 else -1,
        created_at=1_001.0,
    )
    example = Example(interaction.interaction_id, interaction, (thumb,))
    return CreditedExample(example, reward=1.0 if advantage >= 0 else -1.0, advantage=advantage)


def perturbed(policy: Policy, size: float, seed: int) -> AdapterState:
    """Another policy: every number of the adapter moved a little."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + size * torch.randn(tensor.shape, generator=generator)
        for name, tensor in policy.state().items()
    }


@torch.no_grad()
def written(
    policy: Policy, prompt: tuple[int, ...], tokens: int, sampling: SamplingSettings, seed: int = 0
) -> TokenSequence:
    """A reply that ``policy`` samples under these settings."""
    generator = torch.Generator().manual_seed(seed)
    reply: tuple[int, ...] = ()
    for _ in range(tokens):
        # The place-holder is not sampled: the distribution at it is that of the next token.
        logits, _ = policy.completion_logits([TokenSequence(prompt, (*reply, 0))])
        likeliest = logits[-1:].argmax(-1)
        chances = processed_distribution(logits[-1:], likeliest, sampling).exp()
        reply = (*reply, int(torch.multinomial(chances[0], 1, generator=generator)))
    return TokenSequence(prompt, reply)


def archived(policy: Policy, store: ArtifactStore, version: int, state: AdapterState) -> Release:
    """A release of this adapter, its bytes in the store."""
    digest, files = store.put(policy.adapter_files(state))
    return Release(
        alias=ALIAS,
        version=version,
        parent=version - 1,
        kind=ReleaseKind.ADAPTER,
        artifact_digest=digest,
        files=files,
        base_model_digest="1" * 64,
        created_at=1_750_000_000.0,
        verdict=Verdict(decision=Decision.PASS, artifact_digest=digest, checks=(), seconds=0.0),
    )
