"""The one way to put bytes on disk so that a crash leaves the old state or the new one.

Write beside, sync the file, rename, sync the directory. DON'T write in place: a reader, or the next
start, would see half. DON'T skip the directory's sync: after a power cut the rename itself may be
undone.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from daemon.failpoints import failpoint

TEMPORARY_PREFIX = ".tmp-"


def temporary_beside(path: Path) -> Path:
    """A fresh hidden name in the same directory (and so on the same file system) as ``path``."""
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path) -> None:
    """Create a directory and its missing parents durably; fine if it is already there."""
    if path.is_dir():
        return
    make_directory(path.parent)
    path.mkdir(exist_ok=True)
    sync_directory(path.parent)


def write_file(path: Path, content: bytes, step: str) -> None:
    """Replace ``path`` by ``content``, all or nothing, durable on return.

    Args:
        step: names the failpoints ``<step>.before_rename`` and ``<step>.after_rename``.

    Raises:
        OSError: nothing changed; the temporary file is gone.
    """
    temporary = temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        failpoint(f"{step}.before_rename")
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    failpoint(f"{step}.after_rename")
    sync_directory(path.parent)
