"""An adapter folded into the base is the policy that peft runs, for adapters that can be folded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from moorline.adapter_format import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from serving.vllm.merge import AdapterInvalid, check_shapes, merged_weights, read_adapter
from tests.serving.make_release import completion_logits, random_adapter, reference_model


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        tie_word_embeddings=True,
    )
    directory = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapter_dir(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_adapter(base_dir, tmp_path_factory.mktemp("adapter"), seed=3, size=0.2)


def test_the_merged_model_gives_pefts_logits(base_dir: Path, adapter_dir: Path) -> None:
    changes = read_adapter(adapter_dir)
    check_shapes(changes, base_dir)
    merged = LlamaForCausalLM(LlamaForCausalLM.config_class.from_pretrained(base_dir))
    weights = dict(merged_weights(base_dir, changes, torch.float32))
    missing, unexpected = merged.load_state_dict(weights, strict=False)
    merged.tie_weights()
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    tokens = ([1, 2, 3], [4, 5, 6, 7])
    expected = completion_logits(reference_model(base_dir, adapter_dir), *tokens)
    torch.testing.assert_close(
        completion_logits(merged.eval(), *tokens), expected, atol=1e-4, rtol=1e-4
    )


def test_without_an_adapter_the_base_is_unchanged(base_dir: Path) -> None:
    base = load_file(base_dir / "model.safetensors")
    for name, weight in merged_weights(base_dir, {}, torch.float32):
        assert torch.equal(weight, base[name])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("alpha_pattern", {"q_proj": 3}),
        ("r", None),
        ("target_modules", "all-linear"),
    ],
)
def test_what_is_not_plain_lora_is_refused(
    adapter_dir: Path, tmp_path: Path, option: str, value: object
) -> None:
    config = json.loads((adapter_dir / ADAPTER_CONFIG).read_text()) | {option: value}
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config))
    with pytest.raises(AdapterInvalid):
        read_adapter(tmp_path)


def test_half_a_pair_is_refused(adapter_dir: Path, tmp_path: Path) -> None:
    weights = load_file(adapter_dir / ADAPTER_WEIGHTS)
    weights.pop(sorted(weights)[0])
    save_file(weights, tmp_path / ADAPTER_WEIGHTS)
    (tmp_path / ADAPTER_CONFIG).write_bytes((adapter_dir / ADAPTER_CONFIG).read_bytes())
    with pytest.raises(AdapterInvalid, match="half of a LoRA pair"):
        read_adapter(tmp_path)


def test_an_adapter_of_another_shape_is_refused_before_anything_is_loaded(
    base_dir: Path, adapter_dir: Path
) -> None:
    changes = read_adapter(adapter_dir)
    name = next(iter(changes))
    wrong = changes[name]
    changes[name] = type(wrong)(a=wrong.a[:, :-1], b=wrong.b, scale=wrong.scale)
    with pytest.raises(AdapterInvalid, match="in the base model"):
        check_shapes(changes, base_dir)
