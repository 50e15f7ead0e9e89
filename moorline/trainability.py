"""What a reply's own record says against learning from it.

Server and updater ask the same questions: the one to answer whoever rates the reply, the other to
decide. What only the updater can know (its vocabulary, its limits) it asks besides. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from moorline.events import GREEDY_BELOW, Interaction, LogprobConvention, Reason

LOGITS_PROCESSORS = "logits_processors"
"""In ``SamplingSettings.altered_by``: a logits processor that vLLM does not ship."""
SPECULATIVE_DECODING = "speculative_decoding"
"""In ``SamplingSettings.altered_by``: tokens were drafted by another model."""

_ABORTED = frozenset({"abort", "error", "aborted"})
_LEAST_LOGPROB = -1e30


def why_recorded_in_vain(interaction: Interaction) -> Reason | None:
    """Why no honest gradient can follow from this record, or None."""
    length = len(interaction.completion_token_ids)
    altered_by = interaction.sampling.altered_by
    questions: Iterable[tuple[Callable[[], bool], Reason]] = (
        (lambda: bool(interaction.prompt_parts), Reason.MULTIMODAL_PROMPT),
        (lambda: not interaction.prompt_token_ids, Reason.EMPTY_PROMPT),
        (lambda: length == 0, Reason.EMPTY_COMPLETION),
        (lambda: interaction.finish_reason in _ABORTED, Reason.ABORTED),
        (lambda: not _spans_cover(interaction, length), Reason.LENGTH_MISMATCH),
        (lambda: interaction.sampling.temperature < GREEDY_BELOW, Reason.GREEDY_SAMPLING),
        (lambda: SPECULATIVE_DECODING in altered_by, Reason.SPECULATIVE_DECODING),
        (lambda: LOGITS_PROCESSORS in altered_by, Reason.CUSTOM_LOGITS_PROCESSOR),
        (lambda: bool(altered_by), Reason.ALTERED_SAMPLING),
        (lambda: _logprobs_missing(interaction), Reason.NO_LOGPROBS),
        (lambda: len(interaction.completion_logprobs) != length, Reason.LENGTH_MISMATCH),
        (lambda: _unusable(interaction.completion_logprobs), Reason.INVALID_LOGPROBS),
        (lambda: not _from_sampling_distribution(interaction), Reason.RAW_LOGPROBS),
    )
    return next((reason for is_so, reason in questions if is_so()), None)


def defaults_in_vain(defaults: Mapping[str, object]) -> dict[str, float]:
    """Those sampling defaults of a model from whose replies nobody can learn.

    Args:
        defaults: as in ``generation_config.json``; what is no number there is passed over.
    """
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    numbers = {
        name: float(value)
        for name, value in defaults.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    found = {
        name: numbers[name] for name in neutral if numbers.get(name, neutral[name]) != neutral[name]
    }
    if numbers.get("temperature", 1.0) < GREEDY_BELOW:
        found["temperature"] = numbers["temperature"]
    return found


def _unusable(logprobs: Sequence[float | None]) -> bool:
    """Whether one is missing, not finite in float32, or above zero (beyond rounding)."""
    return any(value is None or not _LEAST_LOGPROB <= value <= 1e-4 for value in logprobs)


def _spans_cover(interaction: Interaction, length: int) -> bool:
    """Whether the policy spans are the completion, in order, without gap or overlap."""
    end = 0
    for span in interaction.policy_spans:
        if span.start != end or span.end < span.start:
            return False
        end = span.end
    return end == length


def _logprobs_missing(interaction: Interaction) -> bool:
    given = interaction.completion_logprobs
    return not given or any(logprob is None for logprob in given)


def _from_sampling_distribution(interaction: Interaction) -> bool:
    """Whether the recorded logprobs are those of the distribution that was sampled from."""
    if interaction.logprob_convention is LogprobConvention.PROCESSED:
        return True
    return interaction.sampling.temperature == 1.0 and not interaction.sampling.truncated
