"""A model small enough to be served, trained and killed many times a minute."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from daemon.demo.model import GGUF_FILE, GGUF_PACKAGE


def make_tiny_model(directory: Path) -> Path | None:
    """A random two-layer Llama (3 million parameters, tied embeddings), the same every time.

    The vocabulary, tokenizer and chat template are SmolLM2's. None where its package is missing.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    source = Path(next(iter(spec.submodule_search_locations)))
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.3,  # far from uniform, so that a wrong logprob shows
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
