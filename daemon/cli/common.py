"""What the verbs share: the console, the error for one line, and where to ask."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import BaseModel, ConfigDict, ValidationError
from rich.console import Console

from moorline.durable import write_file
from moorline.errors import MoorlineError
from moorline.http import base_url
from moorline.settings import Settings

if TYPE_CHECKING:  # `moorline --help` need not wait for Kafka's client
    from updater.ledger.inspection import LedgerInspector

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

RUN_FILE = "run.json"


class CommandError(MoorlineError):
    """A verb cannot do what was asked: one line, "what happened: remedy"."""


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


class RunFile(BaseModel):
    """Where the tree of a running `moorline up` listens; gone when it stops."""

    model_config = ConfigDict(frozen=True)

    pid: int
    server: str
    updater: str
    bootstrap: str
    embedded_broker: bool
    started_at: float

    def write(self, state_dir: Path) -> None:
        write_file(state_dir / RUN_FILE, self.model_dump_json().encode(), "cli.run_file")


def running_tree(state_dir: Path) -> RunFile | None:
    """The `moorline up` that uses this state directory now, if there is one."""
    try:
        found = RunFile.model_validate_json((state_dir / RUN_FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    return found if _alive(found.pid) else None


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@dataclass(frozen=True)
class Endpoints:
    """The addresses of server, updater and broker."""

    server: str
    updater: str
    bootstrap: str | None


def endpoints(
    settings: Settings, server: str | None = None, updater: str | None = None
) -> Endpoints:
    """The addresses of the command line, else of the running tree, else of the settings."""
    tree = running_tree(settings.state_dir)
    configured = Endpoints(
        server=base_url(
            settings.serving.host,
            settings.serving.port,
            https=settings.serving.speaks_https,
        ),
        updater=base_url(settings.updater.host, settings.updater.port),
        bootstrap=settings.stream.bootstrap,
    )
    return Endpoints(
        server=(server or (tree.server if tree else configured.server)).rstrip("/"),
        updater=(updater or (tree.updater if tree else configured.updater)).rstrip("/"),
        bootstrap=tree.bootstrap if tree else configured.bootstrap,
    )


def access(settings: Settings) -> dict[str, Any]:
    """What ``request_json`` needs to be let in by the server, and to know that it is the one."""
    secret = settings.serving.api_key
    return {
        "api_key": secret.get_secret_value() if secret else None,
        "certificate": settings.serving.ssl_certfile,
    }


def say(text: str, style: str | None = None) -> None:
    """Print a sentence; the terminal breaks the line, so that what is copied stays whole."""
    out.print(text, style=style, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print plain JSON on stdout, also at a terminal."""
    typer.echo(json.dumps(value, indent=2, default=str))


@contextmanager
def ledger_inspector(settings: Settings) -> Iterator[LedgerInspector]:
    """Open the ledger read-only; the updater may be running or stopped.

    Raises:
        CommandError: there is no ledger, or it cannot be read.
    """
    from updater.ledger import LedgerError
    from updater.ledger.inspection import LedgerInspector

    try:
        with closing(LedgerInspector(settings.ledger_path)) as inspector:
            yield inspector
    except LedgerError as error:
        raise CommandError(str(error)) from None
