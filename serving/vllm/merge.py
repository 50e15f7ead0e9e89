"""A LoRA adapter folded into base weights, tensor by tensor: W + scale * B @ A. No vLLM in here.

Nothing merged is ever written to disk: the adapter that passed the gate is the only copy of a
release, and both swap modes consume exactly its bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from moorline.adapter_format import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PEFT_PREFIX, AdapterConfig
from moorline.errors import MoorlineError
from moorline.logs import describe


class AdapterInvalid(MoorlineError):
    """The adapter cannot be folded into this base model; nothing was changed."""


@dataclass(frozen=True)
class LowRank:
    """The change of one weight matrix: ``scale * b @ a``."""

    a: Tensor  # (rank, in_features) float32
    b: Tensor  # (out_features, rank) float32
    scale: float

    def added_to(self, weight: Tensor) -> Tensor:
        """float32, (out_features, in_features); the caller casts last."""
        return torch.addmm(weight.float(), self.b, self.a, alpha=self.scale)


def read_adapter(directory: Path) -> dict[str, LowRank]:
    """A PEFT LoRA adapter, by the base weight's name (``model.layers.0.self_attn.q_proj.weight``).

    Raises:
        AdapterInvalid: on anything but plain LoRA on linear layers.
    """
    content = (directory / ADAPTER_CONFIG).read_bytes()
    try:
        relied_on = AdapterConfig.model_validate_json(content)
    except ValidationError as error:
        raise AdapterInvalid(f"{ADAPTER_CONFIG} is unusable: {describe(error)}") from None
    config = json.loads(content)
    for option in (
        "use_dora",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
    ):
        if config.get(option):
            raise AdapterInvalid(f"the adapter uses {option}, which cannot be merged here")
    if config.get("bias", "none") != "none":
        raise AdapterInvalid("the adapter trains biases, which cannot be merged here")
    divisor = math.sqrt(relied_on.r) if config.get("use_rslora") else relied_on.r
    scale = relied_on.lora_alpha / divisor

    tensors = load_file(directory / ADAPTER_WEIGHTS)
    changes: dict[str, LowRank] = {}
    for name in sorted(tensors):
        module, _, part = name.removeprefix(PEFT_PREFIX).rpartition(".lora_")
        if part == "B.weight" and f"{PEFT_PREFIX}{module}.lora_A.weight" in tensors:
            continue
        partner = f"{PEFT_PREFIX}{module}.lora_B.weight"
        if part != "A.weight" or partner not in tensors:
            raise AdapterInvalid(f"the adapter holds {name}, which is not half of a LoRA pair")
        changes[f"{module}.weight"] = LowRank(
            a=tensors[name].float(), b=tensors[partner].float(), scale=scale
        )
    return changes


def check_shapes(changes: dict[str, LowRank], base_dir: Path) -> None:
    """Refuse before anything is touched: every target exists in the base, with this shape.

    Raises:
        AdapterInvalid: naming the first weight that does not fit.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(base_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for name, change in changes.items():
        wanted = (change.b.shape[0], change.a.shape[1])
        if shapes.get(name) != wanted or change.b.shape[1] != change.a.shape[0]:
            raise AdapterInvalid(
                f"{name} is {shapes.get(name, 'absent')} in the base model, "
                f"the adapter changes {wanted}"
            )


def merged_weights(
    base_dir: Path, changes: dict[str, LowRank], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Every base weight, changed where the adapter says so, one at a time (bounded memory)."""
    for path in sorted(base_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                weight = file.get_tensor(name)
                change = changes.get(name)
                if change is not None:
                    weight = change.added_to(weight).to(dtype)
                yield name, weight
