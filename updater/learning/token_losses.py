"""What each objective does with a token: ``(log_p, log_q, advantage, mask, limits) -> loss, kept``.

Notation and shapes are those of ``objectives.py``, whose registry names these functions with their
limits and sources. Padding has arrived here as r = 1, A = 0: harmless in sums and in gradients.
``kept`` says which tokens may move the policy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from updater.learning import divergence


def _moving_away(log_r: Tensor, advantage: Tensor) -> Tensor:
    """Tokens that the advantage would push further from the behaviour policy."""
    return ((advantage > 0) & (log_r > 0)) | ((advantage < 0) & (log_r < 0))


def _weighted(log_p: Tensor, weight: Tensor, advantage: Tensor) -> Tensor:
    """-A * sg(weight) * log p."""
    return -advantage * weight.detach() * log_p


def _inside_total_variation(rise: Tensor, advantage: Tensor, limit: float) -> Tensor:
    """Where p - q is no further than the limit in the direction of the advantage (A = 0: down)."""
    return torch.where(advantage > 0, rise <= limit, rise >= -limit)


def _reply_log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:  # [..., batch, 1], no gradient
    """The sum of log r over each reply, nats."""
    return divergence.log_ratio(log_q, log_p.detach()).sum(dim=-1, keepdim=True)


def _reply_tokens(mask: Tensor) -> Tensor:  # [..., batch, 1]
    """The length of each reply; 1 for an empty one."""
    return mask.sum(dim=-1, keepdim=True).clamp_min(1)


def dppo_kl(
    log_p: Tensor,
    log_q: Tensor,
    advantage: Tensor,
    mask: Tensor,  # noqa: ARG001
    *,
    divergence_limit: float,
    ratio_cap: float,
    moved: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-A sg(min(r, C)) M log p; M = 0 where KL(mu || pi) > delta and p is moving away."""
    log_r = divergence.log_ratio(log_q, log_p.detach())
    if moved is None:
        moved = divergence.binary_kl(log_q, log_p.detach())
    kept = (moved <= divergence_limit) | ~_moving_away(log_r, advantage)
    return _weighted(log_p, log_r.exp().clamp_max(ratio_cap) * kept, advantage), kept


def dppo_tv(
    log_p: Tensor,
    log_q: Tensor,
    advantage: Tensor,
    mask: Tensor,  # noqa: ARG001
    *,
    divergence_limit: float,
    ratio_cap: float,
    moved: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same with M = 0 where A > 0 and p - q > delta, or A <= 0 and p - q < -delta.

    A given total variation takes the place of abs(p - q).
    """
    log_r = divergence.log_ratio(log_q, log_p.detach())
    rise = log_p.detach().exp() - log_q.exp()
    if moved is not None:
        rise = moved.copysign(rise)
    kept = _inside_total_variation(rise, advantage, divergence_limit)
    return _weighted(log_p, log_r.exp().clamp_max(ratio_cap) * kept, advantage), kept


def drpo(
    log_p: Tensor,
    log_q: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    divergence_limit: float,
) -> tuple[Tensor, Tensor]:
    """-A r + |A| q (r - 1)^2 / (2 delta), r differentiable.

    The gradient in log p is -A r (1 - sign(A) (p - q) / delta): none at |p - q| = delta, backwards
    beyond it.
    """
    r = divergence.log_ratio(log_q, log_p).exp()
    pull = advantage.abs() * log_q.exp() * (r - 1.0).square() / (2.0 * divergence_limit)
    return -advantage * r + pull, mask


def m2po(
    log_p: Tensor,
    log_q: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    second_moment_limit: float,
) -> tuple[Tensor, Tensor]:
    """-A r; harmful tokens are dropped, largest (log r)^2 first, until its mean is in the limit.

    Harmful: moving away from the behaviour policy. The mean is over the harmful tokens that stay
    (the paper's Algorithm 1; its released code clips there instead, never tighter than 0.7..1.5).
    """
    log_r = divergence.log_ratio(log_q, log_p)
    harmful = _moving_away(log_r.detach(), advantage) & mask
    squares = log_r.detach().square().masked_fill(~harmful, 0.0).flatten(-2)
    ascending, order = squares.sort(dim=-1, stable=True)
    # Tokens that are not harmful are zeros at the front: they take no share in the mean.
    zeros = (~harmful).flatten(-2).sum(dim=-1, keepdim=True)
    position = torch.arange(1, squares.shape[-1] + 1, device=squares.device)
    mean = ascending.cumsum(dim=-1) / (position - zeros).clamp_min(1)
    # The running mean of an ascending list rises, so what is inside the limit is a prefix.
    kept = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, mean <= second_moment_limit)
    kept = kept.view(mask.shape)
    return torch.where(kept, -advantage * log_r.exp(), log_p.new_zeros(())), kept


def ppo_clip(
    log_p: Tensor,
    log_q: Tensor,
    advantage: Tensor,
    mask: Tensor,  # noqa: ARG001
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """-min(r A, clip(r, 1 - low, 1 + high) A)."""
    r = divergence.log_ratio(log_q, log_p).exp()
    return _clipped_surrogate(r, advantage, clip_low, clip_high)


def gspo(
    log_p: Tensor,
    log_q: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """The clipped surrogate of s_t = sg(s) p / sg(p), with the sequence's s = exp(mean log r).

    The paper's token form (section 4.3): where all tokens share one advantage, as ours do, its
    gradient is the sequence form's, and it stays right where they do not.
    """
    log_s = _reply_log_ratio(log_p, log_q) / _reply_tokens(mask)
    s = (log_s + log_p - log_p.detach()).exp()
    return _clipped_surrogate(s, advantage, clip_low, clip_high)


def _clipped_surrogate(
    r: Tensor, advantage: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    loss = -torch.minimum(r * advantage, r.clamp(1.0 - clip_low, 1.0 + clip_high) * advantage)
    out = ((advantage > 0) & (r > 1.0 + clip_high)) | ((advantage < 0) & (r < 1.0 - clip_low))
    return loss, ~out


def cispo(
    log_p: Tensor,
    log_q: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor]:
    """-A sg(clip(r, 1 - low, 1 + high)) log p: no token is dropped, its weight is bounded."""
    r = divergence.log_ratio(log_q, log_p.detach()).exp()
    return _weighted(log_p, r.clamp(1.0 - clip_low, 1.0 + clip_high), advantage), mask


def icepop(
    log_p: Tensor,
    log_q: Tensor,
    advantage: Tensor,
    mask: Tensor,  # noqa: ARG001
    *,
    ratio_min: float,
    ratio_max: float,
) -> tuple[Tensor, Tensor]:
    """-A sg(r) 1[min <= r <= max] log p: dropped on either side, whatever the advantage."""
    r = divergence.log_ratio(log_q, log_p.detach()).exp()
    kept = (r >= ratio_min) & (r <= ratio_max)
    return _weighted(log_p, r * kept, advantage), kept


def pg_is(
    log_p: Tensor,
    log_q: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    ratio_cap: float,
) -> tuple[Tensor, Tensor]:
    """-A sg(min(r, C)) log p: capped importance weights, nothing else."""
    r = divergence.log_ratio(log_q, log_p.detach()).exp()
    return _weighted(log_p, r.clamp_max(ratio_cap), advantage), mask


def pg(log_p: Tensor, log_q: Tensor, advantage: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """-A log p: as if the data were fresh."""
    return _weighted(log_p, torch.ones_like(log_q), advantage), mask


def tapered(
    log_p: Tensor,
    log_q: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    taper_tokens: float,
) -> tuple[Tensor, Tensor]:
    """-A w log p; w = 1 where A > 0, else min(1, exp(s)), s = sum log r * min(1, T0 / T).

    What is disliked is pushed away ever more gently as the policy leaves the whole reply behind, so
    that a stale dislike cannot push without end. T: the reply's tokens; T0: ``taper_tokens``, which
    keeps long replies from losing all weight. TOPR (arXiv 2503.14286) is T0 without limit.
    """
    share = (taper_tokens / _reply_tokens(mask)).clamp_max(1.0)
    weight = (_reply_log_ratio(log_p, log_q) * share).clamp_max(0.0).exp()
    return _weighted(log_p, torch.where(advantage > 0, 1.0, weight), advantage), mask


def vespo(
    log_p: Tensor,
    log_q: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    k_positive: float,
    lambda_positive: float,
    k_negative: float,
    lambda_negative: float,
) -> tuple[Tensor, Tensor]:
    """-A sg(phi(W)) log p with phi(W) = W^k exp(lambda (1 - W)), W the reply's product of ratios.

    As in the authors' code, log W is held within 20 nats.
    """
    limit = divergence.MAX_LOG_RATIO_NATS
    log_w = _reply_log_ratio(log_p, log_q).clamp(-limit, limit)
    positive = advantage >= 0
    k = torch.where(positive, log_w.new_tensor(k_positive), k_negative)
    rate = torch.where(positive, log_w.new_tensor(lambda_positive), lambda_negative)
    return _weighted(log_p, (k * log_w + rate * (1.0 - log_w.exp())).exp(), advantage), mask


def ppo_clip_masked_negatives(
    log_p: Tensor,
    log_q: Tensor,
    advantage: Tensor,
    mask: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    drift_limit: float,
) -> tuple[Tensor, Tensor]:
    """PPO's clip without those negative replies whose mean log(q / p) is above a limit, in nats."""
    loss, kept = ppo_clip(log_p, log_q, advantage, mask, clip_low=clip_low, clip_high=clip_high)
    drift = -_reply_log_ratio(log_p, log_q) / _reply_tokens(mask)
    stays = (advantage >= 0) | (drift <= drift_limit)
    return torch.where(stays, loss, log_p.new_zeros(())), kept & stays


def prime_rl(
    log_p: Tensor,
    log_q: Tensor,
    advantage: Tensor,
    mask: Tensor,  # noqa: ARG001
    *,
    divergence_limit: float,
    pull: float,
) -> tuple[Tensor, Tensor]:
    """-A r M + tau (log r)^2, r differentiable; M is ``dppo_tv``'s mask.

    The pull toward the behaviour policy (tau) is felt by the tokens that M drops, too.
    """
    log_r = divergence.log_ratio(log_q, log_p)
    rise = log_p.detach().exp() - log_q.exp()
    kept = _inside_total_variation(rise, advantage, divergence_limit)
    surrogate = torch.where(kept, -advantage * log_r.exp(), log_p.new_zeros(()))
    return surrogate + pull * log_r.square(), kept
