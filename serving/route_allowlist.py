"""An allow-list of routes in front of vLLM's app.

vLLM registers routes that its API key does not guard and that answer prompts (``/invocations``) or
change the engine (``/scale_elastic_ep``, and more in development mode). Whatever is not named here
does not exist, also what a later vLLM may add.
"""

from __future__ import annotations

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

GUARDED_PREFIX = "/v1/"
"""Behind the API key, if there is one."""
OPEN_PATHS = frozenset({"/health", "/healthz", "/readyz", "/metrics", "/ping", "/version"})
"""Routes for probes and monitoring, without a key; none shows or takes a prompt or a reply."""


class RouteAllowlist:
    """ASGI: 404 for every path that is not on the list."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        known = path.startswith(GUARDED_PREFIX) or path.rstrip("/") in OPEN_PATHS
        if scope["type"] == "lifespan" or (scope["type"] == "http" and known):
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            message = f"no such route; there are {GUARDED_PREFIX}* and {sorted(OPEN_PATHS)}"
            await JSONResponse({"error": {"message": message, "code": 404}}, 404)(
                scope, receive, send
            )
        else:  # websockets: nothing here speaks them
            await send({"type": "websocket.close", "code": 1008})
