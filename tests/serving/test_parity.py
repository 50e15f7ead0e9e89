"""The parity check accepts the policy that was released and nothing else."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moorline.adapter_format import PARITY_FILE
from serving.parity import (
    ParityError,
    candidate_logprobs,
    compare,
    parent_logprobs,
    read_parity,
)
from updater.update.parity import parity_bytes
from updater.values import TokenSequence

TOKENS = 64
TOLERANCE_NATS = 0.1


def logprobs(seed: int) -> Any:
    return -np.random.default_rng(seed).exponential(2.0, TOKENS)


@given(seed=st.integers(0, 1000), step=st.floats(0.001, 1.0), noise=st.floats(0.0, 1e-5))
def test_the_candidate_is_accepted_with_its_distance(seed: int, step: float, noise: float) -> None:
    before = logprobs(seed)
    candidate = before + step * np.random.default_rng(seed + 1).standard_normal(TOKENS)
    served = candidate + noise * np.random.default_rng(seed + 2).standard_normal(TOKENS)
    assert compare(served, candidate, before, TOLERANCE_NATS) == pytest.approx(
        float(np.mean(np.abs(served - candidate)))
    )


@given(seed=st.integers(0, 1000), step=st.floats(0.001, 0.05), noise=st.floats(0.0, 1e-5))
def test_a_load_that_did_nothing_is_caught_inside_the_tolerance(
    seed: int, step: float, noise: float
) -> None:
    before = logprobs(seed)
    candidate = before + step * np.random.default_rng(seed + 1).standard_normal(TOKENS)
    served = before + noise * np.random.default_rng(seed + 2).standard_normal(TOKENS)
    with pytest.raises(ParityError, match="still the one before"):
        compare(served, candidate, before, TOLERANCE_NATS)


def test_another_policy_is_caught_by_the_tolerance() -> None:
    with pytest.raises(ParityError, match="differ from the trainer's"):
        compare(logprobs(1), logprobs(2), logprobs(3), TOLERANCE_NATS)


def test_a_step_below_the_noise_is_decided_by_the_tolerance_alone() -> None:
    before = logprobs(1)
    candidate = before + 1e-6
    served = before + 0.01 * np.random.default_rng(5).standard_normal(TOKENS)
    assert compare(served, candidate, before, TOLERANCE_NATS) < TOLERANCE_NATS


def test_values_that_are_not_finite_are_no_policy() -> None:
    served = logprobs(1)
    served[3] = float("nan")
    with pytest.raises(ParityError, match="not finite"):
        compare(served, logprobs(1), logprobs(2), TOLERANCE_NATS)


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"not json",
        b'{"sequences": []}',
        json.dumps(
            {
                "sequences": [
                    {
                        "prompt_token_ids": [1],
                        "completion_token_ids": [2, 3],
                        "candidate_logprobs": [-1.0],
                        "parent_logprobs": [-1.0, -1.0],
                    }
                ]
            }
        ).encode(),
    ],
)
def test_a_release_without_usable_references_is_refused(
    tmp_path: Path, content: bytes | None
) -> None:
    if content is not None:
        (tmp_path / "parity.json").write_bytes(content)
    with pytest.raises(ParityError, match=r"parity\.json"):
        read_parity(tmp_path)


@pytest.mark.parametrize(("off_by_nats", "accepted"), [(0.099, True), (0.101, False)])
def test_the_tolerance_is_crossed_just_beyond_it(off_by_nats: float, accepted: bool) -> None:
    candidate = logprobs(1)
    context = contextlib.nullcontext() if accepted else pytest.raises(ParityError, match="differ")
    with context:
        compare(candidate + off_by_nats, candidate, candidate - 9.0, TOLERANCE_NATS)


def test_the_file_that_the_trainer_writes_is_the_one_that_the_server_reads(tmp_path: Path) -> None:
    sequences = [TokenSequence((1,), (0, 1)), TokenSequence((1, 0), (1,))]
    ours = [torch.tensor([[-0.1, -0.2], [-0.3, -0.4]]), torch.tensor([[-0.5, -0.6]])]
    parents = [part - 1.0 for part in ours]
    (tmp_path / PARITY_FILE).write_bytes(parity_bytes(sequences, ours, parents))
    batch = read_parity(tmp_path)
    assert [one.prompt_token_ids for one in batch.sequences] == [(1,), (1, 0)]
    assert [one.completion_token_ids for one in batch.sequences] == [(0, 1), (1,)]
    assert candidate_logprobs(batch) == pytest.approx([-0.1, -0.4, -0.6])
    assert parent_logprobs(batch) == pytest.approx([-1.1, -1.4, -1.6])
