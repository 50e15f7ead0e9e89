"""Verbs that run processes: up, serve, update, demo."""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape
from rich.status import Status

from daemon import tree
from daemon.broker import BrokerError, broker_binary
from daemon.cli.common import RUN_FILE, CommandError, RunFile, out
from daemon.cli.options import BOOTSTRAP, MODEL, SERVING_PORT, UPDATER_PORT, with_settings
from daemon.supervise import Notice, NoticeKind, Supervisor
from moorline.base_model import ModelInvalid, check_model_dir
from moorline.locks import FileLock, LockHeld
from moorline.logs import setup_logging
from moorline.settings import Settings, child_environment

_STYLES = {
    NoticeKind.READY: "green",
    NoticeKind.CRASHED: "yellow",
    NoticeKind.GAVE_UP: "bold red",
    NoticeKind.KILLED: "yellow",
}
_WORDS = {NoticeKind.GAVE_UP: "gave up", NoticeKind.CRASHED: "crashed"}


@with_settings(MODEL, SERVING_PORT, BOOTSTRAP)
def up(
    settings: Settings,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Also show what the processes log.")
    ] = False,
) -> None:
    """Run everything on this machine: broker, server and updater, as one tree.

    One Ctrl-C stops all, in order; running replies may end first. A second one does not wait.
    Logs are in STATE_DIR/logs/.

    [bold]Examples[/]

      moorline up --model models/SmolLM2-135M-Instruct
      moorline up --model models/mine --bootstrap kafka1:9092,kafka2:9092
      moorline up -c moorline.toml --set learning.batch_examples=12 --verbose
    """
    _check_model(settings)
    if settings.stream.bootstrap is None:
        _check_embedded_broker()
    with _only_one(settings.state_dir):
        planned = tree.plan(settings)
        if not planned.embedded_broker:
            _check_broker(settings)
        run_file = RunFile(
            pid=os.getpid(),
            server=planned.server,
            updater=planned.updater,
            bootstrap=planned.bootstrap,
            embedded_broker=planned.embedded_broker,
            started_at=time.time(),
        )
        run_file.write(settings.state_dir)
        try:
            code = _supervise(settings, planned, verbose=verbose)
        finally:
            (settings.state_dir / RUN_FILE).unlink(missing_ok=True)
    raise typer.Exit(code)


def _supervise(settings: Settings, planned: tree.Tree, *, verbose: bool) -> int:
    screen = _Screen()
    if not screen.interactive:  # at a terminal the screen says it already
        setup_logging(settings, "up")
    supervisor = Supervisor(
        planned.children,
        settings.state_dir / "logs",
        notify=screen.show,
        echo=_echo if verbose or not screen.interactive else None,
        on_ready=lambda: screen.welcome(settings, planned),
    )
    return supervisor.run()


class _Screen:
    """Shows the tree's state at a terminal; elsewhere it is silent, since the logs have it."""

    def __init__(self) -> None:
        self.interactive = out.is_terminal
        self._spinner: Status | None = None

    def show(self, notice: Notice) -> None:
        if not self.interactive:
            return
        self._stop_spinner()
        if notice.kind is NoticeKind.STARTING:
            hint = " (loading the model takes a while)" if notice.name == "server" else ""
            self._spinner = out.status(f"{notice.name} starting{hint}", spinner="line")
            self._spinner.start()
            return
        text = notice.text
        if notice.kind is NoticeKind.STOPPING and notice.name == "updater":
            text = "(an update under way ends first; Ctrl-C again does not wait)"
        word = _WORDS.get(notice.kind, str(notice.kind))
        style = _STYLES.get(notice.kind, "dim")
        out.print(f"  {notice.name:<8} [{style}]{word}[/] {escape(text)}".rstrip(), soft_wrap=True)

    def welcome(self, settings: Settings, planned: tree.Tree) -> None:
        self._stop_spinner()
        if not self.interactive:
            return
        embedded = " [dim](embedded, in memory)[/]" if planned.embedded_broker else ""
        out.print(
            f"\n  OpenAI API   [bold]{planned.server}/v1[/]  model [bold]{settings.alias}[/]"
            f"\n  Feedback     POST {planned.server}/v1/feedback, or `moorline feedback ID`"
            f"\n  Kafka        {planned.bootstrap}{embedded}"
            f"\n  Inspect      moorline status --state-dir {settings.state_dir}"
            "\n\n  Ctrl-C stops everything.\n",
            soft_wrap=True,
        )

    def _stop_spinner(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None


def _echo(name: str, line: str) -> None:
    sys.stdout.write(f"{name:<8}| {line}\n")
    sys.stdout.flush()


@contextmanager
def _only_one(state_dir: Path) -> Iterator[None]:
    """Create the state directory for this user only, and lock it until the block ends.

    Raises:
        CommandError: it cannot be written, or another tree runs on it.
    """
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = FileLock(state_dir / "up.lock")
    except LockHeld as error:
        raise CommandError(
            f"another `moorline up` ({error.holder}) runs on {state_dir}: stop it, or give "
            "another --state-dir"
        ) from None
    except OSError as error:
        raise CommandError(
            f"cannot write the state directory {state_dir} ({error.strerror}): "
            "give another with --state-dir"
        ) from None
    with lock:
        yield


def _check_model(settings: Settings) -> None:
    try:
        check_model_dir(settings.model.path)
    except ModelInvalid as error:
        hint = " (--model DIR)" if settings.model.path is None else ""
        raise CommandError(f"{error}{hint}") from None


def _check_broker(settings: Settings) -> None:
    """Check now that the broker answers; `serve` and `update` wait for one instead.

    Raises:
        CommandError: the configured broker does not answer, or refuses us.
    """
    from moorline.stream.client import StreamUnavailable, admin_session

    try:
        with admin_session(settings.stream):
            pass
    except StreamUnavailable as error:
        raise CommandError(str(error)) from None


def _check_embedded_broker() -> None:
    try:
        broker_binary()
    except BrokerError as error:
        raise CommandError(str(error)) from None


@with_settings(MODEL, SERVING_PORT, BOOTSTRAP)
def serve(settings: Settings) -> None:
    """Run the server alone: the OpenAI API, on the newest or the pinned release.

    [bold]Examples[/]

      moorline serve --model models/mine --bootstrap kafka1:9092
      moorline serve -c /etc/moorline/moorline.toml
    """
    _check_model(settings)
    _become(settings, "serving")


@with_settings(MODEL, UPDATER_PORT, BOOTSTRAP)
def update(settings: Settings) -> None:
    """Run the updater alone: consume the stream, learn, gate, release.

    [bold]Examples[/]

      moorline update --model models/mine --bootstrap kafka1:9092
      moorline update -c /etc/moorline/moorline.toml
    """
    _check_model(settings)
    if settings.stream.bootstrap is None:
        raise CommandError(
            "the updater needs a broker: give --bootstrap HOST:PORT, or run `moorline up`"
        )
    _become(settings, "updater")


def _become(settings: Settings, module: str) -> NoReturn:
    """Replace this process, so that a service manager talks to the one that does the work."""
    with suppress(FileExistsError):
        settings.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", module], child_environment(settings))


def demo(context: typer.Context) -> None:
    """Watch a real model learn from feedback, on this machine, in about ten minutes.

    Everything after `demo` goes to the demo itself: `moorline demo --help`.
    """
    module: Any = importlib.import_module("daemon.demo.run")
    raise typer.Exit(module.main(context.args) or 0)
