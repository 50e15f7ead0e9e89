"""`moorline audit`: compares the stream with the ledger, event by event."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from daemon.cli.common import (
    CommandError,
    JsonOption,
    endpoints,
    err,
    ledger_inspector,
    out,
    print_json,
)
from daemon.cli.options import with_settings
from daemon.cli.status_page import accounting_table
from moorline.settings import Settings

if TYPE_CHECKING:  # `moorline --help` need not wait for Kafka's client
    from updater.audit import StreamAudit
    from updater.ledger.inspection import LedgerInspector


@with_settings()
def audit(
    settings: Settings,
    offline: Annotated[
        bool, typer.Option("--offline", help="Only the ledger: recount it, ask no broker.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Read the stream again and compare it with the ledger.

    Every record that the broker still has and the updater has read must have exactly one fate, and
    every total must be what a recount gives. Exits 1 when there is a difference.

    [bold]Examples[/]

      moorline audit
      moorline audit --offline
      moorline audit --json | jq .differences
    """
    with ledger_inspector(settings) as inspector:
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
        out.print(_page(stream, accounting.as_dict(), differences))
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


def _page(
    stream: StreamAudit | None, accounting: Mapping[str, Any], differences: Sequence[str]
) -> RenderableType:
    """The comparison by partition, the totals, and the verdict."""
    parts: list[RenderableType] = []
    if stream is not None and stream.partitions:
        parts += [Text("The stream, read again", style="bold"), _partitions_table(stream), Text()]
    fates = accounting_table(accounting)
    if fates.row_count:
        parts += [Text("Events and where they ended", style="bold"), fates, Text()]
    parts += [Text(f"note: {note}", style="yellow") for note in (stream.notes if stream else ())]
    if differences:
        parts += [Text(line, style="bold red") for line in differences]
        parts.append(Text(f"Audit failed: {len(differences)} differences."))
    else:
        total = accounting["total"]
        scope = "in the ledger and on the stream" if stream else "in the ledger (stream not read)"
        verdict = f"Audit passed: {total} events, each with one fate, {scope}."
        parts.append(Text(verdict, style="green"))
    return Group(*parts)


def _partitions_table(stream: StreamAudit) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=True)
    table.add_column("topic", no_wrap=True)
    for heading in ("part", "offsets", "broker", "ledger", "markers", "removed", "missed"):
        table.add_column(heading, justify="right")
    for heading in ("unread", ""):
        table.add_column(heading, justify="right")
    for one in sorted(stream.partitions, key=lambda one: (one.topic, one.partition)):
        wrong = bool(one.differences)
        table.add_row(
            str(one.topic),
            str(one.partition),
            f"{one.start}..{one.stop}",
            *map(str, (one.records, one.events, one.empty, one.before, one.missed, one.unread)),
            Text("differs" if wrong else "ok", style="bold red" if wrong else "green"),
        )
    return table
