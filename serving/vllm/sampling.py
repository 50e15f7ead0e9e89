"""What a request asks of vLLM's sampler, and what vLLM says about the tokens that it sampled."""

from __future__ import annotations

import copy
from typing import Any

from vllm.sampling_params import RequestOutputKind
from vllm.sampling_params import SamplingParams as SamplingParams
from vllm.v1.sample.logits_processor import cached_load_custom_logitsprocs

from moorline.events import GREEDY_BELOW, SamplingSettings
from moorline.trainability import LOGITS_PROCESSORS, SPECULATIVE_DECODING
from serving.vllm.worker import PROCESSED_ROW


def asks_for_logprobs(params: SamplingParams) -> bool:
    """Whether the client wants logprobs itself."""
    return params.logprobs is not None or params.logprob_token_ids is not None


def with_recorder_logprobs(params: SamplingParams) -> SamplingParams:
    """A copy that also asks for the processed logprob of each sampled token."""
    changed = copy.copy(params)
    changed.logprobs = 0  # the sampled token's only
    changed.extra_args = {**(changed.extra_args or {}), PROCESSED_ROW: True}
    return changed


def gives_deltas(params: SamplingParams) -> bool:
    """Whether each output holds the new tokens only, not all tokens so far."""
    return bool(params.output_kind is RequestOutputKind.DELTA)


def states_by_choice(engine: Any, request_id: str) -> dict[int, Any]:
    """The engine's state of each choice; it knows the weight versions of a reply that is cut."""
    processor = engine.output_processor
    states = (
        processor.request_states.get(internal)
        for internal in processor.external_req_ids.get(request_id, ())
    )
    return {state.request_index: state for state in states if state is not None}


def spans_of_cut_reply(state: Any | None, length: int) -> list[tuple[str, int, int]]:
    """(version, start, end) over the ``length`` tokens that were seen; empty without a state."""
    starts = [] if state is None else list(state.weight_version_starts)
    ends = [*(start for _, start in starts), length][1:]
    return [
        (version, start, min(end, length))
        for (version, start), end in zip(starts, ends, strict=True)
        if start < length
    ]


def logprobs_of_tokens(token_ids: list[int], logprobs: Any) -> list[float | None]:
    """The logprob (nats) of each sampled token; None where vLLM gave none."""
    if not logprobs:
        return [None] * len(token_ids)
    found: list[float | None] = []
    for token_id, position in zip(token_ids, logprobs, strict=True):
        entry = position.get(token_id) if position else None
        found.append(None if entry is None else float(entry.logprob))
    return found


def only_scores_prompt(params: SamplingParams) -> bool:
    """Whether it asks for the prompt's logprobs, with the one token that vLLM insists on."""
    return params.prompt_logprobs is not None and params.max_tokens == 1


def prompt_parts(prompt: Any) -> tuple[str, ...]:
    """What a prompt holds beside tokens: image, audio, video, embeds, ...; () for tokens alone."""
    kind = prompt.get("type", "token") if isinstance(prompt, dict) else "token"
    if kind == "token":
        return ()
    return tuple(sorted(prompt.get("mm_placeholders") or ())) or (kind,)


def altered_by_engine(engine: Any) -> tuple[str, ...]:
    """What changes the distribution of every reply, however it is asked for."""
    config = engine.vllm_config
    if config.speculative_config is not None:  # then vLLM takes no logits processors
        return (SPECULATIVE_DECODING,)
    # A list is not hashable; a tuple of the same names is what vLLM's own cache is asked for.
    own = config.model_config.logits_processors
    processors = cached_load_custom_logitsprocs(None if own is None else tuple(own))
    watermarked = ("watermarking",) if config.watermark_config is not None else ()
    return ((LOGITS_PROCESSORS,) if processors else ()) + watermarked


def sampling_settings(
    params: SamplingParams, altered_by_engine: tuple[str, ...] = ()
) -> SamplingSettings:
    """What shaped the distribution, in our vocabulary."""
    altered = {
        "presence_penalty": params.presence_penalty != 0.0,
        "frequency_penalty": params.frequency_penalty != 0.0,
        "repetition_penalty": params.repetition_penalty != 1.0,
        "min_tokens": params.min_tokens > 0,
        "logit_bias": bool(params.logit_bias),
        "allowed_token_ids": bool(params.allowed_token_ids),
        "bad_words": bool(params.bad_words),
        "structured_outputs": params.structured_outputs is not None,
        "thinking_token_budget": params.thinking_token_budget is not None,
        "watermarking": bool(params.watermarking),
        "trace_decode_token_ids": params.trace_decode_token_ids is not None,
    } | dict.fromkeys(altered_by_engine, True)
    return SamplingSettings(
        temperature=0.0 if params.temperature < GREEDY_BELOW else params.temperature,
        top_p=params.top_p,
        top_k=max(params.top_k, 0),
        min_p=params.min_p,
        altered_by=tuple(name for name, differs in altered.items() if differs),
    )
