"""POST /v1/feedback: publishes a rating of a reply to the feedback topic.

Any Kafka client may produce the same event to the feedback topic; this route is for clients that
only speak HTTP. vLLM's own middleware has checked the API key before a request gets here.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from moorline import metrics
from moorline.events import Feedback, Reason, json_schemas
from moorline.feedback import FeedbackInvalid, read_feedback
from serving.context import NotRecorded

logger = logging.getLogger("moorline.serving.feedback")

WhyUnusable = Callable[[str, int], NotRecorded | Reason | None]
"""Why no rating of this choice of a reply can teach; None where nothing is known against it."""

PublishFeedback = Callable[[Feedback], Awaitable[bool]]
"""Keeps a rating; True once it is safe, False when queue and spool are full."""


class Kept(BaseModel):
    """It is kept, and is read with its topic: `moorline explain` says what became of it."""

    feedback_id: str
    not_trainable: Reason | None = None
    """Why nothing will be learned from it; absent where nothing is known against it."""


class RefusalDetail(BaseModel):
    """Why, and what to do."""

    message: str
    type: str
    code: int


class Refusal(BaseModel):
    """Nothing was kept."""

    error: RefusalDetail


_REFUSALS: dict[int | str, dict[str, Any]] = {
    409: {"model": Refusal, "description": "The reply was not recorded: nothing can come of it"},
    413: {"model": Refusal, "description": "Larger than `serving.feedback_max_bytes`"},
    422: {"model": Refusal, "description": "Not feedback; the message has the remedy"},
    503: {"model": Refusal, "description": "Queue and spool are full: send it again later"},
}


def feedback_router(
    publish: PublishFeedback,
    max_bytes: int,
    why_unusable: WhyUnusable = lambda _reply_id, _choice: None,
) -> APIRouter:
    """The route, bound to a publisher and to what the recorder knows of replies."""
    router = APIRouter()

    @router.post(
        "/v1/feedback",
        status_code=202,
        response_model=Kept,
        responses=_REFUSALS,
        openapi_extra={"requestBody": _request_body()},
    )
    async def post_feedback(request: Request) -> JSONResponse:
        """Rate a reply, or take a rating back."""
        body = await _read_at_most(request, max_bytes)
        if body is None:
            return _refuse(413, "too_large", f"feedback may have at most {max_bytes} bytes")
        try:
            feedback = read_feedback(body)
        except FeedbackInvalid as error:
            return _refuse(422, "invalid", str(error))
        unusable = _why_unusable(feedback, why_unusable)
        if isinstance(unusable, NotRecorded):
            return _refuse(409, "not_recorded", f"the reply was not recorded: {unusable}")
        if not await publish(feedback):
            return _refuse(
                503, "unavailable", "feedback cannot be kept now (queue and spool are full): retry"
            )
        metrics.FEEDBACK_RECEIVED.labels("accepted").inc()
        answer = {"feedback_id": feedback.feedback_id}
        if unusable is not None:
            answer["not_trainable"] = unusable
        return JSONResponse(answer, status_code=202)

    return router


def _request_body() -> dict[str, Any]:
    """For OpenAPI: the schema of the topic, on its own (FastAPI collects no ``$defs`` of ours)."""
    schema = json_schemas()["feedback.v1"]
    kinds = schema.pop("$defs")["FeedbackKind"]
    kind = schema["properties"]["kind"]
    kind["anyOf"] = [kinds, {"type": "null"}]
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _why_unusable(feedback: Feedback, why: WhyUnusable) -> NotRecorded | Reason | None:
    """Why its reply, or the one that it is preferred over, is not usable; None: both are."""
    found = why(feedback.interaction_id, feedback.choice)
    if found is None and feedback.over is not None:
        return why(feedback.over, feedback.over_choice)
    return found


async def _read_at_most(request: Request, max_bytes: int) -> bytes | None:
    """The body, or None as soon as it is known to be longer."""
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > max_bytes:
        return None
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            return None
    return bytes(body)


def _refuse(code: int, outcome: str, message: str) -> JSONResponse:
    metrics.FEEDBACK_RECEIVED.labels(outcome).inc()
    return JSONResponse({"error": {"message": message, "type": outcome, "code": code}}, code)
