"""The pages of `moorline status` and `moorline releases`. Every value may be missing."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from daemon.cli.text import MISSING, ago, number, size
from moorline.events import Fate, Release, policy_name

_RECENT_SWAPS = 3
_LOW_BUDGET_NATS = 0.05


def page(
    *,
    store: Mapping[str, Any],
    server: Mapping[str, Any] | None,
    server_url: str,
    server_problem: str,
    updater: Mapping[str, Any] | None,
    updater_url: str,
    updater_problem: str,
    stream: str,
) -> RenderableType:
    """The whole status on one screen: what is served, what is learned, what happened to events."""
    parts: list[RenderableType] = [
        _section("Release store", _store_rows(store)),
        _section(f"Server  {server_url}", _server_rows(server, server_problem)),
        _section(f"Updater  {updater_url}", _updater_rows(updater, updater_problem)),
        _section("Stream", [("broker", Text(stream))]),
    ]
    accounting = (updater or {}).get("accounting")
    if isinstance(accounting, Mapping):
        table = accounting_table(accounting)
        if table.row_count:
            parts += [Text("Events and where they ended", style="bold"), table]
            parts += _why(accounting)
    return Group(*parts)


def _why(accounting: Mapping[str, Any]) -> list[RenderableType]:
    """The reasons behind the fates that an operator may want to change, and any imbalance."""
    lines: list[RenderableType] = []
    reasons = accounting.get("reasons")
    for topic, fates in sorted(reasons.items() if isinstance(reasons, Mapping) else ()):
        for fate in (Fate.NOT_TRAINABLE, Fate.DEAD_LETTERED, Fate.REJECTED):
            counts = fates.get(fate) if isinstance(fates, Mapping) else None
            if counts:
                words = ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()))
                lines.append(Text(f"  {topic} {fate.replace('_', ' ')}: {words}", "dim"))
    missed = accounting.get("missed")
    if isinstance(missed, Mapping) and any(missed.values()):
        words = ", ".join(f"{topic} {count}" for topic, count in sorted(missed.items()) if count)
        lines.append(Text(f"  never readable (gaps in the topic): {words}", "yellow"))
    if accounting.get("balanced") is False:
        lines.append(Text("  the counts do not add up: please report this", "bold red"))
    return lines


Row = tuple[str, Text]


def _section(title: str, rows: Sequence[Row]) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", min_width=17)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(f"  {name}", value)
    return Group(Text(title, style="bold"), table, Text())


def _store_rows(store: Mapping[str, Any]) -> list[Row]:
    rows = [("newest release", Text(str(store.get("newest") or "none yet (base model)")))]
    pin = store.get("pinned")
    if store.get("problem"):
        rows.append(("pin", Text(str(store["problem"]), style="red")))
    elif pin:
        why = f' "{pin["reason"]}"' if pin.get("reason") else ""
        when = ago(pin.get("pinned_at"))
        rows.append(("pinned", Text(f"{pin['name']} {when}{why}: learning is paused", "yellow")))
    return rows


def _server_rows(server: Mapping[str, Any] | None, problem: str) -> list[Row]:
    if server is None:
        return [("not reachable", Text(problem, style="red"))]
    ready = server.get("ready")
    state = Text("ready", style="green")
    if not ready:
        state = Text(f"not ready: {server.get('why_not_ready') or 'starting'}", style="yellow")
    rows = [
        ("serving", Text(str(server.get("policy_name", MISSING)), style="bold cyan")),
        ("state", state),
        ("swap mode", Text(str(server.get("swap_mode", MISSING)))),
        ("running replies", Text(str(server.get("requests_in_flight", MISSING)))),
    ]
    publisher = server.get("publisher")
    if isinstance(publisher, Mapping):
        rows.append(("publisher", _publisher(publisher)))
    swaps = server.get("swaps") or []
    for place, swap in enumerate(reversed(swaps[-_RECENT_SWAPS:])):
        rows.append(("recent swaps" if place == 0 else "", _swap(swap)))
    refused = server.get("refused_versions")
    if refused:
        pairs = refused.items() if isinstance(refused, Mapping) else ((v, "") for v in refused)
        for version, why in pairs:
            rows.append(("refused", Text(f"v{int(version):06d} {why}".rstrip(), style="red")))
    return rows


def _publisher(stats: Mapping[str, Any]) -> Text:
    connected = stats.get("connected")
    text = Text("connected" if connected else "broker away", "green" if connected else "yellow")
    text.append(f", {stats.get('delivered', MISSING)} delivered", "default")
    text.append(f", {stats.get('queued', MISSING)} queued", "default")
    text.append(f", {stats.get('spooled', MISSING)} on disk", "default")
    dropped = stats.get("dropped") or 0
    if dropped:
        text.append(f", {dropped} dropped", "bold red")
    if not connected and stats.get("last_error"):
        text.append(f" ({stats['last_error']})", "dim")
    return text


def _swap(swap: Mapping[str, Any]) -> Text:
    outcome = str(swap.get("outcome", MISSING))
    text = Text(f"v{int(swap.get('version', 0)):06d} ")
    text.append(outcome, "green" if outcome == "swapped" else "red")
    text.append(f" in {number(swap.get('seconds'), 2)} s", "default")
    text.append(f", pause {number(swap.get('pause_seconds'), 2)} s", "default")
    text.append(f", parity {number(swap.get('parity_nats'), 4)} nats", "default")
    text.append(f", {ago(swap.get('at'))}", "dim")
    return text


def _updater_rows(updater: Mapping[str, Any] | None, problem: str) -> list[Row]:
    if updater is None:
        return [("not reachable", Text(problem, style="red"))]
    rows: list[Row] = []

    def add(name: str, key: str, text: Callable[[Any], str], style: str = "") -> None:
        if updater.get(key) is not None:
            rows.append((name, Text(text(updater[key]), style)))

    recent = updater.get("recent_feedback")
    lost = isinstance(recent, Mapping) and bool(recent.get("missing"))
    budget = updater.get("anchor_budget_left_nats")
    low = isinstance(budget, int | float) and budget < _LOW_BUDGET_NATS
    alias = str(updater.get("alias", "?"))
    add("newest release", "live_version", lambda live: policy_name(alias, live), "bold cyan")
    add("phase", "phase", lambda phase: str(phase).replace("_", " "))
    add("rated, waiting", "ready_examples", lambda count: f"{count} examples")
    add("recent feedback", "recent_feedback", _recent_feedback, "yellow" if lost else "")
    add(
        "updates",
        "updates",
        lambda counts: (
            f"{counts.get('released', 0)} released, {counts.get('rejected', 0)} rejected"
        ),
    )
    add("KL from live", "kl_live_nats", lambda nats: f"{number(nats, 4)} nats/token")
    add("KL from anchor", "kl_anchor_nats", lambda nats: f"{number(nats, 4)} nats/token")
    add(
        "anchor budget",
        "anchor_budget_left_nats",
        lambda nats: f"{number(nats, 4)} nats/token left",
        "red" if low else "",
    )
    last = updater.get("last_update")
    if isinstance(last, Mapping) and last:
        rows.append(("last update", Text(_brief(last))))
    lag = updater.get("lag_events")
    if isinstance(lag, Mapping) and lag:
        ages = updater.get("lag_seconds") or {}
        text = ", ".join(
            f"{topic} {count} events" + (f", {number(ages.get(topic), 0)} s" if count else "")
            for topic, count in sorted(lag.items())
        )
        rows.append(("lag", Text(text)))
    return rows


def _recent_feedback(recent: Any) -> str:
    if not isinstance(recent, Mapping):
        return MISSING
    found, missing = recent.get("found", 0), recent.get("missing", 0)
    if not missing:
        return f"{found} in the last hour"
    return (
        f"{missing} of {found + missing} in the last hour name no reply that was recorded: raters "
        "must send the `id` of the reply; `moorline explain ID` tells of one"
    )


def _brief(update: Mapping[str, Any]) -> str:
    """The plain values of an update; times as ages, nested detail left to --json."""
    words = []
    for key, value in update.items():
        if key in ("at", "created_at", "finished_at"):
            words.append(ago(value))
        elif isinstance(value, float):
            words.append(f"{key.replace('_', ' ')} {number(value, 4)}")
        elif isinstance(value, str | int) and value != "":
            words.append(f"{key.replace('_', ' ')} {value}")
    return ", ".join(words[:8])


def accounting_table(accounting: Mapping[str, Any]) -> Table:
    """Fate by topic, with totals; columns that are all zero are left out."""
    topics = accounting.get("topics") or {}
    fates = [fate for fate in Fate if any(counts.get(fate) for counts in topics.values())]
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=True)
    table.add_column("topic")
    for fate in fates:
        table.add_column(fate.replace("_", " "), justify="right")
    table.add_column("total", justify="right", style="bold")
    for topic, counts in sorted(topics.items()):
        numbers = (str(counts.get(fate, 0)) for fate in fates)
        table.add_row(topic, *numbers, str(sum(counts.values())))
    return table


def releases_table(
    releases: Sequence[Release],
    *,
    unreadable: Sequence[int],
    revoked: Collection[int],
    served: int | None,
    pinned: int | None,
) -> Table:
    """One line a release, newest first."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for heading in ("version", "", "released"):
        table.add_column(heading, no_wrap=True)
    for heading in ("parent", "examples", "KL live", "KL anchor", "step", "gate", "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    for release in reversed(releases):
        marks = [
            word
            for word, is_it in (
                ("serving", release.version == served),
                ("pinned", release.version == pinned),
                ("revoked", release.version in revoked),
            )
            if is_it
        ]
        checks = release.verdict.checks if release.verdict else ()
        table.add_row(
            Text(f"v{release.version:06d}", style="bold cyan" if marks else ""),
            Text(" ".join(marks), style="red" if "revoked" in marks else "green"),
            ago(release.created_at),
            MISSING if release.parent is None else f"v{release.parent:06d}",
            str(release.examples),
            _kl(release, "live"),
            _kl(release, "anchor"),
            f"{release.step_scale:.2f}",
            f"{sum(check.passed for check in checks)}/{len(checks)}" if checks else MISSING,
            size(sum(file.size_bytes for file in release.files)),
        )
    for version in sorted(unreadable, reverse=True):
        table.add_row(f"v{version:06d}", Text("manifest unreadable", style="red"))
    return table


def _kl(release: Release, reference: str) -> str:
    """The measured KL on traffic, else on probes, nats per token."""
    found = {
        divergence.tokens_from: divergence.mean_kl_nats
        for divergence in release.divergences
        if divergence.measured_from == reference
    }
    return number(found.get("traffic", found.get("probes")), 4)
