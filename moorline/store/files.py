"""The files of an artifact: written durably with their hashes, and checked against them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from pathlib import Path

from moorline.events import ArtifactFile

_CHUNK_BYTES = 2**20


def write_hashed(directory: Path, name: str, source: bytes | Path) -> ArtifactFile:
    """Write one file durably, hashing what is written, not what was meant."""
    ArtifactFile(name=name, sha256="0" * 64, size_bytes=0)  # refuses a name with a directory in it
    hasher, size_bytes = hashlib.sha256(), 0
    with contextlib.ExitStack() as stack:
        target = stack.enter_context((directory / name).open("xb"))
        if isinstance(source, Path):
            reader = stack.enter_context(source.open("rb"))
            chunks = iter(lambda: reader.read(_CHUNK_BYTES), b"")
        else:
            chunks = iter((source,))
        for chunk in chunks:
            target.write(chunk)
            hasher.update(chunk)
            size_bytes += len(chunk)
        target.flush()
        os.fsync(target.fileno())
    return ArtifactFile(name=name, sha256=hasher.hexdigest(), size_bytes=size_bytes)


def difference(path: Path, file: ArtifactFile) -> str | None:
    """How the file on disk differs from the listed one, in words; None when it does not."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    if status.st_size != file.size_bytes:
        return f"has {status.st_size} bytes, not {file.size_bytes}"
    with path.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return None if digest == file.sha256 else "was changed (sha256 differs)"
