"""The updater's verbs, loaded by the `moorline` command: audit, explain, lineage, and `forget`.

Those here open the ledger read-only: the updater may be running or stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from daemon.cli.common import CommandError, JsonOption, endpoints, err, out, print_json, say
from daemon.cli.forget import forget
from daemon.cli.options import with_settings
from moorline.settings import Settings

if TYPE_CHECKING:  # `moorline --help` need not wait for Kafka's client
    from updater.audit import StreamAudit
    from updater.ledger.inspection import LedgerInspector


def register(app: typer.Typer) -> None:
    panel = "Inspect"
    app.command(rich_help_panel=panel)(audit)
    app.command(rich_help_panel=panel)(explain)
    app.command(rich_help_panel=panel)(lineage)
    app.command(rich_help_panel="Operate")(forget)


@with_settings()
def audit(
    settings: Settings,
    offline: Annotated[
        bool, typer.Option("--offline", help="Only the ledger: recount it, ask no broker.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Do the books balance: read the stream again, and compare it with the ledger.

    Every record that the broker still has and the updater has read must have exactly one fate, and
    every total must be what a recount gives. Exits 1 when there is a difference.

    [bold]Examples[/]

      moorline audit
      moorline audit --offline
      moorline audit --json | jq .differences
    """
    from daemon.cli import ledger_pages as pages

    with _inspector(settings) as inspector:
        stream = None if offline else _stream_audit(settings, inspector, quiet=as_json)
        recount = inspector.audit()
        accounting = inspector.accounting()
    differences = [*(stream.differences if stream else ()), *recount]
    if not accounting.balanced:
        differences.append("consumed records and fates differ in number")
    if as_json:
        print_json(
            {
                "balanced": not differences,
                "differences": differences,
                "notes": stream.notes if stream else [],
                "partitions": [asdict(one) for one in stream.partitions] if stream else None,
                "accounting": accounting.as_dict(),
            }
        )
    else:
        out.print(pages.audit_page(stream, accounting.as_dict(), differences))
    if differences:
        raise typer.Exit(1)


def _stream_audit(settings: Settings, inspector: LedgerInspector, *, quiet: bool) -> StreamAudit:
    from moorline.stream import StreamUnavailable
    from updater.audit import audit_stream

    bootstrap = endpoints(settings).bootstrap
    if bootstrap is None:
        raise CommandError(
            "no broker is known: set stream.bootstrap, start `moorline up`, or give --offline"
        )
    where = settings.stream.model_copy(update={"bootstrap": bootstrap})
    with Progress(
        TextColumn("reading the stream again"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=quiet or not err.is_terminal,
    ) as bar:
        task = bar.add_task("", total=None)
        try:
            return audit_stream(
                where, inspector, lambda done, total: bar.update(task, completed=done, total=total)
            )
        except StreamUnavailable as error:
            raise CommandError(f"{error}; or audit the ledger alone: --offline") from None


@with_settings()
def explain(
    settings: Settings,
    event_id: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            help="Of a reply (chatcmpl-...), of feedback (fb-...), or a record: TOPIC/PART/OFFSET.",
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """One event's story: when it was read, what it joined, where it ended and why.

    Never shows what anybody wrote. Exits 1 when the ledger does not know the event.

    [bold]Examples[/]

      moorline explain chatcmpl-8f3a
      moorline explain fb-0c1d --json
      moorline explain feedback.v1/2/1041
    """
    from daemon.cli import ledger_pages as pages

    with _inspector(settings) as inspector:
        histories = inspector.histories(event_id)
        waiting = inspector.awaiting(event_id)
        remembered = [] if histories else inspector.decided_examples(event_id)
    if not (histories or waiting or remembered):
        raise CommandError(
            f"the ledger knows no event {event_id!r}: it was not read yet (`moorline status` shows "
            "the lag), was never published, or is of another --state-dir"
        )
    if as_json:
        print_json(
            {
                "stories": [asdict(story) for story in histories],
                "feedback_waiting_for_it": waiting,
                "examples": [
                    dict(zip(("example_id", "fate", "reason", "decided_by"), one, strict=True))
                    for one in remembered
                ],
            }
        )
        return
    for line in pages.explanation(settings.alias, event_id, histories, waiting, remembered):
        say(line)


@with_settings()
def lineage(
    settings: Settings,
    version: Annotated[
        str, typer.Argument(metavar="VERSION", help="42, v000042 or assistant@v000042.")
    ],
    every: Annotated[bool, typer.Option("--all", help="List every example.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What is behind a release: its examples, its raters, its parents back to the base model.

    [bold]Examples[/]

      moorline lineage 42
      moorline lineage assistant@v000042 --all
      moorline lineage 42 --json | jq '.examples[].interaction'
    """
    from daemon.cli import ledger_pages as pages

    number = _number(version)
    if number == 0:
        raise CommandError("version 0 is the base model: nothing of the stream is in it")
    with _inspector(settings) as inspector:
        found = inspector.behind(number)
    if as_json:
        print_json(pages.lineage_json(found))
    else:
        out.print(pages.lineage_page(found, every=every))


def _number(version: str) -> int:
    digits = version.rpartition("@")[2].removeprefix("v")
    if not digits.isdecimal() or len(digits) > 18:
        raise typer.BadParameter(f"{version!r} is not a version, such as 42 or assistant@v000042")
    return int(digits)


@contextmanager
def _inspector(settings: Settings) -> Iterator[LedgerInspector]:
    from updater.ledger import LedgerError
    from updater.ledger.inspection import LedgerInspector

    try:
        with closing(LedgerInspector(settings.ledger_path)) as inspector:
            yield inspector
    except LedgerError as error:
        raise CommandError(str(error)) from None
