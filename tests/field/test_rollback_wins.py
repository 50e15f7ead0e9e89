"""A rollback is served whatever running replies hold: adapter slots, or blocked sends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.serving.deaf_clients import LONG_TOKENS, client_that_does_not_read
from tests.serving.policies import Lineage, one_reply, read_stream
from tests.serving.server_process import ServerProcess, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

STALL_SECONDS = 20.0
SLOTS = 2


@pytest.fixture(scope="module")
def server(server_factory: Callable[..., ServerProcess]) -> ServerProcess:
    server = server_factory(
        "rollback",
        SERVING__SWAP_MODE="adapter",
        SERVING__MAX_LORAS=str(SLOTS),
        SERVING__STREAM_STALL_SECONDS=str(STALL_SECONDS),
    )
    server.launch()
    server.wait_listening()
    return server


@pytest.fixture
def lineage(server: ServerProcess, lines: Lineage) -> Iterator[Lineage]:
    """Two releases, the second live, none pinned."""
    yield lines
    server.store.unpin("assistant")


@pytest.fixture(scope="module")
def lines(
    server: ServerProcess, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Lineage:
    return Lineage(server, tiny_model_dir, tmp_path_factory.mktemp("lineage"))


def roll_back(server: ServerProcess, version: int) -> None:
    """As an operator does it; it returns when the version is served."""
    done = subprocess.run(
        [sys.executable, "-m", "daemon.cli", "rollback", "--to", str(version)],
        env=os.environ
        | {
            "MOORLINE_STATE_DIR": str(server.state_dir),
            "MOORLINE_SERVING__PORT": str(urlsplit(server.url).port),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def waits_for_a_slot(server: ServerProcess, version: int) -> bool:
    lines = server.log.read_text(errors="replace").splitlines()
    return any("swap_waits_for_slot" in line and f"version={version}" in line for line in lines)


async def test_a_rollback_passes_a_release_that_waits_for_running_replies(
    server: ServerProcess, lineage: Lineage
) -> None:
    client = server.openai_async()
    first = await asyncio.to_thread(lineage.release)
    await asyncio.to_thread(server.wait_version, first)
    second, third = [await asyncio.to_thread(lineage.prepare) for _ in range(2)]
    on_first = asyncio.create_task(read_stream(client, LONG_TOKENS))
    await asyncio.to_thread(wait_for, lambda: server.status()["requests_in_flight"] == 1)
    lineage.announce(second)
    await asyncio.to_thread(server.wait_version, second.version)
    on_second = asyncio.create_task(read_stream(client, LONG_TOKENS))
    await asyncio.to_thread(wait_for, lambda: server.status()["requests_in_flight"] == 2)
    lineage.announce(third)
    await asyncio.to_thread(wait_for, lambda: waits_for_a_slot(server, third.version))
    for version in (first, 0):  # an adapter that is still loaded; none at all
        # At once, without the command: the replies must not end before.
        server.store.pin("assistant", version, "test")
        await asyncio.to_thread(server.wait_version, version)
    assert third.version not in [swap["version"] for swap in server.status()["swaps"]]
    assert (await on_first).finish_reason == (await on_second).finish_reason == "length"
    server.store.unpin("assistant")
    await asyncio.to_thread(server.wait_version, third.version)
    assert one_reply(server).model.endswith(f"{third.version:06d}")


def test_a_rollback_is_served_under_clients_that_do_not_read_and_they_are_ended(
    server: ServerProcess, lineage: Lineage
) -> None:
    prepared = [lineage.prepare() for _ in range(SLOTS + 2)]
    ended = server.metric("moorline_stalled_clients_total")
    with contextlib.ExitStack() as clients:
        for count, release in enumerate(prepared[:SLOTS], 1):
            server.wait_version(lineage.announce(release))
            clients.enter_context(client_that_does_not_read(server.url))
            wait_for(lambda: server.status()["requests_in_flight"] == count)  # noqa: B023
        for release in prepared[SLOTS:]:
            lineage.announce(release)
        roll_back(server, 0)
        assert server.status()["policy_version"] == 0
        assert server.status()["requests_in_flight"] == SLOTS
        wait_for(lambda: server.status()["requests_in_flight"] == 0, 300)
    assert server.metric("moorline_stalled_clients_total") == ended + SLOTS
    server.store.unpin("assistant")
    server.wait_version(prepared[-1].version)
