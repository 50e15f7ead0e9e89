"""F34: status, readiness, the reply's header and the metric name one version at any moment."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from moorline.metrics import render
from moorline.store import ArtifactStore
from serving.context import VERSION_HEADER, Admission, RequestMiddleware
from serving.engine_watch import EngineWatch
from serving.parity import ParityError
from serving.status import Readiness, status_router
from serving.strategies import AdapterFlip, SwapStrategy, WeightReload
from serving.swap import SwapController
from serving.vllm.models import LivePolicy, PolicyModels, ServedPolicy

ALIAS = "assistant"
METRIC = 'moorline_policy_version{role="serving"} '


class Server:
    """The parts of a server that know the version, around an engine that only tells its steps."""

    def __init__(self, mode: str, folder: Path) -> None:
        self.live, self.admission = LivePolicy(ALIAS), Admission()
        self.steps: dict[str, set[int]] = {}
        """Step of a swap -> the versions that were named there."""
        self.held: list[asyncio.Task[httpx.Response]] = []
        """Replies that were asked for while weights were exchanged."""
        model_config = SimpleNamespace(max_model_len=9)
        engine = SimpleNamespace(model_config=model_config, renderer=None, input_processor=None)
        self.models = PolicyModels(self.live, engine_client=engine, base_model_paths=[])
        self.strategy: SwapStrategy = (
            AdapterFlip(self, self.models, self.live, max_loras=2, timeout_seconds=60.0)
            if mode == "adapter"
            else WeightReload(self, self.live, folder, self.admission, 60.0)
        )
        swaps = SwapController(
            alias=ALIAS,
            store=ArtifactStore(folder),
            live=self.live,
            strategy=self.strategy,
            generate=None,  # type: ignore[arg-type]
            base_model_digest="0" * 64,
            parity_tolerance_nats=0.1,
        )
        transport = httpx.ASGITransport(app=self._app(swaps, mode))
        self.http = httpx.AsyncClient(transport=transport, base_url="http://test")

    def _app(self, swaps: SwapController, mode: str) -> FastAPI:
        app = FastAPI()
        app.include_router(
            status_router(
                alias=ALIAS,
                live=self.live,
                swaps=swaps,
                mode=mode,
                admission=self.admission,
                readiness=Readiness(None),
                engine_watch=EngineWatch(60.0, lambda: self.admission.held_back),
                publisher_stats=dict,
            )
        )

        @app.get("/metrics")
        async def metrics() -> Response:
            return Response(render())

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> dict[str, str]:
            await request.json()
            return {"model": self.models.model_name(self.models.lora_requests.get(ALIAS))}

        app.add_middleware(
            RequestMiddleware,
            admission=self.admission,
            pseudonyms=None,
        )
        return app

    # --- what the strategies know of an engine ---

    async def add_lora(self, adapter: Any) -> None:
        del adapter
        await self.look("adapter loaded")

    async def collective_rpc(self, method: str, args: Any) -> None:
        del args
        await self.look(method)

    async def pause_generation(self, **_: Any) -> None:
        await self.look("paused")

    async def update_weight_version(self, name: str) -> None:
        await self.look(f"weights of {name}")

    async def resume_generation(self) -> None:
        await self.look("resumed")

    # --- what is named ---

    def ask(self) -> asyncio.Task[httpx.Response]:
        return asyncio.create_task(self.http.post("/v1/chat/completions", json={"messages": []}))

    async def look(self, step: str) -> None:
        """Read all four; a reply that is held back is read when it comes."""
        status = (await self.http.get("/v1/moorline/status")).json()
        ready = (await self.http.get("/readyz")).json()
        text = (await self.http.get("/metrics")).text
        (metric,) = (line for line in text.splitlines() if line.startswith(METRIC))
        named = {status["policy_version"], ready["policy_version"], int(float(metric.split()[-1]))}
        assert status["policy_name"] == self.live.name
        asked = self.ask()
        await asyncio.wait({asked}, timeout=0 if self.admission.held_back else None)
        if asked.done():
            named.add(version_of(asked.result()))
        else:
            self.held.append(asked)
        self.steps[step] = named

    async def swap(self, version: int, check: Any) -> None:
        await self.look("before")
        await self.strategy.swap(ServedPolicy(version, None, Path("somewhere")), check)
        await self.look("after")


def version_of(response: httpx.Response) -> int:
    """What the header says; the reply's ``model`` says the same."""
    version = int(response.headers[VERSION_HEADER])
    assert response.json()["model"] == f"{ALIAS}@v{version:06d}"
    return version


@pytest.mark.parametrize(
    ("mode", "of_the_old", "of_the_new"),
    [
        ("adapter", ["before", "adapter loaded", "checked"], ["after"]),
        (
            "reload",
            ["before", "moorline_prepare", "paused", "moorline_load_prepared"],
            ["weights of assistant@v000007", "resumed", "checked", "after"],
        ),
    ],
)
async def test_all_four_change_together_at_a_swap(
    mode: str, of_the_old: list[str], of_the_new: list[str], tmp_path: Path
) -> None:
    server = Server(mode, tmp_path)

    async def check(_: Any) -> None:
        await server.look("checked")

    await server.swap(7, check)
    expected = [(step, {0}) for step in of_the_old] + [(step, {7}) for step in of_the_new]
    assert list(server.steps.items()) == expected
    for reply in server.held:
        assert version_of(await reply) == 7, "it waited for the new weights, and is named so"
    assert bool(server.held) is (mode == "reload")


@pytest.mark.parametrize("mode", ["adapter", "reload"])
async def test_all_four_go_back_together_when_a_release_is_taken_back(
    mode: str, tmp_path: Path
) -> None:
    server = Server(mode, tmp_path)

    async def check(_: Any) -> None:
        await server.look("checked")
        raise ParityError("it serves something else")

    with pytest.raises(ParityError):
        await server.swap(7, check)
    await server.look("after")
    served_meanwhile = {7} if mode == "reload" else {0}
    assert server.steps["checked"] == served_meanwhile
    assert server.steps["after"] == {0}
    assert all(len(named) == 1 for named in server.steps.values())
