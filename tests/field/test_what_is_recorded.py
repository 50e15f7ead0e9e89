"""What the recorder makes of odd requests: an honest interaction, or none that is counted so."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from moorline import metrics
from moorline.events import Feedback, Interaction, Reason
from serving import context as request_context
from serving.context import NotRecorded, RequestContext
from serving.engine_watch import EngineWatch
from serving.feedback import feedback_router
from serving.recorder import Recorder
from serving.unusable_replies import UnusableReplies
from serving.vllm.models import LivePolicy, PolicyModels, ServedPolicy
from serving.vllm.responses import give_own_ids
from serving.vllm.sampling import altered_by_engine, prompt_parts
from tests.serving.test_recorder import ScriptedEngine
from tests.updater.ledger.fixtures import interaction
from updater.ingest import why_untrainable

TOKENS = {"type": "token", "prompt_token_ids": [1, 2]}
DRAWN = {"temperature": 1.0, "max_tokens": 5}


class Bench:
    """A recorder on a scripted engine, and what came of it."""

    def __init__(self) -> None:
        self.engine = ScriptedEngine([(0, [5, 6], "stop")])
        self.published: list[Interaction] = []
        self.unusable = UnusableReplies()

    def reply(
        self,
        suffixes: tuple[str, ...] = ("",),
        *,
        prompt: Any = TOKENS,
        lora: str | None = None,
        params: dict[str, Any] = DRAWN,
        reply_id: str | None = None,
        **context: Any,
    ) -> str:
        """One HTTP request, of which vLLM makes an engine's request for each suffix."""
        reply_id = f"cmpl-{uuid.uuid4().hex}" if reply_id is None else reply_id
        metadata = SimpleNamespace(request_id=reply_id) if reply_id else None
        state = {"state": {"request_metadata": metadata}}
        about = RequestContext(state, **{"not_recorded": None, **context})
        token = request_context._current.set(about)
        asyncio.run(self._generate(reply_id, suffixes, prompt, lora, params))
        request_context._current.reset(token)
        return reply_id

    async def _generate(
        self,
        reply_id: str,
        suffixes: tuple[str, ...],
        prompt: Any,
        lora: str | None,
        params: dict[str, Any],
    ) -> None:
        recorder = Recorder(
            self.engine,
            "assistant",
            self._publish,
            lambda: 3,
            self.unusable,
            EngineWatch(60.0, lambda: False),
        )
        options = {} if lora is None else {"lora_request": LoRARequest(lora, 1, "/nowhere")}
        for suffix in suffixes:
            chosen = SamplingParams(output_kind=RequestOutputKind.DELTA, **params)
            outputs: AsyncGenerator[Any, None] = recorder.generate(
                prompt, chosen, f"{reply_id}{suffix}", **options
            )
            async for output in outputs:
                assert output.outputs[0].token_ids == [5, 6]

    def _publish(self, event: Interaction) -> bool:
        self.published.append(event)
        return True


@pytest.fixture
def bench() -> Bench:
    return Bench()


def counted(outcome: str) -> float:
    found = metrics.INTERACTIONS.labels(outcome)._value.get()
    return float(found)


@pytest.mark.parametrize(
    ("why", "request_"),
    [
        (NotRecorded.BEAM_SEARCH, {"suffixes": tuple(f"-0af-beam-{i}" for i in range(4))}),
        (NotRecorded.SCORING, {"params": {"max_tokens": 1, "prompt_logprobs": 0}}),
        (NotRecorded.SCORING, {"not_recorded": NotRecorded.SCORING, "suffixes": ("-0", "-1")}),
        (NotRecorded.OPTED_OUT, {"not_recorded": NotRecorded.OPTED_OUT, "suffixes": ("-0", "-1")}),
        (NotRecorded.UNREADABLE, {"not_recorded": NotRecorded.UNREADABLE}),
        (NotRecorded.OTHER_ADAPTER, {"lora": "somebody-elses"}),
        (NotRecorded.OTHER_ADAPTER, {"lora": "other@v000001"}),
    ],
)
def test_what_is_no_interaction_is_counted_once_and_known_by_its_reply(
    bench: Bench, why: NotRecorded, request_: dict[str, Any]
) -> None:
    before, failed = counted(why), counted("failed")
    reply_id = bench.reply(**request_)
    assert bench.published == []
    assert (counted(why), counted("failed")) == (before + 1, failed)
    assert bench.unusable.why(reply_id, 0) is why
    assert bench.unusable.why(reply_id, 7) is why
    assert bench.engine.seen_params is not None
    assert bench.engine.seen_params.logprobs is None  # and the engine was asked as by plain vLLM


def test_a_request_without_a_reply_id_is_counted_as_scoring(bench: Bench) -> None:
    before = counted(NotRecorded.SCORING)
    bench.reply(("decision-1",), reply_id="")
    assert (bench.published, counted(NotRecorded.SCORING)) == ([], before + 1)


def test_prompt_logprobs_beside_a_reply_leave_it_an_interaction(bench: Bench) -> None:
    bench.reply(params=DRAWN | {"prompt_logprobs": 0})
    assert len(bench.published) == 1


def test_an_adapter_that_is_a_policy_of_ours_is_recorded_as_it(bench: Bench) -> None:
    bench.reply(lora="assistant@v000042")
    (event,) = bench.published
    assert event.policy_version == 42


def test_prompts_of_one_request_are_choices_with_the_beginning_of_each(bench: Bench) -> None:
    bench.reply(("_0", "_1", "_2"), reply_prefixes=("The sea", None))
    found = [(event.choice, event.reply_prefix) for event in bench.published]
    assert found == [(0, "The sea"), (1, None), (2, None)]


def test_who_asked_and_under_which_id_is_in_the_record(bench: Bench) -> None:
    bench.reply(client_request_id="mine 1", users=("a" * 32, "b" * 32))
    (event,) = bench.published
    assert event.client_request_id == "mine 1"
    assert (event.user, event.other_users) == ("a" * 32, ("b" * 32,))


# --- what cannot be attributed honestly ---------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        (TOKENS, ()),
        ("text", ()),
        ({"type": "multimodal", "mm_placeholders": {"image": [1], "audio": [2]}},
         ("audio", "image")),
        ({"type": "embeds", "prompt_embeds": None}, ("embeds",)),
        ({"type": "enc_dec"}, ("enc_dec",)),
    ],
)  # fmt: skip
def test_what_a_prompt_holds_beside_tokens_is_named(prompt: Any, parts: tuple[str, ...]) -> None:
    assert prompt_parts(prompt) == parts


class Processor(AdapterLogitsProcessor):
    """One of the operator's own."""


def engine_with(**config: Any) -> Any:
    processors = config.pop("logits_processors", None)
    whole = {"speculative_config": None, "watermark_config": None} | config
    model_config = SimpleNamespace(logits_processors=processors)
    return SimpleNamespace(vllm_config=SimpleNamespace(model_config=model_config, **whole))


@pytest.mark.parametrize(
    ("config", "altered_by", "reason"),
    [
        ({}, (), None),
        ({"speculative_config": object()}, ("speculative_decoding",), "speculative_decoding"),
        ({"logits_processors": [f"{__name__}:Processor"]}, ("logits_processors",),
         "custom_logits_processor"),
        ({"watermark_config": object()}, ("watermarking",), "altered_sampling"),
    ],
)  # fmt: skip
def test_what_the_engine_does_to_every_reply_is_in_each_record(
    config: dict[str, Any], altered_by: tuple[str, ...], reason: str | None
) -> None:
    engine = engine_with(**config)
    assert altered_by_engine(engine) == altered_by
    bench = Bench()
    bench.engine.vllm_config = engine.vllm_config
    reply_id = bench.reply()
    (event,) = bench.published
    assert event.sampling.altered_by == altered_by
    assert why_untrainable(event, 100, "assistant", 100) == reason
    assert bench.unusable.why(reply_id, 0) == reason


def test_an_image_in_the_prompt_is_not_learned_as_text(bench: Bench) -> None:
    reply_id = bench.reply(prompt={"type": "multimodal", "mm_placeholders": {"image": [1]}})
    (event,) = bench.published
    assert event.prompt_parts == ("image",)
    assert why_untrainable(event, 100, "assistant", 100) is Reason.MULTIMODAL_PROMPT
    assert why_untrainable(event, 1, "assistant", 100) is Reason.MULTIMODAL_PROMPT
    assert bench.unusable.why(reply_id, 0) is Reason.MULTIMODAL_PROMPT


@pytest.mark.parametrize(
    "changes", [{"finish_reason": "abort"}, {"completion_token_ids": (), "policy_spans": ()}]
)
def test_the_updaters_own_questions_come_first(changes: dict[str, Any]) -> None:
    event = interaction("a").model_copy(update=changes)
    assert why_untrainable(event, 10**6, "another", 100) is Reason.UNKNOWN_POLICY
    assert why_untrainable(event, 1, "assistant", 100) is Reason.TOKEN_OUT_OF_VOCABULARY
    assert why_untrainable(event, 10**6, "assistant", 1) is Reason.TOO_LONG


# --- the answer to a rating ---------------------------------------------------------------------


async def rate(unusable: UnusableReplies, **body: Any) -> tuple[httpx.Response, list[Feedback]]:
    kept: list[Feedback] = []

    async def publish(event: Feedback) -> bool:
        kept.append(event)
        return True

    app = FastAPI()
    app.include_router(feedback_router(publish, 1000, unusable.why))
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post("/v1/feedback", json=body), kept


async def test_a_rating_of_what_was_not_recorded_is_refused_with_the_reason() -> None:
    unusable = UnusableReplies()
    unusable.note_not_recorded("r1", NotRecorded.OPTED_OUT)
    response, kept = await rate(unusable, id="r1", value=1, choice=3)
    assert (response.status_code, kept) == (409, [])
    assert "opted_out" in response.json()["error"]["message"]
    preferred, _ = await rate(unusable, id="r2", kind="preference", over="r1")
    assert preferred.status_code == 409


async def test_a_rating_of_what_cannot_teach_is_kept_and_answered_so() -> None:
    unusable = UnusableReplies()
    unusable.note_untrainable("r1", 0, Reason.GREEDY_SAMPLING)
    response, kept = await rate(unusable, id="r1", value=1)
    assert (response.status_code, len(kept)) == (202, 1)
    assert response.json()["not_trainable"] == "greedy_sampling"
    other_choice, _ = await rate(unusable, id="r1", value=1, choice=1)
    assert "not_trainable" not in other_choice.json()


def test_only_the_newest_unusable_replies_are_remembered() -> None:
    unusable = UnusableReplies(limit=2)
    for number in range(3):
        unusable.note_not_recorded(f"r{number}", NotRecorded.SCORING)
    assert [unusable.why(f"r{number}", 0) for number in range(3)] == [None, "scoring", "scoring"]


# --- names and ids ------------------------------------------------------------------------------


async def test_a_reply_of_the_responses_route_has_our_id_whatever_its_body_asks_for() -> None:
    seen: list[str] = []

    async def create_responses(request: Any, _raw_request: Any = None) -> Any:
        seen.append(request.request_id)

    serving = SimpleNamespace(create_responses=create_responses)
    give_own_ids(serving)
    context = RequestContext({})
    token = request_context._current.set(context)
    await serving.create_responses(SimpleNamespace(request_id="mine"), None)
    request_context._current.reset(token)
    await serving.create_responses(SimpleNamespace(request_id="nobody-asked"), None)
    assert seen == [f"resp_{context.request_id}", "nobody-asked"]


@pytest.fixture
def models() -> PolicyModels:
    engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=9), renderer=None)
    engine.input_processor = None
    live = LivePolicy("assistant")
    live.policy = ServedPolicy(4)  # pinned: there was a later one
    live.newest_released = 7
    return PolicyModels(live, engine_client=engine, base_model_paths=[])


@pytest.mark.parametrize("name", ["assistant", "assistant@v000003", "assistant@v000007"])
def test_a_listed_name_stays_answered_by_the_live_policy(models: PolicyModels, name: str) -> None:
    assert models.is_base_model(name)
    assert name not in models.lora_requests
    live = LoRARequest("assistant@v000004", 1, "/nowhere")
    models.serve(ServedPolicy(4), live)
    assert models.lora_requests[name] is live
    assert name in models.lora_requests
    models.serve(ServedPolicy(4), None)
    assert name not in models.lora_requests


@pytest.mark.parametrize(
    "name",
    [
        "assistant@v000008",
        "other",
        "assistant@v3",
        "other@v000003",
        "assistant@v",
        "assistant@v00000٣",
        "",
        None,
    ],
)
def test_another_name_is_not(models: PolicyModels, name: str | None) -> None:
    assert not models.is_base_model(name)  # type: ignore[arg-type]
    models.serve(ServedPolicy(4), LoRARequest("assistant@v000004", 1, "/nowhere"))
    assert (name in models.lora_requests) is (name in ("", None))  # no name at all: the live one


async def test_what_is_listed_is_answered(models: PolicyModels) -> None:
    for card in (await models.show_available_models()).data:
        assert models.is_base_model(card.id)
