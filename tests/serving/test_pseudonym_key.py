"""Which key a server makes pseudonyms with, and when it ends instead."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import pytest

from moorline.pseudonyms import PseudonymKeyInvalid, Pseudonyms
from moorline.settings import Settings, load_settings
from moorline.store import ArtifactStore
from moorline.store.pseudonym_keys import RecordedKeys
from serving.pseudonym_key import server_pseudonyms


def settings(state: Path, **serving: object) -> Settings:
    overrides = {f"serving.{name}": value for name, value in serving.items()}
    return load_settings(overrides={"state_dir": str(state), **overrides}, environment={})


def fingerprint(of: Settings) -> str:
    pseudonyms = asyncio.run(server_pseudonyms(of))
    assert pseudonyms is not None
    return pseudonyms.fingerprint


def record(state: Path, *fingerprints: str) -> None:
    RecordedKeys(ArtifactStore(state / "store")).write("assistant", fingerprints)


def test_the_first_server_makes_a_key_before_there_is_a_store_and_keeps_it(tmp_path: Path) -> None:
    made = fingerprint(settings(tmp_path / "state"))
    assert not (tmp_path / "state" / "store").exists()
    assert fingerprint(settings(tmp_path / "state")) == made
    record(tmp_path / "state", made)
    assert fingerprint(settings(tmp_path / "state")) == made


@pytest.mark.parametrize("recorded", [(), ("",)])
def test_a_key_is_made_where_nobody_is_recorded_under_a_named_one(
    tmp_path: Path, recorded: tuple[str, ...]
) -> None:
    record(tmp_path, *recorded)
    assert fingerprint(settings(tmp_path))


def test_no_second_key_is_made_where_people_are_recorded(tmp_path: Path) -> None:
    record(tmp_path, "", "0123456789abcdef")
    with pytest.raises(PseudonymKeyInvalid, match=r"pseudonym\.key is missing.*0123456789abcdef"):
        fingerprint(settings(tmp_path))
    assert not (tmp_path / "pseudonym.key").exists()
    declared = tmp_path / "declared"
    declared.write_text("k" * 40)
    assert fingerprint(settings(tmp_path, pseudonym_key_file=str(declared)))


def test_another_model_in_the_same_store_says_nothing(tmp_path: Path) -> None:
    RecordedKeys(ArtifactStore(tmp_path / "store")).write("other", ("0123456789abcdef",))
    assert fingerprint(settings(tmp_path))


def test_a_server_with_a_key_of_its_own_goes_on_with_it(tmp_path: Path) -> None:
    """A fleet of before, whose servers differ, can be upgraded; the updater says that they do."""
    own = Pseudonyms.from_file(tmp_path / "pseudonym.key").fingerprint
    record(tmp_path, "0123456789abcdef")
    assert fingerprint(settings(tmp_path)) == own


def test_a_declared_key_is_the_same_by_two_paths_and_is_never_made(tmp_path: Path) -> None:
    for name, end in (("a", ""), ("b", "\r\n")):
        (tmp_path / name).write_bytes(f"{'k' * 40}{end}".encode())
    (tmp_path / "c").symlink_to(tmp_path / "a")
    keys = {
        fingerprint(settings(tmp_path / "state", pseudonym_key_file=str(tmp_path / name)))
        for name in "abc"
    }
    assert len(keys) == 1
    missing = tmp_path / "missing"
    with pytest.raises(PseudonymKeyInvalid, match="cannot be read"):
        fingerprint(settings(tmp_path / "state", pseudonym_key_file=str(missing)))
    assert not missing.exists()
    assert not (tmp_path / "state").exists()


def test_an_empty_key_file_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "pseudonym.key").touch()
    with pytest.raises(PseudonymKeyInvalid, match="holds no pseudonym key"):
        fingerprint(settings(tmp_path))


def test_where_users_are_not_recorded_no_key_is_needed(tmp_path: Path) -> None:
    record(tmp_path, "0123456789abcdef")
    of = settings(tmp_path, record_user_field=False, pseudonym_key_file=str(tmp_path / "none"))
    assert asyncio.run(server_pseudonyms(of)) is None
    assert not (tmp_path / "pseudonym.key").exists()


def test_a_store_that_does_not_answer_stops_no_start(tmp_path: Path) -> None:
    record(tmp_path, "0123456789abcdef")
    path = tmp_path / "store/releases/assistant/pseudonym_keys.json"
    path.unlink()
    os.mkfifo(path)  # opening it blocks, as a volume can
    made = fingerprint(settings(tmp_path, store_wait_seconds=0.2))
    os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))
    assert Pseudonyms.read(tmp_path / "pseudonym.key").fingerprint == made


def test_a_damaged_list_stops_no_start(tmp_path: Path) -> None:
    record(tmp_path, "0123456789abcdef")
    (tmp_path / "store/releases/assistant/pseudonym_keys.json").write_bytes(b"{")
    assert fingerprint(settings(tmp_path))


def test_the_log_names_the_key_and_does_not_give_it_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    declared = tmp_path / "declared"
    declared.write_text("secret-" * 6)
    with caplog.at_level(logging.INFO, "moorline"):
        named = fingerprint(settings(tmp_path, pseudonym_key_file=str(declared)))
    (line,) = [vars(one) for one in caplog.records]
    assert (line["event"], line["fingerprint"]) == ("pseudonym_key", named)
    assert "secret-" not in str(line)
