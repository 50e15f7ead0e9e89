"""A client cannot tell Moorline's server from plain vLLM: same tokens, same logprobs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from daemon.broker import free_port
from tests.conftest import Served
from tests.serving.policies import MESSAGES
from tests.serving.server_process import START_SECONDS, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PLAIN = "from vllm.entrypoints.launchers.api_server.entry import main; main()"


@pytest.fixture(scope="module")
def plain_url(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """vLLM as it comes, with its own logprob convention, on the same model."""
    port = free_port("127.0.0.1")
    words = (
        f"--model={tiny_model_dir} --served-model-name=assistant --host=127.0.0.1 --port={port} "
        f"--dtype=float32 --max-model-len=2048 --enforce-eager --kv-cache-memory-bytes={2**28}"
    ).split()
    log = (tmp_path_factory.mktemp("plain") / "server.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-c", PLAIN, *words], stdout=log, stderr=log, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert process.poll() is None, "plain vLLM ended"
        try:
            return httpx.get(f"{url}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    try:
        wait_for(answers, START_SECONDS)
        yield url
    finally:
        process.terminate()
        process.wait(60)
        log.close()


@pytest.fixture(scope="module")
def base_server(reload_server: Served) -> Iterator[Served]:
    """The shared server, on the base model whatever other tests released."""
    store = reload_server.server.store
    store.pin("assistant", 0, "compared with plain vLLM")
    reload_server.server.wait_version(0)
    yield reload_server
    store.unpin("assistant")


def visible(reply: Any) -> Any:
    """What a client can see, without the fields that name the server or the moment."""
    fields = json.loads(reply.model_dump_json())
    for name in ("id", "created", "model", "system_fingerprint"):
        fields.pop(name, None)
    return fields


def logprobs_taken_out(fields: Any) -> tuple[Any, list[float]]:
    """The same fields without any float, and the floats in order."""
    floats: list[float] = []

    def walk(value: Any) -> Any:
        if isinstance(value, float):
            floats.append(value)
            return None
        if isinstance(value, dict):
            return {key: walk(entry) for key, entry in value.items()}
        return [walk(entry) for entry in value] if isinstance(value, list) else value

    return walk(fields), floats


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"logprobs": True, "top_logprobs": 4},
        {"n": 2, "logprobs": True},
        {"extra_body": {"prompt_logprobs": 2}},
        {"logprobs": True, "frequency_penalty": 0.7},
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_the_same_request_gets_the_same_reply(
    base_server: Served, plain_url: str, extra: dict[str, Any], temperature: float
) -> None:
    arguments: dict[str, Any] = {
        "model": "assistant",
        "messages": MESSAGES,
        "max_tokens": 24,
        "seed": 11,
        "temperature": temperature,
        "top_p": 0.9,
    } | extra
    if temperature == 0.0:
        arguments.pop("n", None)  # vLLM refuses several greedy choices
    plain = openai.OpenAI(base_url=f"{plain_url}/v1", api_key="none", timeout=120)
    expected = visible(plain.chat.completions.create(**arguments))
    found = visible(base_server.server.openai().chat.completions.create(**arguments))
    expected_rest, expected_floats = logprobs_taken_out(expected)
    rest, floats = logprobs_taken_out(found)
    assert rest == expected_rest
    assert floats == pytest.approx(expected_floats, abs=1e-4)
