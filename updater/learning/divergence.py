"""How far apart two policies are, in nats or as a share of probability.  Pure torch.

``q`` is the behaviour policy mu (or whatever the distance is measured *from*), ``p`` the policy pi.
Every function takes **log**-probabilities: near q = 1 the complement 1 - q is only exact in logs.

Three views of the same position, each a coarsening of the one below it, so by the data-processing
inequality each is a lower bound of the next:

    binary   the sampled token against everything else; needs one recorded logprob
    top-k    k tokens, the sampled one and one tail bin
    exact    the full vocabulary; needs both policies' distributions

Probabilities are kept inside [1e-30, 1 - 1e-30], which float32 holds exactly in logs. So a token
with q = 1, p = 0 is ~69 nats apart: beyond every limit anyone would set, yet means and gradients
stay finite. NaN goes through as NaN; ``objectives.find_batch_fault`` refuses it earlier.

Sampled estimators (k1, k3, chi2, tv, ess) follow http://joschu.net/blog/kl-approx.html.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MIN_PROBABILITY = 1e-30
MIN_LOG_PROBABILITY_NATS = math.log(MIN_PROBABILITY)
MAX_LOG_RATIO_NATS = 20.0
"""exp(20) = 5e8: a ratio that no cap lets through, and whose square float32 still holds."""


def clamp_log_probability(
    log_p: Tensor,  # any shape
) -> Tensor:
    """log p, inside [log 1e-30, -1e-30]; the gradient is 0 where it was outside."""
    return log_p.clamp(min=MIN_LOG_PROBABILITY_NATS, max=-MIN_PROBABILITY)


def log_complement(
    log_p: Tensor,  # any shape, <= 0
) -> Tensor:
    """log(1 - p), accurate at both ends (Maechler, "Accurately computing log(1 - exp(-|a|))")."""
    log_p = clamp_log_probability(log_p)
    near_one = log_p > -math.log(2.0)
    # Each branch only sees values that are good for it: the other's gradient may be infinite,
    # and 0 * inf would be NaN.
    small = torch.where(near_one, log_p, torch.full_like(log_p, -1.0))
    large = torch.where(near_one, torch.full_like(log_p, -1.0), log_p)
    return torch.where(near_one, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))


def _as_two_bins(log_p: Tensor) -> Tensor:
    """[...] -> [..., 2]: the token, and everything else."""
    return torch.stack((clamp_log_probability(log_p), log_complement(log_p)), dim=-1)


# --- exact: the last dimension is the vocabulary (or any set of bins that sums to 1) ---


def exact_kl(
    log_q: Tensor,  # [..., vocabulary]
    log_p: Tensor,  # [..., vocabulary]
) -> Tensor:  # [...]
    """KL(q || p) = sum q log(q / p), nats. The other direction is ``exact_kl(log_p, log_q)``."""
    log_q, log_p = clamp_log_probability(log_q), clamp_log_probability(log_p)
    return (log_q.exp() * (log_q - log_p)).sum(dim=-1).clamp_min(0.0)


def exact_tv(
    log_q: Tensor,  # [..., vocabulary]
    log_p: Tensor,  # [..., vocabulary]
) -> Tensor:  # [...]
    """Total variation = 0.5 * sum |q - p|, in [0, 1]."""
    return 0.5 * (log_q.exp() - log_p.exp()).abs().sum(dim=-1)


def exact_chi2(
    log_q: Tensor,  # [..., vocabulary]
    log_p: Tensor,  # [..., vocabulary]
) -> Tensor:  # [...]
    """chi2(p || q) = sum (p - q)^2 / q = E_q[(r - 1)^2]: the variance of the ratio under q."""
    log_q, log_p = clamp_log_probability(log_q), clamp_log_probability(log_p)
    return ((log_p.exp() - log_q.exp()).square() * (-log_q).exp()).sum(dim=-1)


def exact_js(
    log_q: Tensor,  # [..., vocabulary]
    log_p: Tensor,  # [..., vocabulary]
) -> Tensor:  # [...]
    """Jensen-Shannon = (KL(q || m) + KL(p || m)) / 2 with m = (q + p) / 2, in [0, log 2] nats."""
    log_q, log_p = clamp_log_probability(log_q), clamp_log_probability(log_p)
    log_m = torch.logaddexp(log_q, log_p) - math.log(2.0)
    return 0.5 * (exact_kl(log_q, log_m) + exact_kl(log_p, log_m))


# --- top-k with a tail bin ---


def top_k_bins(
    log_q: Tensor,  # [..., vocabulary]
    log_p: Tensor,  # [..., vocabulary]
    k: int,
    token_ids: Tensor | None = None,  # [...] the sampled tokens
) -> tuple[Tensor, Tensor]:  # two of [..., k (+ 1) + 1]
    """Both policies on q's k likeliest tokens, the sampled one and a tail bin; for ``exact_*``.

    The sampled token has a bin of its own (empty where it is one of the k), otherwise top-k would
    not be a refinement of binary. Raises ValueError for k outside [1, vocabulary).
    """
    if not 1 <= k < log_q.shape[-1]:
        raise ValueError(f"k must be in [1, {log_q.shape[-1] - 1}], got {k}")
    chosen = log_q.topk(k, dim=-1).indices
    own_bin = torch.zeros_like(log_q, dtype=torch.bool).scatter(-1, chosen, True)
    bins_q, bins_p = log_q.gather(-1, chosen), log_p.gather(-1, chosen)
    if token_ids is not None:
        token = token_ids.unsqueeze(-1)
        already = own_bin.gather(-1, token)
        nothing = torch.full((), MIN_LOG_PROBABILITY_NATS, dtype=log_q.dtype, device=log_q.device)
        bins_q = torch.cat((bins_q, torch.where(already, nothing, log_q.gather(-1, token))), dim=-1)
        bins_p = torch.cat((bins_p, torch.where(already, nothing, log_p.gather(-1, token))), dim=-1)
        own_bin = own_bin.scatter(-1, token, True)
    return (
        torch.cat((bins_q, _log_tail(log_q, own_bin)), dim=-1),
        torch.cat((bins_p, _log_tail(log_p, own_bin)), dim=-1),
    )


def _log_tail(log_p: Tensor, own_bin: Tensor) -> Tensor:
    """[..., vocabulary] -> [..., 1]: log of the probability of all tokens without a bin."""
    rest = clamp_log_probability(log_p).masked_fill(own_bin, MIN_LOG_PROBABILITY_NATS)
    return rest.logsumexp(dim=-1, keepdim=True)


def add_tail_bin(
    log_bins: Tensor,  # [..., k]: some tokens' logprobs, as recorded with an interaction
) -> Tensor:  # [..., k + 1]
    """The bins and one that holds the rest, when the full distribution was not kept."""
    return torch.cat((log_bins, log_complement(log_bins.logsumexp(-1, keepdim=True))), dim=-1)


# --- binary: the sampled token against everything else ---


def binary_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """q log(q / p) + (1 - q) log((1 - q) / (1 - p)), nats; any shape."""
    return exact_kl(_as_two_bins(log_q), _as_two_bins(log_p))


def binary_tv(log_q: Tensor, log_p: Tensor) -> Tensor:
    """|q - p|; any shape."""
    return (log_q.exp() - log_p.exp()).abs()


def binary_chi2(log_q: Tensor, log_p: Tensor) -> Tensor:
    """(p - q)^2 / (q (1 - q)); any shape."""
    return exact_chi2(_as_two_bins(log_q), _as_two_bins(log_p))


def binary_js(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Jensen-Shannon of the two-outcome distributions, nats; any shape."""
    return exact_js(_as_two_bins(log_q), _as_two_bins(log_p))


# --- estimators from tokens that q sampled; the mean over tokens is the estimate ---


def log_ratio(
    log_q: Tensor,  # any shape
    log_p: Tensor,  # any shape
) -> Tensor:
    """log r = log p - log q, inside +-20 nats."""
    return (log_p - log_q).clamp(-MAX_LOG_RATIO_NATS, MAX_LOG_RATIO_NATS)


def k1(log_q: Tensor, log_p: Tensor) -> Tensor:
    """-log r: unbiased for KL(q || p), may be negative."""
    return -log_ratio(log_q, log_p)


def k3(log_q: Tensor, log_p: Tensor) -> Tensor:
    """r - 1 - log r: unbiased for KL(q || p), never negative, less variance."""
    log_r = log_ratio(log_q, log_p)
    return torch.expm1(log_r) - log_r


def sampled_chi2(log_q: Tensor, log_p: Tensor) -> Tensor:
    """(r - 1)^2: unbiased for chi2(p || q)."""
    return torch.expm1(log_ratio(log_q, log_p)).square()


def sampled_tv(log_q: Tensor, log_p: Tensor) -> Tensor:
    """|r - 1| / 2: unbiased for total variation."""
    return 0.5 * torch.expm1(log_ratio(log_q, log_p)).abs()


def ess_share(
    log_q: Tensor,  # [..., tokens]
    log_p: Tensor,  # [..., tokens]
    mask: Tensor,  # [..., tokens] bool
) -> Tensor:  # [...]
    """Effective sample size / n = (sum r)^2 / (n sum r^2), in (0, 1]; 1 where no token counts."""
    log_r = log_ratio(log_q, log_p).masked_fill(~mask, -math.inf)
    count = mask.sum(dim=-1)
    share = torch.exp(2.0 * log_r.logsumexp(-1) - (2.0 * log_r).logsumexp(-1)) / count.clamp_min(1)
    return torch.where(count > 0, share, torch.ones_like(share))
