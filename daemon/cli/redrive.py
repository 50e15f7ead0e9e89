"""`moorline redrive`: dead letters back onto their topics, once their cause is repaired."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from daemon.cli.common import CommandError, JsonOption, endpoints, out, print_json, say
from daemon.cli.options import with_settings
from daemon.cli.text import ago, size
from moorline.events import Reason
from moorline.settings import Settings

if TYPE_CHECKING:  # `moorline --help` need not wait for Kafka's client
    from moorline.stream.redrive import Letter, Redriver, Wanted

_UNITS = {"s": 1, "min": 60, "h": 3600, "d": 86400}
_READY = "ready"
_REDRIVEN = "redriven"


@with_settings()
def redrive(
    settings: Settings,
    reason: Annotated[
        list[Reason] | None,
        typer.Option(
            help="Only letters refused for this reason; repeat at will.", metavar="REASON"
        ),
    ] = None,
    topic: Annotated[
        Literal["interactions.v1", "feedback.v1"] | None,
        typer.Option(help="Only what came from this topic."),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(metavar="WHEN", help="Only letters from then on: 90min, 6h, 2d, 2026-01-31."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Put back at most so many letters.")
    ] = None,
    max_redrives: Annotated[
        int, typer.Option(min=1, help="Leave a record that became a dead letter again so often.")
    ] = 3,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the letters; move nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Put dead letters back on the topic that they came from, each once.

    Repair the cause first: a record that still cannot be read becomes a dead letter again. Bytes,
    key and headers are the original's. What is put back is noted in STATE_DIR/redriven.json, so
    always run it with the same --state-dir.

    [bold]Examples[/]

      moorline redrive --dry-run
      moorline redrive --reason unsupported_schema_version --since 2d
      moorline redrive --topic feedback.v1 --limit 100
    """
    from moorline.stream import StreamUnavailable
    from moorline.stream.redrive import Wanted, redriving
    from moorline.stream.topics import Topic

    bootstrap = endpoints(settings).bootstrap
    if bootstrap is None:
        raise CommandError("no broker is known: set stream.bootstrap, or start `moorline up`")
    stream = settings.stream.model_copy(update={"bootstrap": bootstrap})
    wanted = Wanted(
        topics=[Topic(topic)] if topic else (),
        reasons=reason or (),
        since=None if since is None else _moment(since),
        limit=limit,
        max_redrives=max_redrives,
    )
    rows: list[dict[str, Any]] = []  # no bodies: there may be many
    try:
        with redriving(stream, settings.state_dir) as redriver:
            for letter, outcome in _outcomes(redriver, wanted, dry_run=dry_run):
                rows.append(_as_dict(letter, outcome))
    except (StreamUnavailable, ValueError, OSError) as error:
        done = sum(row["outcome"] == _REDRIVEN for row in rows)
        told = f" ({done} letters were put back before)" if done else ""
        raise CommandError(f"{error}{told}") from None
    if as_json:
        print_json(rows)
        return
    if dry_run and rows:
        out.print(_table(rows))
    _summary(Counter(row["outcome"] for row in rows))


def _outcomes(redriver: Redriver, wanted: Wanted, *, dry_run: bool) -> Iterator[tuple[Letter, str]]:
    """Each letter with what was done with it, or would be in a dry run."""
    from moorline.stream.redrive import BATCH_LETTERS

    letters = redriver.letters(wanted)
    while batch := list(islice(letters, BATCH_LETTERS)):
        refused = {
            letter: refusal
            for letter in batch
            if (refusal := redriver.refusal(letter, wanted)) is not None
        }
        going = [letter for letter in batch if letter not in refused]
        if not dry_run and going:
            refused |= redriver.send(going)
        for letter in batch:
            yield letter, str(refused.get(letter, _READY if dry_run else _REDRIVEN))


def _moment(text: str) -> float:
    """Parse an age or a date into Unix seconds."""
    age = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h|d)", text.strip())
    if age:
        return time.time() - float(age[1]) * _UNITS[age[2]]
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither an age (90min, 6h, 2d) nor a date (2026-01-31T12:00)",
            param_hint="--since",
        ) from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _as_dict(letter: Letter, outcome: str) -> dict[str, Any]:
    return {
        "letter": letter.place,
        "origin": letter.origin,
        "reason": letter.reason,
        "at": letter.timestamp_ms / 1000,
        "size_bytes": len(letter.value or b""),
        "redrives": letter.redrives,
        "outcome": outcome,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for heading in ("letter", "came from", "reason", "when"):
        table.add_column(heading, overflow="fold")
    for heading in ("size", "redrives"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for row in rows:
        table.add_row(
            row["letter"],
            row["origin"],
            row["reason"],
            ago(row["at"]),
            size(row["size_bytes"]),
            str(row["redrives"]),
            row["outcome"].replace("_", " "),
        )
    return table


def _summary(outcomes: Counter[str]) -> None:
    if not outcomes:
        say("No dead letter waits.")
        return
    if outcomes[_READY]:
        say(f"Would be put back: {outcomes[_READY]}. Without --dry-run they are.")
    if outcomes[_REDRIVEN]:
        say(f"Put back: {outcomes[_REDRIVEN]}. `moorline status` shows their new fates.")
    for outcome, count in sorted(outcomes.items()):
        if outcome not in (_READY, _REDRIVEN):
            say(f"Left where they are: {count} ({outcome.replace('_', ' ')}).", style="yellow")
