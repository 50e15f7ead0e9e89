"""State directories of older ledger formats open, and say what they said when they were made."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import sqlite3
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest

from moorline import failpoints
from moorline.base_model import model_digest
from moorline.events import RENAMED_REASONS, Fate
from moorline.store import ArtifactStore
from moorline.stream.outgoing import OutgoingEvent
from moorline.stream.spool import Spool
from tests.conftest import ServerFactory
from updater.ledger import Ledger, LedgerError
from updater.ledger.inspection import LedgerInspector
from updater.ledger.migration import NEWEST_FORMAT

HERE = Path(__file__).parent
STEPS = ("before_copy", "after_copy", "before_commit", "after_commit")
HORIZON_SECONDS = 7 * 86400.0
RENAMED_KEYS = {
    "reference": "measured_from",
    "attempts": "crash_counts",
    "restores": "revokes_after",
    "withdrawn_versions": "revoked_versions",
}
RENAMED_VALUES = RENAMED_REASONS | {"canaries": "probes", "settled": "not_trainable"}


def in_todays_words(value: Any) -> Any:
    """What format 4 said, under the names of today."""
    if isinstance(value, dict):
        return {
            in_todays_words(RENAMED_KEYS.get(name, name)): in_todays_words(one)
            for name, one in value.items()
        }
    if isinstance(value, list):
        return [in_todays_words(one) for one in value]
    return str(RENAMED_VALUES.get(value, value)) if isinstance(value, str) else value


@dataclass(frozen=True)
class Fixture:
    """A stored state directory, and what the commit that made it said of it."""

    format: int
    expected: dict[str, Any]

    @property
    def folder(self) -> Path:
        return HERE / f"format{self.format}"

    @property
    def state(self) -> Path:
        return self.folder / "state"


def stored(number: int) -> Fixture:
    said = json.loads((HERE / f"format{number}" / "expected.json").read_text())
    said = in_todays_words(said) if number == 4 else said
    for accounting in (said["accounting"], said["accounting_at_now_plus_8_days"]):
        accounting["fates"] = {str(fate): 0 for fate in Fate} | accounting["fates"]
    return Fixture(number, said)


FORMATS = [stored(number) for number in (4, 5)]
OLDER = [one for one in FORMATS if one.format < NEWEST_FORMAT]


def name(fixture: Fixture) -> str:
    return f"format{fixture.format}"


older_formats = pytest.mark.parametrize("fixture", OLDER, ids=name, indirect=True)
format_4 = pytest.mark.parametrize("fixture", FORMATS[:1], ids=name, indirect=True)


def plain(value: object) -> Any:
    return json.loads(json.dumps(value, default=lambda model: model.model_dump(mode="json")))


def tables(path: Path) -> dict[tuple[str, str], str]:
    """The text of every table, index and trigger, without comments, quotes and white space."""
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
    return {(kind, name): re.sub(r"--[^\n]*|[\s\"]", "", sql or "") for kind, name, sql in found}


def format_of(path: Path) -> int:
    with closing(sqlite3.connect(path)) as connection:
        return int(connection.execute("PRAGMA user_version").fetchone()[0])


def keys_of(state: Path) -> list[int]:
    with closing(sqlite3.connect(state / "ledger.sqlite.keys")) as connection:
        return [key for (key,) in connection.execute("SELECT id FROM keys ORDER BY id")]


def open_ledger(state: Path) -> Ledger:
    return Ledger(state / "ledger.sqlite", horizon_seconds=HORIZON_SECONDS)


@pytest.fixture(params=FORMATS, ids=name)
def fixture(request: pytest.FixtureRequest) -> Fixture:
    assert isinstance(request.param, Fixture)
    return request.param


@pytest.fixture
def expected(fixture: Fixture) -> dict[str, Any]:
    return fixture.expected


@pytest.fixture
def state(fixture: Fixture, tmp_path: Path) -> Path:
    """A copy of the stored state directory."""
    return shutil.copytree(fixture.state, tmp_path / "state")


@pytest.fixture
def migrated(state: Path) -> Path:
    """The same, opened once."""
    open_ledger(state).close()
    return state


def test_a_migrated_ledger_has_the_tables_of_a_new_one(migrated: Path, tmp_path: Path) -> None:
    Ledger(tmp_path / "new" / "ledger.sqlite").close()
    assert tables(migrated / "ledger.sqlite") == tables(tmp_path / "new" / "ledger.sqlite")
    assert format_of(migrated / "ledger.sqlite") == NEWEST_FORMAT


@older_formats
def test_the_old_ledger_is_kept_beside_the_new_one(fixture: Fixture, migrated: Path) -> None:
    copy = migrated / f"ledger.sqlite.format{fixture.format}"
    assert format_of(copy) == fixture.format
    with (
        closing(sqlite3.connect(copy)) as kept,
        closing(sqlite3.connect(fixture.state / "ledger.sqlite")) as original,
    ):
        assert list(kept.iterdump()) == list(original.iterdump())


def test_an_auditor_finds_what_was_there(migrated: Path, expected: dict[str, Any]) -> None:
    store = ArtifactStore(migrated / "store")
    with LedgerInspector(migrated / "ledger.sqlite") as ledger:
        assert ledger.audit() == expected["audit"] == []
        assert plain(ledger.accounting().as_dict()) == expected["accounting"]
        assert json.loads(ledger.baselines().to_json()) == expected["baselines"]
        assert ledger.live_version() == expected["live_version"]
        assert sorted(ledger.revoked_versions()) == expected["revoked_versions"]
        assert sorted(ledger.policy_versions_referenced()) == expected["policy_versions_referenced"]
        offsets = {f"{topic}/{n}": list(place) for (topic, n), place in ledger.offsets().items()}
        assert offsets == expected["offsets"]
        for release, said in zip(ledger.releases(), expected["releases"], strict=True):
            assert (release.version, release.parent, release.revokes_after) == (
                said["version"],
                said["parent"],
                said["revokes_after"],
            )
            assert plain(ledger.lineage(release.version)) == said["lineage"]
            assert store.release("assistant", release.version) == release
            if said["bytes_kept"]:
                assert release.artifact_digest is not None
                store.open(release.artifact_digest, release.files)


def test_every_event_has_the_history_that_it_had(migrated: Path, expected: dict[str, Any]) -> None:
    with LedgerInspector(migrated / "ledger.sqlite") as ledger:
        for key, told in expected["stories"].items():
            found = [
                [str(one.place), one.fate, one.reason, one.state] for one in ledger.histories(key)
            ]
            assert plain(found) == [
                [one["place"], one["fate"], one["reason"], one["state"]] for one in told
            ]
        for key, told in expected["stories_asdict"].items():
            assert plain([asdict(one) for one in ledger.histories(key)]) == told
        for place, told in expected["kinds_by_place"].items():
            found = [[one.kind, one.fate, one.reason, one.name] for one in ledger.histories(place)]
            assert plain(found) == told


def test_the_updater_goes_on_where_it_was(state: Path, expected: dict[str, Any]) -> None:
    now = expected["now"]
    assert keys_of(state) == expected["keys"]
    with open_ledger(state) as ledger:
        after = expected["after_opening_to_write"]
        assert ledger.epoch == after["lease_epoch"]
        assert keys_of(state) == after["keys"] != expected["keys"], "doomed keys go at the start"
        crashes = ledger._database.rows(
            "SELECT i.key, c.in_update, c.crash_count, c.crash_count_alone FROM crash_counts c"
            " JOIN interactions i ON i.id = c.interaction ORDER BY i.key"
        )
        assert plain(crashes) == after["crash_counts"]
        assert plain(asdict(ledger.expire(now=now))) == expected["expire_at_now"]
        ready = [[one.example_id, one.interaction.key] for one in ledger.ready_examples(24)]
        assert ready == [[one["example_id"], one["key"]] for one in expected["ready_examples"]]
        traffic = ledger.held_out_traffic(24, max_tokens=64)
        tokens = [[list(t.prompt_token_ids), list(t.completion_token_ids)] for t in traffic]
        assert tokens == expected["held_out_traffic_tokens"]
        later = ledger.expire(now=now + 8 * 86400.0)
        assert plain(asdict(later)) == expected["expire_at_now_plus_8_days"]
        assert ledger.audit() == []
        assert plain(ledger.accounting().as_dict()) == expected["accounting_at_now_plus_8_days"]


@format_4
def test_no_old_word_is_left_in_a_column(migrated: Path) -> None:
    columns = {
        "events": ("reason",),
        "totals": ("reason",),
        "decisions": ("reason",),
        "rejections": ("reason",),
        "interactions": ("untrainable",),
        "feedback": ("state",),
    }
    with closing(sqlite3.connect(migrated / "ledger.sqlite")) as connection:
        for table, names in columns.items():
            for name in names:
                found = {v for (v,) in connection.execute(f"SELECT DISTINCT {name} FROM {table}")}
                assert not found & {*RENAMED_REASONS, "settled"}


def test_the_spool_is_read_on(state: Path) -> None:
    spool = Spool(state / "spool", 2**20)
    topics = []
    while (frame := spool.next()) is not None:
        topics.append(str(OutgoingEvent.from_bytes(frame.payload).topic))
    spool.close()
    assert topics == ["feedback.v1", *["interactions.v1", "feedback.v1"] * 2]


@older_formats
def test_reading_an_old_format_says_to_start_the_updater(fixture: Fixture, state: Path) -> None:
    why = rf"format {fixture.format}.*reads {NEWEST_FORMAT}.*moorline update"
    with pytest.raises(LedgerError, match=why):
        LedgerInspector(state / "ledger.sqlite")
    assert format_of(state / "ledger.sqlite") == fixture.format


def test_a_newer_format_is_refused_with_the_way_back(migrated: Path) -> None:
    path = migrated / "ledger.sqlite"
    newer = NEWEST_FORMAT + 1
    shutil.copy(path, path.with_name(f"ledger.sqlite.format{NEWEST_FORMAT}"))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {newer}")
    copy = rf"ledger\.sqlite\.format{NEWEST_FORMAT}"
    with pytest.raises(LedgerError, match=rf"format {newer}.*newer Moorline.*{copy}"):
        open_ledger(migrated)


@format_4
def test_a_format_before_the_first_release_is_refused(state: Path) -> None:
    with closing(sqlite3.connect(state / "ledger.sqlite")) as connection:
        connection.execute("PRAGMA user_version = 3")
    with pytest.raises(LedgerError, match="4 at the oldest: start with a new state_dir"):
        open_ledger(state)
    assert not (state / "ledger.sqlite.format3").exists()


@older_formats
@pytest.mark.parametrize("step", STEPS)
def test_a_kill_in_a_migration_leaves_the_old_ledger_or_the_new_one(
    fixture: Fixture, state: Path, step: str
) -> None:
    copy = state / f"ledger.sqlite.format{fixture.format}"

    def child() -> None:
        failpoints._passes.clear()
        os.environ[failpoints.FAILPOINTS_VARIABLE] = f"ledger.migration.{step}=kill@1"
        open_ledger(state)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == -SIGKILL
    # Reading recovers the WAL; the format says which of the two it is.
    assert format_of(state / "ledger.sqlite") == (
        NEWEST_FORMAT if step == "after_commit" else fixture.format
    )
    assert copy.exists() == (step != "before_copy")
    with open_ledger(state) as ledger:
        assert ledger.audit() == []
        assert plain(ledger.accounting().as_dict()) == fixture.expected["accounting"]
    assert format_of(copy) == fixture.format


@older_formats
def test_a_full_disk_leaves_the_old_ledger(
    fixture: Fixture, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("updater.ledger.migration.os.fsync", refuse)
    with pytest.raises(LedgerError, match="check free space"):
        open_ledger(state)
    assert format_of(state / "ledger.sqlite") == fixture.format
    assert not list(state.glob("*.format*"))


@format_4
@pytest.mark.slow
def test_a_server_serves_the_newest_release(
    fixture: Fixture, tiny_model_dir: Path, server_factory: ServerFactory
) -> None:
    if model_digest(tiny_model_dir) != fixture.expected["base_model_digest"]:
        pytest.skip("on this CPU the tiny model is drawn with other weights than the fixture's")
    server = server_factory("format4", SERVING__SWAP_MODE="reload", STREAM__BOOTSTRAP="127.0.0.1:1")
    shutil.copytree(fixture.state, server.state_dir, dirs_exist_ok=True)
    server.launch()
    server.wait_listening()
    server.wait_version(6)
    reply = server.openai().chat.completions.create(
        model="assistant", messages=[{"role": "user", "content": "hello"}], max_tokens=4
    )
    assert reply.model == "assistant@v000006"
