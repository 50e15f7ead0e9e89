"""Log lines, read from the source: a sentence, a machine key, and fields of one list on each."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import moorline
from moorline.logs import FIELDS

ROOT = Path(moorline.__file__).resolve().parent.parent
PACKAGES = ("moorline", "serving", "updater", "daemon")
LEVELS = ("debug", "info", "warning", "error", "exception", "critical", "log")
PASSED_ON = ("daemon/supervise.py:_report", "serving/swap.py:_log_once")
"""Functions that log a sentence and a key of their caller's or of a table."""
EVENT = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)+")


@dataclass(frozen=True)
class Line:
    """One call of a logger."""

    where: str
    level: str
    message: str | None
    fields: dict[str, ast.expr] | None

    @property
    def event(self) -> str | None:
        value = (self.fields or {}).get("event")
        return str(value.value) if isinstance(value, ast.Constant) else None


def lines(package: str) -> Iterator[Line]:
    for path in sorted((ROOT / package).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        passed_on = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef)
            and f"{path.relative_to(ROOT)}:{node.name}" in PASSED_ON
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if not (
                isinstance(node, ast.Call)
                and node not in passed_on
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in LEVELS
                and ast.unparse(node.func.value).endswith("logger")
            ):
                continue
            said = node.args[node.func.attr == "log" :]
            message = said[0].value if said and isinstance(said[0], ast.Constant) else None
            extra = next((word.value for word in node.keywords if word.arg == "extra"), None)
            fields = None
            if isinstance(extra, ast.BinOp):  # a literal | what the lines of a function share
                extra = extra.left
            if isinstance(extra, ast.Dict):
                fields = {
                    key.value if isinstance(key, ast.Constant) else "**": value
                    for key, value in zip(extra.keys, extra.values, strict=True)
                }
            yield Line(
                f"{path.relative_to(ROOT)}:{node.lineno}",
                node.func.attr,
                message if isinstance(message, str) else None,
                fields,
            )


@pytest.mark.parametrize("package", PACKAGES)
def test_every_line_is_a_sentence_with_an_event_key(package: str) -> None:
    wrong = [
        line.where
        for line in lines(package)
        if line.message is None
        or len(line.message.split()) < 3
        or line.event is None
        or not EVENT.fullmatch(line.event)
    ]
    assert wrong == []


@pytest.mark.parametrize("package", PACKAGES)
def test_fields_have_names_of_the_one_list(package: str) -> None:
    wrong = {
        line.where: sorted(odd)
        for line in lines(package)
        if (odd := set(line.fields or {}) - FIELDS)
    }
    assert wrong == {}


def test_an_event_key_at_a_level_means_one_thing() -> None:
    meanings: dict[tuple[str, str], set[str]] = {}
    for package in PACKAGES:
        for line in lines(package):
            if line.event and line.message:
                meanings.setdefault((line.event, line.level), set()).add(line.message)
    assert {key: said for key, said in meanings.items() if len(said) > 1} == {}


def test_no_field_is_one_that_logging_refuses() -> None:
    assert not FIELDS & set(vars(logging.makeLogRecord({})))
