"""`moorline explain`: the history of one event, from the ledger; never what anybody wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from daemon.cli.common import (
    CommandError,
    JsonOption,
    ledger_inspector,
    print_json,
    say,
)
from daemon.cli.options import with_settings
from daemon.cli.text import divergences_in_words, harmless, in_words, utc
from moorline.events import Fate, Reason, policy_name
from moorline.settings import Settings

if TYPE_CHECKING:  # `moorline --help` need not wait for Kafka's client
    from updater.ledger.history import EventHistory, Joined, Outcome

_SHOWN = 10
_KINDS = {
    "interaction": "an interaction",
    "feedback": "feedback",
    "dead letter": "a dead letter",
    "forgotten": "an event whose row was removed",
}
_SAID = {
    Fate.TRAINED: "it is in the weights of {decision}",
    Fate.REJECTED: "its candidate was refused ({reason}; {decision})",
    Fate.EXPIRED: "it expired: {reason}",
    Fate.LATE: "it came too late: its interaction was forgotten by then",
    Fate.DUPLICATE: "it said nothing new: {reason}",
    Fate.DEAD_LETTERED: "it could not be read ({reason}); its bytes are on the dead-letter topic",
    Fate.RETRACTED: "nothing is learned from it: {reason}",
    Fate.ERASED: "it was erased at its subject's request",
    Fate.NOT_TRAINABLE: "it was read and understood, but teaches nothing: {reason}",
}


@with_settings()
def explain(
    settings: Settings,
    event_id: Annotated[
        str,
        typer.Argument(
            metavar="ID",
            help="A reply (chatcmpl-...), feedback (fb-...) or a record (TOPIC/PARTITION/OFFSET).",
        ),
    ],
    as_json: JsonOption = False,
) -> None:
    """Show one event's history: when it was read, what it joined, where it ended and why.

    Never shows what anybody wrote. Exits 1 when the ledger does not know the event.

    [bold]Examples[/]

      moorline explain chatcmpl-8f3a
      moorline explain fb-0c1d --json | jq '.histories[0].fate'
      moorline explain feedback.v1/2/1041
    """
    with ledger_inspector(settings) as inspector:
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
                "histories": [asdict(history) for history in histories],
                "feedback_waiting_for_it": waiting,
                "examples": [
                    dict(zip(("example_id", "fate", "reason", "decided_by"), one, strict=True))
                    for one in remembered
                ],
            }
        )
        return
    for line in _lines(settings.alias, event_id, histories, waiting, remembered):
        say(line)


def _lines(
    alias: str,
    asked: str,
    histories: Sequence[EventHistory],
    waiting: Sequence[str],
    remembered: Sequence[tuple[str, Fate, Reason, int | None]],
) -> Iterator[str]:
    """Lines of markup: each history, or what is left of an expired one."""
    for index, history in enumerate(histories):
        if index:
            yield ""
        yield from _history(alias, history)
    if waiting:
        yield f"[bold]{harmless(asked)}[/] was not read yet; feedback waits for it:"
        yield from (f"  {harmless(name)}" for name in waiting)
    if remembered:
        yield f"[bold]{harmless(asked)}[/] was forgotten long after its end. What is known still:"
    for example_id, fate, reason, decided_by in remembered:
        by = f" {policy_name(alias, decided_by)}" if fate is Fate.TRAINED and decided_by else ""
        why = f" ({in_words(reason)})" if reason is not Reason.NONE else ""
        yield f"  example {example_id}: {in_words(fate)}{by}{why}"


def _history(alias: str, history: EventHistory) -> Iterator[str]:
    kind = _KINDS[history.kind]
    name = harmless(history.name or str(history.place))
    yield f"[bold]{name}[/], {kind}, read from {history.place}"
    for _, line in sorted(_moments(alias, history), key=lambda moment: moment[0]):
        yield f"  {line}"
    if history.first is not None:
        yield f"  the record that counts is {history.first}"
    if history.repeats:
        places = ", ".join(map(str, history.repeats[:_SHOWN]))
        yield f"  it came again {len(history.repeats)} times, without effect: {places}"
    yield f"  [bold]Now:[/] {harmless(_now(alias, history))}."


def _moments(alias: str, history: EventHistory) -> Iterator[tuple[float, str]]:
    """Pairs of Unix seconds and what happened then."""
    is_reply = history.kind == "interaction"
    if history.event_time is not None and history.arrived_at is not None:
        what = f"{history.rater or 'somebody erased'} gave it ({history.aspect})"
        if is_reply:
            what = "the reply ended"
        yield history.event_time, f"{utc(history.event_time)}  {harmless(what)}"
        yield history.arrived_at, f"{utc(history.arrived_at)}  it arrived at the broker"
    for other in history.joined:
        if other.arrived_at is None:
            yield float("inf"), f"{' ' * 23}  it waits for its interaction {harmless(other.name)}"
            continue
        what = f"reply {other.name}"
        if is_reply:
            what = f"feedback {other.name} ({other.aspect}) of {other.rater or 'somebody erased'}"
        yield (
            other.arrived_at,
            f"{utc(other.arrived_at)}  {harmless(what)} arrived: {_fate(other)}",
        )
    if history.outcome is not None:
        example = f" (example {history.example_id})" if history.example_id else ""
        decision = f"{_decision(alias, history)} was decided{example}"
        yield history.outcome.at, f"{utc(history.outcome.at)}  {decision}"
        yield history.outcome.at + 1e-6, f"{' ' * 23}  {_evidence(history.outcome)}"


def _fate(other: Joined) -> str:
    assert other.fate is not None
    why = f" ({in_words(other.reason)})" if other.reason is not Reason.NONE else ""
    return f"{in_words(other.fate)}{why}"


def _now(alias: str, history: EventHistory) -> str:
    from updater.ledger.schema import FeedbackState

    if history.fate is Fate.PENDING:
        rated = any(other.fate is Fate.PENDING for other in history.joined)
        ready = history.state == FeedbackState.READY or (history.kind == "interaction" and rated)
        if ready:
            return "it waits for an update"
        missing = "feedback" if history.kind == "interaction" else "its interaction"
        return f"it waits for {missing}"
    return _SAID[history.fate].format(
        reason=in_words(history.reason), decision=_decision(alias, history)
    )


def _decision(alias: str, history: EventHistory) -> str:
    if history.outcome is None:
        return "an unknown decision"
    name = history.outcome.name
    return name if "@" in name else f"{alias} {name}"


def _evidence(outcome: Outcome) -> str:
    words = [f"{outcome.examples} examples"]
    if outcome.parent is not None:
        words.append(f"parent v{outcome.parent:06d}")
    words += divergences_in_words(outcome.divergences)
    if outcome.verdict is not None:
        words.append(f"gate: {outcome.verdict} ({outcome.checks_passed} checks passed)")
    if outcome.checks_failed:
        words.append(f"failed: {', '.join(outcome.checks_failed)}")
    if outcome.cause:
        words.append(harmless(outcome.cause))
    return ", ".join(words)
