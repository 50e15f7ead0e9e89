"""The files of a release: what they are called and what they hold.

The updater writes them, servers read them, and both import this module. An adapter is in PEFT's
on-disk format, which vLLM loads as it is; beside it lie the state of the optimizer (for the
updater alone) and the logprobs that a server must compute once it serves the release.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, model_validator

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
OPTIMIZER_STATE = "optimizer.safetensors"
PARITY_FILE = "parity.json"

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The layers that an adapter changes: every linear layer of the usual decoder."""

PEFT_PREFIX = "base_model.model."
"""What PEFT puts before a base weight's name in the adapter's file."""


class AdapterConfig(BaseModel):
    """The fields of ``adapter_config.json`` that both sides rely on; PEFT writes more."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    r: int
    """The rank."""
    lora_alpha: float
    target_modules: tuple[str, ...]


class ParitySequence(BaseModel):
    """One prompt with its completion, as the trainer scored it."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]
    candidate_logprobs: tuple[float, ...]
    """The log-probability of each completion token under the release, nats, untempered."""
    parent_logprobs: tuple[float, ...]
    """Likewise, under the release's parent."""

    @model_validator(mode="after")
    def _lengths_agree(self) -> ParitySequence:
        lengths = {
            len(self.completion_token_ids),
            len(self.candidate_logprobs),
            len(self.parent_logprobs),
        }
        if len(lengths) != 1 or not self.prompt_token_ids:
            raise ValueError("lengths of tokens and logprobs differ, or the prompt is empty")
        return self


class ParityBatch(BaseModel):
    """The content of ``parity.json``."""

    model_config = ConfigDict(frozen=True)

    sequences: tuple[ParitySequence, ...]
