"""From the bytes of feedback to a ``Feedback``: the same at both doors, HTTP and the topic."""

from __future__ import annotations

import json
from typing import Any

import jiter
from pydantic import ValidationError

from moorline.errors import MoorlineError
from moorline.events import Feedback, Reason


class FeedbackInvalid(MoorlineError):
    """Says nothing that can be used. The message has the remedy and quotes nothing of it."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def read_feedback(value: bytes) -> Feedback:
    """The event in a request's body or a record's value.

    UTF-8 with or without a byte-order mark, or UTF-16 or UTF-32, as RFC 4627 tells them apart.

    Raises:
        FeedbackInvalid: what is wrong with it.
    """
    fields = _fields(value)
    if not isinstance(fields, dict):
        raise FeedbackInvalid(
            Reason.SCHEMA_MISMATCH,
            'feedback must be a JSON object like {"id": "chatcmpl-...", "value": 1}',
        )
    try:
        return Feedback.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error) from None


def read_retraction(key: bytes | None) -> Feedback | None:
    """What a record without a value takes back; None where its key does not say which rating.

    It does as ``<interaction id>/<choice>/<feedback id>``.
    """
    parts = (key or b"").decode("utf-8", "replace").split("/")
    if len(parts) != 3:
        return None
    try:
        return Feedback.model_validate(
            {
                "interaction_id": parts[0],
                "choice": parts[1],
                "feedback_id": parts[2],
                "retracted": True,
            }
        )
    except ValidationError:
        return None


def _fields(value: bytes) -> Any:
    try:
        text = value.decode(json.detect_encoding(value))
        return jiter.from_json(text.encode(), cache_mode="keys", catch_duplicate_keys=True)
    except ValueError as error:
        message = "this is not JSON in UTF-8, UTF-16 or UTF-32: send one JSON object"
        if "duplicate key" in str(error):
            message = "a field is named twice: name it once"
        raise FeedbackInvalid(Reason.MALFORMED_JSON, message) from None


def _refusal(error: ValidationError) -> FeedbackInvalid:
    details = error.errors(include_url=False, include_context=False, include_input=False)
    reason = Reason.SCHEMA_MISMATCH
    if any(detail["loc"] == ("schema_version",) for detail in details):
        reason = Reason.UNSUPPORTED_SCHEMA_VERSION
    places = (
        f"{'.'.join(map(str, detail['loc'])) or 'feedback'}: "
        f"{detail['msg'].removeprefix('Value error, ')}"
        for detail in details
    )
    return FeedbackInvalid(reason, "; ".join(places))
