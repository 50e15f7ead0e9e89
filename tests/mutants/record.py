"""The recorded faults, ``mutants.toml``: a change of one file each, and tests that must fail."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).with_name("mutants.toml")


@dataclass(frozen=True)
class Mutant:
    """One fault."""

    what: str
    """What is wrong with it, in words; its name."""
    file: str
    old: str
    """Occurs in the file exactly once."""
    new: str
    tests: tuple[str, ...]
    """As pytest names them; at least one of them fails."""

    def why_stale(self, root: Path = ROOT) -> str | None:
        """Why this fault cannot be put into the tree any more; None when it can."""
        path = root / self.file
        if not path.is_file():
            return f"{self.what}: {self.file} is gone"
        times = path.read_text(encoding="utf-8").count(self.old)
        if times != 1:
            return f"{self.what}: its old text is {times} times in {self.file}, not once"
        for test in self.tests:
            name, _, function = test.partition("::")
            source = root / name
            if not source.is_file() or (
                function and f"def {function}(" not in source.read_text(encoding="utf-8")
            ):
                return f"{self.what}: there is no test {test}"
        return None

    def put_into(self, root: Path) -> None:
        """Change the file under ``root``."""
        path = root / self.file
        source = path.read_text(encoding="utf-8")
        path.write_text(source.replace(self.old, self.new), encoding="utf-8")


def read_mutants(path: Path = RECORD) -> list[Mutant]:
    """All recorded faults, in their order."""
    rows = tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]
    return [Mutant(**{**row, "tests": tuple(row["tests"])}) for row in rows]
