"""How `moorline audit`, `explain` and `lineage` look."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape as escape_markup
from rich.table import Table
from rich.text import Text

from daemon.cli.status_page import accounting_table as fates_table
from daemon.cli.status_page import ago, number
from moorline.events import Divergence, Fate, Reason, Release, policy_name
from updater.audit import StreamAudit
from updater.ledger.history import EventHistory, Joined, Outcome
from updater.ledger.inspection import Lineage
from updater.ledger.schema import FeedbackState

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
    Fate.ERASED: "it was revoked by its subject",
    Fate.NOT_TRAINABLE: "it was read and understood, but teaches nothing: {reason}",
}


# --- audit --------------------------------------------------------------------------------------


def audit_page(
    stream: StreamAudit | None, accounting: Mapping[str, Any], differences: Sequence[str]
) -> RenderableType:
    """The comparison by partition, the totals, and the verdict."""
    parts: list[RenderableType] = []
    if stream is not None and stream.partitions:
        parts += [Text("The stream, read again", style="bold"), _partitions_table(stream), Text()]
    fates = fates_table(accounting)
    if fates.row_count:
        parts += [Text("Events and where they ended", style="bold"), fates, Text()]
    parts += [Text(f"note: {note}", style="yellow") for note in (stream.notes if stream else ())]
    if differences:
        parts += [Text(line, style="bold red") for line in differences]
        parts.append(Text(f"The books do not balance; differences: {len(differences)}."))
    else:
        total = accounting["total"]
        scope = "in the ledger and on the stream" if stream else "in the ledger (stream not read)"
        verdict = f"The books balance: {total} events, each with one fate, {scope}."
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


# --- explain ------------------------------------------------------------------------------------


def explanation(
    alias: str,
    asked: str,
    histories: Sequence[EventHistory],
    waiting: Sequence[str],
    remembered: Sequence[tuple[str, Fate, Reason, int | None]],
) -> Iterator[str]:
    """Markup lines: each story, or what is left of a forgotten one."""
    for index, story in enumerate(histories):
        if index:
            yield ""
        yield from _story(alias, story)
    if waiting:
        yield f"[bold]{_plain(asked)}[/] was not read yet; feedback waits for it:"
        yield from (f"  {_plain(name)}" for name in waiting)
    if remembered:
        yield f"[bold]{_plain(asked)}[/] was forgotten long after its end. What is known still:"
    for example_id, fate, reason, decided_by in remembered:
        by = f" {policy_name(alias, decided_by)}" if fate is Fate.TRAINED and decided_by else ""
        why = f" ({_words(reason)})" if reason is not Reason.NONE else ""
        yield f"  example {example_id}: {_words(fate)}{by}{why}"


def _story(alias: str, story: EventHistory) -> Iterator[str]:
    kind = _KINDS[story.kind]
    yield f"[bold]{_plain(story.name or str(story.place))}[/], {kind}, read from {story.place}"
    for _, line in sorted(_moments(alias, story), key=lambda moment: moment[0]):
        yield f"  {line}"
    if story.first is not None:
        yield f"  the record that counts is {story.first}"
    if story.repeats:
        places = ", ".join(map(str, story.repeats[:_SHOWN]))
        yield f"  it came again {len(story.repeats)} times, without effect: {places}"
    yield f"  [bold]Now:[/] {_plain(_now(alias, story))}."


def _moments(alias: str, story: EventHistory) -> Iterator[tuple[float, str]]:
    """(Unix seconds, what happened then)."""
    is_reply = story.kind == "interaction"
    if story.event_time is not None and story.arrived_at is not None:
        what = f"{story.rater or 'somebody erased'} gave it ({story.aspect})"
        if is_reply:
            what = "the reply ended"
        yield story.event_time, f"{_when(story.event_time)}  {_plain(what)}"
        yield story.arrived_at, f"{_when(story.arrived_at)}  it arrived at the broker"
    for other in story.joined:
        if other.arrived_at is None:
            yield float("inf"), f"{' ' * 23}  it waits for its interaction {_plain(other.name)}"
            continue
        what = f"reply {other.name}"
        if is_reply:
            what = f"feedback {other.name} ({other.aspect}) of {other.rater or 'somebody erased'}"
        yield other.arrived_at, f"{_when(other.arrived_at)}  {_plain(what)} arrived: {_of(other)}"
    if story.outcome is not None:
        example = f" (example {story.example_id})" if story.example_id else ""
        decision = f"{_decision(alias, story)} was decided{example}"
        yield story.outcome.at, f"{_when(story.outcome.at)}  {decision}"
        yield story.outcome.at + 1e-6, f"{' ' * 23}  {_evidence(story.outcome)}"


def _of(other: Joined) -> str:
    assert other.fate is not None
    why = f" ({_words(other.reason)})" if other.reason is not Reason.NONE else ""
    return f"{_words(other.fate)}{why}"


def _now(alias: str, story: EventHistory) -> str:
    if story.fate is Fate.PENDING:
        rated = any(other.fate is Fate.PENDING for other in story.joined)
        ready = story.state == FeedbackState.READY or (story.kind == "interaction" and rated)
        if ready:
            return "it waits for an update"
        missing = "feedback" if story.kind == "interaction" else "its interaction"
        return f"it waits for {missing}"
    return _SAID[story.fate].format(reason=_words(story.reason), decision=_decision(alias, story))


def _decision(alias: str, story: EventHistory) -> str:
    if story.outcome is None:
        return "an unknown decision"
    return story.outcome.name if "@" in story.outcome.name else f"{alias} {story.outcome.name}"


def _evidence(outcome: Outcome) -> str:
    words = [f"{outcome.examples} examples"]
    if outcome.parent is not None:
        words.append(f"parent v{outcome.parent:06d}")
    words += _divergence_words(outcome.divergences)
    if outcome.verdict is not None:
        words.append(f"gate: {outcome.verdict} ({outcome.checks_passed} checks passed)")
    if outcome.checks_failed:
        words.append(f"failed: {', '.join(outcome.checks_failed)}")
    if outcome.cause:
        words.append(_plain(outcome.cause))
    return ", ".join(words)


def _divergence_words(divergences: Sequence[Divergence]) -> list[str]:
    return [
        f"KL from {one.measured_from} {number(one.mean_kl_nats, 4)} nats/token"
        for one in divergences
        if one.tokens_from == "traffic"
    ]


def _plain(text: str) -> str:
    """What clients chose, as names of raters and signals: nothing in it plays with a terminal."""
    return escape_markup(
        "".join(
            letter if letter.isprintable() else letter.encode("unicode_escape").decode()
            for letter in text
        )
    )


def _words(value: Fate | Reason) -> str:
    return value.replace("_", " ")


def _when(unix_seconds: float) -> str:
    return f"{datetime.fromtimestamp(unix_seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


# --- lineage ------------------------------------------------------------------------------------


def lineage_json(found: Lineage) -> dict[str, Any]:
    """For programs."""
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
    }


def lineage_page(found: Lineage, *, every: bool) -> RenderableType:
    """The release, its line of parents, its examples."""
    release = found.release
    about = Table.grid(padding=(0, 2))
    about.add_column(style="dim", min_width=12)
    about.add_column(overflow="fold")
    about.add_row("  released", f"{_when(release.created_at)} ({ago(release.created_at)})")
    if release.revokes_after is not None:
        about.add_row(
            "  has the bytes of",
            f"v{release.revokes_after:06d}, which had not learned from the erased",
        )
    if found.revoked:
        about.add_row("  revoked", "for an erasure: nothing live descends from it")
    events = ", ".join(f"{count} of {topic}" for topic, count in found.events.items()) or "none"
    about.add_row("  events", events)
    about.add_row("  raters", str(found.raters))
    about.add_row("  step", f"{release.step_scale:.2f} of the proposed update")
    for line in _divergence_words(release.divergences):
        about.add_row("  divergence", line)
    for version, why in release.behaviour_policies_unavailable.items():
        about.add_row("  not run again", f"v{version:06d}, {why}: by its recorded logprobs alone")
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
