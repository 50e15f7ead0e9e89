"""Writes the logprobs that a server must compute after a swap, on the gate's probes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moorline.adapter_format import ParityBatch, ParitySequence
from updater.values import TokenSequence


def parity_bytes(
    sequences: Sequence[TokenSequence],
    candidate: Sequence[Tensor],  # one [completion tokens, V] per sequence, nats, untempered
    parent: Sequence[Tensor],  # likewise, of the policy before it
) -> bytes:
    """The content of ``parity.json``; the parent's logprobs show what must *not* be served."""
    batch = ParityBatch(
        sequences=tuple(
            ParitySequence(
                prompt_token_ids=tuple(sequence.prompt_token_ids),
                completion_token_ids=tuple(sequence.completion_token_ids),
                candidate_logprobs=_chosen(ours, sequence.completion_token_ids),
                parent_logprobs=_chosen(theirs, sequence.completion_token_ids),
            )
            for sequence, ours, theirs in zip(sequences, candidate, parent, strict=True)
        )
    )
    return batch.model_dump_json().encode()


def _chosen(logprobs: Tensor, token_ids: Sequence[int]) -> tuple[float, ...]:
    index = torch.tensor(token_ids, device=logprobs.device).unsqueeze(-1)
    return tuple(logprobs.gather(-1, index).squeeze(-1).tolist())
