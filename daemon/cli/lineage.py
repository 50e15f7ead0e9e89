"""`moorline lineage`: what a release learned from, and its parents back to the base model."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from daemon.cli.common import (
    CommandError,
    JsonOption,
    ledger_inspector,
    out,
    print_json,
)
from daemon.cli.options import with_settings
from daemon.cli.text import ago, divergences_in_words, number, utc
from moorline.events import Release
from moorline.settings import Settings

if TYPE_CHECKING:  # `moorline --help` need not wait for Kafka's client
    from updater.ledger.inspection import Lineage

_SHOWN = 10


@with_settings()
def lineage(
    settings: Settings,
    version: Annotated[
        str, typer.Argument(metavar="VERSION", help="42, v000042 or assistant@v000042.")
    ],
    every: Annotated[bool, typer.Option("--all", help="List every example.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a release learned from, and its parents back to the base model.

    [bold]Examples[/]

      moorline lineage 42
      moorline lineage assistant@v000042 --all
      moorline lineage 42 --json | jq '.examples[].interaction'
    """
    number = _number(version)
    if number == 0:
        raise CommandError("version 0 is the base model: nothing of the stream is in it")
    with ledger_inspector(settings) as inspector:
        found = inspector.lineage(number)
    if as_json:
        print_json(_json(found))
    else:
        out.print(_page(found, every=every))


def _number(version: str) -> int:
    digits = version.rpartition("@")[2].removeprefix("v")
    if not digits.isdecimal() or len(digits) > 18:
        raise typer.BadParameter(f"{version!r} is not a version, such as 42 or assistant@v000042")
    return int(digits)


def _json(found: Lineage) -> dict[str, Any]:
    """The lineage as `--json` prints it."""
    return {
        "release": found.release.model_dump(mode="json"),
        "parents": [
            {
                "version": one.version,
                "created_at": one.created_at,
                "examples": one.examples,
                "divergences": [divergence.model_dump() for divergence in one.divergences],
            }
            for one in found.ancestors
        ],
        "examples": [
            {"example_id": example_id, "interaction": key} for example_id, key in found.examples
        ],
        "events": found.events,
        "raters": found.raters,
        "revoked": found.revoked,
        "anchors": [asdict(one) for one in found.anchors],
    }


def _page(found: Lineage, *, every: bool) -> RenderableType:
    """The release, its line of parents, its examples."""
    release = found.release
    about = Table.grid(padding=(0, 2))
    about.add_column(style="dim", min_width=12)
    about.add_column(overflow="fold")
    about.add_row("  released", f"{utc(release.created_at)} ({ago(release.created_at)})")
    if release.revokes_after is not None:
        about.add_row(
            "  goes back to",
            f"v{release.revokes_after:06d}, which had not learned from the erased events",
        )
    if found.revoked:
        about.add_row("  revoked", "for an erasure: nothing live descends from it")
    events = ", ".join(f"{count} of {topic}" for topic, count in found.events.items()) or "none"
    about.add_row("  events", events)
    about.add_row("  raters", str(found.raters))
    about.add_row("  step", f"{release.step_scale:.2f} of the proposed update")
    for line in divergences_in_words(release.divergences):
        about.add_row("  divergence", line)
    for anchor in found.anchors:
        about.add_row(
            "  anchor",
            f"v{anchor.version:06d} since {utc(anchor.applied_at)}, by {anchor.requested_by}: "
            f"{anchor.reason}",
        )
    for version, why in release.behaviour_policies_unavailable.items():
        about.add_row(
            "  unavailable", f"behaviour policy v{version:06d} ({why}): recorded logprobs only"
        )
    parents = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=True)
    parents.add_column("version")
    parents.add_column("released")
    for heading in ("examples", "KL live", "KL anchor"):
        parents.add_column(heading, justify="right")
    for one in (release, *found.ancestors):
        parents.add_row(
            f"v{one.version:06d}",
            ago(one.created_at),
            str(one.examples),
            _kl(one, "live"),
            _kl(one, "anchor"),
        )
    parents.add_row("v000000", "the base model", "", "", "")
    shown = found.examples if every else found.examples[:_SHOWN]
    listed = [Text(f"  {example_id}  {key}") for example_id, key in shown]
    if len(shown) < len(found.examples):
        listed.append(Text(f"  and {len(found.examples) - len(shown)} more: --all", style="dim"))
    return Group(
        Text(release.name, style="bold cyan"),
        about,
        Text("\nIts line, back to the base model", style="bold"),
        parents,
        Text(f"\nIts {len(found.examples)} examples, each with its interaction", style="bold"),
        *listed,
    )


def _kl(release: Release, reference: str) -> str:
    for one in release.divergences:
        if one.measured_from == reference and one.tokens_from == "traffic":
            return number(one.mean_kl_nats, 4)
    return "-"
