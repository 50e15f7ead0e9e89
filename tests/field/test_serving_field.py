"""What clients really send to a server: the reply is plain vLLM's, the record is honest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from moorline.events import Interaction
from moorline.pseudonyms import Pseudonyms
from tests.conftest import Served
from tests.serving.server_process import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

MESSAGES = [{"role": "user", "content": "Tell me about rivers."}]
CHAT = {"model": "assistant", "messages": MESSAGES, "max_tokens": 4}
TEXT = {"model": "assistant", "prompt": "A river", "max_tokens": 4}
COUNTER = 'moorline_interactions_total{outcome="%s"}'


@pytest.fixture(scope="module")
def served(start_recorded: Callable[..., Served]) -> Served:
    return start_recorded(
        "field", SERVING__SWAP_MODE="reload", SERVING__VLLM_ARGS='["--enable-request-id-headers"]'
    )


@pytest.fixture
def counted(served: Served) -> Callable[[str], float]:
    """How often an outcome was counted in this test."""
    names = ("recorded", "opted_out", "unreadable", "scoring", "beam_search", "failed")
    before = {name: served.server.metric(COUNTER % name) for name in names}
    return lambda name: served.server.metric(COUNTER % name) - before[name]


def post(served: Served, route: str, body: Any, **headers: str) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"content-type": b"application/json"} | {
        name.replace("_", "-"): value.encode() for name, value in headers.items()
    }
    return httpx.post(f"{served.server.url}{route}", content=content, headers=sent, timeout=120)


def recorded(served: Served, response: httpx.Response) -> list[Interaction]:
    """The reply's interactions; waits for a later reply, after which nothing of it can come."""
    assert response.status_code == 200, response.text
    marker = post(served, "/v1/chat/completions", CHAT)
    served.tape.of(marker.json()["id"])
    reply_id = response.json()["id"]
    return [event for event in served.tape.interactions if event.interaction_id == reply_id]


def pseudonym(served: Served, name: str) -> str:
    return Pseudonyms.from_file(served.server.state_dir / "pseudonym.key").pseudonym_of(name)


BODIES = {
    "half a surrogate pair": b'{%s,"user":"Zoe \\ud83d"}',
    "a byte-order mark": b"\xef\xbb\xbf{%s}",
    "a huge number": b'{%s,"seed":' + b"9" * 5000 + b"}",
    "deep nesting": b'{%s,"metadata":{"x":"y"},"z":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "deeper nesting": b'{%s,"z":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "not a number": b'{%s,"z":NaN}',
    "a key twice": b'{%s,"max_tokens":3}',
    "a user that is no name": b'{%s,"safety_identifier":[1]}',
    "bytes that are not UTF-8": b'{%s,"z":"\xe9"}',
    "no JSON": b"rivers %s",
    "a list": b"[{%s}]",
    "nothing": b"",
}


@pytest.mark.parametrize("what", BODIES)
def test_a_body_is_answered_with_and_without_recording_alike(served: Served, what: str) -> None:
    """With a clear opt-out by header the body is of no interest to the recorder."""
    inner = json.dumps({**CHAT, "temperature": 0.0})[1:-1].encode()
    body = BODIES[what] % inner if b"%s" in BODIES[what] else BODIES[what]
    plain = post(served, "/v1/chat/completions", body, x_moorline_no_store="1")
    found = post(served, "/v1/chat/completions", body)
    assert found.status_code == plain.status_code
    assert found.status_code < 500
    if what in ("half a surrogate pair", "a byte-order mark", "not a number", "a key twice"):
        assert found.status_code == 200, found.text
        assert found.json()["choices"] == plain.json()["choices"]


def test_half_a_surrogate_pair_in_a_name_is_recorded_under_that_name(served: Served) -> None:
    inner = json.dumps(CHAT)[1:-1].encode()
    (event,) = recorded(
        served, post(served, "/v1/chat/completions", b'{%s,"user":"Zoe \\ud83d"}' % inner)
    )
    assert event.user == pseudonym(served, "Zoe \ud83d")


def test_a_body_in_pieces_is_read_like_one_in_one_piece(served: Served) -> None:
    body = json.dumps({**CHAT, "store": False, "padding": "x" * 300_000}).encode()
    pieces = (body[start : start + 70_000] for start in range(0, len(body), 70_000))
    response = httpx.post(
        f"{served.server.url}/v1/chat/completions",
        content=pieces,
        headers={"content-type": "application/json"},
        timeout=120,
    )
    assert recorded(served, response) == []


@pytest.mark.parametrize(
    "content_type", ["Application/JSON", "application/json; charset=utf-16", "application/json;x"]
)
def test_an_opt_out_counts_whatever_the_content_type(
    served: Served, counted: Callable[[str], float], content_type: str
) -> None:
    response = post(
        served, "/v1/chat/completions", {**CHAT, "store": False}, content_type=content_type
    )
    assert recorded(served, response) == []
    assert counted("opted_out") == 1


@pytest.mark.parametrize(
    ("route", "body", "name"),
    [
        ("/v1/chat/completions", CHAT | {"safety_identifier": "ana"}, "ana"),
        ("/v1/completions", TEXT | {"safety_identifier": "ana"}, "ana"),
        ("/v1/messages", CHAT | {"metadata": {"user_id": "ana"}}, "ana"),
        ("/v1/responses", {"model": "assistant", "input": "Hi", "max_output_tokens": 4}, "ana"),
    ],
)
def test_a_person_has_a_name_on_every_route(
    served: Served, route: str, body: dict[str, Any], name: str
) -> None:
    if route == "/v1/responses":
        body = body | {"safety_identifier": "ana"}
    (event,) = recorded(served, post(served, route, body))
    assert event.user == pseudonym(served, name)


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_one_request_id_twice_is_two_interactions(served: Served, route: str) -> None:
    bodies = {
        "/v1/chat/completions": CHAT,
        "/v1/completions": TEXT,
        "/v1/responses": {"model": "assistant", "input": "Hi", "max_output_tokens": 4},
    }
    body = bodies[route] | {"request_id": "in-the-body"}
    first = post(served, route, body, x_request_id="gateway 7 é")
    second = post(served, route, body, x_request_id="gateway 7 é")
    events = [*recorded(served, first), *recorded(served, second)]
    assert len({event.interaction_id for event in events}) == 2
    assert {event.client_request_id for event in events} == {"gateway 7 é"}


def test_a_request_id_is_echoed_as_plain_vllm_does(served: Served) -> None:
    response = post(served, "/v1/chat/completions", CHAT, x_request_id="mine-1")
    assert response.headers["x-request-id"] == "mine-1"
    assert "mine-1" not in response.json()["id"]


def test_scoring_is_no_interaction_and_is_answered_as_by_vllm(
    served: Served, counted: Callable[[str], float]
) -> None:
    scored = post(served, "/v1/completions", TEXT | {"echo": True, "max_tokens": 0, "logprobs": 1})
    assert scored.json()["choices"][0]["text"] == "A river"
    assert recorded(served, scored) == []
    harness = post(served, "/v1/completions", TEXT | {"echo": 1, "max_tokens": 1, "logprobs": 1})
    assert recorded(served, harness) == []
    assert counted("scoring") == 2
    rated = post(served, "/v1/feedback", {"id": scored.json()["id"], "value": 1})
    assert rated.status_code == 409
    assert "scoring" in rated.text


def test_a_beam_search_is_counted_once_and_its_rating_is_answered_so(
    served: Served, counted: Callable[[str], float]
) -> None:
    found = post(served, "/v1/completions", TEXT | {"use_beam_search": True, "n": 2})
    assert recorded(served, found) == []
    assert counted("beam_search") == 1
    rated = post(served, "/v1/feedback", {"id": found.json()["id"], "value": 1})
    assert rated.status_code == 409
    assert "beam_search" in rated.text


def test_a_request_id_that_looks_like_a_beam_is_recorded(served: Served) -> None:
    found = post(served, "/v1/completions", TEXT, x_request_id="laser-beam-7")
    (event,) = recorded(served, found)
    assert event.client_request_id == "laser-beam-7"


def test_a_rating_of_a_reply_that_cannot_teach_is_answered_so(served: Served) -> None:
    greedy = post(served, "/v1/chat/completions", CHAT | {"temperature": 0})
    rated = post(served, "/v1/feedback", {"id": greedy.json()["id"], "value": 1})
    assert rated.status_code == 202
    assert rated.json()["not_trainable"] == "greedy_sampling"


def test_a_name_that_was_listed_is_answered_and_one_that_never_was_is_not(served: Served) -> None:
    for name in [model["id"] for model in served.server.get("/v1/models").json()["data"]]:
        response = post(served, "/v1/chat/completions", CHAT | {"model": name})
        assert response.status_code == 200, name
        assert response.json()["model"] == "assistant@v000000"
    for name in ("assistant@v000003", "assistant@v0", "other"):
        response = post(served, "/v1/chat/completions", CHAT | {"model": name})
        assert response.status_code == 404, name


def test_a_given_beginning_is_recorded_and_the_prompt_ends_with_it(
    served: Served, tiny_model_dir: Path
) -> None:
    body = CHAT | {
        "messages": [*MESSAGES, {"role": "assistant", "content": "A river is"}],
        "continue_final_message": True,
        "add_generation_prompt": False,
    }
    (event,) = recorded(served, post(served, "/v1/chat/completions", body))
    assert event.reply_prefix == "A river is"
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    assert tokenizer.decode(event.prompt_token_ids).endswith("assistant\nA river is")


def test_the_batch_route_counts_choices_as_its_reply_does(served: Served) -> None:
    body = CHAT | {"messages": [MESSAGES, [{"role": "user", "content": "And the sea?"}]]}
    response = post(served, "/v1/chat/completions/batch", body)
    assert response.status_code == 200, response.text
    events = wait_for(lambda: [*recorded(served, response)])
    assert sorted(event.choice for event in events) == [0, 1]
    assert len({event.prompt_token_ids for event in events}) == 2
