"""Exclusive locks between processes: a file that one process holds until it ends.

The kernel gives a lock back when its holder dies, however it dies, so that none is ever stale. The
file stays: DON'T remove it, or two processes could each lock a file of the same name.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from moorline.errors import MoorlineError


class LockHeld(MoorlineError):
    """Another process holds a lock.

    Attributes:
        holder: "pid 123" as far as the file says it, else "pid unknown".
    """

    def __init__(self, path: Path, pid: str) -> None:
        self.holder = f"pid {pid or 'unknown'}"
        super().__init__(f"another process ({self.holder}) holds {path}: stop it, or wait for it")


class FileLock:
    """An exclusive lock on a file, held until ``close`` or the death of this process."""

    def __init__(self, path: Path) -> None:
        """Take the lock at once or not at all.

        Raises:
            LockHeld: another process (or another ``FileLock`` of this one) has it.
            OSError: the file cannot be made.
        """
        self._descriptor: int | None = None
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pid = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
                raise LockHeld(path, pid if pid.isdigit() else "") from None
            with contextlib.suppress(OSError):  # on a full disk the lock counts, not who has it
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give the lock back. Idempotent."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)
