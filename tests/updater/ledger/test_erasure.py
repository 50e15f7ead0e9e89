"""Erasing a person: nobody reads them any more, nothing new is learned, and the books balance."""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moorline.events import Fate, Reason
from moorline.stream import Topic
from tests.updater.ledger.fixtures import (
    HORIZON,
    HOUR,
    NOW,
    Log,
    correction,
    erasure,
    interaction,
    parsed,
    preference,
    rating,
    release,
    signal,
)
from updater.learning.baselines import Baselines, Cell, cell_name, rater_name
from updater.ledger import BatchDecision, Ledger, LedgerError

REPLIES, WORDS = Topic.INTERACTIONS, Topic.FEEDBACK
SECRET = "the-canary-sings-at-dawn"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with Ledger(path, horizon_seconds=HORIZON) as opened:
        yield opened
        assert opened.audit() == []
        assert opened.accounting().balanced


def feed(ledger: Ledger, log: Log, *events: Any, at: float = NOW, now: float | None = None) -> None:
    ledger.ingest([log.parsed(event, at) for event in events], now=at if now is None else now)


def fates(ledger: Ledger, topic: Topic = WORDS) -> dict[tuple[Fate, Reason], int]:
    found = ledger.accounting().events.get(topic, {})
    return {(fate, reason): n for fate, by in found.items() for reason, n in by.items()}


def train(ledger: Ledger, limit: int = 100) -> int:
    examples = ledger.ready_examples(limit)
    made = release(ledger, examples)
    ledger.commit_release(made, BatchDecision([example.example_id for example in examples]))
    return made.version


def keys(path: Path) -> list[bytes]:
    with sqlite3.connect(path.with_name(f"{path.name}.keys")) as connection:
        found = [key for (key,) in connection.execute("SELECT key FROM keys")]
    connection.close()
    return found


def on_disk(folder: Path) -> bytes:
    """Every byte of every file."""
    return b"".join(file.read_bytes() for file in sorted(folder.iterdir()))


# --- what is on the disk ------------------------------------------------------------------------


def test_no_word_is_in_any_file_and_no_key_after_its_erasure(ledger: Ledger, path: Path) -> None:
    log = Log()
    said = correction("a", SECRET, rater="ana-the-rater", feedback_id="fb-1")
    feed(ledger, log, interaction("a", user="ana"), said, interaction("b", user="ben"))
    with sqlite3.connect(path) as connection:
        bodies = connection.execute(
            "SELECT body FROM interaction_bodies UNION ALL SELECT body FROM feedback_bodies"
        ).fetchall()
    connection.close()
    assert len(bodies) == 3
    for (body,) in bodies:
        with pytest.raises(zlib.error):
            zlib.decompress(body)
    before = keys(path)
    assert len(before) == 3
    assert SECRET.encode() not in on_disk(path.parent)
    assert all(key in on_disk(path.parent) for key in before)
    assert b"ana-the-rater" in on_disk(path.parent)

    ledger.forget(erasure("ana"), now=NOW)
    (kept,) = keys(path)
    assert [key in on_disk(path.parent) for key in before] == [key == kept for key in before]
    assert b"ana-the-rater" not in on_disk(path.parent)
    assert stat.S_IMODE(os.stat(f"{path}.keys").st_mode) == 0o600


def test_a_copy_from_before_an_erasure_cannot_be_read_after_it(path: Path, tmp_path: Path) -> None:
    log, copy = Log(), tmp_path / "backup.sqlite"
    with Ledger(path, horizon_seconds=HORIZON) as ledger:
        feed(ledger, log, interaction("a", user="ana"), rating("a"), interaction("b"), rating("b"))
        feed(ledger, log, interaction("quiet", user="ana"), rating("b", rater="ana"))
        with sqlite3.connect(path) as connection, sqlite3.connect(copy) as target:
            connection.backup(target)
        connection.close()
        target.close()
        ledger.forget(erasure("ana"), now=NOW)
    for file in path.parent.glob("ledger.sqlite*"):
        if not file.name.endswith(".keys"):
            file.unlink()
    shutil.copy(copy, path)
    with Ledger(path, horizon_seconds=HORIZON) as ledger:
        assert ledger.count_ready() == 2
        (example,) = ledger.ready_examples(10)
        assert example.interaction.interaction_id == "b"
        assert [one.rater for one in example.feedback] == ["ann"]
        assert ledger.held_out_traffic(10, exclude=[example.example_id]) == []
        assert ledger.count_ready() == 1
        assert fates(ledger) == {(Fate.PENDING, Reason.NONE): 1, (Fate.ERASED, Reason.NONE): 2}
        assert ledger.audit() == []


def test_names_in_pages_that_somebody_still_reads_go_when_they_have_read(
    ledger: Ledger, path: Path
) -> None:
    said = rating("a", rater="ana-the-rater", feedback_id="fb-1")
    feed(ledger, Log(), interaction("a"), said)
    with Ledger.open_readonly(path) as reader, reader._database.snapshot() as connection:
        assert connection.execute("SELECT count(*) FROM feedback").fetchone() == (1,)
        ledger.forget(erasure("ana-the-rater"), now=NOW)
        assert b"ana-the-rater" in on_disk(path.parent)
    ledger.expire(NOW)
    assert b"ana-the-rater" not in on_disk(path.parent)


def test_without_its_keys_a_ledger_is_refused_in_one_line(path: Path) -> None:
    with Ledger(path) as ledger:
        feed(ledger, Log(), interaction("a"))
    Path(f"{path}.keys").unlink()
    with pytest.raises(LedgerError, match=r"ledger\.sqlite\.keys is missing.*restore it"):
        Ledger(path)


def test_keys_go_with_the_bodies_that_they_encrypt(ledger: Ledger, path: Path) -> None:
    log = Log()
    feed(ledger, log, *[interaction(f"r{i}") for i in range(5)], interaction("mine", user="ana"))
    feed(ledger, log, rating("r1"), rating("r2"))
    assert len(keys(path)) == 8
    train(ledger)
    ledger.expire(NOW)
    assert len(keys(path)) == 8, "a revocation may learn from them again"
    ledger.expire(NOW + HORIZON + 1)
    assert len(keys(path)) == 1, "ana may write again"
    ledger.expire(NOW + 2 * HORIZON + 1)
    assert keys(path) == []


# --- fates --------------------------------------------------------------------------------------


def test_what_waits_is_erased_and_never_trains(ledger: Ledger) -> None:
    log = Log()
    feed(ledger, log, interaction("a", user="ana"), rating("a"), signal("a", "copied", "cy"))
    feed(ledger, log, interaction("b"), rating("b"), rating("b", rater="ana"))
    feed(ledger, log, preference("b", "a", rater="dan"), rating("unseen", rater="ana"))
    found = ledger.forget(erasure("ana"), now=NOW)
    assert (found.interactions, found.feedback, found.releases) == (1, 5, ())
    assert fates(ledger, REPLIES) == {(Fate.ERASED, Reason.NONE): 1, (Fate.PENDING, Reason.NONE): 1}
    assert fates(ledger) == {(Fate.ERASED, Reason.NONE): 5, (Fate.PENDING, Reason.NONE): 1}
    (example,) = ledger.ready_examples(10)
    assert [one.rater for one in example.feedback] == ["ann"]
    assert ledger.held_out_traffic(10, exclude=[example.example_id]) == []
    train(ledger)
    assert ledger.count_ready() == 0


def test_a_batch_in_hand_cannot_be_decided_after_an_erasure(ledger: Ledger) -> None:
    feed(ledger, Log(), interaction("a", user="ana"), rating("a"))
    ids = [example.example_id for example in ledger.ready_examples(10)]
    ledger.forget(erasure("ana"), now=NOW)
    with pytest.raises(LedgerError, match="take a new batch"):
        ledger.commit_release(release(ledger, ids), BatchDecision(ids))


def test_what_was_decided_keeps_its_fate(ledger: Ledger) -> None:
    log = Log()
    feed(ledger, log, interaction("a", user="ana"), rating("a"))
    feed(ledger, log, interaction("b", user="ana"), rating("b"))
    train(ledger, 1)
    ids = [example.example_id for example in ledger.ready_examples(10)]
    ledger.commit_rejection(Reason.GATE_BLOCKED, BatchDecision(ids), now=NOW)
    before = ledger.accounting().events
    found = ledger.forget(erasure("ana"), now=NOW)
    assert (found.interactions, found.feedback, found.releases) == (2, 2, (1,))
    assert ledger.accounting().events == before


def test_what_comes_later_is_erased_up_to_the_moment_and_ordinary_after_it(ledger: Ledger) -> None:
    log, later = Log(), NOW + HOUR
    ledger.forget(erasure("ana", at=NOW), now=NOW)
    old = [interaction("a", user="ana", at=NOW), rating("a", rater="ben", at=later)]
    feed(ledger, log, *old, rating("b", rater="ana", at=NOW), interaction("b"), at=later)
    assert fates(ledger, REPLIES) == {(Fate.ERASED, Reason.NONE): 1, (Fate.PENDING, Reason.NONE): 1}
    assert fates(ledger) == {(Fate.ERASED, Reason.NONE): 2}
    feed(ledger, log, *old, at=later)
    assert fates(ledger)[Fate.DUPLICATE, Reason.REPEATED_EVENT] == 1
    new = [interaction("c", user="ana", at=later), rating("b", rater="ana", at=later)]
    feed(ledger, log, *new, rating("c", at=later), at=later)
    assert {example.interaction.interaction_id for example in ledger.ready_examples(9)} == {
        "b",
        "c",
    }


def test_feedback_that_waits_for_an_erased_reply_ends_with_it(ledger: Ledger) -> None:
    log = Log()
    feed(ledger, log, rating("a"), rating("b", rater="ann"))
    ledger.forget(erasure(interaction_id="b"), now=NOW)
    ledger.forget(erasure("ana"), now=NOW)
    assert fates(ledger) == {(Fate.PENDING, Reason.NONE): 1, (Fate.ERASED, Reason.NONE): 1}
    feed(ledger, log, interaction("a", user="ana"), interaction("b"), rating("b", rater="cy"))
    assert fates(ledger) == {(Fate.ERASED, Reason.NONE): 3}
    assert fates(ledger, REPLIES) == {(Fate.ERASED, Reason.NONE): 2}
    assert ledger._database.rows("SELECT DISTINCT rater FROM feedback") == [("",)]


def test_of_one_tenant_only(ledger: Ledger) -> None:
    log = Log()
    for tenant in ("acme", "other"):
        feed(ledger, log, interaction(f"{tenant}-1", user="ana", tenant=tenant))
        feed(ledger, log, interaction(f"{tenant}-2", tenant=tenant), rating(f"{tenant}-2"))
        feed(ledger, log, rating(f"{tenant}-2", rater="ana"), rating(f"{tenant}-3", rater="ana"))
    of_acme = ledger.forget(erasure("ana", tenant="acme"), now=NOW)
    assert (of_acme.interactions, of_acme.feedback) == (1, 1)
    feed(ledger, log, interaction("acme-3", tenant="acme"), interaction("other-3", tenant="other"))
    assert fates(ledger)[Fate.ERASED, Reason.NONE] == 2, "whose reply it is was known only now"
    whole = ledger.forget(erasure(tenant="acme"), now=NOW)
    assert (whole.interactions, whole.feedback) == (2, 1)
    assert fates(ledger, REPLIES) == {(Fate.ERASED, Reason.NONE): 3, (Fate.PENDING, Reason.NONE): 3}
    assert {e.interaction.tenant for e in ledger.ready_examples(9)} == {"other"}


def test_one_reply_of_somebody_goes_and_their_others_stay_readable(
    ledger: Ledger, path: Path
) -> None:
    log = Log()
    feed(ledger, log, *[interaction(name, user="ana") for name in "abc"], rating("b"), rating("a"))
    (old, *_) = keys(path)
    ledger.forget(erasure(interaction_id="a"), now=NOW)
    assert old not in on_disk(path.parent), "a copy of the erased body was under it"
    (example,) = ledger.ready_examples(9)
    assert example.interaction == interaction("b", user="ana")
    assert len(ledger.held_out_traffic(9, exclude=[example.example_id])) == 1


def test_an_erasure_from_a_clock_ahead_ends_at_its_arrival(ledger: Ledger) -> None:
    log, later = Log(), NOW + HOUR
    feed(ledger, log, erasure("ana", at=NOW + 1e9))
    feed(ledger, log, interaction("a", user="ana", at=later), at=later)
    assert fates(ledger, REPLIES) == {(Fate.PENDING, Reason.NONE): 1}


def test_an_erasure_on_the_stream_is_carried_out_once_and_is_no_event(ledger: Ledger) -> None:
    log = Log()
    asked = erasure("ana")
    first = [log.parsed(one) for one in (interaction("a", user="ana"), rating("a"), asked)]
    assert ledger.ingest(first, now=NOW).records == 3
    found = ledger.erasure(asked.erasure_id)
    assert found is not None
    assert (found.interactions, found.feedback) == (1, 1)
    assert ledger.ingest(first, now=NOW).replayed == 3
    feed(ledger, log, asked)
    assert ledger.erasure(asked.erasure_id) == found
    assert ledger.forget(asked, now=NOW) == found
    assert ledger.accounting().total == 2
    assert ledger.offsets()[Topic.ERASURES, 0] == ("t0", 2)


def test_an_erasure_nobody_can_read_is_a_dead_letter(ledger: Ledger) -> None:
    log = Log()
    record = log.record(b'{"users": ["ana"]}', topic=Topic.ERASURES)
    ledger.ingest([parsed(record)], now=NOW)
    assert fates(ledger, Topic.ERASURES) == {(Fate.DEAD_LETTERED, Reason.SCHEMA_MISMATCH): 1}


def test_the_credit_forgets_their_names(ledger: Ledger) -> None:
    feed(ledger, Log(), interaction("a"), rating("a"))
    cells = {cell_name("acme"): Cell(3, 1), cell_name("other"): Cell(1, 3), "": Cell(4, 4)}
    raters = [("acme", "ana"), ("other", "ana"), ("acme", "ben"), ("other", "ben")]
    known = Baselines(cells, {rater_name(*who): Cell(5, 5) for who in raters})
    ids = [example.example_id for example in ledger.ready_examples(9)]
    ledger.commit_release(release(ledger, ids), BatchDecision(ids, baselines=known))
    ledger.forget(erasure("ana", tenant="other"), now=NOW)
    assert set(ledger.baselines().agreements) == {
        rater_name(*who) for who in raters if who != ("other", "ana")
    }
    ledger.forget(erasure("ana"), now=NOW)
    assert set(ledger.baselines().agreements) == {rater_name(t, "ben") for t in ("acme", "other")}
    assert ledger.baselines().cells == known.cells
    ledger.forget(erasure(tenant="acme"), now=NOW)
    assert set(ledger.baselines().cells) == {cell_name("other"), ""}
    assert set(ledger.baselines().agreements) == {rater_name("other", "ben")}


# --- what had learned from them -----------------------------------------------------------------


def trained_four_times(ledger: Ledger, log: Log) -> None:
    """v1: ben. v2: ana's reply. v3: cy's reply, rated by ana too. v4: a preference over ana's."""
    feed(ledger, log, *[interaction(f"{who}-0", user=who) for who in ("ben", "ana", "cy", "ana2")])
    feed(ledger, log, interaction("lost", user="ana"))
    feed(ledger, log, rating("ben-0"))
    train(ledger)
    feed(ledger, log, rating("ana-0", rater="dan"))
    train(ledger)
    feed(ledger, log, rating("cy-0", rater="ana"), rating("cy-0", rater="eve"))
    train(ledger)
    feed(ledger, log, preference("ana2-0", "lost", rater="eve"))
    assert train(ledger) == 4


def test_releases_that_learned_from_somebody_are_known_long_after_their_rows(
    ledger: Ledger,
) -> None:
    trained_four_times(ledger, Log())
    ledger.expire(NOW + HORIZON + 1)
    ledger.expire(NOW + 2 * HORIZON + 2)
    found = ledger.forget(erasure("ana"), now=NOW + 2 * HORIZON + 2)
    assert (found.interactions, found.feedback) == (0, 0)
    assert (found.releases, found.last_clean_version) == ((2, 3, 4), 1)
    assert ledger.forget(erasure("eve"), now=NOW).last_clean_version == 2
    assert ledger.forget(erasure("ben"), now=NOW).last_clean_version == 0
    assert ledger.forget(erasure(interaction_id="cy-0"), now=NOW).releases == (3,)
    assert ledger.forget(erasure("nobody"), now=NOW).last_clean_version == 4
    assert ledger.revocation_wanted() is None


def test_the_baselines_begin_anew_after_a_revocation(ledger: Ledger) -> None:
    trained_four_times(ledger, Log())
    known = Baselines({"": Cell(4, 4), cell_name("acme"): Cell(3, 1)})
    feed(ledger, Log(topic_id="t1"), interaction("more"), rating("more"))
    ids = [example.example_id for example in ledger.ready_examples(9)]
    ledger.commit_release(release(ledger, ids), BatchDecision(ids, baselines=known))
    ledger.forget(erasure("ana", revoke=True), now=NOW)
    assert ledger.baselines().cells == known.cells
    ledger.commit_revocation(release(ledger, revokes_after=1))
    assert ledger.baselines() == Baselines()


def test_a_replay_goes_back_and_learns_the_rest_again(ledger: Ledger) -> None:
    log = Log()
    trained_four_times(ledger, log)
    feed(ledger, log, interaction("new"), rating("new"))
    found = ledger.forget(erasure("ana", revoke=True), now=NOW)
    assert (found.releases, found.last_clean_version, found.revoke) == ((2, 3, 4), 1, True)
    assert ledger.revocation_wanted() == 1
    before = fates(ledger)
    assert before == {(Fate.TRAINED, Reason.NONE): 5, (Fate.PENDING, Reason.NONE): 1}

    again = release(ledger, revokes_after=1)
    ledger.commit_revocation(again)
    assert ledger.revocation_wanted() is None
    assert ledger.live_version() == 5
    assert [made.version for made in ledger.unpublished()][-1] == 5
    assert ledger.revoked_versions() == {2, 3, 4}
    # Trained still: ben's, in v1. Erased: dan's on ana's reply, ana's on cy's, and eve's over
    # ana's. Ready again: eve's on cy's. And the new one.
    assert fates(ledger) == {
        (Fate.TRAINED, Reason.NONE): 1,
        (Fate.ERASED, Reason.NONE): 3,
        (Fate.PENDING, Reason.NONE): 2,
    }
    assert fates(ledger, REPLIES) == {
        (Fate.TRAINED, Reason.NONE): 1,
        (Fate.ERASED, Reason.NONE): 2,
        (Fate.PENDING, Reason.NONE): 3,
    }
    ready = {e.interaction.interaction_id: e for e in ledger.ready_examples(9)}
    assert set(ready) == {"cy-0", "new"}
    assert [one.rater for one in ready["cy-0"].feedback] == ["eve"]
    assert train(ledger) == 6
    assert fates(ledger)[Fate.TRAINED, Reason.NONE] == 3
    assert {key for _, key in ledger.trained_examples(6)} == {"cy-0/0", "new/0"}
    assert ledger.forget(erasure("ana"), now=NOW).releases == ()
    assert ledger.forget(erasure("eve"), now=NOW).releases == (6,)
    stored = ledger.erasure(ledger_erasure_id(ledger))
    assert stored is not None
    assert stored.revocation_version == 5


def ledger_erasure_id(ledger: Ledger) -> str:
    ((identity,),) = ledger._database.rows("SELECT id FROM erasures WHERE revoke = 1")
    return str(identity)


def test_preferences_and_repeats_are_learned_again_once(ledger: Ledger) -> None:
    log = Log()
    feed(ledger, log, interaction("a"), interaction("b"), interaction("x", user="ana"))
    feed(ledger, log, preference("a", "b"), rating("a", rater="cy"), rating("x"))
    feed(ledger, log, signal("a", "copied", "cy"), correction("b", rater="dan"))
    train(ledger)
    feed(ledger, log, rating("a", rater="cy", at=NOW + 1), at=NOW + 1)
    assert fates(ledger)[Fate.DUPLICATE, Reason.ALREADY_TRAINED] == 1
    ledger.forget(erasure("ana", revoke=True), now=NOW + 1)
    ledger.commit_revocation(release(ledger, revokes_after=0))
    assert ledger.audit() == []
    examples = {e.interaction.interaction_id: e for e in ledger.ready_examples(9)}
    assert {name: len(e.feedback) for name, e in examples.items()} == {"a": 2, "b": 1}
    assert set(examples["a"].rejected) == {"b/0"}
    train(ledger)
    assert fates(ledger)[Fate.TRAINED, Reason.NONE] == 3
    ledger.expire(NOW + 3 * HORIZON)


def test_what_is_no_longer_kept_says_that_its_release_was_withdrawn(ledger: Ledger) -> None:
    log, later = Log(), NOW + HORIZON + 1
    feed(ledger, log, interaction("a"), rating("a"))
    feed(ledger, log, interaction("x", user="ana"), rating("x"))
    train(ledger)
    ledger.expire(later)
    ledger.forget(erasure("ana", revoke=True), now=later)
    ledger.commit_revocation(release(ledger, revokes_after=0))
    expected = {(Fate.NOT_TRAINABLE, Reason.RELEASE_REVOKED): 1, (Fate.ERASED, Reason.NONE): 1}
    assert fates(ledger) == fates(ledger, REPLIES) == expected
    assert ledger.count_ready() == 0


def test_a_revocation_nobody_asked_for_is_refused(ledger: Ledger) -> None:
    trained_four_times(ledger, Log())
    with pytest.raises(LedgerError, match="no erasure asks"):
        ledger.commit_revocation(release(ledger, revokes_after=1))
    ledger.forget(erasure("ana", revoke=True), now=NOW)
    with pytest.raises(LedgerError, match="revokes after 2, not 1"):
        ledger.commit_revocation(release(ledger, revokes_after=2))
    with pytest.raises(LedgerError, match="revokes after None"):
        ledger.commit_revocation(release(ledger))
    ledger.commit_revocation(release(ledger, revokes_after=0))
    assert ledger.revoked_versions() == {1, 2, 3, 4}
