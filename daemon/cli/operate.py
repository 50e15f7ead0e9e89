"""Verbs that change something: rollback, resume, feedback."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError

from daemon.cli.common import CommandError, access, endpoints, say
from daemon.cli.options import with_settings
from moorline.events import ANONYMOUS, Feedback, FeedbackKind, policy_name
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


@with_settings()
def feedback(
    settings: Settings,
    interaction_id: Annotated[
        str, typer.Argument(metavar="ID", help="The `id` of the reply (chatcmpl-...).")
    ],
    thumbs: Annotated[
        Literal["up", "down"] | None, typer.Option(help="Was it good or bad?")
    ] = None,
    score: Annotated[float | None, typer.Option(help="A number inside --range.")] = None,
    score_range: Annotated[
        tuple[float, float] | None,
        typer.Option("--range", metavar="MIN MAX", help="What --score is out of; it needs this."),
    ] = None,
    correction: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The reply that you wanted instead.")
    ] = None,
    over: Annotated[
        str | None,
        typer.Option(metavar="ID", help="You prefer it over this reply to the same prompt."),
    ] = None,
    over_choice: Annotated[
        int, typer.Option(min=0, help="Which choice of that reply, for n > 1.")
    ] = 0,
    signal: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What somebody did with it: a name in learning.signals."),
    ] = None,
    retract: Annotated[
        str | None,
        typer.Option(metavar="FEEDBACK_ID", help="Take back what was said under this id."),
    ] = None,
    choice: Annotated[int, typer.Option(min=0, help="Which choice, for n > 1.")] = 0,
    rater: Annotated[
        str | None,
        typer.Option(
            help="Who says so (cli); the last word of one rater of each kind counts. "
            "With --retract: whose word, where several raters use the id."
        ),
    ] = None,
    kafka: Annotated[
        bool, typer.Option("--kafka", help="Produce to the feedback topic, without the server.")
    ] = False,
) -> None:
    """Rate or correct a reply, prefer it over another, report a signal, or take a word back.

    [bold]Examples[/]

      moorline feedback chatcmpl-8f3a --thumbs up
      moorline feedback chatcmpl-8f3a --score 4 --range 1 5 --rater ana
      moorline feedback chatcmpl-8f3a --correction "A glacier is a river of ice."
      moorline feedback chatcmpl-8f3a --over chatcmpl-77b1
      moorline feedback chatcmpl-8f3a --choice 1 --over chatcmpl-8f3a --over-choice 0
      moorline feedback chatcmpl-8f3a --signal copied
      moorline feedback chatcmpl-8f3a --thumbs down --kafka
      moorline feedback chatcmpl-8f3a --retract fb-51c0
    """
    said: dict[FeedbackKind, dict[str, Any]] = {
        FeedbackKind.THUMBS: {"value": thumbs and {"up": 1.0, "down": -1.0}[thumbs]},
        FeedbackKind.SCORE: {"value": score},
        FeedbackKind.CORRECTION: {"text": correction},
        FeedbackKind.PREFERENCE: {"over": over},
        FeedbackKind.SIGNAL: {"signal": signal},
    }
    given = [kind for kind, fields in said.items() if None not in fields.values()]
    if len(given) + (retract is not None) != 1:
        raise typer.BadParameter(
            "give exactly one of --thumbs, --score, --correction, --over, --signal and --retract"
        )
    if score is not None and score_range is None:
        raise typer.BadParameter("--score needs --range, such as --range 1 5 for stars")
    try:
        about: dict[str, Any] = {"interaction_id": interaction_id, "choice": choice}
        if retract is not None:
            whose = ANONYMOUS if rater is None else rater  # nobody in particular: whoever said it
            event = Feedback(feedback_id=retract, retracted=True, rater=whose, **about)
        else:
            event = Feedback(
                kind=given[0],
                score_min=score_range and score_range[0],
                score_max=score_range and score_range[1],
                over_choice=over_choice,
                rater="cli" if rater is None else rater,
                **about,
                **said[given[0]],
            )
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "feedback"
        raise CommandError(f"{place}: {first['msg'].removeprefix('Value error, ')}") from None
    not_trainable = None
    if kafka:
        where = _produce(settings, event)
    else:
        where = endpoints(settings).server
        answer = request_json(
            "POST",
            f"{where}/v1/feedback",
            body=event.model_dump(mode="json"),
            **access(settings),
        )
        not_trainable = answer.get("not_trainable")
    say(f"Accepted by {where} as {event.feedback_id}")
    if event.retracted:
        say("It no longer counts, unless it is in the weights: see `moorline explain` of its id.")
    if not_trainable is not None:
        say(f"It teaches nothing: the reply cannot be learned from ({not_trainable}).")
    if event.signal is not None and event.signal not in settings.learning.signals:
        known = ", ".join(sorted(settings.learning.signals))
        say(f"It teaches nothing unless learning.signals gives it a reward; here: {known}.")


def _produce(settings: Settings, event: Feedback) -> str:
    """Produce one record to the feedback topic and wait for the broker's acknowledgement."""
    from moorline.stream import Publisher, Topic, topic_name

    bootstrap = endpoints(settings).bootstrap
    if bootstrap is None:
        raise CommandError("no broker is known: set stream.bootstrap, or start `moorline up`")
    stream = settings.stream.model_copy(update={"bootstrap": bootstrap})
    with TemporaryDirectory(prefix="moorline-feedback-") as spool:
        publisher = Publisher(stream, Path(spool))
        publisher.start()
        try:
            publisher.publish(Topic.FEEDBACK, event.key, event.to_bytes())
            if not publisher.flush(stream.connect_timeout_seconds + 5.0):
                why = publisher.stats.last_error or f"{bootstrap} did not acknowledge it in time"
                raise CommandError(f"not delivered: {why}")
        finally:
            publisher.close(1.0)
    return f"{topic_name(stream, Topic.FEEDBACK)} on {bootstrap}"
