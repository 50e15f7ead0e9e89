"""The one way to put bytes on disk so that a crash leaves the old state or the new one.

Write beside, sync the file, rename, sync the directory. DON'T write in place: a reader, or the next
start, would see half. DON'T skip the directory's sync: after a power cut the rename itself may be
undone. DON'T sync again what could not be synced: the kernel has forgotten the error and says yes
to pages that it has lost. Write anew.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path

from moorline.failpoints import failpoint

TEMPORARY_PREFIX = ".tmp-"
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT})
OF_THE_DISK = NO_ROOM | {errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE}
"""What may pass without any change of ours."""
RESERVE_BYTES = 4096
"""A block of most file systems; one that copies on write takes a new one all the same."""


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


def write_file(path: Path, content: bytes, step: str, reserve: Path | None = None) -> None:
    """Replace ``path`` by ``content``, all or nothing, durable on return.

    Args:
        step: names the failpoints ``<step>.before_rename`` and ``<step>.after_rename``.
        reserve: a file of ``make_reserve``; on a full disk it becomes ``path``, and what was there
            becomes the reserve.

    Raises:
        OSError: the disk refused. What is seen is the old content, or, where only the directory
            could not be synced, the new one, which a power cut may undo: write it again.
    """
    temporary = temporary_beside(path)
    try:
        try:
            _write_synced(temporary, "wb", content)
        except OSError as error:
            if error.errno not in NO_ROOM or reserve is None or not reserve.exists():
                raise
            # In place: it has its block already.
            _write_synced(reserve, "r+b", content)
            temporary.unlink(missing_ok=True)
            temporary = reserve
        failpoint(f"{step}.before_rename")
        if temporary == reserve and path.exists():  # the block of the old content is the next one
            old = temporary_beside(path)
            os.link(path, old)
            reserve.replace(path)
            old.replace(reserve)
        else:
            temporary.replace(path)
    except BaseException:
        if temporary != reserve:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise
    failpoint(f"{step}.after_rename")
    sync_directory(path.parent)


def make_reserve(path: Path) -> None:
    """Keep one block of the disk for a small ``write_file`` that must not fail for want of room.

    Raises:
        OSError: there is no room now.
    """
    if not path.exists():
        write_file(path, b" " * RESERVE_BYTES, "reserve")


def _write_synced(path: Path, mode: str, content: bytes) -> None:
    with path.open(mode) as file:
        file.write(content)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
