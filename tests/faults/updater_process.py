"""A whole `python -m updater` for tests: a process of its own on a real broker, quickly started."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from kafka import KafkaProducer
from torch.nn.modules.module import register_module_forward_pre_hook

from moorline.events import Feedback
from moorline.failpoints import FAILPOINTS_VARIABLE
from moorline.settings import StreamSettings
from moorline.store import ArtifactStore
from moorline.stream import Topic, topic_name
from tests.updater.learning.fixtures import ALIAS, recorded, some_sequences
from updater import __main__ as updater_main
from updater.learning.policy import Policy
from updater.ledger import Ledger

BATCH = 4
SETTINGS = {
    "MODEL__MAX_LENGTH_TOKENS": "256",
    "STREAM__PARTITIONS": "1",
    "STREAM__RETENTION_SECONDS": "10000000000",
    "STREAM__CONNECT_TIMEOUT_SECONDS": "2",
    "LEARNING__HORIZON_SECONDS": "10000000000",
    "LEARNING__BATCH_EXAMPLES": str(BATCH),
    "LEARNING__MIN_BATCH_EXAMPLES": str(BATCH),
    "LEARNING__LORA_RANK": "4",
    "LEARNING__LORA_ALPHA": "8",
    "LEARNING__LEARNING_RATE": "0.002",
    "LEARNING__THREADS": "1",
    "BOUND__LIVE_KL_NATS": "0.5",
    "GATE__LIVE_KL_MEAN_NATS": "1",
    "GATE__LIVE_KL_MAX_PROMPT_NATS": "5",
    "GATE__PERPLEXITY_RISE_SHARE": "1",
    "GATE__PERPLEXITY_RISE_SHARE_FROM_ANCHOR": "1",
    "UPDATER__POLL_SECONDS": "0.1",
    "UPDATER__NICENESS": "0",
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def environment(
    model_dir: Path, state_dir: Path, stream: StreamSettings, port: int, **settings: str
) -> dict[str, str]:
    """An updater's environment; ``settings`` without the prefix."""
    given = SETTINGS | settings
    return {f"MOORLINE_{name}": value for name, value in given.items()} | {
        "MOORLINE_MODEL__PATH": str(model_dir),
        "MOORLINE_STATE_DIR": str(state_dir),
        "MOORLINE_STREAM__BOOTSTRAP": str(stream.bootstrap),
        "MOORLINE_STREAM__TOPIC_PREFIX": stream.topic_prefix,
        "MOORLINE_UPDATER__PORT": str(port),
    }


def _run(variables: dict[str, str], log: str, deadly: Sequence[int]) -> None:
    if deadly:
        _die_of(deadly)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(variables)
    sys.exit(updater_main.main())


def _die_of(tokens: Sequence[int]) -> None:
    """From now on a forward pass over these tokens ends the process, as bad native code does."""
    wanted = ",".join(map(str, tokens))

    def kill_at_tokens(module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, torch.nn.Embedding):
            for row in given[0].tolist():
                if wanted in ",".join(map(str, row)):
                    os.kill(os.getpid(), signal.SIGKILL)

    register_module_forward_pre_hook(kill_at_tokens)


class UpdaterProcess:
    """One updater process; its state directory outlives it."""

    _processes = multiprocessing.get_context("forkserver")

    def __init__(
        self,
        model_dir: Path,
        state_dir: Path,
        stream: StreamSettings,
        failpoint: str = "",
        service: Mapping[str, str] | None = None,
        deadly: Sequence[int] = (),
        **settings: str,
    ) -> None:
        """
        Args:
            service: what a service manager puts into the environment.
            deadly: token ids; a forward pass over them kills the process.
        """
        self._processes.set_forkserver_preload([__name__])  # torch is imported once for all
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = state_dir.with_name(f"{state_dir.name}-{port}.log")
        variables = environment(model_dir, state_dir, stream, port, **settings)
        variables |= {FAILPOINTS_VARIABLE: failpoint, **(service or {})}
        self.process = self._processes.Process(
            target=_run, args=(variables, str(self.log), tuple(deadly))
        )
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=10, trust_env=False)

    def why_not_ready(self) -> str | None:
        """None when ready; "down" when nobody answers."""
        try:
            return str(why) if (why := self.get("/readyz").json()["why_not"]) else None
        except httpx.TransportError:
            return "down"

    def wait(self, condition: Callable[[], Any], seconds: float = 90.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive(), self.log_text()
            assert time.monotonic() < deadline, self.log_text()
            time.sleep(0.05)

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for_log(self, words: str) -> None:
        self.wait(lambda: words in self.log_text())

    def wait_version(self, version: int) -> None:
        def reached() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return bool(self.get("/status").json().get("live_version") == version)
            return False

        self.wait(reached)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def stop(self, seconds: float = 60.0) -> int:
        """Send SIGTERM; returns the exit code."""
        self.signal(signal.SIGTERM)
        return self.end(seconds)

    def end(self, seconds: float = 60.0) -> int:
        self.process.join(seconds)
        assert self.process.exitcode is not None, self.log_text()
        return self.process.exitcode

    def kill(self) -> None:
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


class Conversations:
    """Replies of the base model and thumbs for them, a batch at a time."""

    def __init__(self, model_dir: Path, number: int) -> None:
        policy = Policy(model_dir, rank=4, alpha=8, seed=0)
        sequences = some_sequences(number * BATCH)
        self.tokens = [sequence.completion_token_ids for sequence in sequences]
        self.replies = [
            recorded(policy, sequence, f"chatcmpl-{index}").to_bytes()
            for index, sequence in enumerate(sequences)
        ]
        self.thumbs = [
            Feedback(
                feedback_id=f"fb-{index}",
                interaction_id=f"chatcmpl-{index}",
                value=1 if index % 2 else -1,
                rater=f"rater-{index}",
                created_at=1_750_000_000.0,
            ).to_bytes()
            for index in range(len(sequences))
        ]

    def send(self, stream: StreamSettings, batch: int) -> None:
        """Publish the replies and thumbs of one batch."""
        producer = KafkaProducer(bootstrap_servers=stream.bootstrap)
        for topic, values in ((Topic.INTERACTIONS, self.replies), (Topic.FEEDBACK, self.thumbs)):
            for index in range(batch * BATCH, (batch + 1) * BATCH):
                producer.send(topic_name(stream, topic), values[index], partition=0).get(30)
        producer.close()


def outcome(state_dir: Path) -> dict[str, Any]:
    """Fates, offsets, releases and the hashes of their weights."""
    store = ArtifactStore(state_dir / "store")
    with Ledger.open_readonly(state_dir / "ledger.sqlite") as reader:
        assert reader.audit() == []
        assert reader.unpublished() == []
        releases = reader.releases()
        assert [store.release(ALIAS, version) for version in store.versions(ALIAS)] == releases
        return {
            "accounting": reader.accounting().as_dict(),
            "offsets": {(topic, part): at for (topic, part), (_, at) in reader.offsets().items()},
            "weights": [release.artifact_digest for release in releases],
        }
