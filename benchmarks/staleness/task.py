"""The task and the policy of the staleness experiment.

A reply is ``LENGTH_TOKENS`` tokens to one of ``PROMPTS`` prompts, and is right only when every
token is. All but one are *structural*: the base policy already gets them with ~95 % - confident,
and breakable. The *pivot* is the one that the base gets with ~2 %: rare, and to be found. That is
the shape of much learning from feedback on a language model, and both halves of what staleness does
to it: a bound on the ratio slows the pivot and does not protect the structure.

The policy is an autoregressive network (embeddings of prompt, position and previous token, two
hidden layers). Many independent runs are stacked on a leading dimension and share each matrix
multiplication; nothing else is shared between them.

Notation: R runs, B prompts a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

PROMPTS = 16
VOCABULARY = 32
LENGTH_TOKENS = 6
PIVOT_POSITION = 3
STRUCTURAL_PROBABILITY = 0.95
PIVOT_PROBABILITY = 0.02
DECOY_PROBABILITY = 0.5
"""What the base says at the pivot instead, most of the time."""
EMBEDDING = 64
HIDDEN = 96

Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """One seed's question set."""

    answers: Tensor
    """[PROMPTS, T] the only right reply to each prompt."""
    base_targets: Tensor
    """[PROMPTS, T, V] what the base policy is trained to say."""


def make_task(seed: int) -> Task:
    """Random answers, and the base distribution around them."""
    generator = torch.Generator().manual_seed(seed)
    answers = torch.randint(VOCABULARY, (PROMPTS, LENGTH_TOKENS), generator=generator)
    offset = torch.randint(1, VOCABULARY, (PROMPTS,), generator=generator)
    decoy = (answers[:, PIVOT_POSITION] + offset) % VOCABULARY
    rest = (1.0 - STRUCTURAL_PROBABILITY) / (VOCABULARY - 1)
    targets = torch.full((PROMPTS, LENGTH_TOKENS, VOCABULARY), rest)
    targets.scatter_(-1, answers.unsqueeze(-1), STRUCTURAL_PROBABILITY)
    rest = (1.0 - PIVOT_PROBABILITY - DECOY_PROBABILITY) / (VOCABULARY - 2)
    pivot = torch.full((PROMPTS, VOCABULARY), rest)
    pivot.scatter_(-1, answers[:, PIVOT_POSITION].unsqueeze(-1), PIVOT_PROBABILITY)
    pivot.scatter_(-1, decoy.unsqueeze(-1), DECOY_PROBABILITY)
    targets[:, PIVOT_POSITION] = pivot
    return Task(answers, targets)


def new_parameters(seeds: tuple[int, ...]) -> Parameters:
    """R = len(seeds) freshly initialised policies."""

    def one(seed: int) -> Parameters:
        generator = torch.Generator().manual_seed(10_000 + seed)

        def normal(*shape: int, scale: float) -> Tensor:
            return scale * torch.randn(*shape, generator=generator)

        return {
            "prompt": normal(PROMPTS, EMBEDDING, scale=1.0),
            "position": normal(LENGTH_TOKENS, EMBEDDING, scale=1.0),
            "previous": normal(VOCABULARY + 1, EMBEDDING, scale=0.3),
            "w1": normal(EMBEDDING, HIDDEN, scale=(1.0 / EMBEDDING) ** 0.5),
            "b1": torch.zeros(1, HIDDEN),
            "w2": normal(HIDDEN, HIDDEN, scale=(2.0 / HIDDEN) ** 0.5),
            "b2": torch.zeros(1, HIDDEN),
            "w3": normal(HIDDEN, VOCABULARY, scale=0.3 * (1.0 / HIDDEN) ** 0.5),
            "b3": torch.zeros(1, VOCABULARY),
        }

    each = [one(seed) for seed in seeds]
    return {name: torch.stack([p[name] for p in each]) for name in each[0]}


def parameter_count() -> int:
    return sum(p[0].numel() for p in new_parameters((0,)).values())


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """[R, N, E] at [R, M] -> [R, M, E]: each run looks up in its own table."""
    return table.gather(1, index.unsqueeze(-1).expand(-1, -1, table.shape[-1]))


def log_distribution(
    parameters: Mapping[str, Tensor],
    prompts: Tensor,  # [R, B, T] or [R, B, 1]
    positions: Tensor,  # [T]
    previous: Tensor,  # [R, B, T]: the token before each; VOCABULARY at the start
) -> Tensor:  # [R, B, T, V]
    """The policy's log-probabilities of every token at each position."""
    runs, batch, time = previous.shape
    flat = (
        _rows(parameters["prompt"], prompts.expand_as(previous).reshape(runs, -1))
        + _rows(parameters["previous"], previous.reshape(runs, -1))
        + parameters["position"][:, positions].repeat(1, batch, 1)
    )
    hidden = F.silu(torch.baddbmm(parameters["b1"], flat, parameters["w1"]))
    hidden = F.silu(torch.baddbmm(parameters["b2"], hidden, parameters["w2"]))
    logits = torch.baddbmm(parameters["b3"], hidden, parameters["w3"])
    return logits.log_softmax(-1).view(runs, batch, time, VOCABULARY)


def shifted(tokens: Tensor) -> Tensor:
    """[..., T] -> [..., T]: the token before each."""
    start = torch.full_like(tokens[..., :1], VOCABULARY)
    return torch.cat((start, tokens[..., :-1]), dim=-1)


ALL_POSITIONS = torch.arange(LENGTH_TOKENS)


def teacher_forced(
    parameters: Mapping[str, Tensor],
    prompts: Tensor,  # [R, B]
    tokens: Tensor,  # [R, B, T]
) -> Tensor:  # [R, B, T, V]
    return log_distribution(parameters, prompts.unsqueeze(-1), ALL_POSITIONS, shifted(tokens))


def pick(log_full: Tensor, tokens: Tensor) -> Tensor:
    """[..., V] at [...] -> [...]."""
    return log_full.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def sample(
    parameters: Mapping[str, Tensor],
    prompts: Tensor,  # [R, B]
    uniforms: Tensor,  # [R, B, T] in [0, 1): the same for all runs of a seed
) -> tuple[Tensor, Tensor]:  # [R, B, T] twice
    """One reply to each prompt at temperature 1, and its log-probabilities."""
    previous = torch.full_like(prompts, VOCABULARY).unsqueeze(-1)
    tokens, logprobs = [], []
    for position in range(LENGTH_TOKENS):
        log_full = log_distribution(
            parameters, prompts.unsqueeze(-1), ALL_POSITIONS[position : position + 1], previous
        )
        cumulative = log_full.exp().cumsum(-1)
        point = uniforms[..., position, None, None] * cumulative[..., -1:]
        previous = (cumulative <= point).sum(-1).clamp_max(VOCABULARY - 1)
        tokens.append(previous)
        logprobs.append(pick(log_full, previous))
    return torch.cat(tokens, -1), torch.cat(logprobs, -1)


@torch.no_grad()
def expected_reward(
    parameters: Mapping[str, Tensor],
    answers: Tensor,  # [R, PROMPTS, T]
) -> Tensor:  # [R]
    """P(right reply), averaged over all prompts: exact, no sampling noise."""
    prompts = torch.arange(PROMPTS).expand(answers.shape[0], -1)
    log_p = pick(teacher_forced(parameters, prompts, answers), answers)
    return log_p.sum(-1).exp().mean(-1)


def pretrain_base(seeds: tuple[int, ...], steps: int = 600) -> Parameters:
    """The base policy of each seed, trained on its task's base distribution."""
    targets = torch.stack([make_task(seed).base_targets for seed in seeds])  # [R, P, T, V]
    generators = [torch.Generator().manual_seed(20_000 + seed) for seed in seeds]
    parameters = {k: v.requires_grad_() for k, v in new_parameters(seeds).items()}
    optimizer = torch.optim.Adam(list(parameters.values()), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    prompts = torch.arange(PROMPTS).expand(len(seeds), -1)
    for _ in range(steps):
        draws = torch.stack(
            [torch.rand(PROMPTS, LENGTH_TOKENS, 1, generator=g) for g in generators]
        )
        prefix = (targets.cumsum(-1) <= draws).sum(-1).clamp_max(VOCABULARY - 1)
        log_p = teacher_forced(parameters, prompts, prefix)
        # Summed over runs: each has its own parameters, so each gets its own gradient.
        loss = -(targets * log_p).sum(-1).mean((-2, -1)).sum()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return {name: value.detach() for name, value in parameters.items()}
