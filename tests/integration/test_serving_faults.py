"""A server whose surroundings fail: no broker, damaged releases, refused starts."""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon.broker import free_port
from tests.serving.leftovers import Leftovers
from tests.serving.policies import MESSAGES, Lineage
from tests.serving.server_process import ServerProcess, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

KEY = "a-long-test-key"
AUTHORIZED = {"authorization": f"Bearer {KEY}"}


def make_temporary_folder() -> Iterator[Path]:
    """``TMPDIR`` of the servers made while it is there: short, for the sockets' paths."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", folder)
        yield Path(folder)


folder_of_lonely = pytest.fixture(scope="module")(make_temporary_folder)
own_folder = pytest.fixture(make_temporary_folder)


@pytest.fixture(scope="module")
def lonely(
    server_factory: Callable[..., ServerProcess],
    tiny_model_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
    folder_of_lonely: Path,  # noqa: ARG001 - in force when the server is made
) -> ServerProcess:
    """No broker; in its store a good release, one with foreign parity, and a corrupt newest one."""
    server = server_factory(
        "lonely",
        SERVING__SWAP_MODE="reload",
        SERVING__API_KEY=KEY,
        STREAM__BOOTSTRAP=f"127.0.0.1:{free_port('127.0.0.1')}",
        STREAM__CONNECT_TIMEOUT_SECONDS="0.5",
    )
    lineage = Lineage(server, tiny_model_dir, tmp_path_factory.mktemp("lineage"))
    lineage.release()
    lineage.release(parity=lineage.parity_of(lineage.adapter("other", seed=99), 1))
    corrupt = server.store.release("assistant", lineage.release())
    directory = server.store.open(corrupt.artifact_digest or "", corrupt.files)
    (directory / "parity.json").write_bytes(b"{}")
    server.launch()
    server.wait_listening()
    return server


def test_it_starts_on_the_last_good_release(lonely: ServerProcess) -> None:
    status = lonely.get_authorized("/v1/moorline/status", KEY).json()
    assert status["policy_version"] == 1
    assert status["refused_versions"] == {"3": "corrupt", "2": "parity_failed"}
    assert lonely.get("/readyz").json() == {"ready": True, "why_not": None, "policy_version": 1}


def test_replies_do_not_need_a_broker_and_events_are_kept_on_disk(lonely: ServerProcess) -> None:
    body = {"model": "assistant", "messages": MESSAGES, "max_tokens": 8}
    reply = lonely.post("/v1/chat/completions", body, headers=AUTHORIZED)
    assert reply.status_code == 200
    rating = {"id": reply.json()["id"], "value": 1}
    assert lonely.post("/v1/feedback", rating, headers=AUTHORIZED).status_code == 202
    wait_for(lambda: lonely.metric("moorline_spooled_events") >= 2)
    assert lonely.metric("moorline_broker_connected") == 0


def test_the_key_guards_what_learns_and_not_what_watches(lonely: ServerProcess) -> None:
    rating = {"id": "chatcmpl-1", "value": 1}
    assert lonely.post("/v1/feedback", rating).status_code == 401
    assert lonely.get("/v1/moorline/status").status_code == 401
    for path in ("/healthz", "/readyz", "/metrics"):
        assert lonely.get(path).status_code == 200


def test_no_route_changes_weights_or_runs_code(lonely: ServerProcess) -> None:
    routes = ("pause", "sleep", "collective_rpc", "update_weights", "scale_elastic_ep", "tokenize")
    for path in (*(f"/{route}" for route in routes), "/v1/load_lora_adapter"):
        assert lonely.post(path, {}, headers=AUTHORIZED).status_code == 404


def test_the_key_cannot_be_walked_around(lonely: ServerProcess) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1}
    assert lonely.post("/invocations", body).status_code == 404
    for path in ("//v1/chat/completions", "/x/../v1/chat/completions", "/v1/chat/completions"):
        assert lonely.post(path, body).status_code in (401, 404)


def test_one_page_has_vllms_metrics_and_ours(lonely: ServerProcess) -> None:
    page = lonely.get("/metrics").text
    assert "vllm:num_requests_running" in page
    assert "moorline_policy_version" in page


def test_stopping_is_clean_and_leaves_nothing(
    lonely: ServerProcess, folder_of_lonely: Path
) -> None:
    assert lonely.terminate() == 0
    wait_for(lonely.group_is_empty)
    wait_for(Leftovers(folder_of_lonely).none)


def test_a_stop_during_the_start_is_clean_too(
    server_factory: Callable[..., ServerProcess],
) -> None:
    server = server_factory("early", SERVING__SWAP_MODE="reload")
    server.launch()
    wait_for(lambda: "engine_starting" in server.log.read_text(errors="replace"), 600)
    time.sleep(3)
    assert server.terminate() == 0
    wait_for(server.group_is_empty)


MOMENTS = {
    "engine spawned": "spawn_main",
    "worker loading": "VLLM::Worker",
    "listening": None,
}
"""When to kill, and which process there is by then."""


@pytest.mark.parametrize("moment", MOMENTS)
def test_kill_9_at_any_moment_of_a_start_leaves_nothing(
    moment: str,
    server_factory: Callable[..., ServerProcess],
    own_folder: Path,
) -> None:
    server = server_factory("killed", SERVING__SWAP_MODE="reload")
    left = Leftovers(own_folder)
    server.launch()
    assert server.process is not None
    sign = MOMENTS[moment]
    if sign is None:
        server.wait_listening()
    else:
        while not any(sign in command for command in left.processes().values()):
            assert server.process.poll() is None
            time.sleep(0.02)
    if moment != "engine spawned":
        assert len(left.processes()) == 5  # server, tracker, shell, engine, worker
        assert left.shared_memory()
        assert left.files()
    server.process.kill()  # the server alone
    server.process.wait()
    wait_for(left.none)


def test_where_nobody_knows_what_is_wanted_a_start_serves_the_base_model(
    server_factory: Callable[..., ServerProcess], tiny_model_dir: Path, tmp_path: Path
) -> None:
    server = server_factory("unsure", SERVING__SWAP_MODE="reload", SERVING__STORE_WAIT_SECONDS="2")
    Lineage(server, tiny_model_dir, tmp_path).release()
    pin = server.store.root / "releases" / "assistant" / "pin.json"
    os.mkfifo(pin)  # whoever opens it waits for a writer, as on a volume that does not answer
    server.launch()
    server.wait_listening()
    assert "serving_without_the_store" in server.log.read_text(errors="replace")
    assert server.get("/readyz").json() == {"ready": True, "why_not": None, "policy_version": 0}

    (tmp_path / "pin").write_bytes(b"{")
    writer = os.open(pin, os.O_WRONLY | os.O_NONBLOCK)  # fails if nobody waits
    (tmp_path / "pin").replace(pin)
    os.close(writer)
    wait_for(lambda: server.status()["store_wait_seconds"] == 0)
    time.sleep(3)  # several looks
    assert server.status()["policy_version"] == 0
    assert server.log.read_text(errors="replace").count("pin_invalid") == 1

    server.store.pin("assistant", 1, "written anew")
    server.wait_version(1)


def refusal(server: ServerProcess) -> str:
    """Runs a server that cannot start; its one line."""
    server.launch()
    assert server.process is not None
    assert server.process.wait(120) == 1
    return server.log.read_text().strip().splitlines()[-1]


def test_a_busy_port_is_one_line(server_factory: Callable[..., ServerProcess]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refusal(server_factory("busy", SERVING__PORT=str(port)))
    assert f"port {port}" in line
    assert "serving.port" in line


def test_a_missing_model_is_one_line(
    server_factory: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    assert "config.json" in refusal(server_factory("missing", model_dir=tmp_path))


def test_pickled_weights_are_refused(
    server_factory: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    assert "pickled" in refusal(server_factory("pickled", model_dir=tmp_path))


def test_too_long_a_path_for_sockets_is_one_line(
    server_factory: Callable[..., ServerProcess], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / ("x" * 60)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    line = refusal(server_factory("long"))
    assert "too long a path" in line
    assert "TMPDIR" in line
    assert [one.name for one in folder.iterdir() if "torchinductor" not in one.name] == []


def test_too_little_memory_is_one_line(server_factory: Callable[..., ServerProcess]) -> None:
    line = refusal(server_factory("memory", SERVING__KV_CACHE_GIB="100000"))
    assert "too little memory" in line
    assert "serving.kv_cache_gib" in line
