"""A sampler that returns processed logprobs to the recorder and raw ones to clients.

vLLM has one logprob convention for the whole engine. Learning needs the *processed* ones (after
temperature and truncation: the probability the token was really drawn with); clients must get what
plain vLLM gives, the *raw* ones. The engine runs in processed mode, and here the rows of requests
without the recorder's flag are overwritten with raw values before they are gathered.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.v1.sample.sampler import Sampler

from serving.vllm.worker import PROCESSED_ROW


class TwoConventionSampler(Sampler):  # type: ignore[misc]  # vLLM is not typed for us
    """vLLM's sampler; raw logprobs for every row but the recorder's."""

    def __init__(self, model_runner: Any, plain: Sampler) -> None:
        super().__init__(plain.logprobs_mode, plain.use_fp64_gumbel)
        self._requests: Any = model_runner
        self._raw: tuple[list[int], Tensor] | None = None

    def forward(self, logits: Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        """logits: (rows, vocabulary), before temperature, penalties and truncation."""
        self._raw = None
        wants_any = (
            sampling_metadata.max_num_logprobs is not None or sampling_metadata.logprob_token_ids
        )
        rows = self._raw_rows(logits.shape[0]) if wants_any else []
        if rows:  # now: what follows changes the logits in place
            self._raw = rows, self.compute_logprobs(logits[rows])
        try:
            return super().forward(logits, sampling_metadata, *args, **kwargs)
        finally:
            self._raw = None

    def sample(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        sampled, processed = super().sample(*args, **kwargs)
        if self._raw is not None and processed is not None:
            rows, raw = self._raw
            processed[rows] = raw
        return sampled, processed

    def _raw_rows(self, count: int) -> list[int]:
        """Rows whose request a client asked logprobs for (or that nobody did: harmless)."""
        batch = self._requests.input_batch
        rows = []
        for row, request_id in enumerate(batch.req_ids[:count]):
            if request_id not in batch.num_logprobs and request_id not in batch.logprob_token_ids:
                continue
            params = self._requests.requests[request_id].sampling_params
            if not (params.extra_args or {}).get(PROCESSED_ROW, False):
                rows.append(row)
        return rows


def install(model_runner: Any) -> None:
    """Put the sampler into a model runner whose engine runs with processed logprobs.

    Raises:
        RuntimeError: when this vLLM's runner has no such sampler.
    """
    plain = getattr(model_runner, "sampler", None)
    if not isinstance(plain, Sampler) or plain.logprobs_mode != "processed_logprobs":
        raise RuntimeError("this vLLM model runner has no sampler in processed_logprobs mode")
    model_runner.sampler = TwoConventionSampler(model_runner, plain)
