"""What others rely on, read from the code as it is: one table a contract, name -> meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer.main
from pydantic import BaseModel, SecretStr

from daemon.cli.app import app
from moorline import events, metrics
from moorline.settings import Settings
from moorline.stream.topics import COMPACTED, Topic, dlq_name, topic_name

STORED = Path(__file__).with_name("stored.json")
Table = dict[str, str]


def surface() -> dict[str, Table]:
    """Every contract of the product."""
    return {
        "settings": dict(sorted(_settings(Settings).items())),
        "metrics": _metrics(),
        "topics": _topics(),
        "events": _events(),
        "reasons": {reason.value: reason.name for reason in events.Reason},
        "fates": {fate.value: fate.name for fate in events.Fate},
        "commands": dict(sorted(_commands(typer.main.get_command(app), "moorline").items())),
    }


def stored() -> dict[str, Table]:
    """The contracts as they were last written down."""
    tables: dict[str, Table] = json.loads(STORED.read_text(encoding="utf-8"))
    return tables


def broken(now: dict[str, Table], before: dict[str, Table]) -> list[str]:
    """What disappeared or means something else, a line each."""
    lines = []
    for contract, table in before.items():
        for name, meaning in table.items():
            current = now.get(contract, {}).get(name)
            if current is None:
                lines.append(f"{contract}: {name} is gone")
            elif current != meaning:
                lines.append(f"{contract}: {name} was {meaning!r} and is {current!r}")
    return lines


def added(now: dict[str, Table], before: dict[str, Table]) -> list[str]:
    """What is not written down yet, a line each."""
    return [
        f"{contract}: {name}"
        for contract, table in now.items()
        for name in table
        if name not in before.get(contract, {})
    ]


def write(tables: dict[str, Table]) -> None:
    """Write the contracts down."""
    STORED.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")


def _settings(section: type[BaseModel], prefix: str = "") -> Table:
    found: Table = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= _settings(kind, f"{prefix}{name}.")
            continue
        default = field.get_default(call_default_factory=True)
        shown = "***" if isinstance(default, SecretStr) else str(default)
        label = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
        found[f"{prefix}{name}"] = f"{label} = {shown}"
    return found


def _metrics() -> Table:
    rows = sorted(metrics.TABLE, key=lambda row: row.name)
    return {row.name: f"{row.kind}({', '.join(row.labels)})" for row in rows}


def _topics() -> Table:
    stream = Settings().stream
    kinds = {topic: "compacted" if topic in COMPACTED else "retained" for topic in Topic}
    return {topic_name(stream, topic): kinds[topic] for topic in Topic} | {
        dlq_name(stream, topic): "dead letters" for topic in Topic
    }


def _events() -> Table:
    """Wire fields: path -> the schema of the field, without words."""
    found: Table = {}
    for topic, schema in events.json_schemas().items():
        places = {topic: schema} | {
            f"{topic} {name}": part for name, part in schema.get("$defs", {}).items()
        }
        for place, part in places.items():
            if "enum" in part:
                found[place] = f"one of {', '.join(map(str, part['enum']))}"
            required = part.get("required", ())
            for name, field in part.get("properties", {}).items():
                if name == "schema_version":  # moves with every addition
                    field = {"type": field["type"]}
                needed = "required" if name in required else "optional"
                found[f"{place}.{name}"] = f"{needed} {json.dumps(_bare(field), sort_keys=True)}"
    return found


def _bare(schema: Any) -> Any:
    if isinstance(schema, dict):
        words = ("title", "description")
        return {key: _bare(value) for key, value in schema.items() if key not in words}
    return [_bare(item) for item in schema] if isinstance(schema, list) else schema


def _commands(command: Any, name: str) -> Table:
    """Verbs and their options; ``command`` is of whichever click this typer has."""
    found: Table = {}
    for parameter in command.params:
        if parameter.opts[0].endswith("-completion"):  # typer's own
            continue
        words = ["option" if parameter.opts[0].startswith("-") else "argument"]
        words += ["flag"] * bool(getattr(parameter, "is_flag", False))
        words += ["repeatable"] * bool(getattr(parameter, "multiple", False))
        words += ["required"] * bool(parameter.required)
        spelled = "/".join([*parameter.opts, *parameter.secondary_opts])
        found[f"{name} {spelled}"] = " ".join(words)
    for verb, part in getattr(command, "commands", {}).items():
        found[f"{name} {verb}"] = "command"
        found |= _commands(part, f"{name} {verb}")
    return found
