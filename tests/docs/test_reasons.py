"""docs/reasons.md is what moorline/events.py and moorline/reasons.py say.

To write it anew: `python -m tests.docs.test_reasons`.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from moorline import events
from moorline.events import Fate, Reason
from moorline.reasons import FATE_REMEDIES, REMEDIES

Member = TypeVar("Member", bound=StrEnum)

PAGE = Path(__file__).parents[2] / "docs" / "reasons.md"
HEAD = """\
# Fates and reasons

Where an event ends, and why. The value is the word in logs, in metrics (`moorline_events_total`),
in dead letters' headers and in `moorline status` and `moorline explain`. This page is made from
`moorline/events.py` and `moorline/reasons.py` (`python -m tests.docs.test_reasons`).
"""


def meanings(enum: type[StrEnum]) -> dict[str, str]:
    """The docstring under each member, by the member's name, on one line."""
    tree = ast.parse(Path(events.__file__).read_text(encoding="utf-8"))
    body = next(
        node.body
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == enum.__name__
    )
    found: dict[str, str] = {}
    for member, after in pairwise(body):
        match member, after:
            case (
                ast.Assign(targets=[ast.Name(id=name)]),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                found[name] = " ".join(text.split()).replace("``", "`")
    return found


def table(enum: type[Member], remedies: Mapping[Member, str]) -> str:
    means = meanings(enum)
    rows = [f"| `{one}` | {means[one.name]} | {remedies[one]} |" for one in enum]
    return "\n".join(
        [f"| {enum.__name__.lower()} | what it means | what to do |", "|---|---|---|", *rows]
    )


def page() -> str:
    fates, reasons = table(Fate, FATE_REMEDIES), table(Reason, REMEDIES)
    return f"{HEAD}\n## Fates\n\n{fates}\n\n## Reasons\n\n{reasons}\n"


def test_every_fate_and_reason_says_what_it_means_and_what_to_do() -> None:
    assert meanings(Fate).keys() == Fate.__members__.keys()
    assert meanings(Reason).keys() == Reason.__members__.keys()
    assert FATE_REMEDIES.keys() == set(Fate)
    assert REMEDIES.keys() == set(Reason)


def test_the_page_is_made_from_the_code() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
