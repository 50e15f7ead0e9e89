"""Checks by measurement that the engine serves the policy that the trainer made.

A release carries ``parity.json``: token sequences with the raw logprobs that the trainer computed
for their completions, under the candidate and under its parent. The server scores the same
sequences. Two tests: the mean absolute difference from the candidate is within the tolerance, and
the served values lie nearer to the candidate than to the policy that was served before (which a
load that silently did nothing fails, however small the step).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from moorline.adapter_format import PARITY_FILE, ParityBatch
from moorline.errors import MoorlineError
from moorline.logs import describe

Logprobs = NDArray[np.float64]  # (completion tokens of all sequences,) nats

UNDECIDED_STANDARD_ERRORS = 3.0
"""Closer to the half-way point than this, the batch cannot tell the two policies apart."""


class ParityError(MoorlineError):
    """The engine does not serve what the release says (or the release does not say it)."""


def read_parity(directory: Path) -> ParityBatch:
    """The sequences and reference logprobs of a release.

    Raises:
        ParityError: the file is missing, unreadable, or holds no token.
    """
    try:
        batch = ParityBatch.model_validate_json((directory / PARITY_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise ParityError(f"the release has no usable {PARITY_FILE} ({describe(error)})") from None
    if not any(sequence.completion_token_ids for sequence in batch.sequences):
        raise ParityError(f"the release's {PARITY_FILE} holds no completion token")
    return batch


def candidate_logprobs(batch: ParityBatch) -> Logprobs:
    """What the trainer computed under the release itself."""
    return joined(sequence.candidate_logprobs for sequence in batch.sequences)


def parent_logprobs(batch: ParityBatch) -> Logprobs:
    """What the trainer computed under the release's parent."""
    return joined(sequence.parent_logprobs for sequence in batch.sequences)


def joined(parts: Iterable[Iterable[float]]) -> Logprobs:
    """The values of all sequences, end to end."""
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
