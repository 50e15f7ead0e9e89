"""Schemathesis reads the server's OpenAPI, sends what it allows and what it does not, and judges.

No answer is a 5xx that is not declared, and each has the status, the type and the shape that are.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    negative_data_rejection,
    positive_data_acceptance,
)

from moorline.settings import StreamSettings
from moorline.store import ArtifactStore
from moorline.stream import Publisher
from serving.context import Admission, NotRecorded
from serving.engine_watch import EngineWatch
from serving.event_publisher import EventPublisher
from serving.feedback import feedback_router
from serving.status import Readiness, status_router
from serving.swap import SwapController
from serving.vllm.models import LivePolicy

NOBODY = "127.0.0.1:9"
JUDGED_HERE = [positive_data_acceptance, negative_data_rejection]
"""The schema is no rule over several fields (a score needs its range), so 422 may answer what it
allows; and a field that the kind of feedback does not use may hold anything."""


def why_unusable(reply_id: str, _choice: int) -> NotRecorded | None:
    """Replies with an id of odd length were not recorded."""
    return NotRecorded.SCORING if len(reply_id) % 2 else None


@pytest.fixture(scope="module")
def openapi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[schemathesis.BaseSchema]:
    """Our routes, with a publisher that keeps feedback on disk: its broker is away."""
    folder = tmp_path_factory.mktemp("openapi")
    publisher = Publisher(StreamSettings(bootstrap=NOBODY), folder / "spool")
    publisher.start()
    events, live, admission = EventPublisher(publisher), LivePolicy("assistant"), Admission()
    swaps = SwapController(
        alias="assistant",
        store=ArtifactStore(folder / "store"),
        live=live,
        strategy=SimpleNamespace(),  # type: ignore[arg-type]  # nothing is swapped here
        generate=None,  # type: ignore[arg-type]
        base_model_digest="0" * 64,
        parity_tolerance_nats=0.1,
    )
    app = FastAPI()
    app.include_router(feedback_router(events.publish_feedback, 65_536, why_unusable))
    app.include_router(
        status_router(
            alias="assistant",
            live=live,
            swaps=swaps,
            mode="reload",
            admission=admission,
            readiness=Readiness(None),
            engine_watch=EngineWatch(60.0, lambda: admission.held_back),
            publisher_stats=events.stats,
        )
    )
    yield schemathesis.openapi.from_asgi("/openapi.json", app)
    publisher.close()


OPERATIONS = [
    ("/v1/feedback", "POST"),
    ("/healthz", "GET"),
    ("/readyz", "GET"),
    ("/v1/moorline/status", "GET"),
]


def test_these_are_all_operations(openapi: schemathesis.BaseSchema) -> None:
    found = [result.ok() for result in openapi.get_all_operations()]
    assert {(one.path, one.method.upper()) for one in found} == set(OPERATIONS)


@pytest.mark.parametrize(
    ("path", "method", "mode"),
    [
        *((path, method, "positive") for path, method in OPERATIONS),
        ("/v1/feedback", "POST", "negative"),  # a GET has nothing that could be wrong
    ],
)
def test_every_answer_is_one_that_the_openapi_declares(
    openapi: schemathesis.BaseSchema, path: str, method: str, mode: str
) -> None:
    strategy = openapi[path][method].as_strategy(generation_mode=GenerationMode(mode))

    @settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=HealthCheck)
    @given(case=strategy)
    def answers(case: schemathesis.Case) -> None:
        case.validate_response(case.call(), excluded_checks=JUDGED_HERE)

    answers()


@pytest.mark.parametrize(
    ("feedback", "status"),
    [
        ({"interaction_id": "even", "value": 1.0}, 202),
        ({"interaction_id": "odd", "value": 1.0}, 409),
        ({"interaction_id": "even", "value": "excellent"}, 422),
        ({"interaction_id": "even", "value": 1.0, "comment": "long" * 20_000}, 413),
    ],
)
def test_each_answer_to_feedback_has_the_shape_that_the_openapi_declares(
    openapi: schemathesis.BaseSchema, feedback: dict[str, object], status: int
) -> None:
    """What is generated above need not come by each of them."""
    case = openapi["/v1/feedback"]["POST"].Case(body=feedback, media_type="application/json")
    response = case.call()
    assert response.status_code == status
    case.validate_response(response, excluded_checks=JUDGED_HERE)
