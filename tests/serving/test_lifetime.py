"""Nothing outlives a process that says so: with children that are cheaper than vLLM's."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from tests.serving.leftovers import Leftovers
from tests.serving.server_process import wait_for

ROOT = Path(__file__).parents[2]
PARENT = """
import multiprocessing, sys
from serving.lifetime import nothing_outlives_this_process
from tests.serving.test_lifetime import engine

with nothing_outlives_this_process():
    child = multiprocessing.get_context("spawn").Process(target=engine)
    child.start()
    sys.stdin.read()
    child.terminate()
    child.join()
"""


def engine() -> None:
    """A child with a child, a file and shared memory."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    memory = SharedMemory(create=True, size=4096)
    worker = multiprocessing.get_context("spawn").Process(
        target=time.sleep, args=(600,), daemon=True
    )
    worker.start()
    Path(os.environ["TMPDIR"], "socket").touch()
    try:
        worker.join()
    finally:
        memory.close()
        memory.unlink()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A socket's path cannot be as long as those of pytest's folders."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture
def parent(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(folder)},
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    yield process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_kill_9_takes_children_grandchildren_shared_memory_and_files_along(
    parent: subprocess.Popen[bytes], folder: Path
) -> None:
    left = Leftovers(folder)
    wait_for(lambda: left.processes() and list(folder.glob("moorline-*/socket")), 60)
    # Parent, tracker, shell, child, grandchild.
    assert len(left.processes()) == 5
    assert left.shared_memory()
    parent.kill()
    parent.wait()
    wait_for(left.none)


def test_a_clean_end_leaves_no_file(parent: subprocess.Popen[bytes], folder: Path) -> None:
    wait_for(lambda: list(folder.glob("moorline-*/socket")), 60)
    parent.communicate(timeout=60)
    assert parent.returncode == 0
    wait_for(Leftovers(folder).none)


def test_a_child_whose_parent_is_gone_already_ends_at_once() -> None:
    run = "import runpy; runpy.run_module('serving.lifetime', run_name='__mp_main__')"
    for parent, code in ((os.getpid(), 0), (2**22 + 1, 1)):  # the last is nobody's
        environment = os.environ | {"MOORLINE_SPAWNED_BY": str(parent)}
        done = subprocess.run([sys.executable, "-c", run], cwd=ROOT, env=environment, timeout=60)
        assert done.returncode == code
