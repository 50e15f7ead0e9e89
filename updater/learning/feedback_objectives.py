"""What a correction and a preference teach: the losses. Pure.

Notation: x prompt, y the reply that was given, y* the text somebody wanted instead; p under the
policy that is being trained, q under the one that wrote a reply (recorded), live under the live
policy, before the update.

A correction teaches twice:

* *Distillation from the same model told the correction* (SDPO, arXiv 2601.20802; OpenClaw-RL, arXiv
  2603.10165). What the model would have said, had it known: on the logged tokens

      A_t = clip(log live(y_t | x, hint, y_<t) - log live(y_t | x, y_<t), +-limit)

  is a token's advantage in the objective, with its importance weight and its bound.
* *Bounded imitation*: the objective ``dppo_kl`` on y*, with A = weight and q = live. That is
  -M r log p, with M = 0 for a token once the policy has moved further than the limit at it.

A preference of y over z is DPO (arXiv 2305.18290), with the policies that wrote both as reference:

    -log sigmoid(beta * (log p(y)/q(y) - log p(z)/q(z)))        log p(y): the sum over its tokens
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from updater.learning.objectives import OBJECTIVES, ObjectiveOutput


def distillation_advantage(
    log_with_hint: Tensor,  # [tokens] log live(y_t | x, hint, y_<t)
    log_without: Tensor,  # [tokens] log live(y_t | x, y_<t)
    limit_nats: float,
) -> Tensor:  # [tokens]
    """How much likelier each token of the reply becomes by the correction, within +-limit."""
    return (log_with_hint - log_without).clamp(-limit_nats, limit_nats).detach()


def bounded_imitation(
    log_p: Tensor,  # [batch, time], requires grad
    log_live: Tensor,  # [batch, time]
    weight: Tensor,  # [batch, 1], > 0
    mask: Tensor,  # [batch, time] bool
) -> ObjectiveOutput:
    """``dppo_kl`` on text that nobody sampled: the live policy stands for the behaviour policy."""
    return OBJECTIVES["dppo_kl"](log_p, log_live, weight, mask)


def preference_margin(
    chosen_log_ratio: Tensor,  # [pairs] sum over tokens of log p - log q
    rejected_log_ratio: Tensor,  # [pairs]
    beta: float,
) -> Tensor:  # [pairs]
    """The difference of the implicit rewards beta log p/q: > 0 where p agrees with the person."""
    return beta * (chosen_log_ratio - rejected_log_ratio)


def preference_loss(
    chosen_log_ratio: Tensor,  # [pairs]
    rejected_log_ratio: Tensor,  # [pairs]
    beta: float,
) -> Tensor:  # [pairs]
    """-log sigmoid(margin): log 2 where p = q."""
    return -F.logsigmoid(preference_margin(chosen_log_ratio, rejected_log_ratio, beta))
