"""POST /v1/feedback: publishes a rating of a reply to the feedback topic.

Any Kafka client may produce the same event to the feedback topic; this route is for clients that
only speak HTTP. vLLM's own middleware has checked the API key before a request gets here.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from moorline import metrics
from moorline.events import Feedback, Reason
from serving.context import NotRecorded

logger = logging.getLogger("moorline.serving.feedback")

WhyUnusable = Callable[[str, int], NotRecorded | Reason | None]
"""Why no rating of this choice of a reply can teach; None where nothing is known against it."""

PublishFeedback = Callable[[Feedback], Awaitable[bool]]
"""Keeps a rating; True once it is safe, False when queue and spool are full."""


def feedback_router(
    publish: PublishFeedback,
    max_bytes: int,
    why_unusable: WhyUnusable = lambda _reply_id, _choice: None,
) -> APIRouter:
    """The route, bound to a publisher and to what the recorder knows of replies."""
    router = APIRouter()

    @router.post("/v1/feedback", status_code=202)
    async def post_feedback(request: Request) -> JSONResponse:
        body = await _read_at_most(request, max_bytes)
        if body is None:
            return _refuse(413, "too_large", f"feedback may have at most {max_bytes} bytes")
        try:
            feedback = parse_feedback(body)
        except ValueError as error:
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


def _why_unusable(feedback: Feedback, why: WhyUnusable) -> NotRecorded | Reason | None:
    """Of the reply, or of the one that it is preferred over."""
    found = why(feedback.interaction_id, feedback.choice)
    if found is None and feedback.over is not None:
        return why(feedback.over, feedback.over_choice)
    return found


def parse_feedback(body: bytes) -> Feedback:
    """The event in a request body; ``id`` is accepted for ``interaction_id``.

    Raises:
        ValueError: with what is wrong, without quoting what was sent.
    """
    try:
        fields: Any = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("the body is not JSON") from None
    if not isinstance(fields, dict):
        raise ValueError('the body must be a JSON object like {"id": "chatcmpl-...", "value": 1}')
    if "id" in fields and "interaction_id" not in fields:
        fields["interaction_id"] = fields.pop("id")
    try:
        return Feedback.model_validate(fields)
    except ValidationError as error:
        places = (
            f"{'.'.join(map(str, entry['loc'])) or 'feedback'}: {entry['msg']}"
            for entry in error.errors(include_input=False, include_url=False, include_context=False)
        )
        raise ValueError("; ".join(places)) from None


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
