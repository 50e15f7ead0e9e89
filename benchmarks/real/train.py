"""Trains SmolLM2-135M-Instruct from thumbs on its own replies, S updates late.

One update, with the product's own ``Trainer``, ``assign_credit`` and ``Interaction``:

    generate B replies with the live policy, record their log-probabilities   -> queue
    take the batch that was generated S updates ago                          <- queue
    thumb up or down by the rule, credit, one optimiser step on the objective

The queue starts with S batches from the base policy. The last S updates generate nothing, because
nothing would learn from it: a run has S + ``own_batches`` updates. The same questions are asked in
the same order, with the same random seeds, whatever the rule and the method.

An objective's name runs that objective alone: the pull to the anchor, pacing, the trust region and
the gate are left out. ``moorline`` is the update as the updater makes it with its default settings,
without the gate: it looks at the batch first, sets aside what is too far, gives low credit to stale
replies, paces the step by their effective sample size, pulls to the anchor, and goes only as far as
the divergence bound allows.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.real.rules import RULES, Rule, batch_at, held_out_questions, training_questions
from moorline.events import (
    Feedback,
    FeedbackKind,
    Interaction,
    LogprobConvention,
    PolicySpan,
    SamplingSettings,
)
from moorline.settings import BoundSettings, LearningSettings
from updater.learning.advantages import assign_credit
from updater.learning.baselines import Baselines
from updater.learning.divergence import exact_kl
from updater.learning.policy import Policy
from updater.learning.sampling import processed_logprobs
from updater.learning.staleness import StalenessReport
from updater.learning.trainer import Trainer
from updater.safety.probes import ProbeSet, load_probes
from updater.safety.trust_region import Refused, TrustRegion, moved_from_live_nats
from updater.values import Batch, Example, TokenSequence

SAMPLING = SamplingSettings(temperature=1.0)
DIAGNOSTICS = (
    "k3_nats",
    "tv",
    "ess_share",
    "entropy_nats",
    "gradient_norm",
    "masked_share_rare",
    "masked_share_common",
    "masked_share_positive",
    "masked_share_negative",
    "ess_lr_scale",
    "step_scale",
    "set_aside_off_policy",
)
PRODUCT = "moorline"
"""The method that is the whole update; the others are objectives by name."""
SAMPLES = 4
"""Held-out replies of the last policy that a run keeps for the reader."""


@dataclass(frozen=True)
class Config:
    """Everything that shapes the numbers."""

    rules: tuple[str, ...] = ("brevity", "question", "greeting")
    lags: tuple[int, ...] = (0, 8, 32)
    methods: tuple[str, ...] = ("dppo_kl", "ppo_clip", "pg_is", PRODUCT)
    rates: tuple[float, ...] = (5e-4, 1.5e-3)
    """Learning rates: the same for every method; each is shown at its best."""
    own_batches: int = 16
    """Batches that a run generates itself; it learns from S batches of the base policy before."""
    batch_replies: int = 8
    reply_tokens: int = 24
    evaluate_every: int = 8
    held_out: int = 40
    """Questions of an evaluation, one reply each."""
    final_rounds: int = 2
    """The last evaluation asks everything so many times."""
    measure_every: int = 16
    """Updates between two looks at unrelated prompts and text."""
    seed: int = 0

    def updates(self, lag: int) -> int:
        return lag + self.own_batches


@dataclass(frozen=True)
class Cell:
    """One run."""

    rule: str
    lag: int
    method: str
    rate: float

    @property
    def key(self) -> str:
        return f"{self.rule}-{self.lag}-{self.method}-{self.rate:g}"


@dataclass(frozen=True)
class Reply:
    """One reply of a policy, and what it took to make it."""

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """With the end-of-turn token, where the policy chose it."""
    logprobs: tuple[float, ...]
    """The tokens' log-probabilities as sampled; empty where nobody learns from the reply."""
    text: str
    ended: bool

    @property
    def sequence(self) -> TokenSequence:
        return TokenSequence(self.prompt_token_ids, self.token_ids)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Reply:
        return cls(
            tuple(fields["prompt_token_ids"]),
            tuple(fields["token_ids"]),
            tuple(fields["logprobs"]),
            fields["text"],
            fields["ended"],
        )


@dataclass(frozen=True)
class Evaluation:
    """How the policy after ``update`` updates answers the held-out questions."""

    update: int
    share: float
    """Share of replies that follow the rule."""
    replies: int


@dataclass(frozen=True)
class SideEffect:
    """What learning the rule did to everything else."""

    update: int
    kl_nats: float
    """Mean KL(base || policy) per token of unrelated replies, over the whole vocabulary."""
    perplexity: float
    """Measured on held-out text."""


@dataclass(frozen=True)
class Trace:
    """What one run showed."""

    cell: Cell
    evaluations: tuple[Evaluation, ...]
    side_effects: tuple[SideEffect, ...]
    diagnostics: dict[str, float]
    """Means over all updates."""
    samples: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Trace:
        return cls(
            Cell(**fields["cell"]),
            tuple(Evaluation(**row) for row in fields["evaluations"]),
            tuple(SideEffect(**row) for row in fields["side_effects"]),
            fields["diagnostics"],
            tuple(fields["samples"]),
            fields["seconds"],
        )


Tick = Callable[[], None]


class Actor:
    """Generates replies with whatever policy is loaded. (The product serves with vLLM instead.)"""

    def __init__(self, policy: Policy, model_dir: Path, reply_tokens: int) -> None:
        self._model = policy._model  # Policy trains and measures; only here must it also speak
        self._tokenizer = AutoTokenizer.from_pretrained(
            model_dir, local_files_only=True, padding_side="left"
        )
        self._end: int = self._tokenizer.eos_token_id
        self._reply_tokens = reply_tokens

    @torch.no_grad()
    def reply(self, questions: Sequence[str], seed: int, *, recorded: bool) -> list[Reply]:
        """One reply to each; ``recorded``: with log-probabilities, to learn from."""
        prompts = [_as_prompt(question) for question in questions]
        encoded = self._tokenizer(
            prompts, return_tensors="pt", padding=True, add_special_tokens=False
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = self._model.generate(
                **encoded,
                do_sample=True,
                temperature=SAMPLING.temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=self._reply_tokens,
                eos_token_id=self._end,
                pad_token_id=self._end,
                output_logits=recorded,
                return_dict_in_generate=True,
            )
        width = encoded["input_ids"].shape[1]
        replies = []
        for row, prompt_mask in enumerate(encoded["attention_mask"].bool()):
            sampled: list[int] = made.sequences[row, width:].tolist()
            ended = self._end in sampled
            tokens = sampled[: sampled.index(self._end) + 1] if ended else sampled
            logprobs: list[float] = []
            if recorded:
                logits = torch.stack([step[row] for step in made.logits[: len(tokens)]]).float()
                logprobs = processed_logprobs(logits, torch.tensor(tokens), SAMPLING).tolist()
            replies.append(
                Reply(
                    tuple(encoded["input_ids"][row][prompt_mask].tolist()),
                    tuple(tokens),
                    tuple(logprobs),
                    self._tokenizer.decode(tokens, skip_special_tokens=True),
                    ended,
                )
            )
        return replies


def _as_prompt(question: str) -> str:
    """The model's chat template without its default system message: half as many tokens."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def new_policy(model_dir: Path, config: Config) -> Policy:
    """The base policy with a fresh adapter, the same every time."""
    settings = LearningSettings()
    return Policy(model_dir, rank=settings.lora_rank, alpha=settings.lora_alpha, seed=config.seed)


# --- replies of the base policy, shared by all runs ---


def base_batches(
    model_dir: Path, config: Config, numbers: Iterable[int], tick: Tick
) -> list[list[Reply]]:
    """What the queues start with."""
    actor = Actor(new_policy(model_dir, config), model_dir, config.reply_tokens)
    batches = []
    for number in numbers:
        batches.append(_training_batch(actor, config, number))
        tick()
    return batches


def base_held_out(model_dir: Path, config: Config) -> list[Reply]:
    """Evaluation of the base policy: where every run starts."""
    actor = Actor(new_policy(model_dir, config), model_dir, config.reply_tokens)
    return _held_out_replies(actor, config, update=0, rounds=config.final_rounds)


def _training_batch(actor: Actor, config: Config, number: int) -> list[Reply]:
    questions = batch_at(training_questions(config.seed), number, config.batch_replies)
    return actor.reply(questions, seed=1_000_000 * config.seed + number, recorded=True)


def _held_out_replies(actor: Actor, config: Config, update: int, rounds: int) -> list[Reply]:
    questions = held_out_questions(config.held_out)
    return [
        reply
        for number in range(rounds)
        for reply in actor.reply(
            questions,
            seed=1_000_000 * config.seed + 100_000 + 10 * update + number,
            recorded=False,
        )
    ]


def follow_share(rule: Rule, replies: Sequence[Reply]) -> float:
    """The share of replies that the rule would praise."""
    return mean(rule.follows(reply.text, reply.ended) for reply in replies)


# --- one run ---


class Bystanders:
    """Unrelated prompts and held-out text, as the product's gate keeps them."""

    def __init__(self, policy: Policy, model_dir: Path, micro_batch_tokens: int) -> None:
        self._policy = policy
        self.probes: ProbeSet = load_probes(None, model_dir)
        self._micro_batch_tokens = micro_batch_tokens
        with policy.using(None):
            self._base = self._logprobs()

    def _logprobs(self) -> list[Tensor]:
        return self._policy.full_logprobs(self.probes.sequences, self._micro_batch_tokens)

    def measure(self, update: int) -> SideEffect:
        now = self._logprobs()
        chats = len(self.probes.chats)
        moved = [exact_kl(b, n) for b, n in zip(self._base[:chats], now[:chats], strict=True)]
        chosen = [
            part.gather(-1, torch.tensor(text.completion_token_ids)[:, None])
            for text, part in zip(self.probes.texts, now[chats:], strict=True)
        ]
        return SideEffect(
            update,
            kl_nats=float(torch.cat(moved).mean()),
            perplexity=math.exp(-float(torch.cat(chosen).mean())),
        )


def as_example(rule: Rule, reply: Reply, name: str, version: int) -> Example:
    """A reply with the thumb that the rule gives it, as the product's ledger would hand it on."""
    interaction = Interaction(
        interaction_id=name,
        alias="benchmark",
        created_at=0.0,
        latency_seconds=0.0,
        prompt_token_ids=reply.prompt_token_ids,
        completion_token_ids=reply.token_ids,
        completion_logprobs=reply.logprobs,
        logprob_convention=LogprobConvention.PROCESSED,
        sampling=SAMPLING,
        policy_spans=(PolicySpan(version=version, start=0, end=len(reply.token_ids)),),
        finish_reason="stop" if reply.ended else "length",
    )
    thumb = Feedback(
        feedback_id=f"thumb-{name}",
        interaction_id=name,
        kind=FeedbackKind.THUMBS,
        value=1 if rule.follows(reply.text, reply.ended) else -1,
        rater=rule.name,
        created_at=0.0,
    )
    return Example(name, interaction, (thumb,))


@dataclass(frozen=True)
class Stored:
    """Replies that wait for their thumbs."""

    replies: list[Reply]
    version: int
    """The policy that wrote them; 0 is the base."""


class Queue:
    """First in, first out. It starts with S batches of the base policy and stays that long while
    each update puts one in: what comes out is S updates old."""

    def __init__(self, base: Sequence[list[Reply]]) -> None:
        self._waiting = deque(Stored(replies, version=0) for replies in base)

    def put(self, replies: list[Reply], version: int) -> None:
        self._waiting.append(Stored(replies, version))

    def oldest(self) -> Stored:
        return self._waiting.popleft()


def learning_settings(config: Config, cell: Cell) -> LearningSettings:
    """How a run's updates are made."""
    if cell.method == PRODUCT:
        return LearningSettings(learning_rate=cell.rate, seed=config.seed)
    return LearningSettings(
        objective=cell.method, learning_rate=cell.rate, anchor_weight=0.0, seed=config.seed
    )


class ObjectiveAlone:
    """Learns as if nothing were stale, and nothing but the objective bounds a step."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._baselines = Baselines()

    def learn(
        self,
        examples: Sequence[Example],
        update: int,
        traffic: Sequence[TokenSequence],  # noqa: ARG002
    ) -> dict[str, float]:
        """One update; returns its diagnostics, none if there was nothing to learn."""
        credited, self._baselines, _ = assign_credit(examples, self._baselines, signals={})
        batch = Batch(credited, live_version=update)
        if not batch.has_signal:
            return {}
        proposal = self._trainer.propose(batch, StalenessReport(), now=0.0)
        self._trainer.accept(proposal.adapter, proposal.optimizer)
        return {**proposal.diagnostics, "step_scale": 1.0}


class Product:
    """Learns as ``updater/loop.py`` does, from the look to the bound."""

    def __init__(self, trainer: Trainer, trust_region: TrustRegion) -> None:
        self._trainer = trainer
        self._trust_region = trust_region
        self._baselines = Baselines()
        self._moved_nats = 0.0

    def learn(
        self, examples: Sequence[Example], update: int, traffic: Sequence[TokenSequence]
    ) -> dict[str, float]:
        """One update; returns its diagnostics, none if there was nothing to learn."""
        seen = self._trainer.measure_staleness(examples, live_version=update)
        credited, baselines, stats = assign_credit(
            [example for example in examples if example.example_id not in seen.set_aside],
            self._baselines,
            signals={},
            moved_nats=self._moved_nats,
            ess_share=seen.ess_share,
        )
        batch = Batch(credited, update, seen.set_aside, stats.as_dict())
        self._baselines = baselines
        if not batch.has_signal:
            return dict(seen.diagnostics)
        proposal = self._trainer.propose(batch, seen, now=0.0)
        step = self._trust_region.largest_step(
            self._trainer.live_adapter, proposal.adapter, traffic
        )
        if isinstance(step, Refused):
            self._trainer.restore()
            return {**proposal.diagnostics, "step_scale": 0.0}
        self._trainer.accept(step.adapter, proposal.optimizer)
        self._moved_nats = moved_from_live_nats(step.divergences)
        return {**proposal.diagnostics, "step_scale": step.scale}


def learn_cell(
    model_dir: Path,
    config: Config,
    cell: Cell,
    base: Sequence[list[Reply]],  # at least cell.lag batches
    start: Sequence[Reply],  # base policy's held-out replies
    tick: Tick,
) -> Trace:
    """One run from the base policy to its end."""
    began = time.monotonic()
    rule = RULES[cell.rule]
    settings = learning_settings(config, cell)
    policy = new_policy(model_dir, config)
    actor = Actor(policy, model_dir, config.reply_tokens)
    bystanders = Bystanders(policy, model_dir, settings.micro_batch_tokens)
    trainer = Trainer(policy, settings)
    learner: ObjectiveAlone | Product
    if cell.method == PRODUCT:
        probes = bystanders.probes.sequences
        bound = TrustRegion(policy, probes, BoundSettings(), settings.micro_batch_tokens)
        learner = Product(trainer, bound)
    else:
        learner = ObjectiveAlone(trainer)
    waiting = Queue(base[: cell.lag])
    evaluations = [Evaluation(0, follow_share(rule, start), len(start))]
    side_effects = [bystanders.measure(0)]
    sums = dict.fromkeys(DIAGNOSTICS, 0.0)
    last: list[Reply] = []
    updates = config.updates(cell.lag)
    for update in range(updates):
        if update < config.own_batches:
            newest = _training_batch(actor, config, cell.lag + update)
            waiting.put(newest, version=update)
        oldest = waiting.oldest()
        examples = [
            as_example(rule, reply, f"{update}-{place}", oldest.version)
            for place, reply in enumerate(oldest.replies)
        ]
        found = learner.learn(examples, update, [reply.sequence for reply in newest])
        for name in DIAGNOSTICS:
            sums[name] += found.get(name, 0.0)
        done = update + 1
        if done % config.evaluate_every == 0 or done == updates:
            rounds = config.final_rounds if done == updates else 1
            last = _held_out_replies(actor, config, done, rounds)
            evaluations.append(Evaluation(done, follow_share(rule, last), len(last)))
        if done % config.measure_every == 0 or done == updates:
            side_effects.append(bystanders.measure(done))
        tick()
    return Trace(
        cell,
        tuple(evaluations),
        tuple(side_effects),
        {name: round(total / updates, 6) for name, total in sums.items()},
        tuple(reply.text for reply in last[:SAMPLES]),
        round(time.monotonic() - began, 1),
    )
