"""Trains many independent policies at once: one method at one lag, every seed and learning rate.

    R runs (seed x learning rate), B replies a batch, T tokens, V vocabulary, S lag in updates

One update of each run:

    generate B replies with the current policy, remember their log-probabilities   -> queue
    take the batch that was generated S updates ago                               <- queue
    A = (reward - baseline of its prompt) / batch rms
    one Adam step on the objective, gradient clipped to norm 1

The queue starts with S batches from the base policy. All runs of a seed see the same prompts
and the same random numbers, whatever their method, so that methods are compared in pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.staleness import task
from benchmarks.staleness.methods import METHODS, Kind, Method, Tokens
from benchmarks.staleness.task import LENGTH_TOKENS, PROMPTS, Parameters
from updater.learning.divergence import ess_share
from updater.learning.objectives import log_ratio_penalty, measure_batches, token_mean

ADAM_BETAS = (0.9, 0.95)
"""The updater's own. With 0.999, one wrong reply after a long calm makes a step of 3 rates."""
ADAM_EPSILON = 1e-8
GRADIENT_CLIP = 1.0
BASELINE_KEEP = 0.9
"""How much of a prompt's baseline is forgotten at each of its replies."""
RMS_FLOOR = 0.1
"""A batch of nearly equal rewards is not blown up to full size."""
ANCHOR_EVERY_UPDATES = 8
"""How long the "recomputed" ablation keeps one anchor."""
STALE_FROM = 64
"""Lags, in updates, that the claims about stale data are for."""


@dataclass(frozen=True)
class Config:
    """Everything that shapes the numbers."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    learning_rates: tuple[float, ...] = (1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
    lags: tuple[int, ...] = (0, 8, 64, 256)
    methods: tuple[str, ...] = tuple(METHODS)
    updates: int = 1000
    batch_replies: int = 32
    evaluate_every: int = 20
    measure_every: int = 20

    @property
    def groups(self) -> list[tuple[str, int]]:
        """Every (method, lag) to train; ablations and recipes only where data is stale."""
        return [
            (method, lag)
            for lag in self.lags
            for method in self.methods
            if lag >= STALE_FROM or METHODS[method].kind is Kind.OBJECTIVE
        ]


@dataclass(frozen=True)
class Trace:
    """One run."""

    method: str
    lag: int
    seed: int
    learning_rate: float
    rewards: tuple[float, ...]
    """P(right reply) of the policy before update 0, evaluate_every, 2 * evaluate_every, ..."""
    diagnostics: dict[str, float]
    """Means over the updates that were measured."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Trace:
        return cls(**{**fields, "rewards": tuple(fields["rewards"])})


Tick = Callable[[int], None]


@dataclass
class _Queue:
    """A ring of batches, the oldest S updates old."""

    prompts: Tensor  # [S + 1, R, B]
    tokens: Tensor  # [S + 1, R, B, T]
    log_q: Tensor  # [S + 1, R, B, T]
    rewards: Tensor  # [S + 1, R, B]
    put_count: int = 0

    @classmethod
    def empty(cls, lag: int, runs: int, batch: int) -> _Queue:
        shape = (lag + 1, runs, batch)
        return cls(
            torch.zeros(shape, dtype=torch.int64),
            torch.zeros(*shape, LENGTH_TOKENS, dtype=torch.int64),
            torch.zeros(*shape, LENGTH_TOKENS),
            torch.zeros(shape),
        )

    def put(self, prompts: Tensor, tokens: Tensor, log_q: Tensor, rewards: Tensor) -> None:
        slot = self.put_count % self.prompts.shape[0]
        self.prompts[slot], self.tokens[slot] = prompts, tokens
        self.log_q[slot], self.rewards[slot] = log_q, rewards
        self.put_count += 1

    def oldest(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        slot = self.put_count % self.prompts.shape[0]  # the one that the next put overwrites
        return self.prompts[slot], self.tokens[slot], self.log_q[slot], self.rewards[slot]


class _Adam:
    """Adam with one learning rate and one gradient clip for each run."""

    def __init__(self, parameters: Parameters, learning_rates: Tensor) -> None:
        self._rates = learning_rates  # [R]
        self._first = {name: torch.zeros_like(value) for name, value in parameters.items()}
        self._second = {name: torch.zeros_like(value) for name, value in parameters.items()}
        self._steps = 0

    def step(
        self,
        parameters: Parameters,
        gradients: dict[str, Tensor],
        pace: Tensor,  # [R]
    ) -> tuple[Parameters, Tensor]:
        """The new parameters, and each run's gradient norm before the clip."""
        self._steps += 1
        norm = sum(g.square().flatten(1).sum(1) for g in gradients.values())
        assert isinstance(norm, Tensor)
        norm = norm.sqrt()
        clip = (GRADIENT_CLIP / norm.clamp_min(1e-12)).clamp_max(1.0).view(-1, 1, 1)
        keep, keep_square = ADAM_BETAS
        rate = (self._rates * pace).view(-1, 1, 1) / (1 - keep**self._steps)
        moved: Parameters = {}
        for name, gradient in gradients.items():
            gradient = gradient * clip
            first = self._first[name].mul_(keep).add_(gradient, alpha=1 - keep)
            second = self._second[name].mul_(keep_square)
            second.addcmul_(gradient, gradient, value=1 - keep_square)
            scale = (second / (1 - keep_square**self._steps)).sqrt_().add_(ADAM_EPSILON)
            moved[name] = parameters[name].detach() - rate * first / scale
        return moved, norm


class _Credit:
    """A decayed mean of the rewards of each prompt."""

    def __init__(self, runs: int) -> None:
        self._mean = torch.zeros(runs, PROMPTS)

    def advantages(self, prompts: Tensor, rewards: Tensor, share: Tensor) -> Tensor:
        """[R, B], [R, B], [R, 1] -> [R, B]; ``share`` of the baseline is subtracted."""
        baseline = self._mean.gather(1, prompts)
        rms = (rewards - baseline).square().mean(-1, keepdim=True).sqrt()
        count = torch.zeros_like(self._mean).scatter_add_(1, prompts, torch.ones_like(rewards))
        total = torch.zeros_like(self._mean).scatter_add_(1, prompts, rewards)
        keep = BASELINE_KEEP**count
        self._mean = keep * self._mean + (1 - keep) * total / count.clamp_min(1)
        return (rewards - share * baseline) / rms.clamp_min(RMS_FLOOR)


@lru_cache(maxsize=2)
def base_policies(seeds: tuple[int, ...]) -> Parameters:
    """Trained once in each process: they are the same for every method."""
    return task.pretrain_base(seeds)


class _Group:
    """The state of one method at one lag."""

    def __init__(self, method: Method, lag: int, config: Config) -> None:
        self.method, self.lag, self.config = method, lag, config
        self.labels = [(s, rate) for s in config.seeds for rate in config.learning_rates]
        self._which_seed = torch.tensor([config.seeds.index(seed) for seed, _ in self.labels])
        self.runs = len(self.labels)
        base = base_policies(config.seeds)
        self.parameters = {name: value[self._which_seed] for name, value in base.items()}
        answers = torch.stack([task.make_task(seed).answers for seed in config.seeds])
        self.answers = answers[self._which_seed]  # [R, PROMPTS, T]
        self._generators = [torch.Generator().manual_seed(30_000 + s) for s in config.seeds]
        self._adam = _Adam(self.parameters, torch.tensor([rate for _, rate in self.labels]))
        self._credit = _Credit(self.runs)
        self._queue = _Queue.empty(lag, self.runs, config.batch_replies)
        self._anchor = self.parameters
        for _ in range(lag):
            self.generate()

    def generate(self) -> None:
        """One batch from the current policy, into the queue."""
        size = self.config.batch_replies
        prompts = torch.stack(
            [torch.randint(PROMPTS, (size,), generator=g) for g in self._generators]
        )
        draws = torch.stack(
            [torch.rand(size, LENGTH_TOKENS, generator=g) for g in self._generators]
        )
        prompts = prompts[self._which_seed]
        tokens, log_q = task.sample(self.parameters, prompts, draws[self._which_seed])
        answers = self.answers.gather(1, prompts.unsqueeze(-1).expand_as(tokens))
        self._queue.put(prompts, tokens, log_q, (tokens == answers).all(-1).float())

    def learn(self, update: int, measured: bool) -> dict[str, Tensor]:
        """One update from the oldest batch; measurements [R] where asked."""
        prompts, tokens, log_q, rewards = self._queue.oldest()
        mask = torch.ones_like(tokens, dtype=torch.bool)
        for value in self.parameters.values():
            value.requires_grad_()
        log_full = task.teacher_forced(self.parameters, prompts, tokens)
        log_p = task.pick(log_full, tokens)
        effective = ess_share(log_q.flatten(1), log_p.detach().flatten(1), mask.flatten(1))
        recipe = self.method.recipe
        everything = torch.ones_like(effective)
        share = effective if recipe.baseline_follows_ess else everything
        advantage = self._credit.advantages(prompts, rewards, share.unsqueeze(-1)).unsqueeze(-1)
        log_anchor = self._recomputed(update, prompts, tokens, log_q)
        output = self.method.loss(Tokens(log_p, log_q, log_anchor, advantage, mask))
        loss = output.loss
        if recipe.log_ratio_weight > 0.0:
            loss = loss + log_ratio_penalty(log_p, log_q, mask, recipe.log_ratio_weight)
        # The sum over runs: no parameter is shared, so each run gets its own gradient.
        total = token_mean(loss, mask).sum()
        gradients = torch.autograd.grad(total, list(self.parameters.values()))
        pace = effective if recipe.scale_lr_by_ess else everything
        self.parameters, norm = self._adam.step(
            self.parameters, dict(zip(self.parameters, gradients, strict=True)), pace
        )
        if not measured:
            return {}
        entropy = -(log_full.exp() * log_full).sum(-1).mean((-2, -1)).detach()
        found = measure_batches(log_p.detach(), log_q, advantage, mask, output.kept)
        return {**found, "entropy_nats": entropy, "gradient_norm": norm}

    def _recomputed(self, update: int, prompts: Tensor, tokens: Tensor, log_q: Tensor) -> Tensor:
        if not self.method.recomputes_anchor:
            return log_q
        if update % ANCHOR_EVERY_UPDATES == 0:
            self._anchor = {name: value.detach() for name, value in self.parameters.items()}
        with torch.no_grad():
            return task.pick(task.teacher_forced(self._anchor, prompts, tokens), tokens)


def train_group(method: str, lag: int, config: Config, tick: Tick = lambda _: None) -> list[Trace]:
    """Every seed and learning rate of one method at one lag; ``tick(n)`` after n updates."""
    group = _Group(METHODS[method], lag, config)
    rewards: list[Tensor] = []
    sums: dict[str, Tensor] = {}
    measured_count = 0
    for update in range(config.updates):
        if update % config.evaluate_every == 0:
            rewards.append(task.expected_reward(group.parameters, group.answers))
            tick(config.evaluate_every if update else 0)
        measured = update % config.measure_every == 0
        group.generate()
        for name, value in group.learn(update, measured).items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value
        measured_count += measured
    rewards.append(task.expected_reward(group.parameters, group.answers))
    tick(config.updates - (len(rewards) - 2) * config.evaluate_every)
    curves = torch.stack(rewards, dim=1)  # [R, evaluations]
    return [
        Trace(
            method,
            lag,
            seed,
            rate,
            tuple(round(value, 5) for value in curves[run].tolist()),
            {name: round(float(total[run]) / measured_count, 6) for name, total in sums.items()},
        )
        for run, (seed, rate) in enumerate(group.labels)
    ]
