"""Records every reply at the engine: what was sampled, with which probability, by which policy.

``Recorder.generate`` stands in for the engine client's ``generate``, so every route that samples
(chat, completions, responses, streaming or not, n > 1) is recorded in one place. The client sees
no change: logprobs that only the recorder asked for are removed again before the handler sees the
output, and no error in here reaches a reply.

The recorder asks for *processed* logprobs (what the token was really sampled from). A client that
asks for logprobs itself gets plain vLLM's raw ones (``vllm/worker.py`` chooses by row), and then
these are what is recorded, and named so.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from moorline import metrics
from moorline.events import Interaction, LogprobConvention, PolicySpan
from moorline.logs import describe
from moorline.trainability import why_recorded_in_vain
from serving.context import NotRecorded, RequestContext, current_request
from serving.engine_watch import EngineWatch
from serving.unusable_replies import UnusableReplies
from serving.vllm.models import version_of_policy
from serving.vllm.sampling import (
    SamplingParams,
    altered_by_engine,
    asks_for_logprobs,
    gives_deltas,
    logprobs_of_tokens,
    only_scores_prompt,
    prompt_parts,
    sampling_settings,
    spans_of_cut_reply,
    states_by_choice,
    with_recorder_logprobs,
)

logger = logging.getLogger("moorline.serving.recorder")

Publish = Callable[[Interaction], bool]
"""Takes an interaction without blocking; False when it had to be dropped."""

_PROMPT_SUFFIX = re.compile(r"(?:[-_](?P<prompt>\d+))?")
"""What vLLM puts behind a reply's id for the requests of its prompts."""
_BEAM = "-beam-"
"""In what it puts there for each step of a beam search."""


@dataclass
class _Choice:
    """The tokens so far of one choice of one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    finish_reason: str | None = None
    weight_versions: list[tuple[str, int, int]] | None = None


class Recorder:
    """Wraps one engine client."""

    def __init__(
        self,
        engine: Any,
        alias: str,
        publish: Publish,
        live_version: Callable[[], int],
        unusable_replies: UnusableReplies,
        engine_watch: EngineWatch,
    ) -> None:
        self._engine = engine
        self._altered_by = altered_by_engine(engine)
        self._alias = alias
        self._unusable_replies = unusable_replies
        self._engine_watch = engine_watch
        self._publish = publish
        self._live_version = live_version
        self.plain_generate = engine.generate
        """The engine's own method: for warm-up and parity, which are nobody's interactions."""

    def install(self) -> None:
        """From now on, every request of this process goes through the recorder."""
        self._engine.generate = self.generate

    def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **options: Any
    ) -> AsyncGenerator[Any, None]:
        """Same signature and same outputs as ``AsyncLLM.generate``."""
        context = current_request()  # read now: the generator may run in another task
        recording: _Recording | None = None
        if context is not None:
            try:
                recording = self._begin(context, prompt, sampling_params, request_id, options)
            except Exception as error:
                _failed(error)
        if recording is not None:
            sampling_params = recording.params
        return self._run(recording, prompt, sampling_params, request_id, options)

    def _begin(
        self,
        context: RequestContext,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        options: dict[str, Any],
    ) -> _Recording | None:
        """Start to record one prompt's reply; None, counted and noted: it is no interaction."""
        reply_id, lora_request = context.reply_id, options.get("lora_request")
        version = (
            None if lora_request is None else version_of_policy(self._alias, lora_request.lora_name)
        )
        suffix = None if reply_id is None else request_id.removeprefix(reply_id)
        place = None if suffix is None else _PROMPT_SUFFIX.fullmatch(suffix)
        why = context.not_recorded
        if why is None and suffix is not None and _BEAM in suffix:
            why = NotRecorded.BEAM_SEARCH
        if why is None and (place is None or only_scores_prompt(params)):
            why = NotRecorded.SCORING
        if why is None and lora_request is not None and version is None:
            why = NotRecorded.OTHER_ADAPTER
        if why is not None:
            self._note_not_recorded(context, why)
            return None
        assert reply_id is not None
        assert place is not None
        prompt_index = int(place["prompt"] or 0)
        prefixes = context.reply_prefixes
        return _Recording(
            context=context,
            reply_id=reply_id,
            first_choice=prompt_index * params.n,
            asked=params,
            adapter_version=version,
            prompt_parts=prompt_parts(prompt),
            reply_prefix=prefixes[prompt_index] if prompt_index < len(prefixes) else None,
        )

    def _note_not_recorded(self, context: RequestContext, why: NotRecorded) -> None:
        """Once for each request, though a beam search makes many of the engine."""
        if context.counted:
            return
        context.counted = True
        metrics.INTERACTIONS.labels(why).inc()
        if context.reply_id is not None:
            self._unusable_replies.note_not_recorded(context.reply_id, why)

    async def _run(
        self,
        recording: _Recording | None,
        prompt: Any,
        params: SamplingParams,
        request_id: str,
        options: dict[str, Any],
    ) -> AsyncGenerator[Any, None]:
        outputs = self.plain_generate(prompt, params, request_id, **options)
        try:
            while (output := await self._engine_watch.next_output(outputs)) is not None:
                if recording is not None:
                    try:
                        self._observe(recording, output, request_id)
                    except Exception as error:
                        _failed(error)
                        recording.strip(output)
                        recording.broken = True
                yield output
        finally:
            # Closing aborts the request in the engine when the client went away. Not left to the
            # garbage collector: until it runs, the engine would go on sampling for nobody.
            try:
                await outputs.aclose()
            finally:
                if recording is not None:
                    self._close(recording)

    def _observe(self, recording: _Recording, output: Any, request_id: str) -> None:
        if recording.broken:
            recording.strip(output)
            return
        if not recording.states:
            recording.states = states_by_choice(self._engine, request_id)
        if output.prompt_token_ids is not None:
            recording.prompt_token_ids = output.prompt_token_ids
        for completion in output.outputs:
            choice = recording.choices.setdefault(completion.index, _Choice())
            token_ids = list(completion.token_ids)
            logprobs = logprobs_of_tokens(token_ids, completion.logprobs)
            if gives_deltas(recording.asked):
                choice.token_ids += token_ids
                choice.logprobs += logprobs
            else:
                choice.token_ids, choice.logprobs = token_ids, logprobs
            if completion.finish_reason is not None and choice.finish_reason is None:
                choice.finish_reason = completion.finish_reason
                choice.weight_versions = [
                    (span.version, span.start, span.end)
                    for span in completion.weight_versions or ()
                ]
                self._finish(recording, completion.index)
        recording.strip(output)

    def _close(self, recording: _Recording) -> None:
        """The request is over; choices that did not finish were cut by the client or a fault."""
        try:
            unfinished = [i for i, c in recording.choices.items() if c.finish_reason is None]
            if not recording.choices:
                metrics.INTERACTIONS.labels("aborted").inc()  # before its first token
            for index in unfinished:
                choice = recording.choices[index]
                choice.finish_reason = "abort"
                state = recording.states.get(index)
                choice.weight_versions = spans_of_cut_reply(state, len(choice.token_ids))
                self._finish(recording, index)
        except Exception as error:
            _failed(error)

    def _finish(self, recording: _Recording, index: int) -> None:
        """Hand one ended choice to the publisher."""
        choice, context = recording.choices[index], recording.context
        if recording.broken:
            return
        if recording.adapter_version is not None:
            spans = [(recording.adapter_version, 0, len(choice.token_ids))]
        else:
            live = self._live_version()
            spans = [
                (
                    live if (version := version_of_policy(self._alias, name)) is None else version,
                    start,
                    end,
                )
                for name, start, end in choice.weight_versions or ()
            ] or [(live, 0, len(choice.token_ids))]
        now = time.time()
        try:
            interaction = Interaction(
                interaction_id=recording.reply_id,
                choice=recording.first_choice + index,
                alias=self._alias,
                client_request_id=context.client_request_id,
                tenant=context.tenant,
                task=context.task,
                user=context.users[0] if context.users else None,
                other_users=context.users[1:],
                pseudonym_key=context.pseudonym_key,
                created_at=now,
                latency_seconds=max(0.0, now - context.started_at),
                prompt_token_ids=tuple(recording.prompt_token_ids or ()),
                prompt_parts=recording.prompt_parts,
                reply_prefix=recording.reply_prefix,
                completion_token_ids=tuple(choice.token_ids),
                completion_logprobs=tuple(choice.logprobs),
                logprob_convention=recording.convention,
                sampling=sampling_settings(recording.asked, self._altered_by),
                policy_spans=tuple(PolicySpan(version=v, start=s, end=e) for v, s, e in spans),
                finish_reason=choice.finish_reason or "unknown",
                streamed=context.streamed,
            )
        except ValidationError as error:
            _failed(error)
            return
        if (reason := why_recorded_in_vain(interaction)) is not None:
            self._unusable_replies.note_untrainable(recording.reply_id, interaction.choice, reason)
        outcome = "dropped"
        if self._publish(interaction):
            outcome = "aborted" if choice.finish_reason == "abort" else "recorded"
        metrics.INTERACTIONS.labels(outcome).inc()


@dataclass
class _Recording:
    """One request while it is being answered."""

    context: RequestContext
    reply_id: str
    first_choice: int
    """Choice index of this prompt's first completion (completions take several prompts)."""
    asked: SamplingParams
    """As the client's request says."""
    adapter_version: int | None
    prompt_parts: tuple[str, ...] = ()
    reply_prefix: str | None = None
    prompt_token_ids: list[int] | None = None
    choices: dict[int, _Choice] = field(default_factory=dict)
    states: dict[int, Any] = field(default_factory=dict)
    broken: bool = False
    """Whether recording failed: the reply goes on without being recorded."""

    @property
    def only_recorder_asks(self) -> bool:
        """Whether only the recorder wants logprobs."""
        return not asks_for_logprobs(self.asked)

    @property
    def params(self) -> SamplingParams:
        """The client's, plus what the recorder needs."""
        return with_recorder_logprobs(self.asked) if self.only_recorder_asks else self.asked

    @property
    def convention(self) -> LogprobConvention:
        plain = sampling_settings(self.asked)
        same = plain.temperature == 1.0 and not plain.truncated and not plain.altered_by
        processed = self.only_recorder_asks or same
        return LogprobConvention.PROCESSED if processed else LogprobConvention.RAW

    def strip(self, output: Any) -> None:
        """Remove what the client did not ask for: handlers get what plain vLLM gives them."""
        if self.only_recorder_asks:
            for completion in output.outputs:
                completion.logprobs = None
                completion.cumulative_logprob = None


def _failed(error: Exception) -> None:
    metrics.INTERACTIONS.labels("failed").inc()
    logger.error(
        "a reply was not recorded and cannot be learned from; its client saw nothing of it",
        extra={"event": "recording_failed", "error": describe(error)},
    )
