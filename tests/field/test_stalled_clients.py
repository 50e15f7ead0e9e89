"""A client that stops reading is ended after a while; one that reads slowly never is."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from moorline import metrics
from serving.stalled_clients import ending_stalled_clients

ROOT = Path(__file__).parents[2]
STALL_SECONDS = 2.0


class EndlessReply:
    """An ASGI app that sends for ever, and knows whether it was cut off."""

    def __init__(self) -> None:
        self.cut_off = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        hang_up = asyncio.ensure_future(receive())
        while not hang_up.done():
            body = {"type": "http.response.body", "body": bytes(16_384), "more_body": True}
            await send(body)
            await asyncio.sleep(0)
        self.cut_off.set()


@contextlib.asynccontextmanager
async def listening(app: Any) -> AsyncIterator[int]:
    """A real server with our connections; its port."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        lifespan="off",
        http=ending_stalled_clients(STALL_SECONDS),  # type: ignore[arg-type]
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    with socket.create_server(("127.0.0.1", 0)) as bound:
        task = asyncio.create_task(server.serve(sockets=[bound]))
        yield bound.getsockname()[1]
        server.should_exit = True
        await task


async def asking(port: int) -> socket.socket:
    """A client that has asked, and has a small buffer."""
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, ("127.0.0.1", port))
    await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    return client


def stalled() -> float:
    return metrics.STALLED_CLIENTS._value.get()


async def test_a_client_that_reads_nothing_is_ended_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    app, before = EndlessReply(), stalled()
    async with listening(app) as port, asyncio.timeout(60):
        with await asking(port):
            await app.cut_off.wait()
    assert stalled() == before + 1
    events = [getattr(record, "event", None) for record in caplog.records]
    assert events.count("stalled_client_ended") == 1


async def test_a_client_that_reads_slowly_but_steadily_is_never_ended() -> None:
    app, before = EndlessReply(), stalled()
    loop = asyncio.get_running_loop()
    async with listening(app) as port, asyncio.timeout(120):
        with await asking(port) as client:
            until = loop.time() + 6 * STALL_SECONDS
            while loop.time() < until:
                assert await loop.sock_recv(client, 1024)
                await asyncio.sleep(STALL_SECONDS / 20)
            assert not app.cut_off.is_set()
    assert stalled() == before


async def test_a_client_that_has_read_everything_may_be_silent() -> None:
    async def short(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * 1024, "more_body": False})

    before = stalled()
    async with listening(short) as port, httpx.AsyncClient() as client:
        for _ in range(2):  # the same connection
            assert (await client.get(f"http://127.0.0.1:{port}")).status_code == 200
            await asyncio.sleep(2 * STALL_SECONDS)
    assert stalled() == before


SERVER = """
import asyncio
from tests.field.test_stalled_clients import EndlessReply, listening, stalled

async def main():
    app = EndlessReply()
    async with listening(app) as port:
        print(port, flush=True)
        await app.cut_off.wait()
    print(int(stalled()), flush=True)

asyncio.run(main())
"""


async def test_time_in_which_the_server_did_not_run_is_no_stall() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    loop = asyncio.get_running_loop()
    with process, await asking(int(process.stdout.readline())) as client:
        await asyncio.sleep(STALL_SECONDS / 4)  # it has filled the buffers
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(4 * STALL_SECONDS)
        process.send_signal(signal.SIGCONT)
        await asyncio.sleep(STALL_SECONDS / 4)
        for _ in range(1000):  # more than all buffers hold: it was not cut off
            assert await loop.sock_recv(client, 1 << 20)
        client.close()
        assert process.stdout.readline() == "0\n"
