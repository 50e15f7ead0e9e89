"""POST /v1/feedback takes what can be used and says clearly what cannot."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from moorline.events import Feedback
from moorline.feedback import FeedbackInvalid, read_feedback
from serving.feedback import feedback_router

MAX_BYTES = 1000


class Shelf:
    """Keeps ratings in memory; ``full`` makes it refuse."""

    def __init__(self) -> None:
        self.kept: list[Feedback] = []
        self.full = False

    async def put(self, event: Feedback) -> bool:
        if not self.full:
            self.kept.append(event)
        return not self.full


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


async def post(shelf: Shelf, **content: Any) -> httpx.Response:
    app = FastAPI()
    app.include_router(feedback_router(shelf.put, MAX_BYTES))
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post("/v1/feedback", **content)


@pytest.mark.parametrize("id_field", ["id", "interaction_id"])
async def test_a_thumb_is_taken_under_either_name_of_the_id(shelf: Shelf, id_field: str) -> None:
    response = await post(shelf, json={id_field: "chatcmpl-1", "value": 1, "choice": 2})
    assert response.status_code == 202
    (event,) = shelf.kept
    assert response.json() == {"feedback_id": event.feedback_id}
    assert (event.key, event.value) == ("chatcmpl-1/2", 1)


@pytest.mark.parametrize(
    "body",
    [
        {"kind": "thumbs", "value": -1},
        {"kind": "score", "value": 4, "score_min": 1, "score_max": 5},
        {"kind": "correction", "text": "A glacier is a river of ice."},
        {"kind": "preference", "over": "chatcmpl-2"},
        {"kind": "preference", "choice": 1, "over": "chatcmpl-1", "over_choice": 0},
        {"kind": "signal", "signal": "copied"},
    ],
)
async def test_every_kind_is_taken_as_it_was_sent(shelf: Shelf, body: dict[str, Any]) -> None:
    assert (await post(shelf, json={"id": "chatcmpl-1", **body})).status_code == 202
    (event,) = shelf.kept
    assert event.model_dump(include=set(body)) == body


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"value": 1}, "interaction_id"),
        ({"id": "a", "value": 3}, "thumbs"),
        ({"id": "a", "kind": "score", "value": 9, "score_min": 1, "score_max": 5}, "score"),
        ({"id": "a", "kind": "correction", "text": "  "}, "correction needs text"),
        ({"id": "a", "kind": "preference", "over": "a"}, "another reply"),
        ({"id": "a", "kind": "signal"}, "signal needs its name"),
        ({"id": "not an id", "value": 1}, "interaction_id"),
        ({"id": "a", "value": 1, "schema_version": "9.0"}, "schema version"),
        ([1], "JSON object"),
    ],
)
async def test_a_bad_event_is_refused_with_the_rule_it_broke(
    shelf: Shelf, body: Any, word: str
) -> None:
    response = await post(shelf, json=body)
    assert response.status_code == 422
    assert word in response.json()["error"]["message"]
    assert not shelf.kept


async def test_what_is_not_json_is_refused(shelf: Shelf) -> None:
    assert (await post(shelf, content=b"thumbs up!")).status_code == 422


async def test_too_large_a_body_is_refused(shelf: Shelf) -> None:
    body = {"id": "a", "kind": "correction", "text": "x" * MAX_BYTES}
    assert (await post(shelf, json=body)).status_code == 413


async def test_a_full_spool_is_said_and_not_hidden(shelf: Shelf) -> None:
    shelf.full = True
    response = await post(shelf, json={"id": "a", "value": -1})
    assert response.status_code == 503
    assert "retry" in response.json()["error"]["message"]


def test_a_refusal_never_quotes_what_was_sent() -> None:
    with pytest.raises(FeedbackInvalid) as refusal:
        read_feedback(b'{"id": "secret words", "kind": "hidden", "value": "private"}')
    assert "secret" not in str(refusal.value)
    assert "hidden" not in str(refusal.value)
    assert "private" not in str(refusal.value)
