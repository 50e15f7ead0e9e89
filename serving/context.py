"""The context of a request: its labels and opt-out, and which policy answered it.

vLLM's handlers pass neither headers nor unknown body fields down to the engine, so a middleware
(innermost, behind authentication) reads them once and leaves them in a context variable, where the
recorder finds them. On the way back it adds the policy version to the reply's headers.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moorline.pseudonyms import Pseudonyms

VERSION_HEADER = "x-moorline-policy-version"
NO_STORE_HEADER = "x-moorline-no-store"
TENANT_HEADER = "x-moorline-tenant"
TASK_HEADER = "x-moorline-task"
DEFAULT_TENANT = "default"
DEFAULT_TASK = "default"
MAX_LABEL_CHARACTERS = 200

_YES = frozenset({"1", "true", "yes"})
_NOT_GENERATING = frozenset({"/v1/feedback", "/v1/models", "/v1/moorline/status"})
"""Routes under /v1 whose bodies the middleware leaves alone."""


@dataclass
class RequestContext:
    """What learning needs to know of one HTTP request."""

    scope: Scope
    tenant: str = DEFAULT_TENANT
    task: str = DEFAULT_TASK
    """The kind of request, as its header says; never guessed from the prompt."""
    user: str | None = None
    """A pseudonym: keyed hash of the body's `user`."""
    opted_out: bool = False
    streamed: bool = False
    started_at: float = field(default_factory=time.time)
    """Unix seconds."""
    policy_version: int | None = None
    """The version that the reply's `model` field names; set when the handler asks for the name."""

    @property
    def reply_id(self) -> str | None:
        """The `id` that the client gets, as vLLM's handler decided it; None before that."""
        metadata = self.scope.get("state", {}).get("request_metadata")
        reply_id = getattr(metadata, "request_id", None)
        return reply_id if isinstance(reply_id, str) else None


_current: contextvars.ContextVar[RequestContext | None] = contextvars.ContextVar(
    "moorline_request", default=None
)


def current_request() -> RequestContext | None:
    """The HTTP request that this code runs for, if any."""
    return _current.get()


class Admission:
    """Counts running requests, and can hold new ones back while weights are exchanged.

    A request that came in during the exchange would be named after the old policy and answered by
    the new one; held for that fraction of a second, it is named right.
    """

    def __init__(self) -> None:
        self.in_flight = 0
        self._open = asyncio.Event()
        self._open.set()

    def hold(self) -> None:
        """Let new requests wait until ``resume``."""
        self._open.clear()

    def resume(self) -> None:
        """Let new requests in, and those that waited."""
        self._open.set()

    async def admitted(self) -> None:
        """Return when a new request may go on."""
        await self._open.wait()


class RequestMiddleware:
    """ASGI: body and headers in, ``RequestContext`` for the recorder, version header out."""

    def __init__(
        self, app: ASGIApp, admission: Admission, pseudonyms: Pseudonyms, record_user: bool
    ) -> None:
        self._app = app
        self._admission = admission
        self._pseudonyms = pseudonyms
        self._record_user = record_user

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._may_generate(scope):
            await self._app(scope, receive, send)
            return
        context = RequestContext(scope)
        headers = Headers(scope=scope)
        context.tenant = headers.get(TENANT_HEADER, DEFAULT_TENANT)[:MAX_LABEL_CHARACTERS]
        context.task = headers.get(TASK_HEADER, DEFAULT_TASK)[:MAX_LABEL_CHARACTERS]
        context.opted_out = headers.get(NO_STORE_HEADER, "").strip().lower() in _YES
        if "json" in headers.get("content-type", "json"):
            body, receive = await _read_body(receive)
            self._read_fields(body, context)

        async def send_with_version(message: Message) -> None:
            if message["type"] == "http.response.start" and context.policy_version is not None:
                MutableHeaders(scope=message)[VERSION_HEADER] = str(context.policy_version)
            await send(message)

        await self._admission.admitted()
        token = _current.set(context)
        self._admission.in_flight += 1
        try:
            await self._app(scope, receive, send_with_version)
        finally:
            self._admission.in_flight -= 1
            _current.reset(token)

    @staticmethod
    def _may_generate(scope: Scope) -> bool:
        return (
            scope["type"] == "http"
            and scope["method"] == "POST"
            and scope["path"].startswith("/v1/")
            and scope["path"] not in _NOT_GENERATING
        )

    def _read_fields(self, body: bytes, context: RequestContext) -> None:
        """Take `store`, `user` and `stream`; vLLM rejects a body that cannot be read."""
        try:
            fields = json.loads(body)
        except ValueError:
            return
        if not isinstance(fields, dict):
            return
        context.opted_out |= fields.get("store") is False
        context.streamed = fields.get("stream") is True
        user: Any = fields.get("user")
        if self._record_user and isinstance(user, str) and user:
            context.user = self._pseudonyms.pseudonym_of(user)


async def _read_body(receive: Receive) -> tuple[bytes, Receive]:
    """The whole body, and a ``receive`` that gives it once more before it goes on as before."""
    chunks: list[bytes] = []
    messages: list[Message] = []
    while True:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request":
            break
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            break
    replay = iter(messages)

    async def receive_again() -> Message:
        for message in replay:
            return message
        return await receive()

    return b"".join(chunks), receive_again
