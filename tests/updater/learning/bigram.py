"""A language model small enough that every number can be worked out by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from safetensors.torch import save as safetensors_save
from torch import Tensor

from moorline.adapter_format import ADAPTER_WEIGHTS
from moorline.events import (
    Feedback,
    FeedbackKind,
    Interaction,
    LogprobConvention,
    PolicySpan,
    SamplingSettings,
)
from updater.learning.policy import AdapterState, Policy
from updater.values import CreditedExample, Example, TokenSequence

Rows = Sequence[Sequence[float]]
ROWS = "rows"


class BigramPolicy(Policy):
    """Draws a token by the one before it. The adapter is the logits, a row for each token before.

    ``BigramPolicy([[0.9, 0.1], [0.5, 0.5]])`` goes on from token 0 with 0 in nine of ten cases.
    """

    def __init__(self, anchor: Rows) -> None:
        self._anchor = torch.tensor(anchor).log()
        self._now: Tensor | None = None
        self._rows = torch.nn.Parameter(self._anchor.clone())
        self.device = torch.device("cpu")
        self.vocabulary_size = self._anchor.shape[-1]
        self.parameters = [(ROWS, self._rows)]

    def state(self) -> AdapterState:
        return {ROWS: self._rows.detach().clone()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._rows.data.copy_(state[ROWS])

    @contextmanager
    def using(self, state: Mapping[str, Tensor] | None) -> Iterator[None]:
        before, self._now = self._now, self._anchor if state is None else state[ROWS]
        try:
            yield
        finally:
            self._now = before

    def adapter_files(self, state: Mapping[str, Tensor]) -> dict[str, bytes]:
        return {ADAPTER_WEIGHTS: safetensors_save(dict(state))}

    def completion_logits(self, sequences: Sequence[TokenSequence]) -> tuple[Tensor, Tensor]:
        rows = self._rows if self._now is None else self._now
        tokens = [
            list((s.prompt_token_ids + s.completion_token_ids)[-s.tokens - 1 :]) for s in sequences
        ]
        before = torch.tensor([token for one in tokens for token in one[:-1]])
        return rows[before], torch.tensor([token for one in tokens for token in one[1:]])


def rows(*chances: Sequence[float]) -> AdapterState:
    """The adapter of a policy with these chances."""
    return {ROWS: torch.tensor(chances).log()}


def reply(
    name: str,
    tokens: Sequence[int],
    chances: Sequence[float],
    *,
    prompt: int = 0,
    version: int = 0,
    sampling: SamplingSettings | None = None,
) -> Interaction:
    """A reply to the prompt of one token, with the chance that was recorded for each token."""
    return Interaction(
        interaction_id=name,
        alias="assistant",
        created_at=1_000.0,
        latency_seconds=0.1,
        prompt_token_ids=(prompt,),
        completion_token_ids=tuple(tokens),
        completion_logprobs=tuple(torch.tensor(chances).log().tolist()),
        logprob_convention=LogprobConvention.PROCESSED,
        sampling=sampling or SamplingSettings(),
        policy_spans=(PolicySpan(version=version, start=0, end=len(tokens)),),
        finish_reason="stop",
    )


def thumbed(interaction: Interaction) -> Example:
    """An example of one thumb up."""
    thumb = Feedback(interaction_id=interaction.interaction_id, kind=FeedbackKind.THUMBS, value=1)
    return Example(interaction.interaction_id, interaction, (thumb,))


def with_advantage(interaction: Interaction, advantage: float) -> CreditedExample:
    """The same with the advantage that somebody worked out."""
    return CreditedExample(thumbed(interaction), reward=1.0, advantage=advantage)
