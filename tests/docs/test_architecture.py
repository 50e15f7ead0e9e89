"""docs/architecture.md: its picture has the arrows that the code has, and its links lead somewhere.

An arrow `a --> b` says that a module of box a imports one of box b. The imports are read from the
source, those inside functions too, so that nothing is imported to find out.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
FLOORS = ("moorline", "serving", "updater", "daemon")

Arrow = tuple[str, str]


def drawn() -> tuple[set[str], set[Arrow]]:
    """The boxes and the arrows of the page's picture."""
    picture = PAGE.read_text(encoding="utf-8").split("```mermaid\n")[1].split("```")[0]
    boxes = dict(re.findall(r'^\s*(\w+)\["([\w/]+)"\]$', picture, re.MULTILINE))
    lines = re.findall(r"^\s*(\w+) --> ([\w &]+)$", picture, re.MULTILINE)
    arrows = {(boxes[start], boxes[end]) for start, ends in lines for end in ends.split(" & ")}
    return set(boxes.values()), arrows


def box_of(module: str, boxes: set[str]) -> str | None:
    """The innermost box that a module is in; None: it is not one of ours."""
    path = module.replace(".", "/")
    around = [box for box in boxes if path == box or path.startswith(f"{box}/")]
    return max(around, key=len) if around else None


def imported_by(path: Path) -> Iterator[str]:
    """The modules that a file imports, by their full names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(ROOT).parent.parts
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            # The name may be a module of the package, or something that the package holds.
            for alias in node.names:
                inside = ROOT / base.replace(".", "/") / alias.name
                is_module = inside.is_dir() or inside.with_suffix(".py").is_file()
                yield f"{base}.{alias.name}" if is_module else base


def real_arrows(boxes: set[str]) -> set[Arrow]:
    found: set[Arrow] = set()
    for floor in FLOORS:
        for path in (ROOT / floor).rglob("*.py"):
            start = box_of(path.relative_to(ROOT).with_suffix("").as_posix(), boxes)
            ends = {box_of(module, boxes) for module in imported_by(path)}
            found |= {(start, end) for end in ends if start and end and start != end}
    return found


def test_every_arrow_of_the_picture_is_an_import_and_every_import_an_arrow() -> None:
    boxes, arrows = drawn()
    real = real_arrows(boxes)
    assert sorted(arrows - real) == [], "drawn, but nothing is imported that way"
    assert sorted(real - arrows) == [], "imported, but not drawn"


def test_every_package_has_a_box() -> None:
    boxes, _ = drawn()
    packages = {
        path.relative_to(ROOT).as_posix()
        for floor in FLOORS
        for path in [ROOT / floor, *(ROOT / floor).iterdir()]
        if path.is_dir() and any(path.glob("*.py"))
    }
    assert packages == boxes


@pytest.mark.parametrize(
    "page",
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        *sorted(ROOT.glob("docs/**/*.md")),
    ],
    ids=lambda page: page.relative_to(ROOT).as_posix(),
)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings}
            assert anchor in anchors, target


def test_every_decision_is_in_the_index() -> None:
    folder = ROOT / "docs" / "decisions"
    index = (folder / "README.md").read_text(encoding="utf-8")
    records = {path.name for path in folder.glob("*.md")} - {"README.md"}
    assert records == set(re.findall(r"\]\(([\w-]+\.md)\)", index))
