"""All verbs in one table, and the place where errors become one line and an exit code."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from daemon.cli.audit import audit
from daemon.cli.backup import backup, restore
from daemon.cli.common import err
from daemon.cli.doctor import doctor
from daemon.cli.explain import explain
from daemon.cli.feedback import feedback
from daemon.cli.forget import forget
from daemon.cli.inspect import config, releases, schemas, status
from daemon.cli.lineage import lineage
from daemon.cli.operate import resume, rollback
from daemon.cli.reanchor import reanchor
from daemon.cli.redrive import redrive
from daemon.cli.run import demo, serve, up, update
from moorline.errors import MoorlineError

app = typer.Typer(
    name="moorline",
    help="Keeps a deployed language model learning from its users, within measured bounds on how "
    "far it may drift.",
    epilog="Try it: `moorline demo`. With your own model: `moorline up --model DIR`. "
    "Options and examples of a verb: `moorline VERB --help`.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"moorline {version('moorline')}")
        except PackageNotFoundError:
            typer.echo("moorline (not installed)")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print and exit."),
    ] = False,
) -> None:
    del show_version


_VERBS: dict[str, tuple[Callable[..., None], ...]] = {
    "Run": (up, serve, update),
    "Inspect": (status, releases, config, schemas, doctor, audit, explain, lineage),
    "Operate": (rollback, resume, reanchor, feedback, redrive, forget, backup, restore),
}
for _panel, _verbs in _VERBS.items():
    for _verb in _verbs:
        app.command(rich_help_panel=_panel)(_verb)
app.command(
    rich_help_panel="Run",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
)(demo)


def main() -> None:
    """The console script: exit 0, 1 with one line on stderr, or 2 for wrong usage."""
    logging.getLogger().addHandler(logging.NullHandler())  # verbs speak for themselves
    try:
        app(prog_name="moorline")
    except MoorlineError as error:
        err.print("[bold red]moorline:[/]", end=" ")
        err.print(" ".join(str(error).split()), markup=False, soft_wrap=True)
        raise SystemExit(1) from None
    except BrokenPipeError:  # `moorline releases | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
