"""Verbs that change what is served: rollback, resume."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from daemon.cli.common import CommandError, access, endpoints, say
from daemon.cli.options import with_settings
from moorline.events import policy_name
from moorline.http import ServerUnavailable, request_json
from moorline.settings import Settings
from moorline.store import ArtifactStore, RevokedReleases

_ASK_SECONDS = 0.5


@with_settings()
def rollback(
    settings: Settings,
    to: Annotated[
        int | None,
        typer.Option("--to", min=0, metavar="N", help="Version to serve; 0 is the base model."),
    ] = None,
    reason: Annotated[str, typer.Option(help="Why; kept with the pin.")] = "",
    wait: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long to wait for the server.")
    ] = 60.0,
) -> None:
    """Serve an earlier version, at once, and train nothing until `moorline resume`.

    Needs neither Kafka nor the updater: it pins the version in the release store, and every server
    that reads the store swaps to it within about a second. Without --to: the version before the
    one that is served now.

    [bold]Examples[/]

      moorline rollback
      moorline rollback --to 41 --reason "answers got terse"
      moorline rollback --to 0
    """
    store = ArtifactStore(settings.store_dir)
    version = _version_before(store, settings.alias) if to is None else to
    if version in RevokedReleases(store).among(settings.alias, store.versions(settings.alias)):
        raise CommandError(
            f"{policy_name(settings.alias, version)} was revoked for an erasure: roll back to "
            "another version; `moorline releases` lists them"
        )
    store.pin(settings.alias, version, reason)
    say(f"Pinned [bold]{policy_name(settings.alias, version)}[/]; learning is paused.")
    _wait_until_served(settings, version, wait)
    say("`moorline resume` goes back to the newest release and to learning.")


def _version_before(store: ArtifactStore, alias: str) -> int:
    """The parent of the version that servers should serve now."""
    pin, newest = store.pinned(alias), store.newest(alias)
    if pin is not None:
        current = store.release(alias, pin.version) if pin.version > 0 else None
    else:
        current = newest
    if current is None or current.version == 0:
        raise CommandError(
            f"there is nothing before the base model of {alias!r} in {store.root}: "
            "is this the right --state-dir?"
        )
    return current.parent or 0


def _wait_until_served(settings: Settings, version: int, wait_seconds: float) -> None:
    url = endpoints(settings).server + "/v1/moorline/status"
    started = time.monotonic()
    while True:
        try:
            status = request_json("GET", url, **access(settings))
        except ServerUnavailable:
            say(
                f"No server answers at {url.removesuffix('/v1/moorline/status')}; "
                "one that starts will serve it."
            )
            return
        if status.get("policy_version") == version:
            say(f"Served now (after {time.monotonic() - started:.1f} s).")
            return
        refused = status.get("refused_versions") or {}
        if str(version) in (refused if isinstance(refused, dict) else map(str, refused)):
            raise CommandError(
                f"the server refuses {policy_name(settings.alias, version)}: see its log, "
                "or roll back to another version"
            )
        if time.monotonic() - started >= wait_seconds:
            raise CommandError(
                f"pinned, but the server still serves version {status.get('policy_version')} "
                f"after {wait_seconds:.0f} s: see its log, or `moorline status`"
            )
        time.sleep(_ASK_SECONDS)


@with_settings()
def resume(settings: Settings) -> None:
    """End a rollback: serve the newest release again and go on learning.

    [bold]Example[/]

      moorline resume
    """
    store = ArtifactStore(settings.store_dir)
    if not store.unpin(settings.alias):
        say("Nothing was pinned; servers follow the newest release.")
        return
    newest = store.newest(settings.alias)
    name = newest.name if newest else policy_name(settings.alias, 0)
    say(f"Unpinned; servers go to [bold]{name}[/], and learning goes on.")
