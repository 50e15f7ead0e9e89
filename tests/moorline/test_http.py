"""The status server answers while its process works, and its client explains what went wrong."""

from __future__ import annotations

import logging
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from moorline.http import PortUnavailable, ServerUnavailable, StatusServer, base_url, request_json


class Process:
    def __init__(self) -> None:
        self.why_not: str | None = "starting"
        self.state: dict[str, Any] = {"kl": float("nan"), "counts": (1, 2)}

    def status(self) -> dict[str, Any]:
        if not self.state:
            raise RuntimeError("no state")
        return self.state


@pytest.fixture
def process() -> Process:
    return Process()


@pytest.fixture
def server(process: Process) -> Iterator[StatusServer]:
    running = StatusServer("127.0.0.1", 0, status=process.status, ready=lambda: process.why_not)
    running.start()
    yield running
    running.close()


def test_alive_is_not_ready(server: StatusServer, process: Process) -> None:
    assert httpx.get(f"{server.url}/healthz").status_code == 200
    assert httpx.get(f"{server.url}/readyz").status_code == 503
    assert httpx.get(f"{server.url}/readyz").json() == {"ready": False, "why_not": "starting"}
    process.why_not = None
    assert httpx.get(f"{server.url}/readyz").status_code == 200


def test_status_is_json_whatever_the_numbers(server: StatusServer) -> None:
    assert request_json("GET", f"{server.url}/status") == {"kl": None, "counts": [1, 2]}


def test_metrics_page_is_prometheus_text(server: StatusServer) -> None:
    page = httpx.get(f"{server.url}/metrics?x=1")
    assert page.headers["content-type"].startswith("text/plain")
    assert "moorline_updates_total" in page.text


def test_broken_status_does_not_end_the_server(server: StatusServer, process: Process) -> None:
    process.state = {}
    with pytest.raises(ServerUnavailable, match="answered 500"):
        request_json("GET", f"{server.url}/status")
    assert httpx.get(f"{server.url}/healthz").status_code == 200


def test_client_that_resets_is_one_debug_line(
    server: StatusServer, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG, logger="moorline.http")
    with socket.create_connection((server.host, server.port)) as client:
        client.sendall(b"GET /status")
        # Lingering for 0 s makes close() send RST instead of FIN.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    deadline = time.monotonic() + 30
    while not caplog.records and time.monotonic() < deadline:
        time.sleep(0.01)
    [record] = [record for record in caplog.records if record.name == "moorline.http"]
    assert (record.levelno, vars(record)["event"]) == (logging.DEBUG, "status_client_gone")
    assert record.exc_info is None
    assert "Traceback" not in capsys.readouterr().err
    assert httpx.get(f"{server.url}/healthz").status_code == 200


def test_unknown_page_is_404(server: StatusServer) -> None:
    with pytest.raises(ServerUnavailable, match="answered 404"):
        request_json("GET", f"{server.url}/nothing")


def test_busy_port_is_one_line_that_names_the_setting(server: StatusServer) -> None:
    with pytest.raises(PortUnavailable, match=r"is busy: .* updater\.port"):
        StatusServer("127.0.0.1", server.port, status=dict)
    with pytest.raises(PortUnavailable, match="check the address"):
        StatusServer("192.0.2.1", 0, status=dict)


def test_closing_frees_the_port(process: Process) -> None:
    first = StatusServer("127.0.0.1", 0, status=process.status)
    first.start()
    first.close()
    with socket.create_server(("127.0.0.1", first.port)):
        pass
    never_started = StatusServer("127.0.0.1", 0, status=process.status)
    never_started.close()


def test_nobody_there_says_where_and_why() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(
        ServerUnavailable, match=rf"nothing answers at .*:{port}/status \(.*refused\)"
    ):
        request_json("GET", f"http://127.0.0.1:{port}/status")


def test_silence_is_a_time_out() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/status"
        with pytest.raises(ServerUnavailable, match="no answer in time"):
            request_json("GET", url, timeout_seconds=0.2)


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:1"),
        ("0.0.0.0", "http://127.0.0.1:1"),
        ("::", "http://[::1]:1"),
        ("fe80::1", "http://[fe80::1]:1"),
        ("example.org", "http://example.org:1"),
    ],
)
def test_url_reaches_what_listens(host: str, url: str) -> None:
    assert base_url(host, 1) == url


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/status", "/nothing"])
def test_head_says_what_get_says_without_its_body(server: StatusServer, path: str) -> None:
    with httpx.Client() as client:  # one connection: a body would be taken for the next answer
        for _ in range(2):
            head = client.head(server.url + path)
            assert head.content == b""
            got = client.get(server.url + path)
            assert head.status_code == got.status_code
            assert head.headers["content-type"] == got.headers["content-type"]
