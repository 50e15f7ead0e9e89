"""The drills of docs/operations.md, "When state is lost", as an operator walks them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moorline.store import ArtifactMissing, ArtifactStore
from tests.drills.test_adoption import Field
from tests.updater.harness import Tape, Updater
from tests.updater.learning.fixtures import ALIAS
from tests.updater.ledger.test_inspection import moorline
from updater.ledger import LedgerError


@pytest.fixture
def field(tiny_model_dir: Path, tmp_path: Path) -> Field:
    """A backup of version 1; version 2 came after it."""
    field = Field(tiny_model_dir, tmp_path / "state")
    field.teach(1)
    assert moorline("backup", str(tmp_path / "backup"), state=field.state)[0] == 0
    field.teach(2)
    return field


def test_the_store_is_lost(field: Field, tmp_path: Path, tiny_model_dir: Path) -> None:
    with pytest.raises(ArtifactMissing, match="restore it from a backup"):
        field.restart(lambda: shutil.rmtree(field.state / "store"), reread=False)
    tape = field.updater.tape
    field.state.rename(tmp_path / "aside")
    code, told = moorline("restore", str(tmp_path / "backup"), state=field.state)
    assert (code, "Restored assistant@v000001" in told) == (0, True)
    again = Tape()
    again.play_again(tape)
    updater = Updater(tiny_model_dir, field.state, again)
    updater.loop.cycle()  # reads on where the ledger stood: the ratings of version 2 teach again
    assert [release.version for release in updater.published] == [2]
    assert updater.ledger.audit() == []


def test_the_keys_are_lost(field: Field, tmp_path: Path) -> None:
    def lose_keys() -> None:
        for path in field.state.glob("ledger.sqlite.keys*"):
            path.unlink()

    with pytest.raises(LedgerError, match=r"ledger\.sqlite\.keys is missing"):
        field.restart(lose_keys, reread=False)

    def both_from_the_backup() -> None:
        field.lose_ledger()
        for name in ("ledger.sqlite", "ledger.sqlite.keys"):
            shutil.copy(tmp_path / "backup" / name, field.state)

    updater = field.restart(both_from_the_backup)
    assert updater.ledger.live_version() == 2
    updater.loop.cycle()
    assert updater.published == []  # what taught version 2 does not teach again
    field.teach(6)
    assert ArtifactStore(field.state / "store").versions(ALIAS) == [1, 2, 3]


def test_every_drill_of_the_page_is_walked_by_a_test() -> None:
    page = Path("docs/operations.md").read_text(encoding="utf-8")
    _, _, drills = page.partition("## When state is lost")
    drills = drills.partition("\n## ")[0]
    named = [line.split("`")[1] for line in drills.splitlines() if line.startswith("*Walked by*")]
    assert len(named) == drills.count("\n### ") >= 6
    for name in named:
        path, _, function = name.partition("::")
        assert f"def {function}(" in Path("tests", path).read_text(encoding="utf-8"), name
