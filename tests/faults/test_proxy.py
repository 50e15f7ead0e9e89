"""The proxy that the stream's faults are made with does what it says."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest

from tests.proxy import Proxy


@pytest.fixture
def echo() -> Iterator[str]:
    """``host:port`` of a server that sends everything back."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer(end: socket.socket) -> None:
        with end:
            while data := end.recv(65536):
                end.sendall(data)

    def accept() -> None:
        while True:
            try:
                end, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(end,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield f"127.0.0.1:{listening.getsockname()[1]}"
    listening.close()


def open_through(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=5)


def ask(end: socket.socket, word: bytes) -> bytes:
    end.sendall(word)
    answer = b""
    while len(answer) < len(word):
        data = end.recv(65536)
        if not data:
            raise ConnectionResetError
        answer += data
    return answer


def test_faults_are_switched_while_it_runs(echo: str) -> None:
    with Proxy(echo) as proxy, open_through(proxy) as end:
        large = b"x" * 300_000
        assert ask(end, large) == large
        assert proxy.connections == 1

        proxy.delay(0.1, piece_bytes=4)
        begun = time.monotonic()
        assert ask(end, b"12345678") == b"12345678"
        assert time.monotonic() - begun >= 0.3  # two pieces one way, the last of them back too

        proxy.stall()
        end.settimeout(0.3)
        with pytest.raises(TimeoutError):
            ask(end, b"held")
        end.settimeout(5)
        proxy.pass_on()
        assert end.recv(100) == b"held"

        proxy.cut()
        with pytest.raises(ConnectionError):
            ask(end, b"cut")
        with open_through(proxy) as second:
            assert ask(second, b"new") == b"new"

        proxy.hang_up()
        with open_through(proxy) as hung_up_on:
            assert hung_up_on.recv(10) == b""

        proxy.refuse()
        with pytest.raises(ConnectionError):
            open_through(proxy)
        proxy.pass_on()
        with open_through(proxy) as third:
            assert ask(third, b"again") == b"again"


def test_with_nothing_behind_it_clients_are_hung_up_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        unused = taken.getsockname()[1]
    with Proxy(f"127.0.0.1:{unused}") as proxy, open_through(proxy) as end:
        assert end.recv(10) == b""
