"""Errors: one base, so that every entry point knows what it may show as one line."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import moorline
from moorline.base_model import ModelInvalid, check_model_dir
from moorline.errors import MoorlineError

ROOT = Path(moorline.__file__).resolve().parent.parent
PACKAGES = ("moorline", "serving", "updater", "daemon")
ENDINGS = ("Error", "Unavailable", "Invalid", "Locked", "Missing", "Corrupt", "Lost", "Conflict")
NOT_OURS = {
    "FailpointError": "planted by a test in the place of a bug: nobody may expect it",
    "_TooLargeError": "never leaves its module: it says that a letter must be cut",
}


def classes() -> dict[str, list[str]]:
    """Each class of the product with the names of its bases."""
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    found[node.name] = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
    return found


def derives(name: str, bases: dict[str, list[str]]) -> bool:
    return name == MoorlineError.__name__ or any(
        derives(base, bases) for base in bases.get(name, [])
    )


def test_every_error_of_the_product_has_the_one_base() -> None:
    bases = classes()
    errors = [name for name in bases if name.endswith(ENDINGS) and name not in NOT_OURS]
    assert [name for name in errors if not derives(name, bases)] == []


def test_every_exception_to_the_rule_still_exists() -> None:
    assert set(NOT_OURS) <= set(classes())


def test_a_foreseen_failure_is_one_line() -> None:
    with pytest.raises(MoorlineError) as caught:
        check_model_dir(None)
    assert isinstance(caught.value, ModelInvalid)
    assert "\n" not in str(caught.value)
