"""SIGSTOP and SIGCONT of a whole server in the middle of a reply: it goes on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from tests.serving.policies import LONG_TOKENS, begin_streams, one_reply
from tests.serving.server_process import ServerProcess

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STEP_LIMIT_SECONDS = 2
PAUSE_SECONDS = 8.0


async def test_a_server_that_was_stopped_during_a_reply_finishes_it(
    server_factory: Callable[..., ServerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", str(STEP_LIMIT_SECONDS))
    server = server_factory("paused", SERVING__SWAP_MODE="reload")
    server.launch()
    await asyncio.to_thread(server.wait_listening)
    [reply] = await begin_streams(server.openai_async(), 1)
    server.pause()
    await asyncio.sleep(PAUSE_SECONDS)
    server.resume()
    assert (await reply).tokens == LONG_TOKENS
    assert one_reply(server).choices
    assert server.process is not None
    assert server.process.poll() is None
