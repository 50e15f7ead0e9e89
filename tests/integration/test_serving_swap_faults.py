"""A server that dies, or is told to stop, in the middle of a swap: it comes back on an approved
version and says which, and nothing is left behind.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from signal import SIGKILL, SIGTERM
from typing import Any

import httpx
import pytest

from moorline.durable import TEMPORARY_PREFIX
from tests.serving.policies import MESSAGES, Lineage
from tests.serving.server_process import ServerProcess, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

POINTS = {
    "reload": ("swap.paused", "swap.reloaded"),
    "adapter": ("swap.verified", "swap.adapter_loaded"),
}
LONG_TOKENS = 400
HELD_SECONDS = 3.0


@pytest.mark.parametrize("mode", POINTS)
def test_a_swap_that_is_cut_off_leaves_an_approved_version(
    mode: str,
    server_factory: Callable[..., ServerProcess],
    tiny_model_dir: Path,
    tmp_path: Path,
) -> None:
    server = server_factory(f"cut-{mode}", SERVING__SWAP_MODE=mode)
    lineage = Lineage(server, tiny_model_dir, tmp_path)
    releases = [lineage.prepare() for _ in (*POINTS[mode], "SIGTERM")]

    for version, point in enumerate(POINTS[mode]):
        # A start on a release passes the point once.
        start(server, f"{point}=kill@{1 if version == 0 else 2}")
        assert serves(server, version)
        server.store.record_release(releases[version])
        assert server.process is not None
        assert server.process.wait(60) == -SIGKILL, point
        wait_for(server.group_is_empty)
        assert temporary_files(server) == []

    version = len(POINTS[mode])
    start(server, f"{POINTS[mode][-1]}=sleep:{HELD_SECONDS}@2")
    assert serves(server, version)
    with ThreadPoolExecutor() as threads:
        reply = threads.submit(ask, server, LONG_TOKENS)
        wait_for(lambda: server.status()["requests_in_flight"] == 1)
        server.store.record_release(releases[version])
        wait_for(lambda: is_held(server))
        assert server.process is not None
        server.process.send_signal(SIGTERM)
        assert reply.result().json()["usage"]["completion_tokens"] == LONG_TOKENS
    assert server.terminate() == 0
    wait_for(server.group_is_empty)
    assert temporary_files(server) == []


def start(server: ServerProcess, failpoints: str) -> None:
    server.launch(failpoints)
    server.wait_listening()


def ask(server: ServerProcess, max_tokens: int) -> httpx.Response:
    body: dict[str, Any] = {"messages": MESSAGES, "max_tokens": max_tokens, "ignore_eos": True}
    return server.post("/v1/chat/completions", body)


def serves(server: ServerProcess, version: int) -> bool:
    """Whether everything that names the version names this one."""
    name = f"assistant@v{version:06d}"
    response = ask(server, 4)
    assert response.json()["model"] == name
    assert response.headers["x-moorline-policy-version"] == str(version)
    assert server.get("/readyz").json() == {
        "ready": True,
        "why_not": None,
        "policy_version": version,
    }
    assert server.status()["policy_name"] == name
    listening = [line for line in server.log.read_text().splitlines() if "listening" in line]
    return any(f"version={version}" in line for line in listening)


def is_held(server: ServerProcess) -> bool:
    """The failpoint's sleep, in which nothing answers."""
    try:
        httpx.get(f"{server.url}/healthz", timeout=0.5)
    except httpx.ReadTimeout:
        return True
    return False


def temporary_files(server: ServerProcess) -> list[Path]:
    return list(server.state_dir.rglob(f"*{TEMPORARY_PREFIX}*"))
