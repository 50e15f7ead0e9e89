"""A device that hangs: the server says so while its process lives, and recovers with it."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.kafka_fixtures import wait_until
from tests.serving.server_process import ServerProcess


@pytest.mark.slow
def test_a_server_whose_engine_hangs_says_so_until_it_goes_on(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    server = ServerProcess(
        tmp_path / "state", tiny_model_dir, {"MOORLINE_SERVING__ENGINE_STALL_SECONDS": "3"}
    )
    server.launch()
    try:
        server.wait_listening()
        assert server.process is not None
        children = psutil.Process(server.process.pid).children(recursive=True)
        (engine,) = [child.pid for child in children if "EngineCore" in child.name()]
        body = {"model": "assistant", "prompt": [1, 2, 3], "max_tokens": 4}
        assert server.post("/v1/completions", body).status_code == 200
        os.kill(engine, signal.SIGSTOP)
        with ThreadPoolExecutor() as threads:
            try:
                reply = threads.submit(server.post, "/v1/completions", body)
                wait_until(lambda: server.get("/healthz").status_code == 503, 60)
                assert "nothing came out of the engine" in server.get("/healthz").json()["why_not"]
                wait_until(lambda: "event=engine_hung" in server.log.read_text(), 60)
            finally:
                os.kill(engine, signal.SIGCONT)
            assert reply.result(60).status_code == 200
        assert server.get("/healthz").json() == {"alive": True, "why_not": None}
        wait_until(lambda: "event=engine_works_again" in server.log.read_text(), 60)
        assert "moorline_engine_wait_seconds 0.0" in server.get("/metrics").text
    finally:
        server.stop()
