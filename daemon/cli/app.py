"""The verbs, put together, and the one place where errors become a line and an exit code."""

from __future__ import annotations

import logging
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from daemon.cli import doctor, inspect, ledger, operate, redrive, run
from daemon.cli.common import err
from moorline.errors import MoorlineError

app = typer.Typer(
    name="moorline",
    help="Keeps a deployed language model learning from its users, and never lets it drift "
    "further than its line.",
    epilog="A first look:  moorline demo        Your own model:  moorline up --model DIR",
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


run.register(app)
inspect.register(app)
operate.register(app)
redrive.register(app)
doctor.register(app)
ledger.register(app)


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
