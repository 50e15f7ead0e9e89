"""The server as a systemd service: what it tells the service manager, over a real socket."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moorline.settings import ServingSettings
from serving.engine_watch import EngineWatch
from serving.server import _listen, _notify, bind


async def _empty_app(scope: Any, receive: Any, send: Any) -> None:
    """An ASGI app that answers nothing."""
    if scope["type"] == "lifespan":
        for phase in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{phase}.complete"})


async def _listen_until_terminated(manager: socket.socket, bound: socket.socket) -> list[str]:
    """Run the server between its start and a SIGTERM; what systemd heard."""
    loop = asyncio.get_running_loop()
    parts = SimpleNamespace(
        app=_empty_app,
        live=SimpleNamespace(name="assistant@v000002", version=2),
        readiness=SimpleNamespace(why_not=None),
        admission=SimpleNamespace(in_flight=0),
        engine_watch=EngineWatch(60.0, lambda: False),
    )
    following = asyncio.create_task(asyncio.sleep(600))
    listening = asyncio.create_task(
        _listen(
            parts,
            bound,
            SimpleNamespace(errored=False),
            following,
            ServingSettings(drain_seconds=1.0),
        )  # type: ignore[arg-type]
    )
    heard: list[str] = []

    async def hear(what: str) -> None:
        while what not in heard:
            message = await asyncio.wait_for(loop.sock_recv(manager, 4096), 20)
            heard.extend(message.decode().splitlines())

    await hear("WATCHDOG=1")
    parts.live.name = "assistant@v000003"
    port = bound.getsockname()[1]
    await hear(f"STATUS=serving assistant@v000003 on http://127.0.0.1:{port}")
    os.kill(os.getpid(), signal.SIGTERM)
    await hear("STOPPING=1")
    await listening
    return heard


def test_systemd_hears_ready_what_is_served_watchdog_and_stopping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
        bind("127.0.0.1", 0) as bound,
    ):
        manager.bind(str(tmp_path / "notify"))
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "100000")
        heard = asyncio.run(_listen_until_terminated(manager, bound))
    assert heard[0] == "READY=1"
    assert heard[1].startswith("STATUS=serving assistant@v000002 on ")


@pytest.mark.parametrize("hangs", [False, True])
async def test_the_watchdog_is_fed_while_the_engine_works_and_no_longer(hangs: bool) -> None:
    heard: list[str] = []
    notifier = SimpleNamespace(ping=lambda: heard.append("ping"), status=heard.append)
    watch = SimpleNamespace(report=lambda: None, why_hung=lambda: "it hangs" if hangs else None)
    parts = SimpleNamespace(
        engine_watch=watch,
        readiness=SimpleNamespace(why_not=None),
        live=SimpleNamespace(name="assistant@v000002"),
    )
    notifying = asyncio.create_task(_notify(notifier, parts, "http://here"))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    notifying.cancel()
    status = "serving assistant@v000002 on http://here"
    assert heard == ([status] if hangs else ["ping", status])
