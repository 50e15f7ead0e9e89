"""Releases for tests: random adapters that passed a (written, not played) gate."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from moorline.adapter_format import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    PARITY_FILE,
    TARGET_MODULES,
)
from moorline.base_model import model_digest
from moorline.events import Check, Decision, Release, ReleaseKind, Verdict
from moorline.store import ArtifactStore

TokenPair = tuple[list[int], list[int]]
"""Prompt and completion, as token ids."""

PARITY_PAIRS: tuple[TokenPair, ...] = (
    ([1, 5, 9, 33, 71, 100], [7, 8, 9, 10, 11, 12, 13, 14]),
    ([1, 2, 300, 41], [44, 45, 46, 47, 48, 49]),
)


def random_adapter(model_dir: Path, directory: Path, seed: int, size: float = 0.05) -> Path:
    """A LoRA adapter of rank 8 with normal random values of this standard deviation."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=list(TARGET_MODULES), task_type="CAUSAL_LM"
    )
    get_peft_model(model, config).save_pretrained(directory)
    weights = directory / ADAPTER_WEIGHTS
    noise = {name: torch.randn_like(tensor) * size for name, tensor in load_file(weights).items()}
    save_file(noise, weights)
    return directory


def reference_model(model_dir: Path, adapter_dir: Path | None) -> torch.nn.Module:
    """What the trainer would call this policy: transformers, with peft for the adapter."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if adapter_dir is not None:
        model = PeftModel.from_pretrained(model, adapter_dir)
    return model.eval()


@torch.no_grad()
def completion_logits(
    model: torch.nn.Module, prompt: Sequence[int], completion: Sequence[int]
) -> Tensor:  # (completion tokens, vocabulary) float32
    """The logits that each completion token is drawn from."""
    tokens = torch.tensor([[*prompt, *completion]])
    logits: Tensor = model(tokens).logits[0].float()
    return logits[len(prompt) - 1 : -1]


def raw_logprobs(
    model: torch.nn.Module, prompt: Sequence[int], completion: Sequence[int]
) -> list[float]:
    """Temperature 1, untruncated, nats."""
    logprobs = completion_logits(model, prompt, completion).log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(completion).unsqueeze(1))
    return [float(value) for value in chosen.squeeze(1)]


def parity_json(
    candidate: torch.nn.Module,
    parent: torch.nn.Module,
    pairs: Sequence[TokenPair] = PARITY_PAIRS,
) -> bytes:
    sequences = [
        {
            "prompt_token_ids": prompt,
            "completion_token_ids": completion,
            "candidate_logprobs": raw_logprobs(candidate, prompt, completion),
            "parent_logprobs": raw_logprobs(parent, prompt, completion),
        }
        for prompt, completion in pairs
    ]
    return json.dumps({"sequences": sequences}).encode()


def make_release(
    store: ArtifactStore,
    model_dir: Path,
    adapter_dir: Path,
    version: int,
    *,
    alias: str = "assistant",
    parent: int = 0,
    parent_adapter_dir: Path | None = None,
    parity: bytes | None = None,
) -> Release:
    """Put an adapter into the store, for a release that the gate passed: not announced yet."""
    if parity is None:
        parity = parity_json(
            reference_model(model_dir, adapter_dir), reference_model(model_dir, parent_adapter_dir)
        )
    digest, files = store.put(
        {
            ADAPTER_WEIGHTS: adapter_dir / ADAPTER_WEIGHTS,
            ADAPTER_CONFIG: adapter_dir / ADAPTER_CONFIG,
            PARITY_FILE: parity,
        }
    )
    return Release(
        alias=alias,
        version=version,
        parent=parent,
        kind=ReleaseKind.ADAPTER,
        artifact_digest=digest,
        files=files,
        base_model_digest=model_digest(model_dir),
        created_at=time.time(),
        verdict=Verdict(
            decision=Decision.PASS,
            artifact_digest=digest,
            checks=(Check(name="test", measured=0.0, limit=1.0, passed=True),),
            seconds=0.0,
        ),
    )
