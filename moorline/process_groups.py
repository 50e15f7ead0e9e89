"""Process groups that cannot outlive the supervisor, however the supervisor ends.

``python -m moorline.process_groups child PARENT -- ARGV...`` asks the kernel for a SIGTERM when the
parent dies and then becomes ARGV. ``python -m moorline.process_groups reaper GRACE`` waits on its
standard input: when the supervisor is gone (kill -9 too), it stops every process group that it was
told of, grandchildren included, first politely.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from typing import BinaryIO

from moorline.clock import running_seconds

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_POLL_SECONDS = 0.05


def die_with_parent(parent: int, signal_number: int = signal.SIGTERM) -> None:
    """Have the kernel send ``signal_number`` to this process when ``parent`` ends.

    Raises:
        SystemExit: the parent is gone already.
    """
    _prctl(_PR_SET_PDEATHSIG, signal_number)
    if os.getppid() != parent:
        raise SystemExit("whoever started this process is gone")


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends, to wait for all of them."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def group_exists(group: int) -> bool:
    """Whether any process is left in a group, not counting ended ones that are our children."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-group, os.WNOHANG)[0]:
            pass
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def stop_groups(groups: set[int], grace_seconds: float) -> None:
    """SIGTERM to whole groups, and SIGKILL to what is left of them after the grace."""
    deadline = running_seconds() + grace_seconds
    for group in groups:
        _signal_group(group, signal.SIGTERM)
    while any(map(group_exists, groups)) and running_seconds() < deadline:
        time.sleep(_POLL_SECONDS)
    for group in groups:
        _signal_group(group, signal.SIGKILL)


def _signal_group(group: int, signal_number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal_number)


def reap(orders: BinaryIO, grace_seconds: float) -> None:
    """Follow ``+GROUP`` and ``-GROUP`` lines until the supervisor's end of the pipe closes."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    groups: set[int] = set()
    for line in orders:
        sign, group = line[:1], int(line[1:])
        if sign == b"+":
            groups.add(group)
        else:
            groups.discard(group)
    stop_groups(groups, grace_seconds)


def main(arguments: list[str]) -> None:
    match arguments:
        case ["child", parent, "--", *argv] if argv:
            die_with_parent(int(parent))
            try:
                os.execvp(argv[0], argv)
            except OSError as error:
                raise SystemExit(f"cannot run {argv[0]}: {error.strerror}") from None
        case ["reaper", grace]:
            reap(sys.stdin.buffer, float(grace))
        case _:
            raise SystemExit("moorline.process_groups is started by the supervisor only")


if __name__ == "__main__":
    main(sys.argv[1:])
