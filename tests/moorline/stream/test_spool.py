"""The spool: first in, first out, bounded, and whole after any crash."""

from __future__ import annotations

import errno
import os
import stat
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moorline.stream.spool import Frame, Spool, SpoolLocked

MEBIBYTE = 2**20


def drain(spool: Spool) -> list[bytes]:
    """Read and release everything."""
    found = []
    while (frame := spool.next()) is not None:
        assert frame.payload is not None
        found.append(frame.payload)
        spool.release(frame)
    return found


def unread(spool: Spool) -> Iterator[Frame]:
    while (frame := spool.next()) is not None:
        yield frame


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.spool"))


def test_events_come_back_in_order_after_a_restart(tmp_path: Path) -> None:
    spool = Spool(tmp_path, MEBIBYTE)
    payloads = [b"event %d" % number for number in range(100)]
    for payload in payloads:
        assert spool.append(payload)
    spool.close()
    again = Spool(tmp_path, MEBIBYTE)
    assert again.count == 100
    assert drain(again) == payloads
    assert again.count == 0
    again.close()


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    steps=st.lists(
        st.one_of(
            st.binary(max_size=300),
            st.sampled_from(["read", "release", "rewind", "restart", "save", "skip"]),
        ),
        max_size=80,
    )
)
def test_it_behaves_as_a_list_with_two_cursors(
    steps: list[bytes | str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("spool")
    spool = Spool(directory, 64 * 1024)
    waiting: deque[bytes] = deque()  # not released
    read = 0  # of those, read
    held: deque[Frame] = deque()
    for step in steps:
        if isinstance(step, bytes):
            if spool.append(step) is not None:
                waiting.append(step)
        elif step == "read":
            frame = spool.next()
            if read == len(waiting):
                assert frame is None
            else:
                assert frame is not None
                assert frame.payload == waiting[read]
                held.append(frame)
                read += 1
        elif step == "release" and held:
            spool.release(held.popleft())
            waiting.popleft()
            read -= 1
        elif step == "rewind":
            spool.rewind()
            held.clear()
            read = 0
        elif step == "skip":
            for frame in unread(spool):
                held.append(frame)
            read = len(waiting)
            spool.skip()
        elif step == "save":
            spool.save()
        elif step == "restart":
            spool.close()
            spool = Spool(directory, 64 * 1024)
            held.clear()
            read = 0
        assert spool.count == len(waiting)
        assert spool.unread == len(waiting) - read
        assert spool.size_bytes <= 64 * 1024
    spool.rewind()
    assert drain(spool) == list(waiting)
    spool.close()


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(payloads=st.lists(st.binary(max_size=50), min_size=1, max_size=20), data=st.data())
def test_a_torn_tail_costs_only_what_was_torn(
    payloads: list[bytes], data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("spool")
    spool = Spool(directory, MEBIBYTE)
    for payload in payloads:
        spool.append(payload)
    spool.close()
    (path,) = segments(directory)
    whole = path.read_bytes()
    kept = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:kept])
    ends, end = [], 0
    for payload in payloads:
        end += 8 + len(payload)
        ends.append(end)
    survivors = sum(end <= kept for end in ends)
    again = Spool(directory, MEBIBYTE)
    again.append(b"newer")
    assert drain(again) == [*payloads[:survivors], b"newer"]
    again.close()


def test_a_flipped_bit_never_comes_out_as_an_event(tmp_path: Path) -> None:
    spool = Spool(tmp_path, MEBIBYTE)
    for number in range(3):
        spool.append(b"payload %d" % number)
    spool.close()
    (path,) = segments(tmp_path)
    damaged = bytearray(path.read_bytes())
    damaged[8 + 9 + 8 + 2] ^= 1  # in the second payload
    path.write_bytes(damaged)
    again = Spool(tmp_path, MEBIBYTE)
    assert drain(again) == [b"payload 0"]
    assert again.torn_bytes == 2 * (8 + 9)
    again.close()


def test_damage_while_it_runs_is_counted_and_does_not_stop_what_follows(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 8 * 100)  # segments of about 100 bytes
    for number in range(12):
        spool.append(b"payload %03d" % number)
    first = segments(tmp_path)[0]
    content = bytearray(first.read_bytes())
    content[8] ^= 1
    with first.open("r+b") as file:
        file.write(content)
    frame = spool.next()
    assert frame is not None
    assert frame.payload is None
    assert frame.count >= 1
    spool.release(frame)
    rest = drain(spool)
    assert len(rest) + frame.count == 12
    assert rest[-1] == b"payload 011"
    assert spool.count == 0
    spool.close()


def test_the_bound_holds_and_space_comes_back(tmp_path: Path) -> None:
    bound = 64 * 1024
    spool = Spool(tmp_path, bound)
    taken = 0
    while spool.append(b"x" * 1000) is not None:
        taken += 1
    assert taken > 50
    assert sum(path.stat().st_size for path in segments(tmp_path)) <= bound
    for frame in [spool.next() for _ in range(taken // 2)]:
        assert frame is not None
        spool.release(frame)
    assert spool.append(b"y" * 1000) is not None
    assert len(drain(spool)) == taken - taken // 2 + 1
    assert spool.size_bytes == 0
    assert segments(tmp_path) == []
    spool.close()


def test_what_is_released_is_not_given_again_after_a_clean_close(tmp_path: Path) -> None:
    spool = Spool(tmp_path, MEBIBYTE)
    for number in range(5):
        spool.append(b"%d" % number)
    for _ in range(2):
        frame = spool.next()
        assert frame is not None
        spool.release(frame)
    spool.close()
    again = Spool(tmp_path, MEBIBYTE)
    assert drain(again) == [b"2", b"3", b"4"]
    again.close()


def test_an_old_cursor_never_releases_new_events(tmp_path: Path) -> None:
    spool = Spool(tmp_path, MEBIBYTE)
    spool.append(b"old " * 100)
    assert len(drain(spool)) == 1
    spool.close()
    for path in segments(tmp_path):
        path.unlink()
    again = Spool(tmp_path, MEBIBYTE)
    again.append(b"new")
    again.close()
    third = Spool(tmp_path, MEBIBYTE)
    assert drain(third) == [b"new"]
    third.close()


def test_a_second_process_is_refused_with_the_remedy(tmp_path: Path) -> None:
    spool = Spool(tmp_path, MEBIBYTE)
    with pytest.raises(SpoolLocked, match="MOORLINE_STATE_DIR"):
        Spool(tmp_path, MEBIBYTE)
    spool.close()
    Spool(tmp_path, MEBIBYTE).close()


def test_a_full_disk_costs_the_event_and_nothing_before_or_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spool = Spool(tmp_path, MEBIBYTE)
    spool.append(b"before")
    real_write = os.write

    def half_a_write(handle: int, data: bytes) -> int:
        if len(data) > 4:
            return real_write(handle, data[:4])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", half_a_write)
    with pytest.raises(OSError, match="No space"):
        spool.append(b"torn")
    monkeypatch.undo()
    spool.append(b"after")
    spool.close()
    again = Spool(tmp_path, MEBIBYTE)
    assert again.torn_bytes == 0
    assert drain(again) == [b"before", b"after"]
    again.close()


def test_only_its_owner_can_read_it(tmp_path: Path) -> None:
    directory = tmp_path / "spool"
    spool = Spool(directory, MEBIBYTE)
    spool.append(b"a prompt")
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in segments(directory))
    spool.close()
