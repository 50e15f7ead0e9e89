"""What the updater writes into a release is what a server reads out of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moorline.adapter_format import (
    ADAPTER_CONFIG,
    PARITY_FILE,
    TARGET_MODULES,
    AdapterConfig,
    ParityBatch,
)
from serving.parity import candidate_logprobs, parent_logprobs, read_parity
from serving.vllm.merge import check_shapes, read_adapter
from tests.updater.learning.fixtures import some_sequences
from updater.learning.policy import Policy
from updater.update.parity import parity_bytes

STORED = Path(__file__).parents[1] / "migration"


def test_a_server_reads_the_adapter_that_the_updater_wrote(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    policy = Policy(tiny_model_dir, rank=4, alpha=8, seed=0)
    for name, content in policy.adapter_files(policy.state()).items():
        (tmp_path / name).write_bytes(content)
    config = AdapterConfig.model_validate_json((tmp_path / ADAPTER_CONFIG).read_bytes())
    assert (config.r, config.lora_alpha) == (4, 8)
    assert set(config.target_modules) == set(TARGET_MODULES)
    changes = read_adapter(tmp_path)
    check_shapes(changes, tiny_model_dir)
    assert {name.split(".")[-2] for name in changes} == set(TARGET_MODULES)
    assert all(change.scale == 2.0 for change in changes.values())


def test_a_server_reads_the_logprobs_that_the_updater_wrote(tmp_path: Path) -> None:
    sequences = some_sequences(3)
    shapes = [(len(sequence.completion_token_ids), 50_000) for sequence in sequences]
    ours = [torch.randn(shape).log_softmax(-1) for shape in shapes]
    parents = [torch.randn(shape).log_softmax(-1) for shape in shapes]
    (tmp_path / PARITY_FILE).write_bytes(parity_bytes(sequences, ours, parents))
    batch = read_parity(tmp_path)
    for read, written in ((candidate_logprobs(batch), ours), (parent_logprobs(batch), parents)):
        expected = [
            float(rows[position, token])
            for sequence, rows in zip(sequences, written, strict=True)
            for position, token in enumerate(sequence.completion_token_ids)
        ]
        assert list(read) == expected


@pytest.mark.parametrize("path", sorted(STORED.glob("format*/events/parity.json")), ids=str)
def test_a_stored_parity_file_still_parses(path: Path) -> None:
    batch = ParityBatch.model_validate_json(path.read_bytes())
    assert all(sequence.completion_token_ids for sequence in batch.sequences)


def test_there_are_stored_parity_files() -> None:
    assert list(STORED.glob("format*/events/parity.json"))
