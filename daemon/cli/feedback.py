"""`moorline feedback`: say what you think of a reply, over HTTP or on the topic."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError

from daemon.cli.common import CommandError, access, endpoints, say
from daemon.cli.options import with_settings
from moorline.events import ANONYMOUS, Feedback, FeedbackKind
from moorline.http import request_json
from moorline.settings import Settings


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
    about = {"interaction_id": interaction_id, "choice": choice}
    if retract is not None:
        whose = ANONYMOUS if rater is None else rater  # nobody in particular: whoever said it
        event = _event(**about, feedback_id=retract, retracted=True, rater=whose)
    else:
        low, high = score_range or (None, None)
        event = _event(
            **about,
            **said[given[0]],
            kind=given[0],
            score_min=low,
            score_max=high,
            over_choice=over_choice,
            rater="cli" if rater is None else rater,
        )
    where, not_trainable = _produce(settings, event) if kafka else _post(settings, event)
    say(f"Accepted by {where} as {event.feedback_id}")
    _say_what_it_teaches(settings, event, not_trainable)


def _event(**fields: Any) -> Feedback:
    try:
        return Feedback(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "feedback"
        raise CommandError(f"{place}: {first['msg'].removeprefix('Value error, ')}") from None


def _say_what_it_teaches(settings: Settings, event: Feedback, not_trainable: str | None) -> None:
    if event.retracted:
        say("It no longer counts, unless it is in the weights: see `moorline explain` of its id.")
    if not_trainable is not None:
        say(f"It teaches nothing: the reply cannot be learned from ({not_trainable}).")
    if event.signal is not None and event.signal not in settings.learning.signals:
        known = ", ".join(sorted(settings.learning.signals))
        say(f"It teaches nothing unless learning.signals gives it a reward; here: {known}.")


def _post(settings: Settings, event: Feedback) -> tuple[str, str | None]:
    """Give it to the server; where that is, and why nothing will be learned from it, if so."""
    where = endpoints(settings).server
    body = event.model_dump(mode="json")
    answer = request_json("POST", f"{where}/v1/feedback", body=body, **access(settings))
    return where, answer.get("not_trainable")


def _produce(settings: Settings, event: Feedback) -> tuple[str, None]:
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
    return f"{topic_name(stream, Topic.FEEDBACK)} on {bootstrap}", None
