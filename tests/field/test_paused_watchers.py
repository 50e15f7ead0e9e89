"""SIGSTOP and SIGCONT of a watcher: time in which it did not run is nobody's silence."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serving.strategies import WeightReload
from tests.daemon.supervisor_process import Tree
from tests.daemon.test_supervise import WAITING, free_port, plant, script, wait_until

__all__ = ["plant"]

ROOT = Path(__file__).parents[2]
PAUSE_SECONDS = 12.0


def pause(*pids: int) -> None:
    """SIGSTOP for longer than each limit of this module, and SIGCONT."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(PAUSE_SECONDS)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


CLOCKS = """
import asyncio, sys, time
from moorline.clock import running_seconds
from serving.strategies import WeightReload
from updater.progress import Progress

class Engine:
    async def collective_rpc(self, method, args):
        sys.stdin.readline()  # answers after the pause
        await asyncio.sleep(0.1)

progress, started, wall = Progress(stall_seconds=4.0), running_seconds(), time.monotonic()
reload = WeightReload(Engine(), None, None, None, timeout_seconds=4.0)
print("started", flush=True)
asyncio.run(reload._call_workers("anything"))
print(progress.why_stalled(), running_seconds() - started, time.monotonic() - wall)
"""


def test_limits_inside_a_process_stand_still_while_it_is_stopped() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", CLOCKS],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        pause(process.pid)
        said, _ = process.communicate("go on\n", timeout=60)
    stalled, running, wall = said.split()
    assert stalled == "None"
    assert float(wall) - float(running) > PAUSE_SECONDS - 3


async def test_a_call_that_takes_too_long_is_ended_all_the_same() -> None:
    class Engine:
        async def collective_rpc(self, method: str, args: Any) -> None:
            del method, args
            await asyncio.sleep(600)

    unused: Any = None
    reload = WeightReload(Engine(), unused, unused, unused, timeout_seconds=0.2)
    with pytest.raises(TimeoutError):
        await reload._call_workers("anything")


@pytest.fixture
def watched(plant: Callable[..., Tree]) -> tuple[Tree, int]:
    """A supervisor over a healthy server that may be silent for 6 s, and the server's group."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/healthz"
    healthy = "import os; print('pid', os.getpid(), flush=True)\n" + textwrap.dedent(WAITING)
    child = script("server", healthy, ready_url=url, alive_url=url, hang_seconds=6.0)
    child["argv"].append(str(port))
    tree = plant([child])
    tree.wait_for("all_ready")
    log = tree.notes / "logs" / "server.log"
    wait_until(lambda: log.exists() and "pid " in log.read_text())
    return tree, int(log.read_text().split("pid ")[1].split()[0])


@pytest.mark.parametrize("frozen", ["supervisor", "everything"])
def test_a_supervisor_that_was_stopped_kills_nothing_healthy(
    watched: tuple[Tree, int], frozen: str
) -> None:
    tree, server = watched
    pause(tree.process.pid, *([server] if frozen == "everything" else []))
    time.sleep(PAUSE_SECONDS)
    tree.process.terminate()
    assert tree.end() == 0
    assert [kind for kind, _, _ in tree.said] == [
        *("starting", "ready", "all_ready", "stopping", "stopped")
    ]


def test_a_server_that_is_stopped_alone_is_silent(watched: tuple[Tree, int]) -> None:
    tree, server = watched
    os.killpg(server, signal.SIGSTOP)
    assert tree.wait_for("crashed", "server").startswith("no sign of life for 6 s")


SLOW_TO_STOP = """
    import signal, sys, time
    def stop(*_):
        print("stopping", flush=True)
        for _ in range(20):
            time.sleep(0.1)
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    print("started", flush=True)
    while True:
        time.sleep(0.05)
"""


def test_a_pause_during_a_stop_does_not_use_up_the_grace(plant: Callable[..., Tree]) -> None:
    tree = plant([script("server", SLOW_TO_STOP, grace_seconds=6.0)])
    tree.wait_for("all_ready")
    log = tree.notes / "logs" / "server.log"
    wait_until(lambda: log.exists() and "started" in log.read_text())
    tree.process.terminate()
    tree.wait_for("stopping", "server")
    wait_until(lambda: "stopping" in log.read_text())
    children = Path(f"/proc/{tree.process.pid}/task/{tree.process.pid}/children").read_text()
    pause(tree.process.pid, *map(int, children.split()))
    assert tree.end() == 0
    assert ("stopped", "server", "") in tree.said
