"""The context of a request: its labels and opt-out, and which policy answered it.

vLLM's handlers pass neither headers nor unknown body fields down to the engine, so a middleware
(innermost, behind authentication) notes them while the handler reads them, and leaves them in a
context variable, where the recorder finds them. It never reads ahead of the handler. On the way in
it gives the request an id of its own, on the way back the policy version to the reply's headers.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import StrEnum

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moorline.events import composed
from moorline.pseudonyms import Pseudonyms
from serving.request_fields import (
    MAX_LABEL_CHARACTERS,
    RequestFields,
    header_text,
    headers_opt_out,
    read_fields,
)

VERSION_HEADER = "x-moorline-policy-version"
TENANT_HEADER = "x-moorline-tenant"
TASK_HEADER = "x-moorline-task"
REQUEST_ID_HEADER = "x-request-id"
DEFAULT_TENANT = "default"
DEFAULT_TASK = "default"

_NOT_GENERATING = frozenset({"/v1/feedback", "/v1/models", "/v1/moorline/status"})
"""Routes under /v1 whose bodies the middleware leaves alone."""


class NotRecorded(StrEnum):
    """Why a reply is no interaction. The value is the metric's label and the answer to a rating."""

    OPTED_OUT = "opted_out"
    """The client asked not to be recorded."""
    UNREADABLE = "unreadable"
    """What the request says of privacy, or of whose it is, cannot be read: taken for a no."""
    SCORING = "scoring"
    """It asked how likely a given text is; nobody reads the token that vLLM generates beside."""
    BEAM_SEARCH = "beam_search"
    """A search over many beams: the reply was not sampled."""
    OTHER_ADAPTER = "other_adapter"
    """An adapter answered that is no policy of the alias."""


@dataclass
class RequestContext:
    """What learning needs to know of one HTTP request."""

    scope: Scope
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Ours, and so unique: vLLM makes the reply's `id` of it."""
    client_request_id: str | None = None
    """The client's own, which it may use again."""
    tenant: str = DEFAULT_TENANT
    task: str = DEFAULT_TASK
    """The kind of request, as its header says; never guessed from the prompt."""
    users: tuple[str, ...] = ()
    """Pseudonyms: keyed hashes of the names that the body gives the person."""
    pseudonym_key: str | None = None
    """Fingerprint of the key that these were made with; None: there are none."""
    not_recorded: NotRecorded | None = NotRecorded.UNREADABLE
    """Unreadable until the body was read."""
    counted: bool = False
    """Whether it was counted as not recorded."""
    streamed: bool = False
    reply_prefixes: tuple[str | None, ...] = ()
    """The beginning of each conversation's reply, where the client gave one."""
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

    @property
    def held_back(self) -> bool:
        """Whether new requests wait."""
        return not self._open.is_set()

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
    """ASGI: ``RequestContext`` for the recorder on the way in, version header on the way out."""

    def __init__(self, app: ASGIApp, admission: Admission, pseudonyms: Pseudonyms | None) -> None:
        """``pseudonyms``: None: nobody's name is recorded."""
        self._app = app
        self._admission = admission
        self._pseudonyms = pseudonyms

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._may_generate(scope):
            await self._app(scope, receive, send)
            return
        context = _context_of(scope)
        opted_out = headers_opt_out(Headers(scope=scope).items())

        async def body_read(body: bytes) -> None:
            self._note_fields(body, opted_out, context)
            await self._admission.admitted()

        async def send_with_version(message: Message) -> None:
            if message["type"] == "http.response.start" and context.policy_version is not None:
                MutableHeaders(scope=message)[VERSION_HEADER] = str(context.policy_version)
            await send(message)

        token = _current.set(context)
        self._admission.in_flight += 1
        try:
            await self._app(context.scope, _listening(receive, body_read), send_with_version)
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

    def _note_fields(self, body: bytes, opted_out: bool, context: RequestContext) -> None:
        try:
            fields = read_fields(body)
            if self._pseudonyms is not None and fields.users:
                users = map(self._pseudonyms.pseudonym_of, fields.users)
                context.users = tuple(dict.fromkeys(users))
                context.pseudonym_key = self._pseudonyms.fingerprint
        except Exception:  # whatever it is, it is vLLM's to refuse or to answer
            context.not_recorded = NotRecorded.OPTED_OUT if opted_out else NotRecorded.UNREADABLE
            return
        context.not_recorded = _why_not_recorded(fields, opted_out)
        context.streamed = fields.streamed
        context.reply_prefixes = fields.reply_prefixes
        if context.client_request_id is None and fields.request_id is not None:
            context.client_request_id = fields.request_id[:MAX_LABEL_CHARACTERS]


def _context_of(scope: Scope) -> RequestContext:
    """What the headers say. The handler's scope has our request id in place of the client's; who
    is further out sees the client's, and echoes it."""
    scope.setdefault("state", {})  # shared, for vLLM's error handlers
    headers = Headers(scope=scope)
    context = RequestContext(scope)
    ours = (REQUEST_ID_HEADER.encode(), context.request_id.encode())
    others = [pair for pair in scope["headers"] if pair[0].lower() != ours[0]]
    context.scope = {**scope, "headers": [*others, ours]}
    context.tenant = _label(headers, TENANT_HEADER) or DEFAULT_TENANT
    context.task = _label(headers, TASK_HEADER) or DEFAULT_TASK
    context.client_request_id = _label(headers, REQUEST_ID_HEADER)
    return context


def _label(headers: Headers, name: str) -> str | None:
    value = headers.get(name)
    return None if value is None else composed(header_text(value))[:MAX_LABEL_CHARACTERS]


def _why_not_recorded(fields: RequestFields, opted_out: bool) -> NotRecorded | None:
    if opted_out or fields.opted_out:
        return NotRecorded.OPTED_OUT
    return NotRecorded.SCORING if fields.only_scores_prompt else None


def _listening(receive: Receive, body_read: Callable[[bytes], Awaitable[None]]) -> Receive:
    """A ``receive`` that hands the whole body over, once, before its reader gets its last part."""
    chunks: list[bytes] | None = []

    async def receive_and_listen() -> Message:
        nonlocal chunks
        message = await receive()
        if chunks is not None and message["type"] == "http.request":
            chunks.append(message.get("body", b""))
            if not message.get("more_body", False):
                body, chunks = b"".join(chunks), None
                await body_read(body)
        return message

    return receive_and_listen
