"""Logprobs of given sequences under the policy that the engine serves now."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

from vllm.inputs.engine import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

from moorline.adapter_format import ParityBatch
from serving.parity import Logprobs, joined

Generate = Callable[..., AsyncGenerator[Any, None]]


async def score(generate: Generate, batch: ParityBatch, lora_request: Any = None) -> Logprobs:
    """Raw logprobs of the batch's completion tokens under what the engine serves now, nats."""
    scored = [  # one by one: each is a piece of prefill that running replies wait for
        await _score_one(
            generate, sequence.prompt_token_ids, sequence.completion_token_ids, lora_request
        )
        for sequence in batch.sequences
    ]
    return joined(scored)


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
