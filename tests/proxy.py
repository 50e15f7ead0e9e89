"""A TCP proxy whose faults are switched while it runs: pass on, delay, stall, cut, hang up, refuse.

Standard library only, one thread of its own. In front of a broker, have the broker advertise
``proxy.address``; a client that asks for metadata goes around the proxy otherwise.

    with Proxy("127.0.0.1:9092") as proxy:
        proxy.delay(seconds=0.5, piece_bytes=4096)
        ...
        proxy.pass_on()
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any

_CHUNK_BYTES = 64 * 1024


class Proxy:
    """Between clients and one upstream address, both directions alike.

    Args:
        upstream: ``host:port``; nothing needs to listen there yet.
        port: to listen on, on loopback; 0 takes any free one, at once, so that ``address`` can be
            given away before ``start``.
    """

    def __init__(self, upstream: str, port: int = 0) -> None:
        host, _, number = upstream.rpartition(":")
        self._upstream = (host, int(number))
        self._listening = socket.create_server(("127.0.0.1", port))
        self.port = int(self._listening.getsockname()[1])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._ends: set[asyncio.StreamWriter] = set()
        self._delay_seconds = 0.0
        self._piece_bytes = _CHUNK_BYTES
        self._flowing = asyncio.Event()
        self._hanging_up = False
        self.connections = 0
        """Accepted so far."""

    @property
    def address(self) -> str:
        """Where clients come."""
        return f"127.0.0.1:{self.port}"

    @property
    def upstream_port(self) -> int:
        return self._upstream[1]

    # --- what it does from now on, also to the connections that are open -------------------------

    def pass_on(self) -> None:
        """No fault. Connections that were cut stay cut."""
        self._do(self._set, 0.0, _CHUNK_BYTES, True)

    def delay(self, seconds: float, piece_bytes: int = _CHUNK_BYTES) -> None:
        """Each piece of at most so many bytes waits so long: latency, and with small pieces a link
        that trickles ``piece_bytes / seconds`` bytes a second.
        """
        self._do(self._set, seconds, piece_bytes, True)

    def stall(self) -> None:
        """Connections stay open, new ones are accepted, and nothing comes through."""
        self._do(self._set, 0.0, _CHUNK_BYTES, False)

    def cut(self) -> None:
        """Every open connection is reset; new ones are treated as before."""
        self._do(self._cut)

    def hang_up(self) -> None:
        """Every open connection is reset, and whoever comes is let in and hung up on: what a load
        balancer without a server behind it does.
        """
        self._do(self._hang_up)

    def refuse(self) -> None:
        """Nobody listens any more, and every open connection is reset."""
        self._do(self._refuse)

    # --- life ------------------------------------------------------------------------------------

    def start(self) -> Proxy:
        self._thread.start()
        self.pass_on()
        return self

    def close(self) -> None:
        """Idempotent."""
        if self._loop.is_closed():
            return
        if self._thread.is_alive():
            self.refuse()
            self._do(self._end_tasks)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._listening.close()
        self._loop.close()

    def __enter__(self) -> Proxy:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the proxy's own thread ------------------------------------------------------------------

    def _do(self, work: Callable[..., Coroutine[Any, Any, None]], *arguments: Any) -> None:
        asyncio.run_coroutine_threadsafe(work(*arguments), self._loop).result(10)

    async def _set(self, delay_seconds: float, piece_bytes: int, flowing: bool) -> None:
        self._delay_seconds, self._piece_bytes = delay_seconds, piece_bytes
        self._hanging_up = False
        if flowing:
            self._flowing.set()
        else:
            self._flowing.clear()
        if self._server is None:
            if self._listening.fileno() < 0:  # after `refuse`
                self._listening = socket.create_server(("127.0.0.1", self.port))
            self._server = await asyncio.start_server(self._connect, sock=self._listening)

    async def _cut(self) -> None:
        for end in list(self._ends):
            end.transport.abort()

    async def _hang_up(self) -> None:
        self._hanging_up = True
        await self._cut()

    async def _refuse(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._cut()

    async def _end_tasks(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self._hanging_up:
            writer.close()
            return
        self._ends.add(writer)
        far_writer: asyncio.StreamWriter | None = None
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._upstream)
            self._ends.add(far_writer)
            pumps = [
                asyncio.create_task(self._pump(reader, far_writer)),
                asyncio.create_task(self._pump(far_reader, writer)),
            ]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for pump in pumps:
                    pump.cancel()
        except OSError:
            pass  # nothing listens upstream: the client is hung up on
        finally:
            for end in (writer, far_writer):
                if end is not None:
                    self._ends.discard(end)
                    end.close()  # what was read from the other side still goes out

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(_CHUNK_BYTES):
                while data:
                    piece, data = data[: self._piece_bytes], data[self._piece_bytes :]
                    await asyncio.sleep(self._delay_seconds)
                    await self._flowing.wait()
                    writer.write(piece)
                    await writer.drain()
