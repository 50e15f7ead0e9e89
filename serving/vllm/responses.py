"""Ids of /v1/responses: vLLM takes them from the body, where the other routes take a header."""

from __future__ import annotations

from typing import Any

from serving.context import current_request


def give_own_ids(serving: Any) -> None:
    """Let each reply of vLLM's handler have an id of ours, whatever its body asks for."""
    plain = serving.create_responses

    async def create_responses(request: Any, raw_request: Any = None) -> Any:
        context = current_request()
        if context is not None:
            request.request_id = f"resp_{context.request_id}"
        return await plain(request, raw_request)

    serving.create_responses = create_responses
