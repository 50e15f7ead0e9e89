"""A tiny status server for a process whose work is not HTTP, and the client that reads one.

``/metrics`` Prometheus, ``/healthz`` alive and ``/readyz`` ready (200 or 503), ``/status`` JSON. It
answers on its own threads, so a long training step does not make the process look dead; a step that
hangs does, where the process says so (``alive``).
"""

from __future__ import annotations

import errno
import json
import logging
import math
import re
import socket
import socketserver
import ssl
import sys
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from moorline import metrics
from moorline.errors import MoorlineError
from moorline.tls import trusting

logger = logging.getLogger("moorline.http")


class PortUnavailable(MoorlineError):
    """The address cannot be listened on; the line says which and what to do."""


class ServerUnavailable(MoorlineError):
    """Nothing useful answers at an address; the line says where and why.

    Attributes:
        why: the cause alone, for a page that shows the address already.
    """

    def __init__(self, line: str, why: str = "") -> None:
        super().__init__(line)
        self.why = why or line


class StatusServer:
    """Serve one process's state until ``close``.

    Args:
        status: what ``/status`` says; called on the server's threads, must not block.
        ready: None when ready, else why not, in a few words.
        alive: None when alive, else why not: it should be killed and started again.
        port: 0 for any free one; see ``port`` after construction.

    Raises:
        PortUnavailable: the port is taken or the address is not ours.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        status: Callable[[], Mapping[str, Any]],
        ready: Callable[[], str | None] = lambda: None,
        alive: Callable[[], str | None] = lambda: None,
        setting: str = "updater.port",
    ) -> None:
        self._status = status
        self._ready = ready
        self._alive = alive
        try:
            self._server = _Server((host, port), self._handler())
        except OSError as error:
            raise PortUnavailable(port_problem(host, port, error, setting)) from None
        self.host = host
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="status-server", daemon=True
        )

    @property
    def url(self) -> str:
        return base_url(self.host, self.port)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Stop answering and free the port."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def page(self, path: str) -> tuple[int, str, bytes]:
        """HTTP status, content type and body of one path."""
        match path:
            case "/healthz":
                return _verdict("alive", self._alive())
            case "/readyz":
                return _verdict("ready", self._ready())
            case "/status":
                body = json.dumps(_finite(self._status()), default=str)
                return 200, "application/json", f"{body}\n".encode()
            case "/metrics":
                return 200, metrics.CONTENT_TYPE, metrics.render()
        return 404, "text/plain", b"try /status, /metrics, /healthz or /readyz\n"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 30

            def do_GET(self) -> None:
                self._answer()

            def do_HEAD(self) -> None:  # as probes and balancers ask
                self._answer(with_body=False)

            def _answer(self, with_body: bool = True) -> None:
                try:
                    code, content_type, body = server.page(urlsplit(self.path).path)
                except Exception:  # a page that cannot be made must not look like a dead process
                    logger.exception(
                        "the status page failed; the process itself goes on",
                        extra={"event": "status_page_failed", "path": urlsplit(self.path).path},
                    )
                    code, content_type, body = 500, "text/plain", b"internal error, see the log\n"
                self.send_response(code)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                del format, args  # one line per probe would bury the log

        return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def server_bind(self) -> None:
        """As the base class does, without asking DNS for our own name (it may take seconds)."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """Log a client that went away at DEBUG, anything else as an error."""
        del request, client_address
        error = sys.exc_info()[1]
        if isinstance(error, ConnectionError | TimeoutError):
            logger.debug(
                "a client of the status page went away before its answer",
                extra={"event": "status_client_gone", "error": type(error).__name__},
            )
        else:
            logger.error(
                "a connection to the status page failed; the process itself goes on",
                exc_info=sys.exc_info(),
                extra={"event": "status_connection_failed"},
            )


def _verdict(question: str, why_not: str | None) -> tuple[int, str, bytes]:
    body = json.dumps({question: why_not is None, "why_not": why_not})
    return (200 if why_not is None else 503), "application/json", f"{body}\n".encode()


def base_url(host: str, port: int, *, https: bool = False) -> str:
    """Where a client on this machine reaches a server that listens on ``host``."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, host)
    if ":" in reachable and not reachable.startswith("["):
        reachable = f"[{reachable}]"
    return f"{'https' if https else 'http'}://{reachable}:{port}"


def port_problem(host: str, port: int, error: OSError, setting: str) -> str:
    """One line: why an address cannot be listened on, and which setting to change."""
    if error.errno == errno.EADDRINUSE:
        return f"port {port} on {host} is busy: stop what uses it, or set {setting} to another"
    if error.errno == errno.EACCES:
        return f"port {port} needs privileges: set {setting} to one above 1023"
    return f"cannot listen on {host}:{port} ({error.strerror}): check the address, set {setting}"


def request_json(
    method: str,
    url: str,
    *,
    body: Any = None,
    api_key: str | None = None,
    certificate: Path | None = None,
    timeout_seconds: float = 5.0,
) -> Any:
    """The JSON that an HTTP server of ours answers with.

    Args:
        certificate: over HTTPS, the server must have exactly this one; None: one that the system
            trusts (``SSL_CERT_FILE`` names other authorities), for the name in the address.

    Raises:
        CertificateInvalid: ``certificate`` cannot be read.
        ServerUnavailable: no answer in time, an error status, or no JSON.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    verify: ssl.SSLContext | bool = url.startswith("https:")
    if verify:
        verify = trusting(certificate) if certificate else ssl.create_default_context()
    try:
        reply = httpx.request(
            method,
            url,
            json=body,
            headers=headers,
            timeout=timeout_seconds,
            trust_env=False,
            verify=verify,
        )
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        why = "no answer in time" if isinstance(error, httpx.TimeoutException) else str(error)
        why = re.sub(r"^\[Errno -?\d+\] ", "", why)
        raise ServerUnavailable(
            f"nothing answers at {url} ({why}): is it running there?", why
        ) from None
    if reply.status_code == 401:
        raise ServerUnavailable(f"{url} wants an API key: set MOORLINE_SERVING__API_KEY")
    try:
        answer = reply.json()
    except ValueError:
        answer = None
    if reply.status_code >= 400 or answer is None:
        raise ServerUnavailable(f"{url} answered {reply.status_code}{_reason(answer)}")
    return answer


def _reason(answer: Any) -> str:
    """What an error body says, whichever of the usual shapes it has."""
    for key in ("error", "detail", "message"):
        if isinstance(answer, Mapping) and key in answer:
            return _reason(answer[key])
    if isinstance(answer, str):
        return f": {answer}"
    if isinstance(answer, list) and answer and isinstance(answer[0], Mapping):
        return f": {answer[0].get('msg', 'invalid')}"
    return ""


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not finite becomes null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
