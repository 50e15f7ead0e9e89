"""Off-policy data: how fast to learn from it, and which replies are too far off. Pure.

Notation as in ``objectives.py``: q of the behaviour policy, p of the live policy before the update,
r = p / q, T tokens.

*Learning-rate scale*: the rate of one batch is multiplied by its effective sample size as a share
of its tokens, (sum r)^2 / (T sum r^2) (``divergence.ess_share``). At lag 0 that is 1; a batch of
which a few tokens carry all the weight moves the policy little.

*Off-policy*: decided for each reply by what was measured, never by its age. A reply from months ago
is learned from if the policy still writes like that; one of yesterday is not if it no longer does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from updater.learning import divergence

NEGLIGIBLE_WEIGHT = 0.05
"""Mean r of a reply's tokens below which its gradient is as good as none."""


def is_off_policy(
    log_q: Tensor,  # [T]
    log_p: Tensor,  # [T]
    limit_nats: float,
) -> bool:
    """Whether the live policy is too far from the one that wrote this reply.

    Either the mean binary KL(q || p) per token is above the limit (the policies disagree about
    what this text is), or the tokens' importance weights are negligible (it would teach nothing).
    What cannot be measured (NaN) is too far.
    """
    moved_nats = float(divergence.binary_kl(log_q, log_p).mean())
    weight = float(divergence.log_ratio(log_q, log_p).exp().mean())
    return not (moved_nats <= limit_nats and weight >= NEGLIGIBLE_WEIGHT)


def batch_ess_share(
    log_q: Tensor,  # [T] of all replies of a batch
    log_p: Tensor,  # [T]
) -> float:
    """Effective sample size of a batch as a share of its tokens, in (0, 1]; 1 without tokens, NaN
    where a logprob is NaN."""
    everything = torch.ones_like(log_q, dtype=torch.bool)
    return float(divergence.ess_share(log_q, log_p, everything).clamp_max(1.0))
