"""Assembles vLLM's app with Moorline's parts. What each part does is in its own module."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from vllm.entrypoints.launchers.api_server import app_state
from vllm.entrypoints.launchers.app import build_app

from moorline.pseudonyms import Pseudonyms
from moorline.settings import Settings
from moorline.store import ArtifactStore
from serving.context import Admission, RequestMiddleware
from serving.engine_watch import EngineWatch
from serving.event_publisher import EventPublisher
from serving.feedback import feedback_router
from serving.recorder import Recorder
from serving.route_allowlist import RouteAllowlist
from serving.status import Readiness, status_router
from serving.strategies import AdapterFlip, SwapStrategy, WeightReload
from serving.swap import SwapController
from serving.unusable_replies import UnusableReplies
from serving.vllm.models import LivePolicy, PolicyModels
from serving.vllm.responses import give_own_ids


@dataclass(frozen=True)
class Parts:
    """A server, assembled."""

    app: FastAPI
    live: LivePolicy
    recorder: Recorder
    swaps: SwapController
    admission: Admission
    readiness: Readiness
    engine_watch: EngineWatch


async def assemble(
    settings: Settings,
    engine: Any,
    args: Any,
    *,
    mode: str,
    model_dir: Path,
    base_model_digest: str,
    pseudonyms: Pseudonyms | None,
    events: EventPublisher,
) -> Parts:
    """Build the app around a started engine; nothing listens yet."""
    live, admission, readiness = LivePolicy(settings.alias), Admission(), Readiness()
    tasks = await engine.get_supported_tasks()
    app = build_app(args, tasks, engine.model_config)
    app.user_middleware.append(  # last: innermost, behind authentication
        Middleware(RequestMiddleware, admission=admission, pseudonyms=pseudonyms)
    )
    app.user_middleware.insert(0, Middleware(RouteAllowlist))
    app.middleware_stack = app.build_middleware_stack()  # build_app has built it already
    unusable_replies = UnusableReplies()
    stall_seconds = settings.serving.engine_stall_seconds
    engine_watch = EngineWatch(stall_seconds, lambda: admission.held_back)
    recorder = Recorder(
        engine,
        settings.alias,
        events.publish_interaction,
        lambda: live.version,
        unusable_replies,
        engine_watch,
    )
    recorder.install()
    models = await _init_state(engine, app, args, tasks, live)
    if app.state.openai_serving_responses is not None:
        give_own_ids(app.state.openai_serving_responses)
    strategy: SwapStrategy
    timeout = settings.serving.swap_timeout_seconds
    if mode == "adapter":
        strategy = AdapterFlip(engine, models, live, settings.serving.max_loras, timeout)
    else:
        strategy = WeightReload(engine, live, model_dir, admission, timeout)
    await engine.update_weight_version(live.name)
    swaps = SwapController(
        alias=settings.alias,
        store=ArtifactStore(settings.store_dir),
        live=live,
        strategy=strategy,
        generate=recorder.plain_generate,
        base_model_digest=base_model_digest,
        parity_tolerance_nats=settings.serving.parity_tolerance_nats,
    )
    app.include_router(
        feedback_router(
            events.publish_feedback, settings.serving.feedback_max_bytes, unusable_replies.why
        )
    )
    app.include_router(
        status_router(
            alias=settings.alias,
            live=live,
            swaps=swaps,
            mode=mode,
            admission=admission,
            readiness=readiness,
            engine_watch=engine_watch,
            publisher_stats=events.stats,
        )
    )
    return Parts(app, live, recorder, swaps, admission, readiness, engine_watch)


async def _init_state(
    engine: Any, app: FastAPI, args: Any, tasks: Any, live: LivePolicy
) -> PolicyModels:
    """vLLM's own state, with our model names in the one place where they are made."""
    original = app_state.OpenAIServingModels
    app_state.OpenAIServingModels = functools.partial(PolicyModels, live)
    try:
        await app_state.init_app_state(engine, app.state, args, tasks)
    finally:
        app_state.OpenAIServingModels = original
    models = app.state.openai_serving_models
    if not isinstance(models, PolicyModels):
        raise TypeError("vLLM no longer makes its model names in init_app_state")
    return models
