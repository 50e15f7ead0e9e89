"""The policy being trained: a frozen base model (the anchor) under one LoRA adapter.

Everything is float32, whatever the server computes in. Three policies share one set of base
weights: the *anchor* (adapter off), the *live* policy and the *candidate* (an adapter state each),
so measuring how far one is from another costs forward passes, not memory.

Notation: ``N`` completion tokens of all sequences of a pass, laid end to end; ``V`` vocabulary.
The output head runs on completion tokens only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor
from transformers import AutoModelForCausalLM

from moorline.adapter_format import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TARGET_MODULES, AdapterConfig
from moorline.base_model import check_model_dir
from moorline.errors import MoorlineError
from moorline.events import Release
from updater.values import TokenSequence

AdapterState = dict[str, Tensor]


class ReleaseInvalid(MoorlineError):
    """A release cannot be continued from with this model or rank; one line says what to do."""


def check_continues(
    release: Release, adapter: AdapterState, base_model_digest: str, own: AdapterState
) -> None:
    """Check that ``adapter``, of ``release``, continues on this base model as ``own`` would.

    Raises:
        ReleaseInvalid: it does not.
    """
    anew = "or learn anew with another state_dir"
    if release.base_model_digest != base_model_digest:
        raise ReleaseInvalid(
            f"{release.name} was trained on another base model ({release.base_model_digest[:12]}) "
            f"than model.path has ({base_model_digest[:12]}): set model.path back, {anew}"
        )
    if {n: t.shape for n, t in adapter.items()} != {n: t.shape for n, t in own.items()}:
        rank = min(min(tensor.shape) for tensor in adapter.values())
        raise ReleaseInvalid(
            f"the adapter of {release.name} has rank {rank}, which is not learning.lora_rank: "
            f"set it back, {anew}"
        )


class Policy:
    """A base model with one trainable LoRA adapter."""

    def __init__(self, model_dir: Path, *, rank: int, alpha: int, seed: int) -> None:
        """Load the base model and put a fresh adapter on it: the policy equals the anchor.

        Raises:
            ModelInvalid: when ``model_dir`` has no ``*.safetensors``.
        """
        check_model_dir(model_dir)
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(
            model_dir, dtype=torch.float32, use_safetensors=True, local_files_only=True
        )
        self._lora = LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=list(TARGET_MODULES), task_type="CAUSAL_LM"
        )
        self._model = get_peft_model(base, self._lora)
        self._model.train()  # no dropout anywhere; kept in train mode for uniform numerics
        self.device = next(self._model.parameters()).device
        self.vocabulary_size: int = base.config.vocab_size
        self.parameters: list[tuple[str, torch.nn.Parameter]] = [
            (name, parameter)
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        ]

    # --- adapter states ---------------------------------------------------------------------

    def state(self) -> AdapterState:
        """A copy of the adapter's tensors, by PEFT's names."""
        state = get_peft_model_state_dict(self._model)
        return {name: tensor.detach().clone() for name, tensor in state.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Make ``state`` the adapter."""
        set_peft_model_state_dict(self._model, dict(state))

    @contextmanager
    def using(self, state: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Compute as another policy for a while: an adapter state, or ``None`` for the anchor."""
        if state is None:
            with self._model.disable_adapter():
                yield
            return
        before = self.state()
        self.load_state(state)
        try:
            yield
        finally:
            self.load_state(before)

    def adapter_files(self, state: Mapping[str, Tensor]) -> dict[str, bytes]:
        """An adapter in PEFT's on-disk format, which vLLM loads as it is."""
        config = self._lora.to_dict()
        settings = {
            key: sorted(value) if isinstance(value, set) else value for key, value in config.items()
        }
        settings.update(inference_mode=True, base_model_name_or_path=None)
        AdapterConfig.model_validate(settings)  # what a server will read, whatever PEFT adds
        contiguous = {name: tensor.contiguous() for name, tensor in sorted(state.items())}
        return {
            ADAPTER_WEIGHTS: safetensors_save(contiguous, metadata={"format": "pt"}),
            ADAPTER_CONFIG: json.dumps(settings, indent=1, sort_keys=True, default=str).encode(),
        }

    def read_adapter(self, directory: Path) -> AdapterState:
        """The adapter state in an artifact directory (already verified by its hashes)."""
        state: AdapterState = safetensors_load((directory / ADAPTER_WEIGHTS).read_bytes())
        return state

    # --- forward ----------------------------------------------------------------------------

    def completion_logits(
        self, sequences: Sequence[TokenSequence]
    ) -> tuple[Tensor, Tensor]:  # [N, V] float32, [N] int64
        """Logits that predict each completion token, and those tokens, sequences end to end."""
        length = max(len(s.prompt_token_ids) + len(s.completion_token_ids) for s in sequences)
        ids = torch.zeros(len(sequences), length, dtype=torch.long)
        attention = torch.zeros_like(ids)
        predicts = torch.zeros_like(ids, dtype=torch.bool)
        for row, sequence in enumerate(sequences):
            tokens = sequence.prompt_token_ids + sequence.completion_token_ids
            ids[row, : len(tokens)] = torch.tensor(tokens)
            attention[row, : len(tokens)] = 1
            predicts[row, len(sequence.prompt_token_ids) - 1 : len(tokens) - 1] = True
        causal_lm = self._model.get_base_model()
        hidden = causal_lm.model(
            input_ids=ids.to(self.device), attention_mask=attention.to(self.device), use_cache=False
        ).last_hidden_state
        logits = causal_lm.lm_head(hidden[predicts.to(self.device)]).float()
        sampled = torch.tensor(
            [token for s in sequences for token in s.completion_token_ids], device=self.device
        )
        return logits, sampled

    @torch.no_grad()
    def full_logprobs(
        self, sequences: Sequence[TokenSequence], micro_batch_tokens: int
    ) -> list[Tensor]:  # one [completion tokens, V] each
        """Untempered log-probabilities over the whole vocabulary at every completion token."""
        results: list[Tensor | None] = [None] * len(sequences)
        for group in micro_batches(sequences, micro_batch_tokens):
            logits, _ = self.completion_logits([sequences[index] for index in group])
            logprobs = logits.log_softmax(dim=-1)
            sizes = [sequences[index].tokens for index in group]
            for index, part in zip(group, torch.split(logprobs, sizes), strict=True):
                results[index] = part
        return [part for part in results if part is not None]


@torch.no_grad()
def sampled_logprobs(
    policy: Policy, sequences: Sequence[TokenSequence], micro_batch_tokens: int
) -> list[Tensor]:  # one [completion tokens] each
    """Untempered log-probability of each completion token, nats."""
    results: dict[int, Tensor] = {}
    for group in micro_batches(sequences, micro_batch_tokens):
        logits, tokens = policy.completion_logits([sequences[index] for index in group])
        chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)
        sizes = [sequences[index].tokens for index in group]
        results.update(zip(group, torch.split(chosen, sizes), strict=True))
    return [results[index] for index in range(len(sequences))]


def micro_batches(sequences: Sequence[TokenSequence], max_tokens: int) -> list[list[int]]:
    """Group sequence indices by similar length so that padded tokens stay under ``max_tokens``.

    A single sequence that is longer than that gets a group of its own.
    """
    lengths = [len(s.prompt_token_ids) + len(s.completion_token_ids) for s in sequences]
    order = sorted(range(len(sequences)), key=lambda index: (lengths[index], index))
    groups: list[list[int]] = []
    for index in order:
        if groups and lengths[index] * (len(groups[-1]) + 1) <= max_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def interpolate(start: AdapterState, end: AdapterState, scale: float) -> AdapterState:
    """The adapter ``scale`` of the way from ``start`` (0) to ``end`` (1)."""
    if scale == 1.0:
        return end
    return {name: torch.lerp(start[name], end[name], scale) for name in start}
