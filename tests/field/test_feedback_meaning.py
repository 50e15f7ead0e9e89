"""Feedback means the same at both doors, HTTP and the topic, and is learned as what it says."""

from __future__ import annotations

import codecs
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon.cli import status_page
from moorline import metrics
from moorline.events import Fate, Reason
from moorline.stream import Topic
from tests.field.feedback_doors import DOORS, Body, Door
from tests.updater.harness import Updater
from tests.updater.ledger.fixtures import HORIZON, NOW, rating
from tests.updater.ledger.test_inspection import moorline

UP, DOWN = 1.0, -1.0
PENDING = (Fate.PENDING, Reason.NONE)
REPLACED = (Fate.DUPLICATE, Reason.SUPERSEDED_RATING)
REPEATED = (Fate.DUPLICATE, Reason.REPEATED_EVENT)
ALREADY_TRAINED = (Fate.DUPLICATE, Reason.ALREADY_TRAINED)
TRAINED = (Fate.TRAINED, Reason.NONE)
TAKEN_BACK = (Fate.RETRACTED, Reason.RATING_RETRACTED)
RETRACTION = (Fate.RETRACTED, Reason.RETRACTION)


@pytest.fixture(params=DOORS)
def door(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Door]:
    opened = Door(request.param, tmp_path)
    opened.record("chatcmpl-1")
    yield opened
    opened.ledger.close()


def said(**fields: Any) -> dict[str, Any]:
    return {"id": "chatcmpl-1", **fields}


# --- scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bounds",
    [
        {},
        {"score_max": 5},
        {"score_min": 1},
        {"score_min": None, "score_max": 5},
        {"score_min": 5, "score_max": 1},
        {"score_min": 1, "score_max": 1},
    ],
)
@pytest.mark.parametrize("value", [1, 0, 0.5, 5])
def test_a_score_without_its_range_is_refused(
    door: Door, value: float, bounds: dict[str, Any]
) -> None:
    assert not door.send(said(kind="score", value=value, **bounds))
    assert door.taught == []


@pytest.mark.parametrize(
    ("value", "taught"), [(1, DOWN), (3, 0.0), (5, UP), ("4", 0.5), (2.0, -0.5)]
)
@pytest.mark.parametrize(("low", "high"), [(1, 5), ("1", "5.0")])
def test_a_score_counts_by_its_range(
    door: Door, value: object, taught: float, low: object, high: object
) -> None:
    assert door.send(said(kind="score", value=value, score_min=low, score_max=high))
    assert door.taught == [taught]


@pytest.mark.parametrize("value", [0, 6, "6", True, "five", [3], {}, float("nan"), float("inf")])
def test_a_score_outside_its_range_is_refused(door: Door, value: object) -> None:
    assert not door.send(said(kind="score", value=value, score_min=1, score_max=5))


# --- thumbs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "taught"),
    [
        *((up, UP) for up in (1, 1.0, True, "1", "+1", "1.0", "true", "True", "up", "UP")),
        *((down, DOWN) for down in (-1, 0, 0.0, -0.0, False, "-1", "0", "false", "FALSE", "down")),
    ],
)
def test_both_halves_of_a_thumb_are_taken(door: Door, value: object, taught: float) -> None:
    assert door.send(said(value=value))
    assert door.taught == [taught]


@pytest.mark.parametrize(
    "value", [2, -2, 0.5, "2", "", " ", "yes", "maybe", "null", [], [1], {}, {"value": 1}, 1e-300]
)
def test_what_is_no_thumb_is_refused(door: Door, value: object) -> None:
    assert not door.send(said(value=value))
    assert door.taught == []


# --- the same id again ----------------------------------------------------------------------------


@pytest.mark.parametrize("created_at", [NOW, NOW - 60, NOW + 60, None])
def test_the_last_word_under_an_id_counts(door: Door, created_at: float | None) -> None:
    assert door.send(said(feedback_id="f", value=1, created_at=NOW))
    assert door.send(said(feedback_id="f", value=0, created_at=created_at))
    assert door.taught == [DOWN]
    assert door.fates == {PENDING: 1, REPLACED: 1}


def test_the_same_word_under_an_id_is_a_repeat_in_any_spelling(door: Door) -> None:
    for body in ({"value": 1}, {"value": True}, {"value": "up", "created_at": NOW + 9}):
        assert door.send(said(feedback_id="f", **body))
    assert door.taught == [UP]
    assert door.fates == {PENDING: 1, REPEATED: 2}


def test_a_word_may_change_and_change_back(door: Door) -> None:
    for value in (1, 0, 1):
        assert door.send(said(feedback_id="f", value=value))
    assert door.taught == [UP]
    assert door.fates == {PENDING: 1, REPLACED: 2}


def test_an_id_may_become_another_kind_and_is_counted_once(door: Door) -> None:
    assert door.send(said(feedback_id="f", value=1))
    assert door.send(said(feedback_id="f", kind="correction", text="A river of ice."))
    ((one,),) = (example.feedback for example in door.ledger.ready_examples(9))
    assert one.text == "A river of ice."
    assert door.fates == {PENDING: 1, REPLACED: 1}


def test_an_id_that_has_taught_teaches_nothing_of_another_kind(door: Door) -> None:
    assert door.send(said(feedback_id="f", value=1))
    door.release(door.take_batch())
    assert door.send(said(feedback_id="f", kind="correction", text="A river of ice."))
    assert door.taught == []
    assert door.fates == {TRAINED: 1, ALREADY_TRAINED: 1}


def test_an_id_belongs_to_its_rater(door: Door) -> None:
    assert door.send(said(feedback_id="f", value=1, rater="ann"))
    assert door.send(said(feedback_id="f", value=0, rater="bob"))
    assert sorted(filter(None, door.taught)) == [DOWN, UP]


def test_what_is_in_the_weights_is_not_learned_again(door: Door) -> None:
    assert door.send(said(feedback_id="f", value=1))
    door.release(door.take_batch())
    assert door.send(said(feedback_id="f", value=0))
    assert door.taught == []
    assert door.fates == {TRAINED: 1, ALREADY_TRAINED: 1}


# --- taken back -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        {"value": None},
        {"kind": "thumbs", "value": None},
        {"kind": "score", "value": None},
        {"kind": "score", "value": None, "score_min": 1, "score_max": 5},
        {"retracted": True},
        {"value": 1, "retracted": True},
    ],
)
@pytest.mark.parametrize("names", [{}, {"feedback_id": "f"}, {"feedback_id": "f", "rater": "ann"}])
def test_a_thumb_clicked_away_no_longer_counts(
    door: Door, body: dict[str, Any], names: dict[str, str]
) -> None:
    assert door.send(said(value=1, **names))
    assert door.send(said(**names, **body))
    assert door.taught == []
    assert door.fates == {TAKEN_BACK: 1, RETRACTION: 1}


@pytest.mark.parametrize(
    "body", [{}, {"retracted": False}, {"retracted": None}, {"retracted": "true"}, {"value": ""}]
)
def test_what_says_nothing_takes_nothing_back(door: Door, body: dict[str, Any]) -> None:
    assert door.send(said(feedback_id="f", value=1))
    assert not door.send(said(feedback_id="f", **body))
    assert door.taught == [UP]


def test_who_took_a_word_back_may_speak_again(door: Door) -> None:
    for value in (1, None, 0):
        assert door.send(said(feedback_id="f", value=value))
    assert door.taught == [DOWN]


def test_a_retraction_takes_back_only_the_raters_own_word(door: Door) -> None:
    assert door.send(said(value=1, rater="ann"))
    assert door.send(said(value=None, rater="bob"))
    assert door.taught == [UP]


def test_a_retraction_may_come_before_the_reply_and_after_the_horizon(door: Door) -> None:
    for body in (said(value=1, feedback_id="f"), said(value=None, feedback_id="f")):
        assert door.send(body | {"id": "later"})
    door.record("later")
    assert door.taught == []
    assert door.send(said(value=1, feedback_id="g"))
    assert door.send(said(value=None, feedback_id="g"), after_seconds=2 * HORIZON)
    assert door.taught == []


def test_what_has_taught_stays_taught_and_the_books_say_so(door: Door) -> None:
    assert door.send(said(feedback_id="f", value=1))
    door.release(door.take_batch())
    assert door.send(said(feedback_id="f", value=None))
    assert door.fates == {TRAINED: 1, ALREADY_TRAINED: 1}


NEW_WORDS = [{"value": None}, {"value": 0}, {"retracted": True}]


@pytest.mark.parametrize("word", NEW_WORDS)
def test_what_changes_while_its_batch_is_in_training_was_learned_or_is_not(
    door: Door, word: dict[str, Any]
) -> None:
    assert door.send(said(feedback_id="f", value=1))
    batch = door.take_batch()
    assert door.send(said(feedback_id="f", **word))
    door.release(batch)
    assert door.fates == {TRAINED: 1, ALREADY_TRAINED: 1}
    assert door.taught == []


@pytest.mark.parametrize("word", NEW_WORDS)
@pytest.mark.parametrize("during", [True, False])
@pytest.mark.parametrize("max_tries", [1, 3])
def test_a_refused_candidate_brings_no_word_back_that_was_changed(
    door: Door, word: dict[str, Any], during: bool, max_tries: int
) -> None:
    assert door.send(said(feedback_id="f", value=1))
    batch = door.take_batch()
    assert not during or door.send(said(feedback_id="f", **word))
    door.refuse(batch, max_tries)
    assert during or door.send(said(feedback_id="f", **word))
    assert UP not in door.taught
    assert sum(door.fates.values()) == 2
    assert DOWN not in door.taught or word == {"value": 0}


@pytest.mark.parametrize("word", NEW_WORDS)
@pytest.mark.parametrize("during", [True, False])
def test_a_revocation_teaches_nothing_again_that_was_changed(
    door: Door, word: dict[str, Any], during: bool
) -> None:
    door.record("chatcmpl-2", user="ana")
    assert door.send(said(feedback_id="f", value=1))
    assert door.send({"id": "chatcmpl-2", "value": 1})
    batch = door.take_batch()
    assert not during or door.send(said(feedback_id="f", **word))
    door.release(batch)
    assert during or door.send(said(feedback_id="f", **word))
    door.revoke_for("ana")
    assert door.taught == []
    assert sum(door.fates.values()) == 3


@pytest.mark.parametrize("rater", ["anonymous", "ann"])
def test_a_record_without_a_value_takes_back_the_rating_of_its_key(door: Door, rater: str) -> None:
    assert door.send(said(feedback_id="f", value=1, rater=rater))
    assert door.send(said(feedback_id="g", value=1, rater="bob"))
    door.send_null("chatcmpl-1/0/f")
    assert door.taught == [UP]
    assert door.fates == {PENDING: 1, TAKEN_BACK: 1, RETRACTION: 1}


@pytest.mark.parametrize("key", ["", "chatcmpl-1", "chatcmpl-1/0", "chatcmpl-1/x/f", "a/0/f/g"])
def test_a_record_without_a_value_whose_key_names_no_rating_is_a_dead_letter(
    door: Door, key: str
) -> None:
    assert door.send(said(feedback_id="f", value=1))
    door.send_null(key)
    assert door.taught == [UP]
    assert door.fates == {PENDING: 1, (Fate.DEAD_LETTERED, Reason.EMPTY_VALUE): 1}


# --- encodings ------------------------------------------------------------------------------------

TEXT = 'A glacier is a "river" of ice: Eisströme, 氷河, 🧊'
CORRECTION = json.dumps(said(kind="correction", text=TEXT), ensure_ascii=False)


@pytest.mark.parametrize(
    "body",
    [
        CORRECTION.encode(),
        json.dumps(said(kind="correction", text=TEXT)).encode(),
        *(
            CORRECTION.encode(name)
            for name in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be")
        ),
        codecs.BOM_UTF16_BE + CORRECTION.encode("utf-16-be"),
        b"\r\n " + CORRECTION.encode() + b" \n",
    ],
)
def test_every_encoding_of_unicode_is_read(door: Door, body: bytes) -> None:
    assert door.send(body)
    ((one,),) = (example.feedback for example in door.ledger.ready_examples(9))
    assert one.text == TEXT


@pytest.mark.parametrize(
    "body",
    [
        CORRECTION.replace("氷河, 🧊", "").encode("latin-1"),
        CORRECTION.encode("utf-16")[:-1],
        codecs.BOM_UTF8,
        codecs.BOM_UTF16_LE,
        b"\xff\xfe\x00",
        b'{"id":"chatcmpl-1","value":1,"value":0}',
        b'{"id":"chatcmpl-1","kind":"correction","text":"half \\ud83d"}',
        b'{"id":"chatcmpl-1","value":1} {}',
        b'{"id":"chatcmpl-1","value":' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"id":"chatcmpl-1","value":' + b"9" * 5000 + b"}",
        b"null",
        b"[1]",
        b'"up"',
    ],
)
def test_what_is_not_one_object_in_unicode_is_refused_at_both_doors(
    door: Door, body: bytes
) -> None:
    assert not door.send(body)
    assert door.taught == []


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"\xff\xfe\x00", Reason.MALFORMED_JSON),
        (b"[1]", Reason.SCHEMA_MISMATCH),
        (said(value=2), Reason.SCHEMA_MISMATCH),
        (said(value=1, schema_version="2.0"), Reason.UNSUPPORTED_SCHEMA_VERSION),
        (said(value=1, schema_version=None), Reason.UNSUPPORTED_SCHEMA_VERSION),
    ],
)
def test_what_is_refused_says_why(door: Door, body: Body, reason: Reason) -> None:
    assert not door.send(body)
    if door.answer is None:
        assert door.fates == {(Fate.DEAD_LETTERED, reason): 1}
    else:
        assert len(door.answer["error"]["message"]) > 20


# --- ids that no reply has ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run-0b1e", "6f1b2c1e-6a0c-4f7e-9d53-1f0a5b6c7d8e", "resp_1"])
def test_feedback_that_no_reply_is_found_for_is_seen_within_the_hour(door: Door, name: str) -> None:
    assert door.send(said(value=1))
    assert door.send({"id": name, "value": 1})
    assert door.send({"id": "chatcmpl-1", "kind": "preference", "over": name})
    seen = [door.ledger.recent_feedback(NOW + at, HORIZON) for at in (60, 600, 3500, 4000)]
    assert [(one.found, one.missing) for one in seen] == [(0, 0), (1, 2), (1, 2), (0, 0)]
    door.record(name)
    found = door.ledger.recent_feedback(NOW + 600, HORIZON)
    assert (found.found, found.missing) == (3, 0)


def test_feedback_whose_reply_is_known_is_never_said_to_be_without(door: Door) -> None:
    for value in (1, 0, None):
        assert door.send(said(value=value))
    assert door.ledger.recent_feedback(NOW + 600, HORIZON).missing == 0


def test_a_short_horizon_looks_at_what_has_not_expired(door: Door) -> None:
    assert door.send({"id": "run-1", "value": 1})
    assert door.ledger.recent_feedback(NOW + 50, horizon_seconds=60).missing == 1


@pytest.mark.parametrize(
    ("recent", "expected"),
    [
        ({"found": 3, "missing": 9}, "9 of 12 in the last hour name no reply that was recorded"),
        ({"found": 3, "missing": 0}, "3 in the last hour"),
    ],
)
def test_status_says_how_much_feedback_has_no_reply(
    recent: dict[str, int], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from rich import print as show

    show(
        status_page.page(
            store={},
            server=None,
            server_url="",
            server_problem="",
            updater={"recent_feedback": recent},
            updater_url="",
            updater_problem="",
            stream="",
        )
    )
    assert expected in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_the_metric_says_how_much_feedback_has_no_reply(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    updater = Updater(tiny_model_dir, tmp_path / "state")
    for name in ("run-1", "run-2"):
        updater.tape.add(Topic.FEEDBACK, rating(name).to_bytes(), at=time.time() - 600)
    updater.interact(1, rated=False)
    updater.tape.add(Topic.FEEDBACK, rating("chatcmpl-0-0").to_bytes(), at=time.time() - 600)
    updater.loop.cycle()
    updater.close()
    shown = metrics.render().decode()
    assert 'moorline_recent_feedback_events{interaction="missing"} 2.0' in shown
    assert 'moorline_recent_feedback_events{interaction="found"} 1.0' in shown


def test_explain_tells_what_such_feedback_waits_for(door: Door, tmp_path: Path) -> None:
    assert door.send({"id": "run-1", "feedback_id": "f", "value": 1})
    assert "feedback waits for it" in moorline("explain", "run-1", state=tmp_path)[1]
    assert "it waits for its interaction run-1" in moorline("explain", "f", state=tmp_path)[1]
