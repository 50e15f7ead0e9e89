"""`moorline forget`, with and without an updater; and how an erased event is explained."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from moorline.events import Fate
from moorline.pseudonyms import Pseudonyms
from moorline.stream import Topic
from tests.updater.ledger.fixtures import (
    HORIZON,
    NOW,
    Log,
    correction,
    interaction,
    rating,
    release,
)
from tests.updater.ledger.test_inspection import moorline
from updater.ledger import BatchDecision, Ledger
from updater.ledger.inspection import LedgerInspector


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """ana, by her pseudonym, has a trained reply and one that waits; she rated ben's."""
    ana = Pseudonyms.from_file(tmp_path / "pseudonym.key").pseudonym_of("ana")
    log = Log(partitions=1)
    with Ledger(tmp_path / "ledger.sqlite", horizon_seconds=HORIZON) as ledger:
        events = [interaction("r1", user=ana), rating("r1"), interaction("r2", user="ben")]
        ledger.ingest([log.parsed(event) for event in events], now=NOW)
        ids = [example.example_id for example in ledger.ready_examples(1)]
        ledger.commit_release(release(ledger, ids), BatchDecision(ids))
        more = [interaction("r3", user=ana), rating("r3"), correction("r2", rater="ana")]
        ledger.ingest([log.parsed(event) for event in more], now=NOW)
    return tmp_path


def erased(state: Path) -> dict[str, int]:
    with LedgerInspector(state / "ledger.sqlite") as inspector:
        fates = inspector.accounting().fates
        assert inspector.audit() == []
    return {topic: by[Fate.ERASED] for topic, by in fates.items() if Fate.ERASED in by}


def test_a_user_is_found_by_the_name_that_clients_use(state: Path) -> None:
    code, told = moorline("forget", "--user", "ana", "--dry-run", state=state)
    assert code == 0, told
    assert "To be erased: 2 replies, 3 ratings and corrections." in told
    assert "Have learned from them: assistant@v000001." in told
    assert "The last release without them is assistant@v000000 (the base model)" in told
    assert erased(state) == {}
    code, told = moorline("forget", "--user", "ana", "--yes", state=state)
    assert code == 0, told
    assert "Erased: 2 replies, 3 ratings and corrections." in told
    assert erased(state) == {Topic.INTERACTIONS: 1, Topic.FEEDBACK: 2}


def test_for_programs(state: Path) -> None:
    code, told = moorline(
        "forget", "--interaction", "r1", "--revoke", "--yes", "--json", state=state
    )
    assert code == 0
    found = json.loads(told)
    assert found["erasure_id"].startswith("er-")
    assert found["result"] == {
        "interactions": 1,
        "feedback": 1,
        "releases": [1],
        "last_clean_version": 0,
        "revoke": True,
        "revocation_version": None,
    }
    with Ledger(state / "ledger.sqlite", horizon_seconds=HORIZON) as ledger:
        assert ledger.revocation_wanted() == 0
        ledger.commit_revocation(release(ledger, revokes_after=0))
    assert "for an erasure" in moorline("lineage", "1", state=state)[1]
    assert "goes back to" in moorline("lineage", "2", state=state)[1]
    assert [
        json.loads(moorline("lineage", number, "--json", state=state)[1])["revoked"]
        for number in ("1", "2")
    ] == [True, False]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "say who"),
        (("--interaction", "r1", "--tenant", "acme"), "say who"),
        (("--interaction", "r1"), "say --yes"),
    ],
)
def test_without_a_subject_or_a_yes_nothing_is_erased(
    state: Path, arguments: tuple[str, ...], said: str
) -> None:
    code, told = moorline("forget", *arguments, "--json", state=state)
    assert code != 0
    assert said in " ".join(told.split())
    assert erased(state) == {}


def test_neither_a_ledger_nor_a_broker_is_one_line(tmp_path: Path) -> None:
    code, told = moorline("forget", "--user", "ana", "--yes", "--json", state=tmp_path / "none")
    assert code == 1
    assert "there is neither a ledger at" in told


def test_a_running_updater_without_a_broker_cannot_be_told(state: Path) -> None:
    with Ledger(state / "ledger.sqlite", horizon_seconds=HORIZON):
        code, told = moorline("forget", "--user", "ana", "--yes", "--json", state=state)
    assert code == 1
    assert "another updater" in told
    assert erased(state) == {}


def test_an_erased_event_is_explained_without_its_rater(state: Path) -> None:
    assert moorline("forget", "--user", "ana", "--yes", state=state)[0] == 0
    code, told = moorline("explain", "r3", state=state)
    assert code == 0
    assert "Now: it was erased at its subject's request." in told
    for asked in ("r1", "r2", "feedback.v1/0/2"):
        code, told = moorline("explain", asked, state=state)
        assert code == 0
        assert "of ana" not in told
        assert "ana gave it" not in told
    assert "somebody erased gave it (correction)" in told
    code, told = moorline("lineage", "1", state=state)
    assert code == 0
    assert moorline("audit", "--offline", state=state)[0] == 0
    with sqlite3.connect(state / "ledger.sqlite") as connection:
        raters = connection.execute("SELECT DISTINCT rater FROM feedback").fetchall()
    connection.close()
    assert raters == [("",)]
