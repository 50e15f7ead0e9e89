"""Examples for the learning half, written by the policy that is being tested."""

from __future__ import annotations

import torch

from daemon.events import (
    Feedback,
    FeedbackKind,
    Interaction,
    LogprobConvention,
    PolicySpan,
    SamplingSettings,
)
from updater.policy import Policy
from updater.sampling import processed_logprobs
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
        created_at=1_000.0,
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
