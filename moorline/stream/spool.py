"""A bounded first-in-first-out queue on disk, for events that wait for a broker.

Segments ``000000000001.spool`` hold frames: length and CRC-32 (4 bytes each, big endian), then the
payload. A new process never appends to an old segment, so a tail that a crash tore is read up to
its last whole frame and costs no other. The file ``acknowledged`` says up to which frame everything
is delivered; it may lag behind, so a frame can be read again after a crash, never skipped.
"""

from __future__ import annotations

import contextlib
import logging
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from moorline.errors import MoorlineError
from moorline.failpoints import failpoint
from moorline.locks import FileLock, LockHeld

logger = logging.getLogger("moorline.spool")

_HEADER = struct.Struct(">II")
_SUFFIX = ".spool"
_CURSOR = "acknowledged"
_LOCK = "lock"
_LARGEST_SEGMENT_BYTES = 8 * 2**20


class SpoolLocked(MoorlineError):
    """Another process uses this directory; the message says which directory and what to do."""


class SpoolNotSynced(MoorlineError, OSError):
    """A sync failed: whether the frames since the sync before are on the disk is unknown."""


@dataclass(frozen=True, order=True)
class FrameEnd:
    """The end of a frame: segment number, and byte offset in it."""

    segment: int
    offset: int


@dataclass
class _Segment:
    valid_bytes: int = 0
    """Up to the end of the last whole frame."""
    size_bytes: int = 0
    """On disk."""
    frames: int = 0
    read: int = 0
    released: int = 0


@dataclass(frozen=True)
class Frame:
    """What ``next`` gives."""

    position: FrameEnd
    payload: bytes | None
    """None: damaged on disk; then ``count`` frames are lost."""
    count: int = 1


class Spool:
    """The queue. Not thread-safe; one process at a time.

    Three positions, in order: acknowledged (``release``), read (``next``), written (``append``).

    Raises:
        SpoolLocked: from the constructor, when another process holds the directory.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory = directory
        self.max_bytes = max_bytes
        self.torn_bytes = 0
        """Bytes found unreadable when the directory was opened."""
        # A bounded queue must give space back in pieces well below its bound.
        self._segment_bytes = max(1, min(_LARGEST_SEGMENT_BYTES, max_bytes // 8))
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = self._take_lock()
        self._segments: dict[int, _Segment] = {}
        self._writer: int | None = None
        self._reader: int | None = None
        self._writer_segment = 0
        self._reader_segment = 0
        self._acknowledged = FrameEnd(0, 0)
        self._saved = self._acknowledged
        try:
            self._load()
        except BaseException:
            self._lock.close()
            raise
        self._read = self._acknowledged

    @property
    def count(self) -> int:
        """Frames that are not acknowledged."""
        return sum(segment.frames - segment.released for segment in self._segments.values())

    @property
    def unread(self) -> int:
        """Frames that ``next`` will still give."""
        return sum(segment.frames - segment.read for segment in self._segments.values())

    @property
    def size_bytes(self) -> int:
        """Disk in use."""
        return sum(segment.size_bytes for segment in self._segments.values())

    def append(self, payload: bytes) -> Frame | None:
        """Write one frame at the end; ``None`` when the bound is reached.

        It survives this process from now on, and a power cut from the next ``sync``.

        Raises:
            SpoolNotSynced: as ``sync``; the frame is not in the queue.
            OSError: the disk is full or broken; the frame is not in the queue.
        """
        needed = _HEADER.size + len(payload)
        if self.size_bytes + needed > self.max_bytes:
            return None
        failpoint("spool.before_append")
        frame = _HEADER.pack(len(payload), zlib.crc32(payload)) + payload
        number = self._writable_segment()
        segment = self._segments[number]
        assert self._writer is not None
        try:
            _write_all(self._writer, frame)
        except OSError:
            self._cut_back(number)
            raise
        segment.valid_bytes += needed
        segment.size_bytes = segment.valid_bytes
        segment.frames += 1
        return Frame(FrameEnd(number, segment.valid_bytes), payload)

    def sync(self) -> None:
        """Make everything appended survive a power cut.

        Raises:
            SpoolNotSynced: the disk is broken. What was appended since the last sync is in the
                queue, and nobody will ever know whether it is on the disk.
        """
        if self._writer is None:
            return
        try:
            os.fdatasync(self._writer)
        except OSError as error:
            self._close_writer()  # asked again it might say yes; the next frame starts a segment
            raise SpoolNotSynced(error.errno, error.strerror) from error

    def next(self) -> Frame | None:
        """The oldest unread frame, or None. It stays in the queue until it is released."""
        for number in sorted(self._segments):
            segment = self._segments[number]
            if segment.read >= segment.frames:
                continue
            offset = self._read.offset if self._read.segment == number else 0
            handle = self._reader_for(number)
            header = os.pread(handle, _HEADER.size, offset)
            length, checksum = _HEADER.unpack(header) if len(header) == _HEADER.size else (0, 1)
            end = offset + _HEADER.size + length
            payload = (
                os.pread(handle, length, offset + _HEADER.size)
                if (end <= segment.valid_bytes)
                else b""
            )
            if zlib.crc32(payload) == checksum and end <= segment.valid_bytes:
                segment.read += 1
                self._read = FrameEnd(number, end)
                return Frame(self._read, payload)
            # It was whole when it was written or opened. Its length may be what is damaged, so
            # the frames behind it cannot be found either.
            lost = segment.frames - segment.read
            logger.error(
                "a spool file is damaged: the events from there to its end are lost",
                extra={
                    "event": "spool_segment_damaged",
                    "path": str(self._path(number)),
                    "offset": offset,
                    "events": lost,
                },
            )
            segment.read = segment.frames
            self._read = FrameEnd(number, segment.valid_bytes)
            return Frame(self._read, None, lost)
        return None

    def skip(self) -> None:
        """Count everything written so far as read: it is on its way already."""
        for number, segment in self._segments.items():
            segment.read = segment.frames
            self._read = max(self._read, FrameEnd(number, segment.valid_bytes))

    def rewind(self) -> None:
        """Read again from the oldest frame that is not released."""
        self._read = self._acknowledged
        for segment in self._segments.values():
            segment.read = segment.released

    def release(self, frame: Frame) -> None:
        """This frame and those before it are delivered. Call it for every frame, in order."""
        position = frame.position
        self._acknowledged = max(self._acknowledged, position)
        segment = self._segments.get(position.segment)
        if segment is not None:
            segment.released += frame.count
        for number in sorted(self._segments):
            done = number < position.segment or (
                number == position.segment and position.offset >= self._segments[number].valid_bytes
            )
            if not done:
                break
            self._drop_segment(number)

    def save(self) -> None:
        """Remember what is released, for the next start.

        Raises:
            OSError: the disk is full or broken; the next start may deliver some frames again.
        """
        if self._saved == self._acknowledged:
            return
        position = self._acknowledged
        temporary = self.directory / f"{_CURSOR}.tmp"
        temporary.write_text(f"{position.segment} {position.offset}\n")
        failpoint("spool.before_cursor_rename")
        os.replace(temporary, self.directory / _CURSOR)
        self._saved = position

    def close(self) -> None:
        """Sync, remember, and let another process in."""
        with contextlib.suppress(OSError):
            self.sync()
            self.save()
        self._close_writer()
        if self._reader is not None:
            os.close(self._reader)
            self._reader = None
        self._lock.close()

    # --- segments ---

    def _take_lock(self) -> FileLock:
        try:
            return FileLock(self.directory / _LOCK)
        except LockHeld as error:
            raise SpoolLocked(
                f"another server ({error.holder}) uses the spool {self.directory}: stop it, or "
                "give this one its own MOORLINE_STATE_DIR"
            ) from error

    def _load(self) -> None:
        saved = FrameEnd(0, 0)
        with contextlib.suppress(OSError, ValueError):
            segment_text, offset_text = (self.directory / _CURSOR).read_text().split()
            saved = FrameEnd(int(segment_text), int(offset_text))
        numbers = sorted(
            int(path.stem) for path in self.directory.glob(f"*{_SUFFIX}") if path.stem.isdigit()
        )
        for number in numbers:
            self._segments[number] = segment = _Segment()
            path = self._path(number)
            segment.size_bytes = path.stat().st_size
            for end in _whole_frames(path):
                segment.frames += 1
                segment.valid_bytes = end
                segment.released += FrameEnd(number, end) <= saved
            segment.read = segment.released
            torn = segment.size_bytes - segment.valid_bytes
            if torn:
                self.torn_bytes += torn
                logger.warning(
                    "a spool file ends in the middle of an event, as a crash leaves it: "
                    "that event is lost",
                    extra={"event": "spool_tail_torn", "path": str(path), "bytes": torn},
                )
        self._acknowledged = self._saved = saved
        # Numbers are never reused, or an old cursor could release new frames.
        self._next_number = max([*numbers, saved.segment]) + 1
        for number in numbers:
            if FrameEnd(number, self._segments[number].valid_bytes) <= saved or (
                self._segments[number].frames == 0
            ):
                self._drop_segment(number)
            else:
                break

    def _writable_segment(self) -> int:
        if self._writer is not None:
            if self._segments[self._writer_segment].valid_bytes < self._segment_bytes:
                return self._writer_segment
            self.sync()
            self._close_writer()
        number = self._next_number
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND
        self._writer = os.open(self._path(number), flags, 0o600)
        self._writer_segment = number
        self._next_number += 1
        self._segments[number] = _Segment()
        try:
            _sync_directory(self.directory)
        except OSError:
            self._drop_segment(number)  # a power cut might take its name away, frames and all
            raise
        return number

    def _close_writer(self) -> None:
        if self._writer is not None:
            os.close(self._writer)
            self._writer = None

    def _cut_back(self, number: int) -> None:
        """After a failed write: end the segment at its last whole frame."""
        assert self._writer is not None
        try:
            os.ftruncate(self._writer, self._segments[number].valid_bytes)
        except OSError:  # then nothing may follow the torn frame: the next one starts a segment
            self._close_writer()

    def _drop_segment(self, number: int) -> None:
        del self._segments[number]
        if number == self._writer_segment:
            self._close_writer()
        if self._reader is not None and number == self._reader_segment:
            os.close(self._reader)
            self._reader = None
        with contextlib.suppress(FileNotFoundError):
            self._path(number).unlink()

    def _reader_for(self, number: int) -> int:
        if self._reader is None or self._reader_segment != number:
            if self._reader is not None:
                os.close(self._reader)
            self._reader = os.open(self._path(number), os.O_RDONLY)
            self._reader_segment = number
        return self._reader

    def _path(self, number: int) -> Path:
        return self.directory / f"{number:012d}{_SUFFIX}"


def _whole_frames(path: Path) -> Iterator[int]:
    """End offsets of the frames of a segment, up to the first that is cut or damaged."""
    with path.open("rb") as file:
        end = 0
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            length, checksum = _HEADER.unpack(header)
            payload = file.read(length) if length <= os.fstat(file.fileno()).st_size else b""
            if len(payload) != length or zlib.crc32(payload) != checksum:
                return
            end += _HEADER.size + length
            yield end


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
