"""Routes that report the server's state: /healthz, /readyz and /v1/moorline/status.

``/metrics`` needs nothing here: vLLM exposes the process's default Prometheus registry, and
``moorline.metrics`` lives in it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from serving.context import Admission
from serving.engine_watch import EngineWatch
from serving.swap import SwapController
from serving.vllm.models import LivePolicy


@dataclass
class Readiness:
    """Whether this server should get traffic; ``why_not`` is None when it should."""

    why_not: str | None = "starting"


def status_router(
    *,
    alias: str,
    live: LivePolicy,
    swaps: SwapController,
    mode: str,
    admission: Admission,
    readiness: Readiness,
    engine_watch: EngineWatch,
    publisher_stats: Callable[[], Mapping[str, Any]],
) -> APIRouter:
    """The three routes, bound to this process's parts."""
    router = APIRouter()

    @router.head("/healthz", include_in_schema=False)
    @router.get("/healthz", responses={503: {"description": "The engine hangs: start it again"}})
    async def healthz() -> JSONResponse:
        why_not = engine_watch.why_hung()
        return JSONResponse(
            {"alive": why_not is None, "why_not": why_not}, 200 if why_not is None else 503
        )

    @router.head("/readyz", include_in_schema=False)
    @router.get("/readyz", responses={503: {"description": "No traffic now; `why_not` says why"}})
    async def readyz() -> JSONResponse:
        ready = readiness.why_not is None
        return JSONResponse(
            {"ready": ready, "why_not": readiness.why_not, "policy_version": live.version},
            200 if ready else 503,
        )

    @router.get("/v1/moorline/status")
    async def status() -> dict[str, Any]:
        return {
            "alias": alias,
            "policy_version": live.version,
            "policy_name": live.name,
            "swap_mode": mode,
            "ready": readiness.why_not is None,
            "why_not_ready": readiness.why_not,
            "swaps": [record.model_dump(mode="json") for record in swaps.history],
            "publisher": publisher_stats(),
            "pinned": swaps.pinned_version,
            "store_wait_seconds": swaps.reader.waiting_seconds(),
            "refused_versions": {str(version): why for version, why in swaps.refused.items()},
            "requests_in_flight": admission.in_flight,
        }

    return router
