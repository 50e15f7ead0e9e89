"""The recorder's own promises, on an engine that says exactly what the test wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.logprobs import Logprob
from vllm.sampling_params import RequestOutputKind, SamplingParams

from moorline.events import Interaction, LogprobConvention
from serving import context as request_context
from serving.context import NotRecorded
from serving.engine_watch import EngineWatch
from serving.recorder import Recorder, sampling_settings
from serving.unusable_replies import UnusableReplies
from serving.vllm.worker import PROCESSED_ROW

REPLY_ID = "chatcmpl-1"
Delta = tuple[int, list[int], str | None]
"""Choice, its new tokens, its finish reason."""


class ScriptedEngine:
    """Replays deltas; token t has logprob -t/10."""

    def __init__(self, deltas: list[Delta]) -> None:
        self.deltas = deltas
        self.seen_params: SamplingParams | None = None
        self.closed = False
        self.vllm_config = SimpleNamespace(
            speculative_config=None,
            watermark_config=None,
            model_config=SimpleNamespace(logits_processors=None),
        )
        self.output_processor = SimpleNamespace(external_req_ids={}, request_states={})

    async def generate(
        self, _prompt: Any, params: SamplingParams, _request_id: str, **_: Any
    ) -> AsyncGenerator[Any, None]:
        self.seen_params = params
        lengths: dict[int, int] = {}
        try:
            for choice, tokens, finish_reason in self.deltas:
                lengths[choice] = lengths.get(choice, 0) + len(tokens)
                spans = [SimpleNamespace(version="assistant@v000007", start=0, end=lengths[choice])]
                completion = SimpleNamespace(
                    index=choice,
                    token_ids=tokens,
                    logprobs=[{token: Logprob(-token / 10)} for token in tokens],
                    cumulative_logprob=-1.0,
                    finish_reason=finish_reason,
                    weight_versions=spans if finish_reason else None,
                )
                yield SimpleNamespace(prompt_token_ids=[1, 2], outputs=[completion])
                await asyncio.sleep(0)
        finally:
            self.closed = True


@pytest.fixture(autouse=True)
def in_a_request() -> Iterator[request_context.RequestContext]:
    """Runs the test inside one HTTP request."""
    metadata = SimpleNamespace(request_id=REPLY_ID)
    context = request_context.RequestContext(
        {"state": {"request_metadata": metadata}}, not_recorded=None
    )
    token = request_context._current.set(context)
    yield context
    request_context._current.reset(token)


def recorded(
    deltas: list[Delta], take: int | None = None, **params: Any
) -> tuple[list[Interaction], list[Any], ScriptedEngine]:
    """What was published, what the handler saw, and the engine; the handler leaves after `take`."""
    engine, published, outputs = ScriptedEngine(deltas), [], []

    def publish(event: Interaction) -> bool:
        published.append(event)
        return True

    recorder = Recorder(
        engine, "assistant", publish, lambda: 3, UnusableReplies(), EngineWatch(60.0, lambda: False)
    )
    recorder.install()

    async def handle() -> None:
        chosen = SamplingParams(output_kind=RequestOutputKind.DELTA, **params)
        stream = engine.generate("prompt", chosen, REPLY_ID)
        async for output in stream:
            outputs.append(output)
            if len(outputs) == take:
                break
        await stream.aclose()

    asyncio.run(handle())
    return published, outputs, engine


pieces = st.lists(st.lists(st.integers(1, 50), max_size=3), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(choices=st.lists(pieces, min_size=1, max_size=3), data=st.data())
def test_every_choice_is_its_pieces_in_order_however_they_interleave(
    choices: list[list[list[int]]], data: st.DataObject
) -> None:
    turns = [index for index, choice in enumerate(choices) for _ in choice]
    left = {index: list(choice) for index, choice in enumerate(choices)}
    deltas: list[Delta] = []
    for index in data.draw(st.permutations(turns)):
        piece = left[index].pop(0)
        deltas.append((index, piece, None if left[index] else "stop"))
    published, _, _ = recorded(deltas, n=len(choices))
    assert len(published) == len(choices)
    for event in published:
        tokens = [token for piece in choices[event.choice] for token in piece]
        assert list(event.completion_token_ids) == tokens
        assert event.completion_logprobs == pytest.approx([-token / 10 for token in tokens])
        assert event.policy_version == 7


def test_the_handler_sees_no_logprobs_that_the_client_did_not_ask_for() -> None:
    _, outputs, engine = recorded([(0, [5], None), (0, [6], "stop")])
    assert engine.seen_params is not None
    assert engine.seen_params.logprobs == 0
    assert (engine.seen_params.extra_args or {})[PROCESSED_ROW] is True
    for output in outputs:
        assert output.outputs[0].logprobs is None
        assert output.outputs[0].cumulative_logprob is None


def test_a_client_that_asks_for_logprobs_gets_them_untouched() -> None:
    published, outputs, engine = recorded([(0, [5], "stop")], logprobs=2, temperature=0.5)
    assert engine.seen_params is not None
    assert engine.seen_params.logprobs == 2
    assert not engine.seen_params.extra_args
    assert outputs[0].outputs[0].logprobs[0][5].logprob == -0.5
    assert published[0].logprob_convention is LogprobConvention.RAW


def test_raw_equals_processed_at_temperature_one_without_truncation() -> None:
    published, _, _ = recorded([(0, [5], "stop")], logprobs=2)
    assert published[0].logprob_convention is LogprobConvention.PROCESSED


def test_a_handler_that_leaves_aborts_the_engine_and_records_what_was_seen() -> None:
    published, _, engine = recorded([(0, [5, 6], None), (0, [7], "stop")], take=1)
    assert engine.closed
    (event,) = published
    assert event.finish_reason == "abort"
    assert event.completion_token_ids == (5, 6)
    assert [(s.version, s.start, s.end) for s in event.policy_spans] == [(3, 0, 2)]


def test_an_opted_out_request_reaches_the_engine_unchanged(
    in_a_request: request_context.RequestContext,
) -> None:
    in_a_request.not_recorded = NotRecorded.OPTED_OUT
    published, outputs, engine = recorded([(0, [5], "stop")])
    assert not published
    assert engine.seen_params is not None
    assert engine.seen_params.logprobs is None
    assert len(outputs) == 1


def test_no_error_of_the_recorder_reaches_a_reply() -> None:
    engine = ScriptedEngine([(0, [5], None), (0, [6], "stop")])

    def publish(_: Interaction) -> bool:
        raise OSError("disk on fire")

    Recorder(
        engine, "assistant", publish, lambda: 3, UnusableReplies(), EngineWatch(60.0, lambda: False)
    ).install()

    async def handle() -> list[Any]:
        params = SamplingParams(output_kind=RequestOutputKind.DELTA)
        return [output async for output in engine.generate("prompt", params, REPLY_ID)]

    outputs = asyncio.run(handle())
    assert [output.outputs[0].token_ids for output in outputs] == [[5], [6]]
    assert all(output.outputs[0].logprobs is None for output in outputs)


def test_sampling_settings_speak_our_vocabulary() -> None:
    params = SamplingParams(temperature=0.0, top_k=-1, top_p=0.9, presence_penalty=0.1)
    found = sampling_settings(params)
    assert (found.temperature, found.top_k, found.altered_by) == (0.0, 0, ("presence_penalty",))


def test_what_a_request_says_of_itself_is_recorded(
    in_a_request: request_context.RequestContext,
) -> None:
    in_a_request.tenant, in_a_request.task, in_a_request.users = "blue", "sql", ("u-1", "u-2")
    in_a_request.streamed = True
    published, _, _ = recorded([(0, [5], "stop")])
    (event,) = published
    assert (event.tenant, event.task, event.streamed) == ("blue", "sql", True)
    assert (event.user, event.other_users) == ("u-1", ("u-2",))
    assert event.alias == "assistant"


ALTERING: dict[str, Any] = {
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "repetition_penalty": 1.05,
    "min_tokens": 1,
    "logit_bias": {1: 1.0},
    "allowed_token_ids": [1],
    "bad_words": ["x"],
}


@pytest.mark.parametrize("name", ALTERING)
def test_each_setting_that_alters_the_distribution_is_named(name: str) -> None:
    assert sampling_settings(SamplingParams()).altered_by == ()
    assert sampling_settings(SamplingParams(**{name: ALTERING[name]})).altered_by == (name,)


def test_each_setting_that_truncates_is_recorded_as_it_was() -> None:
    found = sampling_settings(SamplingParams(temperature=0.7, top_p=0.9, top_k=40, min_p=0.05))
    assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.7, 0.9, 40, 0.05)


def test_a_reply_of_an_adapter_is_its_versions_whatever_is_live_at_its_end() -> None:
    engine = ScriptedEngine([(0, [5, 6], "stop")])
    published: list[Interaction] = []

    def publish(event: Interaction) -> bool:
        published.append(event)
        return True

    recorder = Recorder(
        engine, "assistant", publish, lambda: 3, UnusableReplies(), EngineWatch(60.0, lambda: False)
    )
    recorder.install()
    adapter = SimpleNamespace(lora_name="assistant@v000005", lora_int_id=2)

    async def handle() -> None:
        params = SamplingParams(output_kind=RequestOutputKind.DELTA)
        async for _ in engine.generate("prompt", params, REPLY_ID, lora_request=adapter):
            pass

    asyncio.run(handle())
    (event,) = published
    assert [(span.version, span.start, span.end) for span in event.policy_spans] == [(5, 0, 2)]
