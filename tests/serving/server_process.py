"""A real `python -m serving` for tests: started, asked, stopped, and nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import openai

from moorline.events import Feedback, Interaction
from moorline.failpoints import FAILPOINTS_VARIABLE
from moorline.settings import StreamSettings
from moorline.store import ArtifactStore
from moorline.stream import Reader, Topic
from serving.harmless_warnings import VLLM_LOG_VARIABLES

START_SECONDS = 600.0
ALIAS = "assistant"


class ServerProcess:
    """One server on a free port, with a state directory of its own."""

    def __init__(self, state_dir: Path, model_dir: Path, settings: Mapping[str, str]) -> None:
        self.state_dir = state_dir
        self.store = ArtifactStore(state_dir / "store")
        self.log = state_dir / "server.log"
        state_dir.mkdir(parents=True, exist_ok=True)
        clean = {
            name: value
            for name, value in os.environ.items()
            if "MOORLINE_" not in name and name not in VLLM_LOG_VARIABLES
        }
        self.environment = clean | {
            "MOORLINE_STATE_DIR": str(state_dir),
            "MOORLINE_MODEL__PATH": str(model_dir),
            "MOORLINE_SERVING__PORT": "0",
            "MOORLINE_SERVING__KV_CACHE_GIB": "0.25",
            "MOORLINE_SERVING__DRAIN_SECONDS": "30",
            **settings,
        }
        self.url = ""
        self.process: subprocess.Popen[bytes] | None = None

    def launch(self, failpoints: str = "", **changes: str) -> None:
        """Start without waiting, for the first time or again in the same state directory.

        Args:
            changes: variables of the environment, for this process only.
        """
        self.url = ""
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serving"],
                env=self.environment | {FAILPOINTS_VARIABLE: failpoints, **changes},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_listening(self) -> None:
        assert self.process is not None
        deadline = time.monotonic() + START_SECONDS
        while not self.url:
            text = self.log.read_text(errors="replace")
            assert self.process.poll() is None, f"the server ended:\n{text[-4000:]}"
            assert time.monotonic() < deadline, f"the server does not listen:\n{text[-4000:]}"
            for line in text.splitlines():
                if line.startswith("moorline serving "):
                    self.url = line.split()[-1]
            time.sleep(0.1)

    def terminate(self, timeout_seconds: float = 120.0) -> int:
        """SIGTERM, as an operator does it; the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_seconds)

    def pause(self) -> None:
        """SIGSTOP: nothing of it runs until ``resume``."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGCONT)

    def group_is_empty(self) -> bool:
        """Whether no process that the server started is left."""
        assert self.process is not None
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return True
        return False

    def stop(self) -> None:
        """End it in any case, with everything it started."""
        assert self.process is not None
        try:
            self.terminate()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def openai(self, **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=120, **options)

    def openai_async(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", timeout=120)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=30)

    def get_authorized(self, path: str, key: str) -> httpx.Response:
        return httpx.get(
            f"{self.url}{path}", headers={"authorization": f"Bearer {key}"}, timeout=30
        )

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=120, **options)

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/v1/moorline/status").json()
        return found

    def wait_version(self, version: int, timeout_seconds: float = 60.0) -> None:
        """Wait until this version is live, and its swap has ended."""

        def served() -> bool:
            status = self.status()
            swapped = [s["version"] for s in status["swaps"] if s["outcome"] == "swapped"]
            return status["policy_version"] == version == (swapped or [0])[-1]

        wait_for(served, timeout_seconds)

    def metric(self, sample: str) -> float:
        """The value of one sample, e.g. ``moorline_pinned``; 0 when it is absent."""
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(f"{sample} "):
                return float(line.split()[-1])
        return 0.0


def wait_for(condition: Callable[[], Any], timeout_seconds: float = 30.0) -> Any:
    """Poll until the condition gives something true, which is returned."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, f"still not true after {timeout_seconds} s"
        time.sleep(0.1)


class Tape:
    """Everything a server has published, by interaction id."""

    def __init__(self, settings: StreamSettings) -> None:
        self._reader = Reader(settings, [Topic.INTERACTIONS, Topic.FEEDBACK])
        self.interactions: list[Interaction] = []
        self.feedback: list[Feedback] = []

    def of(self, reply_id: str, choices: int = 1) -> list[Interaction]:
        """The interactions of one reply, by choice; waits until all of them are there."""

        def found() -> list[Interaction] | None:
            self.read()
            ours = [event for event in self.interactions if event.interaction_id == reply_id]
            return ours if len(ours) >= choices else None

        return sorted(wait_for(found), key=lambda event: event.choice)

    def read(self) -> None:
        for record in self._reader.poll(500, 0.2):
            assert record.value is not None
            if record.topic is Topic.INTERACTIONS:
                self.interactions.append(Interaction.model_validate_json(record.value))
            else:
                self.feedback.append(Feedback.model_validate_json(record.value))

    def close(self) -> None:
        self._reader.close()
