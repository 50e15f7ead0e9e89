"""One update: from a credited batch to a proposed adapter, with everything measured on the way.

The trainer holds the live policy's adapter and optimiser state. ``propose`` moves away from them;
``accept`` makes the result the new live state and ``restore`` goes back, so that a rejected
candidate leaves no trace, not even in the optimiser's moments.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from daemon.settings import LearningSettings
from updater.objectives import OBJECTIVES, measure, token_mean
from updater.policy import AdapterState, Policy, micro_batches
from updater.sampling import processed_logprobs
from updater.values import Batch, CreditedExample, TokenSequence

OptimizerState = dict[str, Tensor]


class UnknownObjective(ValueError):
    """`learning.objective` names no objective."""


class NonFiniteUpdate(ArithmeticError):
    """A loss or gradient was NaN or infinite; the policy was left as it was."""


@dataclass(frozen=True)
class Proposal:
    """Where the gradient wants to go, before any bound."""

    adapter: AdapterState
    optimizer: OptimizerState
    diagnostics: dict[str, float]


class Trainer:
    """Makes proposals from the live policy."""

    def __init__(self, policy: Policy, settings: LearningSettings) -> None:
        """Start from the anchor; ``resume`` continues from a release.

        Raises:
            UnknownObjective: it is not in the registry.
        """
        if settings.objective not in OBJECTIVES:
            raise UnknownObjective(
                f"learning.objective {settings.objective!r} is unknown: "
                f"use one of {', '.join(sorted(OBJECTIVES))}"
            )
        self._policy = policy
        self._settings = settings
        self._objective = OBJECTIVES[settings.objective]
        self._limits = (
            {"divergence_limit": settings.divergence_limit}
            if settings.divergence_limit is not None
            else {}
        )
        self._optimizer = torch.optim.AdamW(
            [parameter for _, parameter in policy.parameters],
            lr=settings.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )
        self.live_adapter = policy.state()
        self._live_optimizer: OptimizerState = {}

    # --- live state -------------------------------------------------------------------------

    def resume(self, adapter: AdapterState, optimizer: bytes | None) -> None:
        """Continue from a release: its adapter and, if kept, its optimiser state."""
        self.accept(adapter, safetensors_load(optimizer) if optimizer else {})

    def accept(self, adapter: AdapterState, optimizer: OptimizerState) -> None:
        """The candidate (as far as the bound let it go) is the live policy now."""
        self.live_adapter = adapter
        self._live_optimizer = optimizer
        self.restore()

    def restore(self) -> None:
        """Back to the live policy, as if nothing had been tried."""
        self._policy.load_state(self.live_adapter)
        self._optimizer.state.clear()
        for name, parameter in self._policy.parameters:
            if f"{name}.step" in self._live_optimizer:
                self._optimizer.state[parameter] = {
                    key: self._live_optimizer[f"{name}.{key}"].clone()
                    for key in ("step", "exp_avg", "exp_avg_sq")
                }

    def _optimizer_state(self) -> OptimizerState:
        return {
            f"{name}.{key}": value.clone()
            for name, parameter in self._policy.parameters
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }

    # --- the update -------------------------------------------------------------------------

    def propose(self, batch: Batch, now: float | None = None) -> Proposal:
        """Take the optimiser steps of one batch from the live policy.

        The trainer's policy stands at the proposal afterwards: call ``accept`` or ``restore``.

        Raises:
            NonFiniteUpdate: nothing changed.
        """
        first_look = _FirstLook(batch, time.time() if now is None else now)
        gradient_norms: list[float] = []
        try:
            for number in range(self._settings.passes):
                for minibatch in _chunks(batch.examples, self._settings.minibatch_examples):
                    look = first_look if number == 0 else None
                    gradient_norms.append(self._step(minibatch, look))
                    first_look.from_live = False
        except NonFiniteUpdate:
            self.restore()
            raise
        adapter = self._policy.state()
        diagnostics = first_look.diagnostics()
        diagnostics["gradient_norm"] = max(gradient_norms)
        diagnostics["step_norm_share"] = _relative_change(self.live_adapter, adapter)
        return Proposal(adapter, self._optimizer_state(), diagnostics)

    def _step(self, examples: Sequence[CreditedExample], look: _FirstLook | None) -> float:
        """One optimiser step on one minibatch; returns the gradient norm before clipping."""
        self._optimizer.zero_grad(set_to_none=True)
        sequences = [as_sequence(credited) for credited in examples]
        total_tokens = sum(len(sequence.completion_token_ids) for sequence in sequences)
        for group in micro_batches(sequences, self._settings.micro_batch_tokens):
            loss = self._loss(
                [examples[index] for index in group],
                [sequences[index] for index in group],
                total_tokens,
                look,
            )
            if not torch.isfinite(loss):
                raise NonFiniteUpdate("the loss is not finite")
            loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(
            [parameter for _, parameter in self._policy.parameters], self._settings.gradient_clip
        ).item()
        if not math.isfinite(norm):
            raise NonFiniteUpdate("the gradient is not finite")
        self._optimizer.step()
        return norm

    def _loss(
        self,
        examples: Sequence[CreditedExample],
        sequences: Sequence[TokenSequence],
        total_tokens: int,
        look: _FirstLook | None,
    ) -> Tensor:
        """The objective plus ``anchor_weight * KL(policy || anchor)`` over the vocabulary."""
        sizes = [len(sequence.completion_token_ids) for sequence in sequences]
        logits, sampled = self._policy.completion_logits(sequences)
        log_p = [
            processed_logprobs(part, tokens, credited.example.interaction.sampling)
            for part, tokens, credited in zip(
                torch.split(logits, sizes), torch.split(sampled, sizes), examples, strict=True
            )
        ]
        log_q = [
            torch.tensor(credited.example.interaction.completion_logprobs, dtype=torch.float32)
            for credited in examples
        ]
        mask = pad_sequence([torch.ones(size, dtype=torch.bool) for size in sizes], True)
        advantage = torch.tensor([[credited.advantage] for credited in examples])
        output = self._objective(
            pad_sequence(log_p, True),
            pad_sequence(log_q, True).to(logits.device),
            advantage.expand(-1, max(sizes)).to(logits.device),
            mask.to(logits.device),
            **self._limits,
        )
        loss = token_mean(output.loss, output.mask, total_tokens)
        if self._settings.anchor_weight > 0.0:
            logprobs = logits.log_softmax(dim=-1)
            with torch.no_grad(), self._policy.using(None):
                anchor = self._policy.completion_logits(sequences)[0].log_softmax(dim=-1)
            moved_nats = (logprobs.exp() * (logprobs - anchor)).sum()
            loss = loss + self._settings.anchor_weight * moved_nats / total_tokens
        if look is not None:
            look.add(output.log_p, output.log_q, output.advantage, output.mask, output.kept)
            look.add_entropy(logits.detach())
            look.add_mismatch(examples, [part.detach() for part in log_p], log_q)
        return loss


class _FirstLook:
    """What the batch looks like: gathered in the first pass over it, minibatch by minibatch."""

    def __init__(self, batch: Batch, now: float) -> None:
        self.from_live = True
        """Until the first optimiser step, the policy that looks is the live one."""
        self._live_version = batch.live_version
        interactions = [credited.example.interaction for credited in batch.examples]
        self._staleness_versions = [
            batch.live_version - interaction.policy_version for interaction in interactions
        ]
        self._staleness_seconds = [now - interaction.created_at for interaction in interactions]
        self._rewards = [credited.reward for credited in batch.examples]
        self._tokens: list[tuple[Tensor, ...]] = []
        self._entropy_nats = 0.0
        self._entropy_tokens = 0
        self._mismatch: list[Tensor] = []

    def add(self, *token_tensors: Tensor) -> None:
        """log_p, log_q, advantage, mask, kept; each [batch, time]."""
        mask = token_tensors[3]
        self._tokens.append(tuple(tensor[mask] for tensor in token_tensors))

    def add_entropy(self, logits: Tensor) -> None:
        logprobs = logits.log_softmax(dim=-1)
        self._entropy_nats -= float((logprobs.exp() * logprobs).sum())
        self._entropy_tokens += logits.shape[0]

    def add_mismatch(
        self,
        examples: Sequence[CreditedExample],
        log_p: Sequence[Tensor],
        log_q: Sequence[Tensor],
    ) -> None:
        """At lag 0 server and trainer are one policy: what differs is numerical noise or a bug."""
        if not self.from_live:
            return
        for credited, recomputed, recorded in zip(examples, log_p, log_q, strict=True):
            spans = credited.example.interaction.policy_spans
            if all(span.version == self._live_version for span in spans):
                self._mismatch.append((recomputed.cpu() - recorded).abs())

    def diagnostics(self) -> dict[str, float]:
        """Names as in the metric ``moorline_update_diagnostic``; no key where nothing applies."""
        log_p, log_q, advantage, mask, kept = (
            torch.cat(column).unsqueeze(0) for column in zip(*self._tokens, strict=True)
        )
        found = dict(measure(log_p, log_q, advantage, mask, kept))
        found |= {
            "entropy_nats": self._entropy_nats / max(1, self._entropy_tokens),
            "mean_reward": sum(self._rewards) / len(self._rewards),
            "completion_tokens_mean": self._entropy_tokens / len(self._rewards),
            "staleness_versions_mean": sum(self._staleness_versions) / len(self._rewards),
            "staleness_versions_max": float(max(self._staleness_versions)),
            "staleness_seconds_mean": sum(self._staleness_seconds) / len(self._rewards),
        }
        if self._mismatch:
            found["mismatch_nats"] = float(torch.cat(self._mismatch).mean())
        return {name: float(value) for name, value in found.items()}


def as_sequence(credited: CreditedExample) -> TokenSequence:
    """The token ids of an example's reply."""
    interaction = credited.example.interaction
    return TokenSequence(interaction.prompt_token_ids, interaction.completion_token_ids)


def optimizer_bytes(state: OptimizerState) -> bytes:
    """An optimiser state as one safetensors file."""
    content: bytes = safetensors_save({name: state[name].contiguous() for name in sorted(state)})
    return content


def _chunks(examples: Sequence[CreditedExample], size: int) -> list[Sequence[CreditedExample]]:
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def _relative_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """||after - before|| / ||before||, over all adapter tensors."""
    moved = sum(float((after[name] - before[name]).square().sum()) for name in before)
    size = sum(float(tensor.square().sum()) for tensor in before.values())
    return math.sqrt(moved / size) if size else math.inf
