"""The ledger as an operator asks: an event's story, a release's lineage, and their verbs."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from unittest import mock

import pytest

from daemon import cli
from daemon.cli import common
from moorline.events import Fate, Reason
from moorline.stream import Topic
from tests.updater.ledger.fixtures import (
    HORIZON,
    HOUR,
    NOW,
    Log,
    interaction,
    preference,
    rating,
    release,
)
from updater.ledger import BatchDecision, Ledger
from updater.ledger.history import Place
from updater.ledger.inspection import LedgerInspector

REPLIES, RATINGS = Topic.INTERACTIONS, Topic.FEEDBACK


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """One release, one rejection, and an event for every other way to end."""
    path = tmp_path / "ledger.sqlite"
    log = Log(partitions=1)
    with Ledger(path, horizon_seconds=HORIZON) as ledger:
        again = rating("r1", rater="bob")
        ledger.ingest(
            [
                log.parsed(interaction("r1")),
                log.parsed(interaction("r2"), at=NOW + 1),
                log.parsed(interaction("unrated"), at=NOW + 2),
                log.parsed(rating("r1"), at=NOW + 60),
                log.parsed(again, at=NOW + 61),
                log.parsed(again, at=NOW + 62),
                log.parsed(rating("r2", at=NOW + 1), at=NOW + 63),
                log.parsed(rating("never-seen"), at=NOW + 64),
                log.parsed(b"not json", at=NOW + 65),
            ],
            now=NOW + HOUR,
        )
        first = ledger.ready_examples(1)
        ledger.commit_release(
            release(ledger, first), BatchDecision([one.example_id for one in first])
        )
        second = ledger.ready_examples(1)
        ledger.commit_rejection(
            Reason.DIVERGENCE_BOUND,
            BatchDecision(
                [one.example_id for one in second],
                record={"verdict": None, "divergences": [], "diagnostics": {}, "cause": ""},
            ),
            now=NOW + 2 * HOUR,
        )
    return tmp_path


@pytest.fixture
def inspector(state: Path) -> LedgerInspector:
    return LedgerInspector(state / "ledger.sqlite")


def moorline(*arguments: str, state: Path) -> tuple[int, str]:
    """The command in this process: its exit code, and stdout, or stderr if it failed."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["moorline", *arguments, "--state-dir", str(state)]),
        mock.patch.object(common.out, "_width", 120),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    code = int(ended.value.code or 0)
    return code, stdout.getvalue() or stderr.getvalue()


def test_a_trained_reply_names_its_feedback_its_release_and_its_place(
    inspector: LedgerInspector,
) -> None:
    for asked in ("r1", "r1/0", "interactions.v1/0/0"):
        (story,) = inspector.histories(asked)
        assert (story.kind, story.name) == ("interaction", "r1/0")
        assert story.place == Place(REPLIES, 0, 0, "t0")
        assert (story.fate, story.event_time, story.arrived_at) == (Fate.TRAINED, NOW, NOW)
        assert [(one.rater, one.fate) for one in story.joined] == [
            ("ann", Fate.TRAINED),
            ("bob", Fate.TRAINED),
        ]
        assert story.outcome is not None
        assert story.outcome.name == "assistant@v000001"
        assert story.example_id is not None
        assert story.example_id == inspector.trained_examples(1)[0][0]


def test_a_repeat_and_the_record_that_counts_name_each_other(inspector: LedgerInspector) -> None:
    first, second = Place(RATINGS, 0, 1, "t0"), Place(RATINGS, 0, 2, "t0")
    (story,) = inspector.histories(str(first))
    assert story.name is not None
    assert (story.repeats, story.first) == ((second,), None)
    assert inspector.histories(story.name) == [story]
    (repeat,) = inspector.histories(str(second))
    assert (repeat.fate, repeat.reason) == (Fate.DUPLICATE, Reason.REPEATED_EVENT)
    assert (repeat.first, repeat.repeats) == (first, ())


def test_rejected_waiting_and_unreadable_events_say_so(inspector: LedgerInspector) -> None:
    (rejected,) = inspector.histories("r2")
    assert rejected.outcome is not None
    assert rejected.outcome.reason is Reason.DIVERGENCE_BOUND
    assert rejected.outcome.at == NOW + 2 * HOUR
    (unrated,) = inspector.histories("unrated")
    assert (unrated.fate, unrated.joined) == (Fate.PENDING, ())
    assert inspector.histories("never-seen") == []
    (waiting,) = inspector.awaiting("never-seen")
    (early,) = inspector.histories(waiting)
    assert [(one.name, one.arrived_at) for one in early.joined] == [("never-seen/0", None)]
    (letter,) = inspector.histories("feedback.v1/0/5")
    assert (letter.kind, letter.reason) == ("dead letter", Reason.MALFORMED_JSON)


def test_a_preference_is_in_the_story_of_both_replies(tmp_path: Path) -> None:
    path, log = tmp_path / "ledger.sqlite", Log(partitions=1)
    word = preference("won", "lost")
    with Ledger(path, horizon_seconds=HORIZON) as ledger, LedgerInspector(path) as inspector:
        ledger.ingest([log.parsed(word), log.parsed(interaction("won"))], now=NOW)
        assert inspector.awaiting("lost") == [word.feedback_id]
        (waiting,) = inspector.histories(word.feedback_id)
        assert [(one.name, one.arrived_at) for one in waiting.joined] == [
            ("won/0", NOW),
            ("lost/0", None),
        ]
        ledger.ingest([log.parsed(interaction("lost"))], now=NOW)
        assert inspector.awaiting("lost") == []
        for name in ("won", "lost"):
            (story,) = inspector.histories(name)
            assert [(one.name, one.aspect) for one in story.joined] == [
                (word.feedback_id, "preference over lost/0")
            ]
    assert "(preference over lost/0) of" in moorline("explain", "lost", state=tmp_path)[1]


def test_a_pruned_event_keeps_its_fate_and_its_example(state: Path) -> None:
    path = state / "ledger.sqlite"
    with Ledger(path, horizon_seconds=HORIZON) as ledger:
        for _ in range(3):
            ledger.expire(NOW + 5 * HORIZON)
    with LedgerInspector(path) as inspector:
        assert inspector.histories("r1") == []
        ((_, fate, _, version),) = inspector.decided_examples("r1")
        assert (fate, version) == (Fate.TRAINED, 1)
        (story,) = inspector.histories("interactions.v1/0/0")
        assert (story.kind, story.fate) == ("forgotten", Fate.TRAINED)
        assert story.outcome is not None
        assert inspector.lineage(1).events == {RATINGS: 2, REPLIES: 1}


def test_lineage_counts_events_and_raters(inspector: LedgerInspector) -> None:
    found = inspector.lineage(1)
    assert found.release.version == 1
    assert found.ancestors == ()
    assert [key for _, key in found.examples] == ["r1/0"]
    assert (found.events, found.raters) == ({RATINGS: 2, REPLIES: 1}, 2)


def test_explain_is_told_in_words_and_never_shows_a_body(state: Path) -> None:
    code, text = moorline("explain", "r1", state=state)
    assert code == 0
    for words in (
        "an interaction, read from interactions.v1/0/0",
        "2025-06-15 15:06:40 UTC  the reply ended",
        "(rating) of ann arrived: trained",
        "assistant@v000001 was decided (example ex-",
        "it is in the weights of assistant@v000001",
    ):
        assert words in text, text
    assert "waits for an update" not in text
    assert "it waits for feedback" in moorline("explain", "unrated", state=state)[1]
    assert "feedback waits for it" in moorline("explain", "never-seen", state=state)[1]
    told = json.loads(moorline("explain", "r1", "--json", state=state)[1])
    assert told["histories"][0]["outcome"]["name"] == "assistant@v000001"
    assert "token_ids" not in json.dumps(told)


def test_what_a_client_chose_cannot_play_with_the_terminal(tmp_path: Path) -> None:
    word = rating("r", rater="ann\x1b[2J[red]\n", feedback_id="fb-1")
    with Ledger(tmp_path / "ledger.sqlite", horizon_seconds=HORIZON) as ledger:
        log = Log()
        ledger.ingest([log.parsed(interaction("r")), log.parsed(word)], now=NOW)
    code, text = moorline("explain", "r", state=tmp_path)
    assert code == 0
    assert "of ann\\x1b[2J[red]\\n arrived" in text
    assert "\x1b" not in text


def test_an_unknown_event_or_version_is_one_line_and_exit_1(state: Path, tmp_path: Path) -> None:
    for arguments, words in (
        (("explain", "chatcmpl-nobody"), "knows no event 'chatcmpl-nobody'"),
        (("explain", "feedback.v1/0/99"), "knows no event"),
        (("explain", f"feedback.v1/0/{10**30}"), "knows no event"),
        (("lineage", "7"), "there is no release 7"),
        (("lineage", "0"), "base model"),
    ):
        code, text = moorline(*arguments, state=state)
        assert code == 1
        assert words in text
        assert text.count("\n") == 1
    code, text = moorline("audit", "--offline", state=tmp_path / "nothing")
    assert (code, "there is no ledger at" in text) == (1, True)


def test_lineage_takes_every_way_to_name_a_version(state: Path) -> None:
    for name in ("1", "v000001", "assistant@v000001"):
        code, text = moorline("lineage", name, state=state)
        assert code == 0
        assert "r1/0" in text
        assert "v000000" in text
    told = json.loads(moorline("lineage", "1", "--json", state=state)[1])
    assert told["raters"] == 2
    assert [one["interaction"] for one in told["examples"]] == ["r1/0"]
    for wrong in ("newest", "9" * 30):
        assert moorline("lineage", wrong, state=state)[0] == 2


def test_offline_audit_balances_while_an_updater_holds_the_ledger(state: Path) -> None:
    with Ledger(state / "ledger.sqlite", horizon_seconds=HORIZON):
        code, text = moorline("audit", "--offline", state=state)
    assert code == 0, text
    assert "Audit passed: 9 events" in text


def test_audit_finds_a_fate_that_was_lost(state: Path) -> None:
    import sqlite3

    with contextlib.closing(sqlite3.connect(state / "ledger.sqlite")) as connection:
        connection.execute("DELETE FROM events WHERE offset = 5")
        connection.commit()
    code, text = moorline("audit", "--offline", state=state)
    assert code == 1
    assert "Audit failed" in text
    told = json.loads(moorline("audit", "--offline", "--json", state=state)[1])
    assert not told["balanced"]
    assert told["differences"]
