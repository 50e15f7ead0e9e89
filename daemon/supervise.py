"""Run the processes of one machine as one tree: start in order, restart, stop in reverse order.

Each child is its own process group, so a Ctrl-C in the terminal reaches the supervisor only, which
then stops the tree from the last started to the first. A crashed child comes back after a growing
pause. When one that is essential crashes too often everything stops with one clear line; one that
is not is tried again, rarely, while the others go on.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import FrameType

from daemon.children import Child, ChildProcess
from moorline.clock import running_seconds
from moorline.process_groups import adopt_orphans
from moorline.systemd import Notifier

__all__ = ["Child", "Notice", "NoticeKind", "RestartPolicy", "Supervisor"]

logger = logging.getLogger("moorline.supervise")

EXIT_CONFIG = 78  # sysexits.h: the settings are wrong; trying again cannot help
_TICK_SECONDS = 0.05
_STARTING_GRACE_SECONDS = 5.0


class NoticeKind(StrEnum):
    """What happens to a child."""

    STARTING = "starting"
    READY = "ready"
    CRASHED = "crashed"
    """Ended or hung by itself; it will be started again."""
    GAVE_UP = "gave_up"
    STOPPING = "stopping"
    KILLED = "killed"
    """Did not stop within its grace."""
    STOPPED = "stopped"


_SENTENCES = {
    NoticeKind.STARTING: "process is starting",
    NoticeKind.READY: "process is ready",
    NoticeKind.CRASHED: "process ended or hung, it will be started again",
    NoticeKind.GAVE_UP: "process crashes again and again, giving up",
    NoticeKind.STOPPING: "process is asked to stop",
    NoticeKind.KILLED: "process did not stop in time, it was killed",
    NoticeKind.STOPPED: "process has stopped",
}
_SERIOUS = (NoticeKind.CRASHED, NoticeKind.GAVE_UP, NoticeKind.KILLED)


@dataclass(frozen=True)
class Notice:
    """One line for a person."""

    kind: NoticeKind
    name: str
    text: str = ""


@dataclass(frozen=True)
class RestartPolicy:
    """When to start a crashed child again, and when to stop trying."""

    first_delay_seconds: float = 0.5
    max_delay_seconds: float = 30.0
    stable_seconds: float = 60.0
    """After a run of this length a crash is the first of a new count."""
    give_up_after: int = 5
    """So many crashes in a row, each before ``stable_seconds``, are enough."""
    rest_seconds: float = 300.0
    """A child that is not essential is tried again this long after it was given up."""


class _Slot:
    """A child and its state, which outlives each of its processes."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self.process: ChildProcess | None = None
        self.announced_ready = False
        self.ever_ready = False
        self.crashes = 0
        self.start_at = 0.0
        self.gave_up = False

    @property
    def settled(self) -> bool:
        """Whether the next child in order may start."""
        return self.ever_ready or (self.gave_up and not self.child.essential)


class Supervisor:
    """Runs the tree in the main thread until a signal comes or an essential child is given up.

    Args:
        children: in starting order; each waits until those before it were ready once.
        log_dir: ``<name>.log`` of each child, rotated.
        notify: called with everything that happens to a child.
        echo: called with every output line (name, line), on other threads.
        on_ready: called once, when every child was ready (or given up, if it is not essential).
    """

    def __init__(
        self,
        children: Sequence[Child],
        log_dir: Path,
        *,
        notify: Callable[[Notice], None] | None = None,
        echo: Callable[[str, str], None] | None = None,
        restart: RestartPolicy | None = None,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        self._slots = [_Slot(child) for child in children]
        self._log_dir = log_dir
        self._notify = notify
        self._echo = echo
        self._restart = restart or RestartPolicy()
        self._on_ready = on_ready
        self._all_ready = False
        self._signals = 0
        self._service = Notifier()
        self._reaper: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Start, watch and stop the tree; returns 0 after a signal, 1 after giving up."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        adopt_orphans()
        self._start_reaper()
        hopeless = False
        try:
            while not self._signals and not hopeless:
                hopeless = not self._tick()
                self._service.ping()
                time.sleep(_TICK_SECONDS)
        finally:
            self._service.stopping()
            self._stop_all()
            self._end_reaper()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return 1 if hopeless else 0

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._signals += 1

    # --- running -------------------------------------------------------------------------------

    def _tick(self) -> bool:
        """Start and check every child once; False when an essential one was given up."""
        for slot in self._slots:
            if slot.process is None:
                if (
                    not (slot.gave_up and slot.start_at == 0.0)
                    and time.monotonic() >= slot.start_at
                ):
                    self._start(slot)
            elif not self._watch(slot, slot.process):
                return False
            if not slot.settled:
                break  # the next ones wait
        else:
            self._announce_all_ready()
        return True

    def _start(self, slot: _Slot) -> None:
        self._report(NoticeKind.STARTING, slot)
        path = self._log_dir / f"{slot.child.name}.log"
        slot.announced_ready = False
        try:
            slot.process = ChildProcess(slot.child, path, self._echo)
        except OSError as error:  # no memory or no process left: the others must go on
            slot.start_at = time.monotonic() + self._restart.max_delay_seconds
            self._report(NoticeKind.CRASHED, slot, f"cannot be started: {error.strerror}")
            return
        self._order_reaper(f"+{slot.process.pid}\n")

    def _watch(self, slot: _Slot, process: ChildProcess) -> bool:
        code = process.poll()
        if code is not None:
            return self._crashed(slot, process, describe_exit(code), refused=code > 0)
        if process.ready and not slot.announced_ready:
            slot.announced_ready = slot.ever_ready = True
            slot.gave_up = False
            self._report(NoticeKind.READY, slot, f"after {process.age_seconds:.1f} s")
        if process.stuck:
            why = f"not ready after {slot.child.ready_timeout_seconds:.0f} s"
            return self._crashed(slot, process, why)
        if process.hung:
            why = f"no sign of life for {slot.child.hang_seconds:.0f} s"
            return self._crashed(slot, process, why)
        return True

    def _crashed(
        self, slot: _Slot, process: ChildProcess, why: str, *, refused: bool = False
    ) -> bool:
        """Clear up after a child and plan its restart; False when everything must stop."""
        was_stable = process.ready and process.age_seconds >= self._restart.stable_seconds
        code = process.finish()
        self._order_reaper(f"-{process.pid}\n")
        slot.process = None
        slot.crashes = 1 if was_stable else slot.crashes + 1
        last_line = process.last_line()
        text = f"{why}: {last_line}" if last_line else why
        # It refused to start and was never ready: the same start would be refused again.
        hopeless = code == EXIT_CONFIG or (refused and not slot.ever_ready)
        if not hopeless and slot.crashes < self._restart.give_up_after:
            doublings = slot.crashes - 1
            delay = self._restart.first_delay_seconds * 2.0**doublings
            delay = min(delay, self._restart.max_delay_seconds)
            slot.start_at = time.monotonic() + delay
            self._report(NoticeKind.CRASHED, slot, f"{text} (again in {delay:.1f} s)")
            return True
        return self._give_up(slot, process, text, retry=code != EXIT_CONFIG)

    def _give_up(self, slot: _Slot, process: ChildProcess, text: str, *, retry: bool) -> bool:
        if slot.crashes > 1:
            text = f"{slot.crashes} crashes in a row, the last: {text}"
        rest = self._restart.rest_seconds if retry and not slot.child.essential else 0.0
        after = f"; the others go on, next try in {rest:.0f} s" if rest else ""
        slot.gave_up = True
        slot.start_at = time.monotonic() + rest if rest else 0.0
        self._report(NoticeKind.GAVE_UP, slot, f"{text} [log: {process.log_path}]{after}")
        return not slot.child.essential

    def _announce_all_ready(self) -> None:
        if not self._all_ready:
            self._all_ready = True
            self._service.ready("ready")
            if self._on_ready is not None:
                self._on_ready()

    # --- stopping ------------------------------------------------------------------------------

    def _stop_all(self) -> None:
        """Stop the last started first; a second signal ends the grace of all."""
        for slot in reversed(self._slots):
            process = slot.process
            if process is None:
                continue
            self._report(NoticeKind.STOPPING, slot)
            process.terminate()
            # What never was ready has nothing to bring to an end.
            grace = slot.child.grace_seconds if process.ready else _STARTING_GRACE_SECONDS
            deadline = running_seconds() + min(grace, slot.child.grace_seconds)
            while process.poll() is None and running_seconds() < deadline and self._signals < 2:
                self._service.ping()
                time.sleep(_TICK_SECONDS)
            too_slow = process.poll() is None
            process.finish()
            self._order_reaper(f"-{process.pid}\n")
            slot.process = None
            self._report(NoticeKind.KILLED if too_slow else NoticeKind.STOPPED, slot)

    # --- helpers -------------------------------------------------------------------------------

    def _report(self, kind: NoticeKind, slot: _Slot, text: str = "") -> None:
        """Log it, and tell the service manager and whoever watches."""
        extra: dict[str, str | int] = {"event": f"child_{kind}", "child": slot.child.name}
        if text:
            extra["reason"] = text
        if slot.crashes:
            extra["crashes"] = slot.crashes
        level = logging.WARNING if kind in _SERIOUS else logging.INFO
        logger.log(level, _SENTENCES[kind], extra=extra)
        self._service.status(f"{slot.child.name} {kind}")
        if self._notify is not None:
            with contextlib.suppress(OSError):  # the terminal may be gone; the tree is not
                self._notify(Notice(kind, slot.child.name, text))

    def _start_reaper(self) -> None:
        grace = max((slot.child.grace_seconds for slot in self._slots), default=0.0)
        self._reaper = subprocess.Popen(
            [sys.executable, "-m", "moorline.process_groups", "reaper", str(grace)],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    def _order_reaper(self, order: str) -> None:
        assert self._reaper is not None
        assert self._reaper.stdin is not None
        try:
            self._reaper.stdin.write(order.encode())
            self._reaper.stdin.flush()
        except BrokenPipeError:  # somebody killed it; children still die with us by the kernel
            logger.warning(
                "the helper that stops processes left behind by a killed supervisor has ended",
                extra={"event": "reaper_gone"},
            )

    def _end_reaper(self) -> None:
        assert self._reaper is not None
        assert self._reaper.stdin is not None
        try:
            self._reaper.stdin.close()
        except BrokenPipeError:
            logger.warning(
                "the helper that stops processes left behind by a killed supervisor has ended",
                extra={"event": "reaper_gone"},
            )
        self._reaper.wait()


def describe_exit(code: int) -> str:
    """An exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    hint = ", out of memory?" if -code == signal.SIGKILL else ""
    return f"killed by {name}{hint}"
