"""Is the policy that the engine serves the one that the trainer made? Measured, not assumed.

A release carries ``parity.json``: token sequences with the raw logprobs that the trainer computed
for their completions, under the candidate and under its parent. The server scores the same
sequences. Two tests: the mean absolute difference from the candidate is within the tolerance, and
the served values lie nearer to the candidate than to the policy that was served before (which a
load that silently did nothing fails, however small the step).
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

from moorline.errors import MoorlineError
from moorline.logs import describe

PARITY_FILE = "parity.json"
Logprobs = NDArray[np.float64]  # (completion tokens of all sequences,) nats

UNDECIDED_STANDARD_ERRORS = 3.0
"""Closer to the half-way point than this, the batch cannot tell the two policies apart."""


class ParityError(MoorlineError):
    """The engine does not serve what the release says (or the release does not say it)."""


class ParitySequence(BaseModel):
    """One prompt with its completion, as the trainer scored it."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]
    candidate_logprobs: tuple[float, ...]
    parent_logprobs: tuple[float, ...]

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
    """What the trainer computed."""

    model_config = ConfigDict(frozen=True)

    sequences: tuple[ParitySequence, ...]

    @classmethod
    def from_release(cls, directory: Path) -> ParityBatch:
        """Read a release's file.

        Raises:
            ParityError: it is missing, unreadable, or holds no token.
        """
        try:
            batch = cls.model_validate_json((directory / PARITY_FILE).read_bytes())
        except (OSError, ValidationError) as error:
            raise ParityError(
                f"the release has no usable {PARITY_FILE} ({describe(error)})"
            ) from None
        if not any(sequence.completion_token_ids for sequence in batch.sequences):
            raise ParityError(f"the release's {PARITY_FILE} holds no completion token")
        return batch

    @property
    def candidate(self) -> Logprobs:
        return _joined(sequence.candidate_logprobs for sequence in self.sequences)

    @property
    def parent(self) -> Logprobs:
        return _joined(sequence.parent_logprobs for sequence in self.sequences)


def _joined(parts: Any) -> Logprobs:
    return np.array(list(itertools.chain.from_iterable(parts)), dtype=np.float64)


def compare(
    served: Logprobs, candidate: Logprobs, before: Logprobs, tolerance_nats: float
) -> float:
    """Mean |served - candidate|, nats a token, when ``served`` is the candidate.

    ``share`` is where served lies on the line from before (0) to candidate (1), by least squares;
    "nearer to the candidate" is share > 1/2. With numerical noise larger than the step the batch
    decides nothing, and then only the tolerance counts.

    Raises:
        ParityError: it is not.
    """
    if not np.all(np.isfinite(served)):
        raise ParityError("the served policy gives logprobs that are not finite")
    mean_nats = float(np.mean(np.abs(served - candidate)))
    if mean_nats > tolerance_nats:
        raise ParityError(
            f"served logprobs differ from the trainer's by {mean_nats:.4f} nats a token "
            f"(allowed {tolerance_nats})"
        )
    step = candidate - before
    length = float(step @ step)
    if length > 0.0:
        share = float((served - before) @ step) / length
        noise = float(np.std(served - before - share * step))
        standard_error = noise / np.sqrt(length)
        if share <= 0.5 and 0.5 - share > UNDECIDED_STANDARD_ERRORS * standard_error:
            raise ParityError(
                f"the served policy is still the one before (moved {share:.2f} of the way)"
            )
    return mean_nats


Generate = Callable[..., AsyncGenerator[Any, None]]


async def score(generate: Generate, batch: ParityBatch, lora_request: Any = None) -> Logprobs:
    """Raw logprobs of the batch's completion tokens under what the engine serves now, nats."""
    scored = [  # one by one: each is a piece of prefill that running replies wait for
        await _score_one(
            generate, sequence.prompt_token_ids, sequence.completion_token_ids, lora_request
        )
        for sequence in batch.sequences
    ]
    return _joined(scored)


async def _score_one(
    generate: Generate, prompt: Sequence[int], completion: Sequence[int], lora_request: Any
) -> list[float]:
    params = SamplingParams(
        max_tokens=1,
        temperature=0.0,
        prompt_logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    tokens = [*prompt, *completion]
    final: Any = None
    async for output in generate(
        tokens_input(tokens),
        params,
        f"moorline-parity-{uuid.uuid4().hex}",
        lora_request=lora_request,
    ):
        final = output
    positions = final.prompt_logprobs[len(prompt) :]
    return [float(entry[token].logprob) for token, entry in zip(completion, positions, strict=True)]
