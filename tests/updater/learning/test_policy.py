"""The trainable policy: anchor, adapter states, and what it computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from moorline.adapter_format import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from moorline.base_model import ModelInvalid, model_digest
from tests.updater.learning.fixtures import some_sequences
from updater.learning.policy import Policy, interpolate, micro_batches


@pytest.fixture(scope="module")
def policy(tiny_model_dir: Path) -> Policy:
    return Policy(tiny_model_dir, rank=4, alpha=8, seed=0)


def perturbed(policy: Policy, size: float = 0.05) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: tensor + size * torch.randn(tensor.shape, generator=generator)
        for name, tensor in policy.state().items()
    }


def test_a_fresh_adapter_is_the_anchor(policy: Policy, tiny_model_dir: Path) -> None:
    sequences = some_sequences(5)
    own = policy.full_logprobs(sequences, 64)
    with policy.using(None):
        anchor = policy.full_logprobs(sequences, 64)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    for sequence, mine, anchors in zip(sequences, own, anchor, strict=True):
        tokens = sequence.prompt_token_ids + sequence.completion_token_ids
        with torch.no_grad():
            logits = base(torch.tensor([tokens])).logits[0]
        wanted = logits[len(sequence.prompt_token_ids) - 1 : -1].log_softmax(-1)
        assert torch.allclose(mine, anchors, atol=1e-5)
        assert torch.allclose(mine, wanted, atol=1e-3)


def test_padding_and_grouping_change_nothing(policy: Policy) -> None:
    sequences = some_sequences(7)
    together = policy.full_logprobs(sequences, 10_000)
    alone = policy.full_logprobs(sequences, 1)
    for one, other in zip(together, alone, strict=True):
        assert torch.allclose(one, other, atol=1e-3)


def test_using_another_state_is_undone(policy: Policy) -> None:
    before = policy.state()
    sequences = some_sequences(2)
    with policy.using(perturbed(policy)):
        moved = policy.full_logprobs(sequences, 64)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state().items())
    still = policy.full_logprobs(sequences, 64)
    assert not torch.allclose(moved[0], still[0], atol=1e-3)


def test_an_adapter_survives_its_files_bit_by_bit(policy: Policy, tmp_path: Path) -> None:
    state = perturbed(policy)
    for name, content in policy.adapter_files(state).items():
        (tmp_path / name).write_bytes(content)
    assert {path.name for path in tmp_path.iterdir()} == {ADAPTER_WEIGHTS, ADAPTER_CONFIG}
    back = policy.read_adapter(tmp_path)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)
    assert policy.adapter_files(state) == policy.adapter_files(back)


def test_interpolation_ends_at_its_ends(policy: Policy) -> None:
    start, end = policy.state(), perturbed(policy)
    assert all(torch.equal(interpolate(start, end, 0.0)[name], start[name]) for name in start)
    assert interpolate(start, end, 1.0) is end
    half = interpolate(start, end, 0.5)
    assert all(torch.allclose(half[n], (start[n] + end[n]) / 2, atol=1e-6) for n in start)


def test_micro_batches_cover_everything_once_within_the_limit() -> None:
    sequences = some_sequences(23)
    groups = micro_batches(sequences, 40)
    assert sorted(index for group in groups for index in group) == list(range(23))
    for group in groups:
        longest = max(
            len(sequences[i].prompt_token_ids) + len(sequences[i].completion_token_ids)
            for i in group
        )
        assert len(group) == 1 or longest * len(group) <= 40


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ModelInvalid, match="pickled"):
        Policy(tmp_path, rank=4, alpha=8, seed=0)


def test_the_digest_tells_models_apart(tiny_model_dir: Path, tmp_path: Path) -> None:
    digest = model_digest(tiny_model_dir)
    assert digest == model_digest(tiny_model_dir)
    (tmp_path / "config.json").write_bytes((tiny_model_dir / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert digest != model_digest(tmp_path)
