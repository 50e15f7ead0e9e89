"""The ledger is lost, or older than the store: the line goes on from the store's newest release."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from moorline.events import Fate, Reason
from moorline.stream import Topic
from tests.updater.harness import Tape, Updater
from tests.updater.learning.fixtures import ALIAS
from updater.learning.policy import ReleaseInvalid
from updater.progress import Phase

LEDGER = ("ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm", "ledger.sqlite.keys")


class Field:
    """A state directory with updaters one after the other, and the stream that outlives them."""

    def __init__(self, model_dir: Path, state: Path) -> None:
        self.state = state
        self._model_dir = model_dir
        self.updater = Updater(model_dir, state)

    def teach(self, seed: int) -> None:
        before = self.updater.ledger.next_version()
        self.updater.interact(4, seed=seed)
        self.updater.loop.cycle()
        assert self.updater.ledger.live_version() == before

    def restart(self, meanwhile: Callable[[], object], *, reread: bool = True) -> Updater:
        tape = self.updater.tape
        self.updater.close()
        meanwhile()
        again = Tape()
        again.continue_after(tape)
        if reread:
            again.play_again(tape)
        self.updater = Updater(self._model_dir, self.state, again)
        return self.updater

    def lose_ledger(self) -> None:
        for path in self.state.glob("ledger.sqlite*"):
            path.unlink()


@pytest.fixture
def field(tiny_model_dir: Path, tmp_path: Path) -> Field:
    field = Field(tiny_model_dir, tmp_path / "state")
    field.teach(1)
    field.teach(2)
    return field


def reasons(updater: Updater) -> dict[Reason, int]:
    events = updater.ledger.accounting().events[Topic.FEEDBACK]
    return {r: n for by in events.values() for r, n in by.items() if r is not Reason.NONE and n}


def test_a_lost_ledger_adopts_the_line_and_old_replies_still_teach(field: Field) -> None:
    field.updater.interact(4, seed=3, rated=False)  # by version 2
    field.updater.loop.cycle()
    updater = field.restart(field.lose_ledger)
    assert updater.ledger.live_version() == 2
    updater.rate(4, seed=3)
    updater.loop.cycle()
    (release,) = updater.published
    assert (release.version, release.parent, release.examples) == (3, 2, 4)
    assert updater.store.versions(ALIAS) == [1, 2, 3]
    assert updater.ledger.audit() == []


def test_no_rating_teaches_twice(field: Field) -> None:
    updater = field.restart(field.lose_ledger)
    updater.loop.cycle()
    updater.loop.cycle()
    assert updater.published == []
    assert updater.fates() == {Fate.NOT_TRAINABLE: 8}
    assert reasons(updater) == {Reason.MAY_HAVE_TAUGHT: 8}


def test_an_older_copy_of_the_ledger_adopts_what_came_after_it(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    field = Field(tiny_model_dir, tmp_path / "state")
    field.teach(1)
    field.updater.interact(3, seed=2)  # wait in the copy, and teach version 2
    field.updater.loop.cycle()
    copy = tmp_path / "copy"

    def save() -> None:
        copy.mkdir()
        for path in field.state.glob("ledger.sqlite*"):
            shutil.copy(path, copy)

    def put_back() -> None:
        field.lose_ledger()
        shutil.copytree(copy, field.state, dirs_exist_ok=True)

    updater = field.restart(save, reread=False)
    updater.interact(1, seed=5)
    updater.loop.cycle()
    assert updater.ledger.live_version() == 2
    updater = field.restart(put_back)
    assert updater.ledger.live_version() == 2
    updater.loop.cycle()
    assert updater.published == []
    assert reasons(updater) == {Reason.MAY_HAVE_TAUGHT: 4}
    assert updater.ledger.audit() == []
    field.teach(6)
    assert [release.version for release in updater.published] == [3]


def test_a_damaged_manifest_is_named_and_its_number_stays_taken(
    field: Field, caplog: pytest.LogCaptureFixture
) -> None:
    def damage() -> None:
        field.lose_ledger()
        path = field.state / "store" / "releases" / ALIAS / "v000002.json"
        path.write_bytes(path.read_bytes()[:100])

    with caplog.at_level(logging.ERROR):
        updater = field.restart(damage, reread=False)
    (told,) = [r for r in caplog.records if getattr(r, "event", "") == "manifest_not_adopted"]
    assert told.version == 2  # type: ignore[attr-defined]
    assert updater.ledger.live_version() == 1
    assert updater.ledger.next_version() == 3
    updater.interact(4, seed=7)
    updater.loop.cycle()
    assert [(r.version, r.parent) for r in updater.published] == [(3, 1)]


def test_ratings_of_a_topic_made_again_are_new_at_whatever_offset(field: Field) -> None:
    field.restart(field.lose_ledger, reread=False)
    field.updater.tape.begin_anew()
    field.updater.tape.at = 9e9
    field.teach(5)
    assert field.updater.published[0].version == 3


def test_a_foreign_manifest_is_refused_by_name(field: Field) -> None:
    def other_model() -> None:
        field.lose_ledger()
        path = field.state / "store" / "releases" / ALIAS / "v000002.json"
        digest = field.updater.store.release(ALIAS, 2).base_model_digest
        path.write_text(path.read_text().replace(digest, "f" * 64))

    with pytest.raises(ReleaseInvalid, match="has assistant@v000002, of another base model"):
        field.restart(other_model)


def test_a_second_writer_is_noticed_and_nobody_crashes(field: Field, tmp_path: Path) -> None:
    """Another updater, with a ledger of its own, on the same store."""
    updater = field.updater
    other = tmp_path / "other"
    other.mkdir()
    (other / "store").symlink_to(updater.settings.store_dir.absolute())
    second = Field(field._model_dir, other)
    second.updater.tape.continue_after(updater.tape)
    second.teach(8)
    assert second.updater.published[0].version == 3
    updater.interact(4, seed=9)
    updater.loop.cycle()
    assert updater.loop.phase is Phase.RELEASE_CONFLICT
    assert updater.fates()[Fate.PENDING] == 4
    assert updater.store.release(ALIAS, 3) == second.updater.published[0]
    assert field.restart(second.updater.close, reread=False).ledger.next_version() == 4
