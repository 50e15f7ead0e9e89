"""The verb that gives the line a new anchor."""

from __future__ import annotations

import getpass
from typing import Annotated

import typer

from daemon.cli.common import CommandError, say
from daemon.cli.options import with_settings
from moorline.events import policy_name
from moorline.settings import Settings
from moorline.store import AnchorRequests, ArtifactStore, RevokedReleases


@with_settings()
def reanchor(
    settings: Settings,
    reason: Annotated[str, typer.Option(help="Why; kept in the ledger with your name.")],
    to: Annotated[
        int | None,
        typer.Option(
            "--to", min=0, metavar="N", help="Version that becomes the anchor; 0: the base model."
        ),
    ] = None,
    by: Annotated[
        str, typer.Option(metavar="NAME", help="Who decides it; default: your login.")
    ] = "",
) -> None:
    """Make a release the anchor: its distance budget begins anew.

    The bound keeps the line within bound.anchor_kl_nats of its anchor, at first the base model.
    When that is used up (phase anchor_exhausted), ratings wait. This is a person's decision that
    the release is as good a place to start from as the base model was: evaluate it first
    (docs/operations.md, "The anchor's budget is used up"). Without --to: the newest release.

    The updater carries it out within a cycle and writes it into its ledger; `moorline lineage` and
    /status show it.

    [bold]Examples[/]

      moorline reanchor --reason "v41 passed the October evaluation"
      moorline reanchor --to 38 --by ana --reason "last release before the campaign"
    """
    if not reason.strip():
        raise CommandError("--reason is empty: say why this release may be the new anchor")
    store = ArtifactStore(settings.store_dir)
    newest = store.newest(settings.alias)
    if newest is None:
        raise CommandError(
            f"{settings.alias!r} has no release in {store.root}: the base model is the anchor; "
            "is this the right --state-dir?"
        )
    version = newest.version if to is None else to
    name = policy_name(settings.alias, version)
    if version in RevokedReleases(store).among(settings.alias, store.versions(settings.alias)):
        raise CommandError(f"{name} was revoked for an erasure: choose another version")
    request = AnchorRequests(store).write(
        settings.alias, version, reason=reason.strip(), requested_by=by or getpass.getuser()
    )
    say(
        f"Asked for: [bold]{name}[/] becomes the anchor (by {request.requested_by}). The updater "
        "carries it out in its next cycle; `moorline status` shows the budget."
    )
