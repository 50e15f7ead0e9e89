"""Verbs that read and change nothing: status, releases, config, schemas."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import SecretStr
from rich.live import Live
from rich.table import Table
from rich.text import Text

from daemon.cli import status_page
from daemon.cli.common import (
    CommandError,
    JsonOption,
    access,
    endpoints,
    out,
    print_json,
    running_tree,
    say,
)
from daemon.cli.options import with_settings
from moorline.events import json_schemas, policy_name
from moorline.http import ServerUnavailable, request_json
from moorline.settings import Settings
from moorline.settings_sources import leaves
from moorline.store import ArtifactStore, RevokedReleases, StoreError

ServerOption = Annotated[
    str | None, typer.Option("--server", metavar="URL", help="Where the server listens.")
]
UpdaterOption = Annotated[
    str | None, typer.Option("--updater", metavar="URL", help="Where the updater listens.")
]


@with_settings()
def status(
    settings: Settings,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh until Ctrl-C.")] = False,
    as_json: JsonOption = False,
    server: ServerOption = None,
    updater: UpdaterOption = None,
) -> None:
    """Show what is served, what is being learned, and where every event ended.

    Exits 1 when neither the server nor the updater answers.

    [bold]Examples[/]

      moorline status
      moorline status --watch
      moorline status --json | jq .server.policy_version
    """
    if as_json:
        report = _gather_status(settings, server, updater)
        print_json(report)
    elif watch:
        _watch(settings, server, updater)
        return
    else:
        report = _gather_status(settings, server, updater)
        out.print(_render(report))
    if report["server"] is None and report["updater"] is None:
        tree = running_tree(settings.state_dir)
        if tree is not None:
            raise CommandError(
                f"`moorline up` (process {tree.pid}) is still starting: its logs are in "
                f"{settings.state_dir / 'logs'}"
            )
        raise CommandError("neither the server nor the updater answers: start `moorline up`")


def _watch(settings: Settings, server: str | None, updater: str | None) -> None:
    with Live(console=out, screen=out.is_terminal, auto_refresh=False) as live:
        try:
            while True:
                live.update(_render(_gather_status(settings, server, updater)), refresh=True)
                time.sleep(1.0)
        except KeyboardInterrupt:
            return


def _gather_status(settings: Settings, server: str | None, updater: str | None) -> dict[str, Any]:
    where = endpoints(settings, server, updater)
    tree = running_tree(settings.state_dir)
    store = ArtifactStore(settings.store_dir)
    report: dict[str, Any] = {"alias": settings.alias, "store": _store(store, settings.alias)}
    for part, url, path in (
        ("server", where.server, "/v1/moorline/status"),
        ("updater", where.updater, "/status"),
    ):
        problem = ""
        try:
            answer = request_json("GET", url + path, **access(settings))
        except ServerUnavailable as error:
            answer, problem = None, error.why
        report |= {part: answer, f"{part}_url": url, f"{part}_problem": problem}
    embedded = tree is not None and tree.embedded_broker
    kind = " (embedded, in memory)" if embedded else ""
    report["stream"] = f"{where.bootstrap}{kind}" if where.bootstrap else "none configured"
    return report


def _store(store: ArtifactStore, alias: str) -> dict[str, Any]:
    newest = store.newest(alias)
    report: dict[str, Any] = {"newest": newest.name if newest else None, "pinned": None}
    try:
        pin = store.pinned(alias)
    except StoreError as error:
        return report | {"problem": str(error)}
    if pin is not None:
        report["pinned"] = {"name": policy_name(alias, pin.version)} | pin.model_dump()
    return report


def _render(report: dict[str, Any]) -> Any:
    return status_page.page(**{key: value for key, value in report.items() if key != "alias"})


@with_settings()
def releases(
    settings: Settings,
    as_json: JsonOption = False,
    limit: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 20,
    server: ServerOption = None,
) -> None:
    """List the releases in the store: measured divergences, gate, size.

    A revoked release had learned from somebody who was erased: its weights are deleted.

    [bold]Examples[/]

      moorline releases
      moorline releases --limit 5
      moorline releases --json | jq '.[-1].verdict.checks'
    """
    store = ArtifactStore(settings.store_dir)
    found = store.releases(settings.alias)
    versions = store.versions(settings.alias)
    revoked = RevokedReleases(store).among(settings.alias, versions)
    if as_json:
        print_json(
            [
                release.model_dump(mode="json") | {"revoked": release.version in revoked}
                for release in found[-limit:]
            ]
        )
        return
    unreadable = set(versions) - {release.version for release in found}
    if not found and not unreadable:
        say(
            f"No release of {settings.alias!r} in {settings.store_dir} yet: "
            "the base model is served."
        )
        return
    served = None
    try:
        url = endpoints(settings, server).server + "/v1/moorline/status"
        served = request_json("GET", url, **access(settings)).get("policy_version")
    except ServerUnavailable:
        pass  # the store is the truth; who serves what is only an extra mark
    pin = store.pinned(settings.alias)
    out.print(
        status_page.releases_table(
            found[-limit:],
            unreadable=sorted(unreadable),
            revoked=revoked,
            served=served,
            pinned=pin.version if pin else None,
        )
    )
    if len(found) > limit:
        say(f"and {len(found) - limit} older: --limit {len(found)}", style="dim")


@with_settings()
def config(
    settings: Settings,
    as_json: JsonOption = False,
    changed: Annotated[
        bool, typer.Option("--changed", help="Only settings that are not at their default.")
    ] = False,
) -> None:
    """List every setting, its value and who set it. Secrets are never printed.

    [bold]Examples[/]

      moorline config
      moorline config --changed
      MOORLINE_SERVING__PORT=9000 moorline config --json | jq '."serving.port"'
    """
    rows = {
        name: (_shown(settings, name), settings.origin_of(name)) for name, _ in leaves(Settings)
    }
    if changed:
        rows = {name: row for name, row in rows.items() if row[1] != "default"}
    if as_json:
        print_json(
            {name: {"value": value, "origin": origin} for name, (value, origin) in rows.items()}
        )
        return
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("setting")
    table.add_column("value", overflow="fold")
    table.add_column("set by", overflow="fold")
    for name, (value, origin) in rows.items():
        by_user = origin != "default"
        table.add_row(
            Text(name, style="bold" if by_user else ""),
            Text(json.dumps(value) if value is not None else "-"),
            Text(origin, style="cyan" if by_user else "dim"),
        )
    out.print(table if rows else "Everything is at its default.")


def _shown(settings: Settings, name: str) -> Any:
    """A setting as JSON takes it."""
    value: Any = settings
    for part in name.split("."):
        value = getattr(value, part)
    if isinstance(value, SecretStr):
        return "(secret)"
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def schemas(
    topic: Annotated[
        str | None, typer.Argument(metavar="[TOPIC]", help="One topic, such as feedback.v1.")
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write TOPIC.schema.json files.")
    ] = None,
) -> None:
    """Print the JSON Schema of every event, made from the models that parse them.

    [bold]Examples[/]

      moorline schemas feedback.v1
      moorline schemas --out schemas/
    """
    found = json_schemas()
    if topic is not None:
        if topic not in found:
            raise CommandError(f"there is no topic {topic!r}: choose one of {', '.join(found)}")
        found = {topic: found[topic]}
    if to is None:
        print_json(found if topic is None else found[topic])
        return
    to.mkdir(parents=True, exist_ok=True)
    for name, schema in found.items():
        path = to / f"{name}.schema.json"
        path.write_text(json.dumps(schema, indent=2) + "\n", encoding="utf-8")
        say(f"wrote {path}")
