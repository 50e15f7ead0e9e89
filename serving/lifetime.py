"""Makes sure that nothing of a server outlives it: no process, no shared memory, no file.

*Processes*: each one that vLLM spawns runs this file first, before anything of vLLM is imported,
and has the kernel kill it when the one that spawned it ends: the engine with the server, the worker
with the engine. vLLM leaves them running for ever, with all their memory. *Shared memory*: Python's
own resource tracker stays until the last of them is gone, and removes it. *Files* (vLLM leaves its
sockets after a clean stop too): they are in one folder, which a waiting shell removes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from moorline.errors import MoorlineError
from moorline.process_groups import die_with_parent

_SPAWNED_BY = "MOORLINE_SPAWNED_BY"
"""Environment: who should be the parent of a process that is spawned. It may be gone by then."""
LONGEST_FOLDER_BYTES = 107 - len("/") - 36
"""What the kernel takes as a socket's path, less vLLM's name for it (a UUID)."""
_SWEEP = """\
trap '' HUP INT TERM
read -r _ || sleep 1  # killed: the others are about to end too
rm -rf -- "$1"
"""


class TemporaryFolderUnavailable(MoorlineError):
    """One line with the remedy."""


@contextlib.contextmanager
def nothing_outlives_this_process() -> Iterator[None]:
    """Tie children and temporary files that come into being inside the block to this process.

    Only in the main thread: the kernel ends a child with the *thread* that started it.

    Raises:
        TemporaryFolderUnavailable: there is no place for temporary files.
    """
    # Children run their parent's main module first, unless it is called `__main__` (a package's).
    sys.modules["__main__"].__spec__ = sys.modules[__name__].__spec__
    os.environ[_SPAWNED_BY] = str(os.getpid())
    with _temporary_folder():
        yield


@contextlib.contextmanager
def _temporary_folder() -> Iterator[None]:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    try:
        cache_dir()  # notes in the environment where it is, so that what was compiled stays
        folder = tempfile.mkdtemp(prefix="moorline-")
    except OSError as error:
        raise TemporaryFolderUnavailable(
            f"no place for temporary files ({error}): set TMPDIR"
        ) from None
    if len(os.fsencode(folder)) > LONGEST_FOLDER_BYTES:
        os.rmdir(folder)
        raise TemporaryFolderUnavailable(f"a socket in {folder} has too long a path: set TMPDIR")
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    sweeper = subprocess.Popen(
        ["/bin/sh", "-c", _SWEEP, "moorline-sweep", folder],
        stdin=subprocess.PIPE,  # ends when this process does
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield
    finally:
        sweeper.communicate(b"\n")


if __name__ == "__mp_main__":
    die_with_parent(int(os.environ[_SPAWNED_BY]), signal.SIGKILL)
    os.environ[_SPAWNED_BY] = str(os.getpid())
