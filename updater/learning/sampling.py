"""The distribution that a token was sampled from, given the logits and the sampling settings.

Pure. The order is vLLM's: temperature, min_p, top_k, then top_p on what is left, renormalised.

With truncation a ratio compares two distributions on one support: that of the behaviour policy,
which sampled the token. Give it as ``possible`` and p is renormalised on it, which is exact at any
lag. Where it is not known, the policy's own support *and* the sampled token take its place: exact
at lag 0, and never zero for what was sampled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moorline.events import SamplingSettings


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
    possible: Tensor | None = None,  # [tokens, vocabulary], bool: the behaviour policy's support
) -> Tensor:  # [tokens], nats
    """Log-probability of each sampled token under the settings it was sampled with.

    Raises:
        ValueError: for temperature 0, where the policy is a point mass.
    """
    scaled = _tempered(logits, sampling)
    chosen = scaled.gather(-1, sampled.unsqueeze(-1)).squeeze(-1)
    return chosen - _truncated(scaled, sampled, sampling, possible).logsumexp(dim=-1)


def processed_distribution(
    logits: Tensor,  # [tokens, vocabulary]
    sampled: Tensor,  # [tokens], int64
    sampling: SamplingSettings,
    possible: Tensor | None = None,  # [tokens, vocabulary], bool: the behaviour policy's support
) -> Tensor:  # [tokens, vocabulary], nats; -inf outside the support
    """The whole distribution that ``processed_logprobs`` reads one token of. Raises as it does."""
    scaled = _tempered(logits, sampling)
    return _truncated(scaled, sampled, sampling, possible).log_softmax(dim=-1)


def _tempered(logits: Tensor, sampling: SamplingSettings) -> Tensor:
    if sampling.temperature <= 0.0:
        raise ValueError("temperature 0 has no sampling distribution")
    return logits / sampling.temperature if sampling.temperature != 1.0 else logits


def _truncated(
    scaled: Tensor, sampled: Tensor, sampling: SamplingSettings, possible: Tensor | None
) -> Tensor:
    """The logits of what is possible, -inf elsewhere; what was sampled is possible."""
    if not sampling.truncated:
        return scaled
    with torch.no_grad():
        kept = support(scaled, sampling) if possible is None else possible
        kept = kept.scatter(-1, sampled.unsqueeze(-1), True)
    return scaled.masked_fill(~kept, -torch.inf)
