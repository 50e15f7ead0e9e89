"""A wish not to be recorded that is unclear is taken for one; only a clear no is a no."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message, Receive, Scope, Send

from moorline.pseudonyms import Pseudonyms
from serving.context import (
    Admission,
    NotRecorded,
    RequestContext,
    RequestMiddleware,
    current_request,
)
from serving.request_fields import BodyUnreadable, read_fields

PSEUDONYMS = Pseudonyms(b"k" * 32)
OPTED_OUT, UNREADABLE = NotRecorded.OPTED_OUT, NotRecorded.UNREADABLE
Header = tuple[bytes, bytes]


class Handler:
    """Reads its request's body as FastAPI does, and keeps what it saw."""

    def __init__(self) -> None:
        self.context: RequestContext | None = None
        self.body = b""
        self.headers: list[Header] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        more = True
        while more:
            message = await receive()
            self.body += message.get("body", b"")
            more = message.get("more_body", False)
        self.context, self.headers = current_request(), scope["headers"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def ask(
    *pieces: bytes,
    headers: tuple[Header, ...] = (),
    pseudonyms: Pseudonyms | None = PSEUDONYMS,
) -> Handler:
    """One request through the middleware, its body in these pieces."""
    handler, admission = Handler(), Admission()
    middleware = RequestMiddleware(handler, admission, pseudonyms)
    messages: Iterator[Message] = iter(
        {"type": "http.request", "body": piece, "more_body": index + 1 < len(pieces)}
        for index, piece in enumerate(pieces)
    )
    scope = {"type": "http", "method": "POST", "path": "/v1/x", "headers": list(headers)}

    async def receive() -> Message:
        return next(messages)

    async def send(_: Message) -> None: ...

    asyncio.run(middleware(scope, receive, send))
    assert admission.in_flight == 0
    assert scope["headers"] == list(headers)  # who is further out still sees the client's
    return handler


def outcome(*pieces: bytes, headers: tuple[Header, ...] = ()) -> NotRecorded | None:
    found = ask(*pieces, headers=headers)
    assert found.context is not None
    assert found.body == b"".join(pieces)
    return found.context.not_recorded


@pytest.mark.parametrize(
    "body",
    [
        b'{"store":false}',
        b'{"store":"false"}',
        b'{"store":"False "}',
        b'{"store":0}',
        b'{"store":0.0}',
        b'{"store":-1}',
        b'{"store":""}',
        b'{"store":"no"}',
        b'{"store":"never"}',
        b'{"store":{}}',
        b'{"store":[true]}',
        b'{"store":true,"store":false}',
        b'{"store":false,"store":true}',
        b'{"Store":false}',
        b'{"st\\u006fre":false}',
        b'{"extra_body":{"store":false}}',
        b'{"no_store":true}',
        b'{"x-moorline-no-store":"1"}',
        b'\xef\xbb\xbf{"store":false}',
        '{"store":false}'.encode("utf-16"),
        '{"store":false}'.encode("utf-32"),
    ],
)
def test_a_body_that_may_mean_no_is_not_recorded(body: bytes) -> None:
    assert outcome(body) is OPTED_OUT


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"store":true}',
        b'{"store":null}',
        b'{"store":"true"}',
        b'{"store":1}',
        b'{"no_store":false}',
        b'{"messages":[{"role":"user","content":"{\\"store\\":false}"}]}',
        b'{"metadata":{"store":"Berlin"}}',
    ],
)
def test_a_body_that_says_nothing_against_it_is_recorded(body: bytes) -> None:
    assert outcome(body) is None


@pytest.mark.parametrize(
    "value", ["1", "true", "on", "y", "YES", "1, 1", "0, 1", "", " ", "maybe", "2", "\xe9", "no!"]
)
def test_a_header_that_may_mean_yes_counts(value: str) -> None:
    header = (b"x-moorline-no-store", value.encode("latin-1"))
    assert outcome(b"{}", headers=(header,)) is OPTED_OUT


@pytest.mark.parametrize("value", ["0", "false", "No", "OFF", " 0 ", "0, false"])
def test_a_header_that_clearly_means_no_does_not(value: str) -> None:
    assert outcome(b"{}", headers=((b"x-moorline-no-store", value.encode()),)) is None


def test_of_repeated_headers_one_wish_is_enough() -> None:
    name = b"x-moorline-no-store"
    assert outcome(b"{}", headers=((name, b"0"), (name, b"1"))) is OPTED_OUT
    assert outcome(b"{}", headers=((b"x_moorline_no_store", b"1"),)) is OPTED_OUT


@pytest.mark.parametrize(
    "content_type",
    [None, b"Application/JSON", b"application/json; charset=latin-1", b"text/plain", b"\xff"],
)
def test_no_content_type_hides_a_wish_or_a_name(content_type: bytes | None) -> None:
    headers = () if content_type is None else ((b"content-type", content_type),)
    assert outcome(b'{"store":false}', headers=headers) is OPTED_OUT
    context = ask(b'{"user":"ana"}', headers=headers).context
    assert context is not None
    assert context.users == (PSEUDONYMS.pseudonym_of("ana"),)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"rivers",
        b"[1]",
        b'{"z":"\xe9"}',
        b'{"z":' + b"9" * 5000 + b"}",
        b'{"z":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"safety_identifier":[1]}',
        b'{"user":true}',
        b'{"metadata":{"user_id":{"name":"ana"}}}',
    ],
)
def test_what_cannot_be_read_is_handed_on_and_not_recorded(body: bytes) -> None:
    with pytest.raises(BodyUnreadable):
        read_fields(body)
    assert outcome(body) is UNREADABLE


def test_a_body_that_the_handler_did_not_read_is_not_recorded() -> None:
    assert RequestContext({}).not_recorded is UNREADABLE


@given(body=st.binary(max_size=60) | st.text(max_size=40).map(str.encode), cut=st.integers(0, 60))
def test_no_bytes_are_changed_and_none_raise(body: bytes, cut: int) -> None:
    assert ask(body[:cut], body[cut:]).body == body


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)


@given(
    fields=st.dictionaries(
        st.sampled_from(["store", "user", "metadata", "messages", "input", "echo", "max_tokens"]),
        json_values,
    ),
    more=st.sampled_from([{}, {"continue_final_message": True}]),
)
def test_any_json_is_read_or_unreadable(fields: dict[str, Any], more: dict[str, Any]) -> None:
    try:
        found = read_fields(json.dumps(fields | more).encode())
    except BodyUnreadable:
        return
    store = fields.get("store")
    if store is False or store == 0:
        assert found.opted_out
    if store is None or store is True:
        assert not found.opted_out


async def test_the_middleware_does_not_read_ahead_of_the_handler() -> None:
    """A route that answers without its body answers at once, however slowly the body comes."""
    answered = asyncio.Event()

    async def refuses(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        answered.set()

    async def never() -> Message:
        raise AssertionError("nobody asked for the body")

    async def send(_: Message) -> None: ...

    middleware = RequestMiddleware(refuses, Admission(), PSEUDONYMS)
    await middleware(
        {"type": "http", "method": "POST", "path": "/v1/x", "headers": []}, never, send
    )
    assert answered.is_set()
