"""The distribution that a token was sampled from, given the logits and the sampling settings.

Pure. The order is vLLM's: temperature, min_p, top_k, then top_p on what is left, renormalised.

With truncation the policy being trained has its own support, which under staleness differs from
that of the behaviour policy; a sampled token outside it would have probability zero and teach
nothing but infinities. So the support used is the policy's own *and* the sampled token: exact at
lag 0, finite at any lag.
"""

from __future__ import annotations

import torch
from torch import Tensor

from daemon.events import SamplingSettings


def support(
    logits: Tensor,  # [tokens, vocabulary], already divided by the temperature
    sampling: SamplingSettings,
) -> Tensor:  # [tokens, vocabulary], bool
    """Which tokens min_p, top_k and top_p leave possible."""
    kept = torch.ones_like(logits, dtype=torch.bool)
    if sampling.min_p > 0.0:
        floor = logits.max(dim=-1, keepdim=True).values + torch.log(
            torch.tensor(sampling.min_p, dtype=logits.dtype)
        )
        kept &= logits >= floor
    if 0 < sampling.top_k < logits.shape[-1]:
        masked = logits.masked_fill(~kept, -torch.inf)
        threshold = masked.topk(sampling.top_k, dim=-1).values[..., -1:]
        kept &= masked >= threshold
    if sampling.top_p < 1.0:
        masked = logits.masked_fill(~kept, -torch.inf)
        ascending, order = masked.sort(dim=-1)
        mass_up_to = ascending.softmax(dim=-1).cumsum(dim=-1)
        dropped = mass_up_to <= 1.0 - sampling.top_p
        dropped[..., -1] = False  # the most probable token always stays
        kept &= ~torch.zeros_like(kept).scatter(-1, order, dropped)
    return kept


def processed_logprobs(
    logits: Tensor,  # [tokens, vocabulary]
    sampled: Tensor,  # [tokens], int64
    sampling: SamplingSettings,
) -> Tensor:  # [tokens], nats
    """Log-probability of each sampled token under the settings it was sampled with.

    Raises:
        ValueError: for temperature 0, where the policy is a point mass.
    """
    if sampling.temperature <= 0.0:
        raise ValueError("temperature 0 has no sampling distribution")
    scaled = logits / sampling.temperature if sampling.temperature != 1.0 else logits
    chosen = scaled.gather(-1, sampled.unsqueeze(-1)).squeeze(-1)
    if not sampling.truncated:
        return chosen - scaled.logsumexp(dim=-1)
    with torch.no_grad():
        possible = support(scaled, sampling)
        possible.scatter_(-1, sampled.unsqueeze(-1), True)
    return chosen - scaled.masked_fill(~possible, -torch.inf).logsumexp(dim=-1)
