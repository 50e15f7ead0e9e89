"""What a request says about itself reaches the recorder, and its body still reaches the handler."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request

from moorline.pseudonyms import Pseudonyms
from serving.context import (
    Admission,
    NotRecorded,
    RequestContext,
    RequestMiddleware,
    current_request,
)

PSEUDONYMS = Pseudonyms(b"k" * 32)


def app_with(seen: list[RequestContext | None], admission: Admission | None = None) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Any:
        body = await request.json()  # before the handler's own code, as FastAPI does it
        context = current_request()
        if context is not None:
            context.policy_version = 42
        seen.append(context)
        return body

    app.add_middleware(
        RequestMiddleware,
        admission=admission or Admission(),
        pseudonyms=PSEUDONYMS,
    )
    return app


async def post(app: FastAPI, body: Any, **headers: str) -> httpx.Response:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return await client.post("/v1/chat/completions", json=body, headers=names)


async def test_the_handler_gets_the_body_and_the_client_the_version() -> None:
    seen: list[RequestContext | None] = []
    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
    response = await post(app_with(seen), body, x_moorline_tenant="blue", x_moorline_task="sql")
    assert response.json() == body
    assert response.headers["x-moorline-policy-version"] == "42"
    (context,) = seen
    assert context is not None
    assert (context.tenant, context.task) == ("blue", "sql")
    assert (context.streamed, context.not_recorded) == (True, None)


async def test_tenant_and_task_have_defaults_and_a_length() -> None:
    seen: list[RequestContext | None] = []
    app = app_with(seen)
    await post(app, {})
    await post(app, {}, x_moorline_tenant="t" * 900, x_moorline_task="t" * 900)
    assert [(one.tenant, one.task) for one in seen if one] == [
        ("default", "default"),
        ("t" * 200, "t" * 200),
    ]


@pytest.mark.parametrize(
    ("body", "headers", "out"),
    [
        ({"store": False}, {}, True),
        ({"store": True}, {}, False),
        ({"store": None}, {}, False),
        ({}, {"x_moorline_no_store": "1"}, True),
        ({}, {"x_moorline_no_store": "TRUE"}, True),
        ({}, {"x_moorline_no_store": "0"}, False),
        ({"store": True}, {"x_moorline_no_store": "1"}, True),
    ],
)
async def test_either_way_of_opting_out_counts(body: Any, headers: Any, out: bool) -> None:
    seen: list[RequestContext | None] = []
    await post(app_with(seen), body, **headers)
    assert seen[0] is not None
    assert (seen[0].not_recorded is NotRecorded.OPTED_OUT) is out


async def test_a_user_is_a_pseudonym_that_needs_the_key() -> None:
    seen: list[RequestContext | None] = []
    await post(app_with(seen), {"user": "bob"})
    assert seen[0] is not None
    assert (
        seen[0].users
        == (PSEUDONYMS.pseudonym_of("bob"),)
        != (Pseudonyms(b"x" * 32).pseudonym_of("bob"),)
    )
    assert "bob" not in seen[0].users[0]


async def test_a_body_that_is_no_object_is_the_handlers_to_refuse() -> None:
    seen: list[RequestContext | None] = []
    assert (await post(app_with(seen), [1, 2])).json() == [1, 2]


async def test_a_closed_door_holds_new_requests_until_it_opens() -> None:
    admission = Admission()
    admission.hold()
    seen: list[RequestContext | None] = []
    waiting = asyncio.create_task(post(app_with(seen, admission), {}))
    await asyncio.sleep(0.05)
    assert not seen
    admission.resume()
    assert (await waiting).status_code == 200
    assert admission.in_flight == 0


def test_the_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "state" / "pseudonym.key"
    first = Pseudonyms.from_file(path).pseudonym_of("bob")
    assert Pseudonyms.from_file(path).pseudonym_of("bob") == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(list(path.parent.iterdir())) == 1


async def test_nobodys_name_is_recorded_where_the_setting_says_so() -> None:
    seen: list[RequestContext | None] = []
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> None:
        await request.body()
        seen.append(current_request())

    app.add_middleware(RequestMiddleware, admission=Admission(), pseudonyms=None)
    await post(app, {"user": "bob", "stream": True})
    assert seen[0] is not None
    assert seen[0].users == ()
    assert seen[0].pseudonym_key is None
    assert seen[0].streamed
