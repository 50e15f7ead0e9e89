"""A client that asks for much and reads nothing."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from urllib.parse import urlsplit

from tests.serving.policies import MESSAGES

LONG_TOKENS = 1900


@contextlib.contextmanager
def client_that_does_not_read(url: str) -> Iterator[None]:
    """Asks for a stream that is larger than all buffers on its way."""
    address = urlsplit(url)
    body = json.dumps(
        {
            "model": "assistant",
            "messages": MESSAGES,
            "max_tokens": LONG_TOKENS,
            "ignore_eos": True,
            "stream": True,
            "n": 2,
            "logprobs": True,
            "top_logprobs": 20,
        }
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((address.hostname, address.port))
        client.sendall(head.encode() + body)
        yield
