"""A real supervisor over real processes: it restarts, gives up, stops in order, leaves nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.children import OutputFile
from daemon.supervise import describe_exit
from tests.daemon.supervisor_process import PATIENCE_SECONDS, Tree

# A child with a worker of its own (a grandchild), which notes its pids and the order of its end.
WORKER = """
import os, signal, subprocess, sys, time
from pathlib import Path
notes, name, stubborn = Path(sys.argv[1]), sys.argv[2], "stubborn" in sys.argv
def note(text):
    with (notes / "notes").open("a") as file:
        file.write(text + "\\n")
def stop(*_):
    note(f"stop {name}")
    if not stubborn:
        sys.exit(0)
signal.signal(signal.SIGTERM, stop)
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
note(f"pid {os.getpid()}")
note(f"pid {worker.pid}")
print("hello from", name, flush=True)
while True:
    time.sleep(0.05)
"""


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Callable[..., Tree]]:
    trees: list[Tree] = []

    def start(children: list[dict[str, Any]], environment: Any = None, **config: Any) -> Tree:
        trees.append(Tree(tmp_path, {"children": children, **config}, **(environment or {})))
        return trees[-1]

    yield start
    for tree in trees:
        if tree.process.poll() is None:
            tree.process.terminate()
            tree.process.wait(PATIENCE_SECONDS)
        if tree.process.stdout is not None:
            tree.process.stdout.close()


def worker(notes: Path, name: str, *flags: str, **fields: Any) -> dict[str, Any]:
    return {
        "name": name,
        "argv": [sys.executable, "-c", WORKER, str(notes), name, *flags],
        **fields,
    }


def script(name: str, code: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "argv": [sys.executable, "-c", textwrap.dedent(code)], **fields}


def exists(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.02)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_ctrl_c_stops_in_reverse_order_and_leaves_nothing_behind(
    plant: Callable[..., Tree], tmp_path: Path
) -> None:
    tree = plant([worker(tmp_path, name) for name in ("broker", "server", "updater")])
    tree.wait_for("all_ready")
    wait_until(lambda: len(tree.pids()) == 6)
    tree.process.send_signal(signal.SIGINT)
    assert tree.end() == 0
    stops = [line for line in tree.noted() if line.startswith("stop")]
    assert stops == ["stop updater", "stop server", "stop broker"]
    assert [said[1] for said in tree.said if said[0] == "stopped"] == [
        "updater",
        "server",
        "broker",
    ]
    assert not any(exists(pid) for pid in tree.pids())


def test_kill_9_of_the_supervisor_takes_children_and_grandchildren_down(
    plant: Callable[..., Tree], tmp_path: Path
) -> None:
    tree = plant(
        [
            worker(tmp_path, "mild", grace_seconds=0.5),
            worker(tmp_path, "hard", "stubborn", grace_seconds=0.5),
        ]
    )
    tree.wait_for("all_ready")
    wait_until(lambda: len(tree.pids()) == 4)
    tree.process.kill()
    tree.process.wait(PATIENCE_SECONDS)
    wait_until(lambda: not any(exists(pid) for pid in tree.pids()))


def test_crash_is_restarted_and_its_workers_are_cleared_first(
    plant: Callable[..., Tree], tmp_path: Path
) -> None:
    tree = plant([worker(tmp_path, "server")], restart={"first_delay_seconds": 0.01})
    tree.wait_for("all_ready")
    wait_until(lambda: len(tree.pids()) == 2)
    first = tree.pids()
    os.kill(first[0], signal.SIGKILL)
    said = tree.wait_for("crashed", "server")
    assert "killed by SIGKILL" in said
    tree.wait_for("ready", "server")
    wait_until(lambda: len(tree.pids()) == 4)
    assert not any(exists(pid) for pid in first)
    tree.process.terminate()
    assert tree.end() == 0


def test_each_waits_until_the_one_before_is_ready(
    plant: Callable[..., Tree], tmp_path: Path
) -> None:
    port = free_port()
    slow = script(
        "broker",
        f"""
        import socket, time
        time.sleep(0.5)
        listener = socket.create_server(("127.0.0.1", {port}))
        while True:
            listener.accept()[0].close()
        """,
        ready_url=f"tcp://127.0.0.1:{port}",
    )
    tree = plant([slow, worker(tmp_path, "server")])
    tree.wait_for("all_ready")
    kinds = [(kind, name) for kind, name, _ in tree.said if kind in ("starting", "ready")]
    assert kinds == [
        ("starting", "broker"),
        ("ready", "broker"),
        ("starting", "server"),
        ("ready", "server"),
    ]


def test_essential_child_that_refuses_to_start_ends_everything_with_its_last_words(
    plant: Callable[..., Tree], tmp_path: Path
) -> None:
    refusing = script(
        "server",
        "print('port 8000 is busy: set serving.port'); raise SystemExit(1)",
        ready_url="tcp://127.0.0.1:1",
    )
    tree = plant([worker(tmp_path, "broker"), refusing])
    said = tree.wait_for("gave_up", "server")
    assert "port 8000 is busy: set serving.port" in said
    assert "logs/server.log" in said
    assert tree.end() == 1
    assert not any(exists(pid) for pid in tree.pids())


def test_essential_child_that_crashes_again_and_again_ends_everything(
    plant: Callable[..., Tree],
) -> None:
    crashing = script("server", "import os; os.abort()")
    tree = plant([crashing], restart={"first_delay_seconds": 0.01, "give_up_after": 3})
    said = tree.wait_for("gave_up", "server")
    assert said.startswith("3 crashes in a row, the last: killed by SIGABRT")
    assert tree.end() == 1
    assert [said[0] for said in tree.said].count("starting") == 3


def test_updater_that_cannot_run_does_not_stop_the_server_and_is_tried_again(
    plant: Callable[..., Tree], tmp_path: Path
) -> None:
    hopeless = script(
        "updater", "raise SystemExit('no probes')", essential=False, ready_url="tcp://127.0.0.1:1"
    )
    tree = plant([worker(tmp_path, "server"), hopeless], restart={"rest_seconds": 0.1})
    said = tree.wait_for("gave_up", "updater")
    assert "no probes" in said
    assert "the others go on" in said
    tree.wait_for("gave_up", "updater")
    assert tree.process.poll() is None
    assert exists(tree.pids()[0])
    tree.process.terminate()
    assert tree.end() == 0


def test_wrong_settings_are_not_tried_again(plant: Callable[..., Tree]) -> None:
    tree = plant([script("server", "raise SystemExit(78)")])
    tree.wait_for("gave_up", "server")
    assert tree.end() == 1
    assert [said[0] for said in tree.said].count("starting") == 1


def test_child_that_never_gets_ready_is_a_crash(plant: Callable[..., Tree], tmp_path: Path) -> None:
    deaf = worker(tmp_path, "server", ready_url="tcp://127.0.0.1:1", ready_timeout_seconds=0.5)
    tree = plant([deaf], restart={"first_delay_seconds": 0.01, "give_up_after": 2})
    assert "not ready after" in tree.wait_for("gave_up", "server")
    assert tree.end() == 1
    assert not any(exists(pid) for pid in tree.pids())


WAITING = """
    import sys
    from http.server import BaseHTTPRequestHandler, HTTPServer
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/healthz" else 503)
            self.end_headers()
    HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_child_that_waits_for_something_elsewhere_is_no_crash_while_it_is_alive(
    plant: Callable[..., Tree],
) -> None:
    port = free_port()
    child = script(
        "updater",
        WAITING,
        ready_url=f"http://127.0.0.1:{port}/readyz",
        alive_url=f"http://127.0.0.1:{port}/healthz",
        ready_timeout_seconds=7.0,  # it is asked every 5 s
        may_wait=True,
    )
    child["argv"].append(str(port))
    tree = plant([child])
    time.sleep(11)
    tree.process.terminate()
    assert tree.end() == 0
    assert [kind for kind, _, _ in tree.said] == ["starting", "stopping", "stopped"]


def test_child_that_waits_and_gives_no_sign_of_life_is_a_crash(plant: Callable[..., Tree]) -> None:
    gone = f"http://127.0.0.1:{free_port()}/"
    child = script("updater", "import time; time.sleep(600)", ready_url=gone, alive_url=gone)
    tree = plant([child | {"may_wait": True, "ready_timeout_seconds": 0.5}])
    assert "not ready after" in tree.wait_for("crashed", "updater")


def test_stubborn_child_is_killed_after_its_grace(
    plant: Callable[..., Tree], tmp_path: Path
) -> None:
    tree = plant([worker(tmp_path, "server", "stubborn", grace_seconds=0.3)])
    tree.wait_for("all_ready")
    wait_until(lambda: len(tree.pids()) == 2)
    tree.process.terminate()
    assert tree.end() == 0
    assert ("killed", "server", "") in tree.said
    assert not any(exists(pid) for pid in tree.pids())


def test_second_ctrl_c_does_not_wait_for_the_grace(
    plant: Callable[..., Tree], tmp_path: Path
) -> None:
    tree = plant([worker(tmp_path, "server", "stubborn", grace_seconds=3600)])
    tree.wait_for("all_ready")
    wait_until(lambda: len(tree.pids()) == 2)
    tree.process.send_signal(signal.SIGINT)
    tree.wait_for("stopping", "server")
    tree.process.send_signal(signal.SIGINT)
    assert tree.end() == 0
    assert not any(exists(pid) for pid in tree.pids())


def test_systemd_hears_ready_watchdog_and_stopping(
    plant: Callable[..., Tree], tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(PATIENCE_SECONDS)
        manager.bind(str(tmp_path / "notify"))
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "100000"}
        tree = plant([worker(tmp_path, "server")], environment)
        heard: list[str] = []
        while "READY=1" not in heard or "WATCHDOG=1" not in heard:
            heard += manager.recv(4096).decode().splitlines()
        tree.process.terminate()
        while "STOPPING=1" not in heard:
            heard += manager.recv(4096).decode().splitlines()
        assert tree.end() == 0


def test_output_is_kept_in_a_log_by_name(plant: Callable[..., Tree], tmp_path: Path) -> None:
    tree = plant([worker(tmp_path, "server")])
    tree.wait_for("all_ready")
    log = tmp_path / "logs" / "server.log"
    wait_until(lambda: log.exists() and "hello from server" in log.read_text())


def test_full_disk_costs_lines_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    log = OutputFile(Path("/dev/full"))
    for _ in range(3):
        log.add("hello")
    with contextlib.suppress(OSError):
        log.close()
    assert [vars(record)["event"] for record in caplog.records] == ["child_output_lost"]


def test_exit_codes_in_words() -> None:
    assert describe_exit(3) == "exit code 3"
    assert describe_exit(-signal.SIGKILL) == "killed by SIGKILL, out of memory?"
