"""Probes ask with GET or HEAD, and connections stay open longer than a balancer keeps its own."""

from __future__ import annotations

import time

import httpx
import pytest

from moorline.settings import Settings
from tests.conftest import Served

BALANCER_SECONDS = 60.0


def test_a_connection_outlives_a_balancers_by_default() -> None:
    assert Settings().serving.keep_alive_seconds > BALANCER_SECONDS


@pytest.mark.slow
def test_an_idle_connection_is_still_there_for_the_next_request(reload_server: Served) -> None:
    limits = httpx.Limits(keepalive_expiry=BALANCER_SECONDS)
    with httpx.Client(base_url=reload_server.server.url, limits=limits) as client:
        client.get("/healthz")
        (before,) = client._transport._pool.connections  # type: ignore[attr-defined]
        time.sleep(7.0)  # uvicorn's own limit is 5
        client.get("/healthz")
        assert client._transport._pool.connections == [before]  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_a_server_answers_head_as_get(reload_server: Served, path: str) -> None:
    head = httpx.head(reload_server.server.url + path)
    got = httpx.get(reload_server.server.url + path)
    assert (head.status_code, head.content) == (got.status_code, b"")
