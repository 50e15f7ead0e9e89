"""The updater says which keys there are, to servers in the store, to operators when they differ."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from moorline import metrics
from moorline.store import ArtifactStore
from moorline.store.pseudonym_keys import RecordedKeys
from tests.updater.ledger.fixtures import HORIZON, HOUR, NOW, Log, erasure, interaction
from updater.ledger import Ledger
from updater.pseudonym_keys import PseudonymKeys, keys_in_use

A, B = "a" * 16, "b" * 16


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(tmp_path / "ledger.sqlite", horizon_seconds=HORIZON) as opened:
        yield opened


def recorded(ledger: Ledger, log: Log, name: str, key: str | None, at: float = NOW) -> None:
    event = interaction(name, at=at, user=f"pseudonym-{name}", pseudonym_key=key)
    ledger.ingest([log.parsed(event, at=at)], now=at)


def in_use() -> float:
    return metrics.PSEUDONYM_KEYS._value.get()


def test_the_ledger_knows_each_key_that_somebody_is_recorded_under(ledger: Ledger) -> None:
    log = Log(partitions=1)
    assert ledger.pseudonym_keys() == {}
    ledger.ingest([log.parsed(interaction("nobody", pseudonym_key=A))], now=NOW)
    assert ledger.pseudonym_keys() == {}
    recorded(ledger, log, "r1", A, NOW + 60)
    recorded(ledger, log, "r2", A, NOW + 30)
    recorded(ledger, log, "old", None)
    other = interaction("r3", other_users=("pseudonym",), pseudonym_key=B)
    ledger.ingest([log.parsed(other)], now=NOW)
    assert ledger.pseudonym_keys() == {A: NOW + 60, "": NOW, B: NOW}


def test_a_key_is_known_by_a_reply_that_was_erased_before_it_came(ledger: Ledger) -> None:
    log = Log(partitions=1)
    ledger.forget(erasure("pseudonym-r1", at=NOW + 1))
    recorded(ledger, log, "r1", A)
    assert ledger.pseudonym_keys() == {A: NOW}


def test_keys_of_the_last_day_are_in_use_and_a_changed_one_goes() -> None:
    assert keys_in_use({}) == ()
    assert keys_in_use({"": NOW}) == ()
    assert keys_in_use({A: NOW, "": NOW + 90 * HOUR, B: NOW + 24 * HOUR}) == (A, B)
    assert keys_in_use({A: NOW, B: NOW + 24.1 * HOUR}) == (B,)


def test_servers_that_differ_are_said_once_and_so_is_that_they_agree_again(
    ledger: Ledger, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log, store = Log(partitions=1), ArtifactStore(tmp_path / "store")
    keys = PseudonymKeys(ledger, store, "assistant")
    events: list[str] = []

    def export() -> None:
        keys.export()
        keys.export()
        events.extend(vars(one)["event"] for one in caplog.records)
        caplog.clear()

    with caplog.at_level(logging.INFO, "moorline"):
        export()
        assert (in_use(), events) == (0, [])
        recorded(ledger, log, "r1", A)
        recorded(ledger, log, "old", None)
        export()
        assert (in_use(), events) == (1, [])
        recorded(ledger, log, "r2", B, NOW + HOUR)
        export()
        assert (in_use(), events) == (2, ["pseudonym_keys_differ"])
        recorded(ledger, log, "r3", B, NOW + 25 * HOUR)
        export()
        assert (in_use(), events) == (1, ["pseudonym_keys_differ", "pseudonym_keys_agree"])


def test_the_store_has_the_ledgers_list_also_after_it_was_lost_or_damaged(
    ledger: Ledger, tmp_path: Path
) -> None:
    store = ArtifactStore(tmp_path / "store")
    keys, copy = PseudonymKeys(ledger, store, "assistant"), RecordedKeys(store)
    assert copy.read("assistant") is None
    keys.export()
    assert copy.read("assistant") == ()
    recorded(ledger, Log(partitions=1), "r1", A)
    keys.export()
    assert copy.read("assistant") == (A,)
    assert copy.read("other") is None
    path = tmp_path / "store/releases/assistant/pseudonym_keys.json"
    for damage in (path.unlink, lambda: path.write_bytes(b"")):
        damage()
        assert copy.read("assistant") is None
        keys.export()
        assert copy.read("assistant") == (A,)
    assert store.versions("assistant") == []
