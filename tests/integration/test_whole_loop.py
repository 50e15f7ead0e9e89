"""`moorline up` as a newcomer runs it: broker, vLLM server and updater, from reply to release.

A random two-layer model has nothing to learn; what is shown here is that every part does its part.
That a real model learns is shown by `make demo`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from kafka import KafkaProducer

from moorline.store import ArtifactStore
from tests.serving.make_release import raw_logprobs, reference_model
from tests.serving.server_process import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

BATCH = 6
CLOSE_NATS = 0.001
"""How near the served logprobs are to those of the same weights outside vLLM, in float32."""
SETTINGS = {
    "serving.port": "0",
    "updater.port": "0",
    "serving.kv_cache_gib": "0.25",
    "serving.drain_seconds": "10",
    "learning.batch_examples": str(BATCH),
    "learning.min_batch_examples": str(BATCH),
    "learning.learning_rate": "0.003",
    "learning.lora_rank": "8",
    "bound.live_kl_nats": "1.0",
    "bound.anchor_kl_nats": "10.0",
    "gate.live_kl_mean_nats": "2.0",
    "gate.live_kl_max_prompt_nats": "20",
    "gate.anchor_kl_mean_nats": "20",
    "gate.anchor_kl_max_prompt_nats": "50",
    "gate.perplexity_rise_share": "1000",
    "gate.perplexity_rise_share_from_anchor": "1000",
}


@dataclass
class Running:
    """One `moorline up`."""

    process: subprocess.Popen[bytes]
    state_dir: Path
    addresses: dict[str, Any]

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.addresses['server']}/v1", api_key="none", max_retries=0
        )

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """One `moorline` verb on this tree."""
        return subprocess.run(
            [sys.executable, "-m", "daemon.cli", *words, "--state-dir", str(self.state_dir)],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def updater(self) -> dict[str, Any]:
        answer = httpx.get(f"{self.addresses['updater']}/status", timeout=30)
        return dict(answer.json())

    def ask(self, number: int, **options: Any) -> Any:
        return self.client.chat.completions.create(
            model="assistant",
            messages=[{"role": "user", "content": f"Question {number}?"}],
            max_tokens=12,
            temperature=0.7,
            **options,
        )

    def get(self, path: str) -> Any:
        """JSON of the server; None while it cannot be reached."""
        try:
            return httpx.get(f"{self.addresses['server']}{path}", timeout=30).json()
        except httpx.TransportError:
            return None

    def distance_nats(self, model_dir: Path, adapter_dir: Path) -> float:
        """Mean difference of a reply's logprobs from what these bytes would have given it."""
        options = {"logprobs": True, "extra_body": {"return_token_ids": True}}
        reply = self.ask(0, **options)
        (choice,) = reply.choices
        served = [token.logprob for token in choice.logprobs.content]
        model = reference_model(model_dir, adapter_dir)
        expected = raw_logprobs(model, reply.prompt_token_ids, choice.token_ids)
        pairs = zip(served, expected, strict=True)
        return sum(abs(one - other) for one, other in pairs) / len(served)

    def children(self) -> list[int]:
        """Processes of the tree, by the environment that only they have."""
        mark = f"MOORLINE_STATE_DIR={self.state_dir}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
        return found

    def server(self) -> int | None:
        """Process id of the server, if there is one."""
        for pid in self.children():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if words[1:3] == [b"-m", b"serving"]:
                    return pid
        return None

    def serves(self, version: int) -> bool:
        """Whether everything that names the version names this one."""
        name = f"assistant@v{version:06d}"
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        reply = httpx.post(f"{self.addresses['server']}/v1/chat/completions", json=body, timeout=60)
        assert reply.json()["model"] == name
        assert reply.headers["x-moorline-policy-version"] == str(version)
        assert self.get("/readyz") == {"ready": True, "why_not": None, "policy_version": version}
        return bool(self.get("/v1/moorline/status")["policy_name"] == name)


@pytest.fixture(scope="module")
def up(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    state_dir = tmp_path_factory.mktemp("up") / "state"
    words = [sys.executable, "-m", "daemon.cli", "up", "--model", str(tiny_model_dir)]
    words += ["--state-dir", str(state_dir)]
    for name, value in SETTINGS.items():
        words += ["--set", f"{name}={value}"]
    log = state_dir.parent / "up.log"
    clean = {name: value for name, value in os.environ.items() if "MOORLINE_" not in name}
    with log.open("wb") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, env=clean, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
            try:
                addresses = json.loads((state_dir / "run.json").read_text())
                ready = [
                    httpx.get(f"{addresses[name]}/readyz", timeout=5).status_code == 200
                    for name in ("server", "updater")
                ]
            except (OSError, ValueError, httpx.HTTPError):
                ready = [False]
            if all(ready):
                break
            time.sleep(0.5)
        yield Running(process, state_dir, addresses)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def test_ratings_by_http_and_by_any_kafka_client_become_a_release_that_is_served(
    up: Running,
) -> None:
    producer = KafkaProducer(bootstrap_servers=up.addresses["bootstrap"])
    replies = [up.ask(number) for number in range(BATCH + 2)]
    assert {reply.model for reply in replies} == {"assistant@v000000"}
    for index, reply in enumerate(replies[:BATCH]):
        if index % 2:
            rating = {"interaction_id": reply.id, "kind": "thumbs", "value": 1, "rater": "ana"}
            answer = httpx.post(f"{up.addresses['server']}/v1/feedback", json=rating)
            assert answer.status_code == 202
        else:
            rating = {
                "interaction_id": reply.id,
                "kind": "score",
                "value": 1,
                "score_min": 1,
                "score_max": 5,
                "rater": "ben",
            }
            value = json.dumps(rating).encode()
            producer.send("feedback.v1", key=reply.id.encode(), value=value).get(20)
    producer.close()
    wait_for(lambda: up.ask(99).model == "assistant@v000001", 180)
    status = up.command("status")
    assert status.returncode == 0, status.stderr
    assert "assistant@v000001" in status.stdout
    wait_for(lambda: up.updater()["accounting"]["topics"]["feedback.v1"] == {"trained": BATCH}, 60)
    accounting = up.updater()["accounting"]
    assert accounting["balanced"]
    assert accounting["topics"]["interactions.v1"]["trained"] == BATCH
    release = ArtifactStore(up.state_dir / "store").release("assistant", 1)
    assert release.verdict is not None
    # At lag 0 the server and the updater are one policy (temperature 0.7, float32).
    assert release.diagnostics["mismatch_nats"] < 0.02
    assert release.diagnostics["mean_ratio"] == pytest.approx(1.0, abs=0.02)


def test_an_operator_rolls_back_and_resumes_with_one_command_each(up: Running) -> None:
    back = up.command("rollback", "--to", "0", "--reason", "test")
    assert back.returncode == 0, back.stderr
    assert up.ask(1).model == "assistant@v000000"
    wait_for(lambda: up.updater()["pinned"] == 0, 60)
    forth = up.command("resume")
    assert forth.returncode == 0, forth.stderr
    wait_for(lambda: up.ask(2).model == "assistant@v000001", 60)


def test_unreadable_events_are_dead_lettered_and_counted(up: Running) -> None:
    before = up.updater()["accounting"]["topics"]["feedback.v1"].get("dead_lettered", 0)
    producer = KafkaProducer(bootstrap_servers=up.addresses["bootstrap"])
    for value in (b"{not json", b"", json.dumps({"interaction_id": "x", "value": 7}).encode()):
        producer.send("feedback.v1", value=value).get(20)
    producer.close()
    wait_for(
        lambda: (
            up.updater()["accounting"]["topics"]["feedback.v1"].get("dead_lettered", 0)
            == before + 3
        ),
        60,
    )
    assert up.updater()["accounting"]["balanced"]


def test_the_broker_dying_costs_no_reply_and_learning_goes_on(up: Running) -> None:
    (broker,) = [
        pid
        for pid in up.children()
        if b"tansu" in Path(f"/proc/{pid}/exe").readlink().name.encode()
    ]
    os.kill(broker, signal.SIGKILL)
    replies = [up.ask(number, user="eve") for number in range(BATCH)]
    assert all(reply.choices[0].finish_reason in ("stop", "length") for reply in replies)
    for index, reply in enumerate(replies):
        rating = {"interaction_id": reply.id, "value": 1 if index % 2 else -1, "rater": "ana"}
        answer = httpx.post(f"{up.addresses['server']}/v1/feedback", json=rating)
        assert answer.status_code == 202
    wait_for(lambda: up.ask(99).model == "assistant@v000002", 240)
    assert up.updater()["accounting"]["balanced"]


def test_what_had_learned_from_an_erased_person_is_not_served_any_more(
    up: Running, tiny_model_dir: Path, tmp_path: Path
) -> None:
    store = ArtifactStore(up.state_dir / "store")
    releases = [store.release("assistant", version) for version in (1, 2)]
    clean, stained = (  # copies: a revoked adapter is removed
        Path(shutil.copytree(store.open(one.artifact_digest or "", one.files), tmp_path / one.name))
        for one in releases
    )
    assert up.distance_nats(tiny_model_dir, stained) < CLOSE_NATS
    assert up.distance_nats(tiny_model_dir, clean) > 10 * CLOSE_NATS

    forgotten = up.command("forget", "--user", "eve", "--revoke", "--yes", "--json")
    assert forgotten.returncode == 0, forgotten.stderr
    result = json.loads(forgotten.stdout)["result"]
    assert (result["interactions"], result["releases"], result["last_clean_version"]) == (
        BATCH,
        [2],
        1,
    )
    wait_for(lambda: up.ask(1).model == "assistant@v000003", 60)
    assert up.serves(3)
    assert store.release("assistant", 3).artifact_digest == releases[0].artifact_digest
    assert up.distance_nats(tiny_model_dir, clean) < CLOSE_NATS
    assert up.command("rollback", "--to", "2", "--reason", "test").returncode != 0

    killed = up.server()
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: up.server() not in (None, killed), 60)
    wait_for(lambda: (up.get("/readyz") or {}).get("ready"), 300)
    assert up.serves(3)
    status = up.get("/v1/moorline/status")
    assert [swap["version"] for swap in status["swaps"]] == [3]
    assert status["refused_versions"] == {}
    assert up.distance_nats(tiny_model_dir, clean) < CLOSE_NATS


def test_one_signal_stops_everything_and_leaves_nothing_behind(up: Running) -> None:
    assert len(up.children()) >= 3
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(120) == 0
    wait_for(lambda: up.children() == [], 10)
    status = up.command("status")
    assert "v000003" in status.stdout or status.returncode != 0
