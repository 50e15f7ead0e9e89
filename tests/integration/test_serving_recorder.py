"""What is recorded is what was sampled, and the client sees no difference."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from moorline.events import Interaction, LogprobConvention
from tests.conftest import Served
from tests.serving.make_release import completion_logits, reference_model
from tests.serving.server_process import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

MESSAGES: Any = [{"role": "user", "content": "Tell me about rivers."}]


@pytest.fixture(scope="module")
def reference(tiny_model_dir: Path) -> torch.nn.Module:
    return reference_model(tiny_model_dir, None)


def processed_logprobs(model: torch.nn.Module, event: Interaction) -> list[float]:
    """The convention `processed`, written down anew: temperature, min-p, top-k, top-p, in this
    order, renormalised.
    """
    logits = completion_logits(model, event.prompt_token_ids, event.completion_token_ids)
    logits = logits / event.sampling.temperature
    likeliest = logits.softmax(-1).amax(-1, keepdim=True)
    outside = logits.softmax(-1) < event.sampling.min_p * likeliest
    logits = logits.masked_fill(outside, float("-inf"))
    if event.sampling.top_k:
        last_in = logits.topk(event.sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < last_in, float("-inf"))
    if event.sampling.top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= event.sampling.top_p
        logits = logits.masked_fill(outside.scatter(1, order, outside), float("-inf"))
    chosen = torch.tensor(event.completion_token_ids).unsqueeze(1)
    return [float(value) for value in logits.log_softmax(-1).gather(1, chosen).squeeze(1)]


def without_ids(reply: Any) -> Any:
    """A reply as JSON, without what differs between any two replies."""
    fields = json.loads(reply.model_dump_json())
    for name in ("id", "created"):
        fields.pop(name)
    return fields


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k", "min_p"),
    [
        (1.0, 1.0, 0, 0.0),
        (0.7, 1.0, 0, 0.0),
        (1.0, 0.9, 0, 0.0),
        (0.7, 0.9, 0, 0.0),
        (1.0, 1.0, 5, 0.0),
        (1.0, 1.0, 0, 0.2),
        (0.7, 0.8, 20, 0.05),
    ],
)
def test_recorded_logprobs_are_those_the_tokens_were_sampled_with(
    reload_server: Served,
    reference: torch.nn.Module,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
) -> None:
    reply = reload_server.server.openai().chat.completions.create(
        model="assistant",
        messages=MESSAGES,
        temperature=temperature,
        top_p=top_p,
        max_tokens=40,
        extra_body={"top_k": top_k, "min_p": min_p},
    )
    (event,) = reload_server.tape.of(reply.id)
    assert event.logprob_convention is LogprobConvention.PROCESSED
    sampling = event.sampling
    assert (sampling.temperature, sampling.top_p) == (temperature, top_p)
    assert (sampling.top_k, sampling.min_p) == (top_k, min_p)
    expected = processed_logprobs(reference, event)
    differences = [
        abs(recorded - value)
        for recorded, value in zip(event.completion_logprobs, expected, strict=True)
        if recorded is not None
    ]
    assert len(differences) == len(event.completion_token_ids) > 0
    assert sum(differences) / len(differences) < 0.02


def test_a_chat_reply_is_recorded_with_what_a_person_needs_to_rate_it(
    reload_server: Served,
) -> None:
    response = reload_server.server.openai().chat.completions.with_raw_response.create(
        model="assistant",
        messages=MESSAGES,
        max_tokens=12,
        user="bob@example.org",
        extra_headers={"x-moorline-tenant": "blue", "x-moorline-task": "sql"},
    )
    reply = response.parse()
    (event,) = reload_server.tape.of(reply.id)
    assert reply.usage is not None
    assert len(event.prompt_token_ids) == reply.usage.prompt_tokens
    assert len(event.completion_token_ids) == reply.usage.completion_tokens
    assert event.finish_reason == reply.choices[0].finish_reason
    assert (event.tenant, event.task) == ("blue", "sql")
    assert (event.alias, event.streamed) == ("assistant", False)
    assert event.user is not None
    assert "bob" not in event.user
    assert reply.model == f"assistant@v{event.policy_version:06d}"
    assert response.headers["x-moorline-policy-version"] == str(event.policy_version)
    assert event.latency_seconds > 0


def test_a_streamed_reply_is_recorded_token_for_token(reload_server: Served) -> None:
    stream = reload_server.server.openai().chat.completions.create(
        model="assistant",
        messages=MESSAGES,
        max_tokens=20,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": True},
    )
    chunks = list(stream)
    seen: list[int] = []
    for chunk in chunks:
        for choice in chunk.choices:
            seen += getattr(choice, "token_ids", None) or []
    (event,) = reload_server.tape.of(chunks[0].id)
    assert list(event.completion_token_ids) == seen
    assert event.streamed
    assert len(event.completion_logprobs) == len(seen)
    assert {chunk.model for chunk in chunks} == {f"assistant@v{event.policy_version:06d}"}


@pytest.mark.parametrize("streamed", [False, True])
def test_every_choice_is_recorded_under_its_index(reload_server: Served, streamed: bool) -> None:
    client = reload_server.server.openai()
    arguments: dict[str, Any] = {
        "model": "assistant",
        "messages": MESSAGES,
        "max_tokens": 8,
        "n": 3,
    }
    if streamed:
        chunks = list(client.chat.completions.create(stream=True, **arguments))
        reply_id = chunks[0].id
    else:
        reply_id = client.chat.completions.create(**arguments).id
    events = reload_server.tape.of(reply_id, choices=3)
    assert [event.choice for event in events] == [0, 1, 2]
    assert len({event.prompt_token_ids for event in events}) == 1


def test_completions_of_several_prompts_count_choices_as_the_reply_does(
    reload_server: Served,
) -> None:
    reply = reload_server.server.openai().completions.create(
        model="assistant", prompt=["A river", "The sea is"], n=2, max_tokens=6
    )
    events = reload_server.tape.of(reply.id, choices=4)
    assert [event.choice for event in events] == [choice.index for choice in reply.choices]
    prompts = [event.prompt_token_ids for event in events]
    assert prompts[0] == prompts[1] != prompts[2] == prompts[3]
    assert reply.model.startswith("assistant@v")


async def test_a_client_that_goes_away_leaves_an_aborted_interaction(
    reload_server: Served,
) -> None:
    client = reload_server.server.openai_async()
    stream = await client.chat.completions.create(
        model="assistant",
        messages=MESSAGES,
        max_tokens=1500,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    reply_id, seen = "", 0
    async for chunk in stream:
        reply_id, seen = chunk.id, seen + 1
        if seen == 8:
            break
    await stream.close()
    (event,) = await asyncio.to_thread(reload_server.tape.of, reply_id)
    assert event.finish_reason == "abort"
    assert 6 <= len(event.completion_token_ids) < 1500
    assert event.policy_spans[-1].end == len(event.completion_token_ids)
    await asyncio.to_thread(
        wait_for, lambda: reload_server.server.status()["requests_in_flight"] == 0
    )


@pytest.mark.parametrize("how", ["store", "header"])
def test_an_opted_out_reply_is_recorded_nowhere(reload_server: Served, how: str) -> None:
    server, tape = reload_server.server, reload_server.tape
    options: dict[str, Any] = (
        {"store": False} if how == "store" else {"extra_headers": {"x-moorline-no-store": "1"}}
    )
    secret = server.openai().chat.completions.create(
        model="assistant", messages=MESSAGES, max_tokens=5, **options
    )
    marker = server.openai().chat.completions.create(
        model="assistant", messages=MESSAGES, max_tokens=5
    )
    tape.of(marker.id)  # published after it, so it would be here by now
    assert secret.id not in {event.interaction_id for event in tape.interactions}


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_client_sees_the_same_with_and_without_recording(
    reload_server: Served, logprobs: bool, temperature: float
) -> None:
    arguments: dict[str, Any] = {
        "model": "assistant",
        "messages": MESSAGES,
        "max_tokens": 24,
        "seed": 7,
        "temperature": temperature,
        "top_p": 0.9,
    }
    if logprobs:
        arguments |= {"logprobs": True, "top_logprobs": 3}
    client = reload_server.server.openai()
    recorded = client.chat.completions.create(**arguments)
    unrecorded = client.chat.completions.create(store=False, **arguments)
    assert without_ids(recorded) == without_ids(unrecorded)


def test_logprobs_that_a_client_asked_for_are_recorded_as_what_they_are(
    reload_server: Served,
) -> None:
    reply = reload_server.server.openai().chat.completions.create(
        model="assistant", messages=MESSAGES, max_tokens=8, temperature=0.7, logprobs=True
    )
    (event,) = reload_server.tape.of(reply.id)
    assert event.logprob_convention is LogprobConvention.RAW
    content = reply.choices[0].logprobs
    assert content is not None
    assert content.content is not None
    assert [entry.logprob for entry in content.content] == pytest.approx(event.completion_logprobs)


def test_what_alters_the_distribution_is_named(reload_server: Served) -> None:
    reply = reload_server.server.openai().chat.completions.create(
        model="assistant",
        messages=MESSAGES,
        max_tokens=5,
        frequency_penalty=0.5,
        logit_bias={"10": 2},
        extra_body={"top_k": 20, "min_tokens": 2},
    )
    (event,) = reload_server.tape.of(reply.id)
    assert set(event.sampling.altered_by) == {"frequency_penalty", "logit_bias", "min_tokens"}
    assert event.sampling.top_k == 20


def test_a_request_id_of_the_client_is_kept_beside_ours(reload_server: Served) -> None:
    reply = reload_server.server.openai().chat.completions.create(
        model="assistant",
        messages=MESSAGES,
        max_tokens=5,
        extra_headers={"x-request-id": "no identifier!"},
    )
    (event,) = reload_server.tape.of(reply.id)
    assert event.client_request_id == "no identifier!"


def test_no_prompt_or_reply_is_in_the_log(reload_server: Served) -> None:
    canary = "xylophone quandary"
    reload_server.server.openai().chat.completions.create(
        model="assistant", messages=[{"role": "user", "content": canary}], max_tokens=5
    )
    assert canary not in reload_server.server.log.read_text(errors="replace")
