"""Clocks that are behind: their events' windows are shorter by as much, and no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from moorline.events import Fate
from moorline.stream import Topic
from tests.updater.ledger.fixtures import HORIZON, HOUR, NOW, Log, interaction, rating
from updater.ledger import Ledger

WITHIN, BEYOND = 6 * HOUR, HORIZON + 6 * HOUR


def fates(ledger: Ledger, topic: Topic) -> dict[Fate, int]:
    assert ledger.audit() == []
    return {fate: n for fate, n in ledger.accounting().fates.get(str(topic), {}).items() if n}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.sqlite", horizon_seconds=HORIZON)


@pytest.mark.parametrize("behind", [WITHIN, BEYOND])
def test_a_server_whose_clock_is_behind_shortens_its_own_windows_only(
    ledger: Ledger, behind: float
) -> None:
    log = Log()
    then = NOW - behind  # what the server stamps on its events and on its records
    ledger.ingest(
        [
            log.parsed(interaction("slow", at=then), at=then),
            log.parsed(interaction("slow-silent", at=then), at=then),
            log.parsed(interaction("right", at=NOW), at=NOW),
            log.parsed(interaction("right-silent", at=NOW), at=NOW),
        ],
        now=NOW,
    )
    ledger.ingest(
        [log.parsed(rating(name, at=NOW + 1), at=NOW + 1) for name in ("slow", "right")],
        now=NOW + 1,
    )
    ledger.expire(NOW + 1)
    if behind == WITHIN:
        assert fates(ledger, Topic.FEEDBACK) == {Fate.PENDING: 2}
        assert fates(ledger, Topic.INTERACTIONS) == {Fate.PENDING: 4}
    else:
        assert fates(ledger, Topic.FEEDBACK) == {Fate.LATE: 1, Fate.PENDING: 1}
        assert fates(ledger, Topic.INTERACTIONS) == {Fate.EXPIRED: 2, Fate.PENDING: 2}
    # The window of the others is as long as it ever was.
    ledger.expire(NOW + HORIZON)
    assert fates(ledger, Topic.INTERACTIONS)[Fate.PENDING] == 3 - (behind == BEYOND)
    ledger.expire(NOW + HORIZON + 1)
    assert fates(ledger, Topic.INTERACTIONS)[Fate.PENDING] == 2 - (behind == BEYOND), "the rated"


def test_a_rater_whose_clock_is_behind_is_heard_and_judged_by_arrival(ledger: Ledger) -> None:
    log = Log()
    early = NOW - BEYOND
    ledger.ingest(
        [
            log.parsed(interaction("a", at=NOW), at=NOW),
            log.parsed(rating("a", at=early), at=NOW + 1),
        ],
        now=NOW + 1,
    )
    assert fates(ledger, Topic.FEEDBACK) == {Fate.PENDING: 1}
    assert ledger.count_ready() == 1


@pytest.mark.parametrize("behind", [WITHIN, BEYOND])
def test_an_updater_whose_clock_is_behind_expires_nothing_and_counts_what_it_makes_late(
    ledger: Ledger, behind: float
) -> None:
    log = Log()
    wrong = NOW - behind
    records = [log.parsed(interaction("early", at=wrong - 1), at=wrong - 1)]
    records += [log.parsed(interaction(name, at=NOW), at=NOW) for name in ("a", "b")]
    ledger.ingest([*records, log.parsed(rating("a", at=NOW), at=NOW)], now=wrong)
    ledger.expire(wrong)
    assert fates(ledger, Topic.INTERACTIONS) == {Fate.PENDING: 3}
    assert ledger.count_ready() == 1
    # Its clock is put right.
    ledger.ingest([log.parsed(rating("b", at=NOW + 2), at=NOW + 2)], now=NOW + 2)
    ledger.expire(NOW + 2)
    late = {Fate.LATE: 1, Fate.PENDING: 1} if behind == BEYOND else {Fate.PENDING: 2}
    assert fates(ledger, Topic.FEEDBACK) == late
    assert ledger.count_ready() == (1 if behind == BEYOND else 2)
