"""`moorline forget`: erases a person, whether an updater is running or not.

The request goes onto the stream first, where every updater that reads it from its start will meet
it, however often a ledger is lost. Then the ledger carries it out: that of the running updater,
which reads it there, or the one here, at once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError

from daemon.cli.common import CommandError, JsonOption, endpoints, err, print_json, say
from daemon.cli.options import with_settings
from daemon.cli.pseudonym_keys import KeysAtHand, keys_at_hand
from moorline.events import MAX_ERASED_NAMES, Erasure, policy_name, user_digest
from moorline.pseudonyms import spellings
from moorline.settings import Settings

if TYPE_CHECKING:  # `moorline --help` need not wait for Kafka's client
    from updater.ledger import Forgotten

_ASK_SECONDS = 0.5


@with_settings()
def forget(
    settings: Settings,
    user: Annotated[
        list[str] | None,
        typer.Option(
            "--user",
            metavar="NAME",
            help="As clients send it (`user`, `safety_identifier`, `metadata.user_id`, or a "
            "`rater`), in the same case; repeat for one with several names.",
        ),
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Everybody of a tenant; with --user, them only there.")
    ] = None,
    interaction: Annotated[
        str | None,
        typer.Option(metavar="ID", help="One reply (chatcmpl-...), and what was said of it."),
    ] = None,
    key: Annotated[
        list[Path] | None,
        typer.Option(
            "--key",
            metavar="FILE",
            help="A pseudonym key of other servers, or of earlier; repeat for several.",
        ),
    ] = None,
    lost_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FINGERPRINT",
            help="Go on without a key that is lost: who is recorded under it is not found by name.",
        ),
    ] = None,
    revoke: Annotated[
        bool,
        typer.Option(
            "--revoke",
            help="Also revoke the releases that learned from them: go back to the last that did "
            "not, and learn again from the others.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be erased; erase nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    wait: Annotated[
        float,
        typer.Option(
            min=0, metavar="SECONDS", help="How long to wait for a running updater to erase."
        ),
    ] = 120.0,
    as_json: JsonOption = False,
) -> None:
    """Erase a person: nobody can read what they wrote, and nothing more is learned from it.

    What was not decided yet ends as `erased`, and so does whatever of them still arrives that is
    older than this moment. The keys of their stored bodies are destroyed, which no backup of the
    ledger survives. Releases that have learned from them are listed; --revoke takes them back.
    There is no undo.

    [bold]Examples[/]

      moorline forget --user ana --dry-run
      moorline forget --user ana --user ana@example.org --yes --revoke
      moorline forget --user ana --key /run/secrets/last-years.key
      moorline forget --tenant acme
      moorline forget --interaction chatcmpl-8f3a
    """
    keys = keys_at_hand(settings, key or (), lost_key or ()) if user else None
    erasure = _erasure(user or (), keys, tenant, interaction, revoke=revoke)
    before = _preview(settings, erasure)
    if not as_json:
        for line in keys.lines() if keys else ():
            say(line)
        _print_outcome(settings, before, will=True, revoke=revoke)
    if dry_run:
        if as_json:
            _print_json(None, before, keys)
        return
    if not yes:
        if as_json or not err.is_terminal:
            raise CommandError("nothing was erased: there is nobody to ask, so say --yes")
        typer.confirm("There is no undo. Erase?", abort=True)
    told = _publish(settings, erasure)
    done = _carry_out(settings, erasure, told=told, wait_seconds=wait)
    if as_json:
        _print_json(erasure.erasure_id, done, keys)
    elif done is None:
        say(f"Accepted as {erasure.erasure_id}; the updater carries it out where its ledger is.")
    else:
        _print_outcome(settings, done, will=False, revoke=revoke)
        say(f"Erased ({erasure.erasure_id}).")


def _erasure(
    users: Sequence[str],
    keys: KeysAtHand | None,
    tenant: str | None,
    interaction: str | None,
    *,
    revoke: bool,
) -> Erasure:
    names = [spelling for name in users for spelling in spellings(name)]
    if keys is not None:  # what servers made of the same names
        names += [pseudonym for name in users for pseudonym in keys.pseudonyms_of(name)]
    digests = tuple(dict.fromkeys(map(user_digest, names)))
    if len(digests) > MAX_ERASED_NAMES:
        raise CommandError(
            f"nothing was erased: with what each key made of them these are {len(digests)} names, "
            f"and one request holds {MAX_ERASED_NAMES}: give fewer --user at once"
        )
    try:
        return Erasure(
            interaction_id=interaction,
            tenant=tenant,
            users=digests,
            revoke=revoke,
        )
    except ValidationError:
        raise typer.BadParameter(
            "say who: --user, --tenant, both (a user of that tenant), or --interaction alone"
        ) from None


def _preview(settings: Settings, erasure: Erasure) -> Forgotten | None:
    """What the erasure would change; None when the ledger is elsewhere."""
    from updater.ledger import LedgerError
    from updater.ledger.inspection import LedgerInspector

    if not settings.ledger_path.exists():
        return None
    try:
        with closing(LedgerInspector(settings.ledger_path)) as inspector:
            return inspector.would_forget(erasure)
    except LedgerError as error:
        raise CommandError(str(error)) from None


def _publish(settings: Settings, erasure: Erasure) -> bool:
    """Publish the request; False when no broker is configured."""
    from moorline.stream import StreamUnavailable, publish_erasure

    bootstrap = endpoints(settings).bootstrap
    if bootstrap is None:
        return False
    try:
        publish_erasure(settings.stream.model_copy(update={"bootstrap": bootstrap}), erasure)
    except StreamUnavailable as error:
        raise CommandError(f"nothing was erased: {error}") from None
    return True


def _carry_out(
    settings: Settings, erasure: Erasure, *, told: bool, wait_seconds: float
) -> Forgotten | None:
    """Erase in the ledger here, or wait until the running updater has done so.

    None when the ledger is elsewhere.
    """
    from updater.ledger import Ledger, LedgerError, LedgerLocked

    if not settings.ledger_path.exists():
        if not told:
            raise CommandError(
                f"there is neither a ledger at {settings.ledger_path} nor a broker to tell: give "
                "--state-dir, or set stream.bootstrap"
            )
        return None
    try:
        try:
            with Ledger(settings.ledger_path) as ledger:
                return ledger.forget(erasure)
        except LedgerLocked:
            if not told:
                raise
            return _wait(settings, erasure, wait_seconds)
    except LedgerError as error:
        raise CommandError(str(error)) from None


def _wait(settings: Settings, erasure: Erasure, seconds: float) -> Forgotten:
    from updater.ledger import Ledger

    deadline = time.monotonic() + seconds
    with Ledger.open_readonly(settings.ledger_path) as ledger:
        while (found := ledger.erasure(erasure.erasure_id)) is None:
            if time.monotonic() >= deadline:
                raise CommandError(
                    f"the request is on the stream as {erasure.erasure_id}, but the updater has "
                    f"not carried it out after {seconds:.0f} s (it finishes an update first): "
                    "`moorline status` shows what it is doing"
                )
            time.sleep(_ASK_SECONDS)
    return found


def _print_json(erasure_id: str | None, found: Forgotten | None, keys: KeysAtHand | None) -> None:
    print_json(
        {
            "erasure_id": erasure_id,
            "result": asdict(found) if found else None,
            "pseudonym_keys": list(keys.found) if keys else [],
            "lost_pseudonym_keys": list(keys.lost) if keys else [],
        }
    )


def _print_outcome(
    settings: Settings, found: Forgotten | None, *, will: bool, revoke: bool
) -> None:
    if found is None:
        say(f"No ledger at {settings.ledger_path}: what is stored of them is not known here.")
        return
    verb = "To be erased" if will else "Erased"
    say(f"{verb}: {found.interactions} replies, {found.feedback} ratings and corrections.")
    if not found.releases:
        say("No release that is not revoked has learned from them.")
        return
    names = ", ".join(policy_name(settings.alias, version) for version in found.releases)
    say(f"Have learned from them: {names}.")
    clean = policy_name(settings.alias, found.last_clean_version)
    clean += " (the base model)" if found.last_clean_version == 0 else ""
    if found.revoke:
        does = "would go" if will else "goes"
        say(f"The updater {does} back to {clean} and learns again from what the others said.")
    elif revoke:
        say(f"The live policy, {clean}, has nothing of them: there is nothing to revoke.")
    else:
        say(f"The last release without them is {clean}; --revoke goes back to it.")
