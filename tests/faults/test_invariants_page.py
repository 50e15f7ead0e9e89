"""Every test that docs/invariants.md cites exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def names_in(path: Path) -> set[str]:
    """Functions and assigned names at the top of a module."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.add(name)
            case ast.Assign(targets=[ast.Name(id=name)]):
                found.add(name)
    return found


def test_every_test_that_the_page_cites_exists() -> None:
    page = (TESTS.parent / "docs" / "invariants.md").read_text(encoding="utf-8")
    cited = re.findall(r"`([\w/]+\.py)::(\w+)`", page)
    assert len(cited) == page.count("::")
    missing = [f"{path}::{name}" for path, name in cited if name not in names_in(TESTS / path)]
    assert not missing
