"""Dead letters back onto their topics: whole, once, and not for ever."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from moorline.events import Fate, Reason
from moorline.settings import StreamSettings
from moorline.stream import DeadLetters, Record, Topic, dlq_name, ensure_topics, topic_name
from moorline.stream.redrive import (
    FROM_HEADER,
    REDRIVES_HEADER,
    Refusal,
    Wanted,
    redriving,
)
from moorline.stream.scan import Scanner
from tests.integration.test_ingest_stream import read
from tests.updater.ledger.fixtures import interaction, rating
from tests.updater.ledger.test_inspection import moorline
from updater.ledger.inspection import LedgerInspector

pytest_plugins = ("tests.kafka_fixtures",)

REPLIES, RATINGS = Topic.INTERACTIONS, Topic.FEEDBACK


@pytest.fixture(params=["tansu", "apache_kafka"])
def settings(request: pytest.FixtureRequest, topic_prefix: str) -> StreamSettings:
    """Both kinds of broker."""
    bootstrap = str(request.getfixturevalue(request.param))
    settings = StreamSettings(bootstrap=bootstrap, topic_prefix=topic_prefix, partitions=2)
    ensure_topics(settings)
    return settings


def options(settings: StreamSettings) -> list[str]:
    where = f"stream.bootstrap={settings.bootstrap}"
    return ["--set", where, "--set", f"stream.topic_prefix={settings.topic_prefix}"]


def redrive(settings: StreamSettings, state: Path, *more: str) -> list[dict[str, Any]]:
    """The command, as it tells programs."""
    code, text = moorline("redrive", *options(settings), "--json", *more, state=state)
    assert code == 0, text
    found: list[dict[str, Any]] = json.loads(text)
    return found


def bury(settings: StreamSettings, *records: tuple[Record, Reason]) -> None:
    letters = DeadLetters(settings)
    for record, reason in records:
        letters.send(record, reason, "ingest")
    letters.close()


def records_of(settings: StreamSettings, name: str, partitions: int = 2) -> list[Any]:
    """Everything on a topic, as the library gives it."""
    with Scanner(settings, "test") as scanner:
        return [
            one
            for number in range(partitions)
            for some in scanner.read(name, number, scanner.beginning(name, number))
            for one in some
        ]


def record(topic: Topic, value: bytes | None, offset: int = 0, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "topic": topic,
        "topic_id": "id",
        "partition": 1,
        "offset": offset,
        "timestamp_ms": 1_750_000_000_000,
        "key": b"k\xff",
        "value": value,
        "headers": (("ce_id", b"a"), ("theirs", b"\x00\xfe"), ("theirs", b"again")),
    }
    return Record(**(values | changes))


def test_a_letter_goes_back_whole_to_its_partition_with_two_more_headers(
    settings: StreamSettings, tmp_path: Path
) -> None:
    bury(settings, (record(REPLIES, b"\x00bytes\xff"), Reason.MALFORMED_JSON))
    (told,) = redrive(settings, tmp_path)
    assert (told["origin"], told["reason"]) == ("interactions.v1/1/0", "malformed_json")
    assert told["outcome"] == "redriven"
    (back,) = records_of(settings, topic_name(settings, REPLIES))
    assert (back.key, back.value, back.partition) == (b"k\xff", b"\x00bytes\xff", 1)
    assert tuple(back.headers) == (
        *record(REPLIES, b"").headers,
        (REDRIVES_HEADER, b"1"),
        (FROM_HEADER, f"{dlq_name(settings, REPLIES)}/0/0".encode()),
    )
    assert redrive(settings, tmp_path) == [], "once"


def test_filters_choose_and_what_they_left_can_go_later(
    settings: StreamSettings, tmp_path: Path
) -> None:
    bury(
        settings,
        (record(REPLIES, b"0"), Reason.MALFORMED_JSON),
        (record(RATINGS, b"1"), Reason.MALFORMED_JSON),
        (record(RATINGS, b"2"), Reason.UNSUPPORTED_SCHEMA_VERSION),
        (record(RATINGS, b"3"), Reason.MALFORMED_JSON),
    )
    assert len(redrive(settings, tmp_path, "--dry-run")) == 4
    assert len(redrive(settings, tmp_path, "--dry-run", "--since", "2999-01-01")) == 0
    assert len(redrive(settings, tmp_path, "--dry-run", "--since", "2h")) == 4
    _, page = moorline("redrive", *options(settings), "--dry-run", state=tmp_path)
    assert "Would be put back: 4." in page
    chosen = ("--topic", "feedback.v1", "--reason", "unsupported_schema_version")
    assert [one["reason"] for one in redrive(settings, tmp_path, *chosen)] == [
        "unsupported_schema_version"
    ]
    limited = redrive(settings, tmp_path, "--topic", "feedback.v1", "--limit", "1")
    assert [one["reason"] for one in limited] == ["malformed_json"]
    assert len(redrive(settings, tmp_path)) == 2
    values = [one.value for one in records_of(settings, topic_name(settings, RATINGS))]
    assert sorted(values) == [b"1", b"2", b"3"]


def test_a_poison_record_comes_back_three_times_and_then_stays(
    settings: StreamSettings, tmp_path: Path
) -> None:
    bury(settings, (record(RATINGS, b"poison", key=b"r"), Reason.MALFORMED_JSON))
    for times in range(1, 4):
        (told,) = redrive(settings, tmp_path)
        assert (told["redrives"], told["outcome"]) == (times - 1, "redriven")
        read(settings, tmp_path / "ledger.sqlite", until_total=times)
    (told,) = redrive(settings, tmp_path)
    assert (told["redrives"], told["outcome"]) == (3, Refusal.TOO_OFTEN)
    _, page = moorline("redrive", *options(settings), state=tmp_path)
    assert "Left where they are: 1 (redriven too often)." in page
    newest = records_of(settings, dlq_name(settings, RATINGS), 1)[-1]
    names = [name for name, _ in newest.headers]
    assert names.count(REDRIVES_HEADER) == names.count("moorline_origin_topic") == 1
    (told,) = redrive(settings, tmp_path, "--max-redrives", "4")
    assert told["outcome"] == "redriven"


def test_a_redriven_record_has_a_new_offset_with_a_fate_of_its_own(
    stream_settings: StreamSettings, tmp_path: Path
) -> None:
    settings, path = stream_settings, tmp_path / "ledger.sqlite"
    ensure_topics(settings)
    now = time.time()
    reply, word = interaction("r1", at=now), rating("r1", at=now)
    bury(
        settings,
        (record(REPLIES, reply.to_bytes(), key=b"r1"), Reason.SCHEMA_MISMATCH),
        (record(RATINGS, word.to_bytes(), key=b"r1"), Reason.SCHEMA_MISMATCH),
    )
    assert len(redrive(settings, tmp_path)) == 2
    read(settings, path, until_total=2)
    (tmp_path / "redriven.json").unlink()  # as if a kill had come before it was written
    assert len(redrive(settings, tmp_path)) == 2
    read(settings, path, until_total=4)
    with LedgerInspector(path) as inspector:
        assert inspector.count_ready() == 1
        assert inspector.audit() == []
        assert inspector.accounting().fates == {
            topic: {Fate.PENDING: 1, Fate.DUPLICATE: 1} for topic in (REPLIES, RATINGS)
        }
    code, text = moorline("audit", *options(settings), state=tmp_path)
    assert code == 0, text


def test_what_is_not_whole_or_not_ours_stays(settings: StreamSettings, tmp_path: Path) -> None:
    from kafka import KafkaProducer

    name = dlq_name(settings, RATINGS)
    elsewhere = [("moorline_origin_topic", b"payments"), ("moorline_origin_partition", b"0")]
    cut = [
        ("moorline_origin_topic", topic_name(settings, RATINGS).encode()),
        ("moorline_truncated_from_bytes", b"1000000"),
    ]
    producer = KafkaProducer(bootstrap_servers=settings.bootstrap)
    for headers in ([], elsewhere, cut):
        producer.send(name, b"v", b"k", headers=headers).get(10)
    producer.close()
    outcomes = [one["outcome"] for one in redrive(settings, tmp_path)]
    assert outcomes == [Refusal.NO_ORIGIN, Refusal.NO_ORIGIN, Refusal.TRUNCATED]
    assert records_of(settings, topic_name(settings, RATINGS)) == []
    bury(settings, (record(RATINGS, b"1"), Reason.MALFORMED_JSON))
    outcomes = [one["outcome"] for one in redrive(settings, tmp_path, "--limit", "1")]
    assert outcomes[3:] == ["redriven"], "what stays uses up no limit"


def test_a_letter_that_comes_back_while_redriving_waits_for_the_next_run(
    settings: StreamSettings, tmp_path: Path
) -> None:
    bury(settings, (record(RATINGS, b"poison", key=b"r"), Reason.MALFORMED_JSON))
    with redriving(settings, tmp_path) as redriver:
        (first,) = redriver.letters(Wanted())
        assert redriver.send([first]) == {}
        read(settings, tmp_path / "ledger.sqlite", until_total=1)  # dead-letters it again
        assert list(redriver.letters(Wanted())) == []
    (told,) = redrive(settings, tmp_path)
    assert told["redrives"] == 1


@pytest.mark.parametrize("point", ["redrive.acknowledged", "redrive.journal.before_rename"])
def test_kill_nine_between_sending_and_noting_loses_nothing(
    stream_settings: StreamSettings, tmp_path: Path, point: str
) -> None:
    settings = stream_settings
    ensure_topics(settings)
    words = [rating("r1", rater=f"ann{i}", at=time.time()) for i in range(5)]
    bury(
        settings,
        *(
            (record(RATINGS, word.to_bytes(), i, key=b"r1"), Reason.SCHEMA_MISMATCH)
            for i, word in enumerate(words)
        ),
    )
    killed = subprocess.run(
        [
            *(sys.executable, "-m", "daemon.cli", "redrive"),
            *("--state-dir", str(tmp_path), *options(settings)),
        ],
        env=os.environ | {"MOORLINE_FAILPOINTS": f"{point}=kill"},
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -9
    assert len(redrive(settings, tmp_path)) == 5, "none was noted"
    assert redrive(settings, tmp_path) == []
    read(settings, tmp_path / "ledger.sqlite", until_total=10)
    with LedgerInspector(tmp_path / "ledger.sqlite") as inspector:
        fates = inspector.accounting().fates[RATINGS]
    assert fates == {Fate.PENDING: 5, Fate.DUPLICATE: 5}


def test_two_redrivers_of_one_state_directory_are_refused(
    stream_settings: StreamSettings, tmp_path: Path
) -> None:
    ensure_topics(stream_settings)
    with redriving(stream_settings, tmp_path):
        code, text = moorline("redrive", *options(stream_settings), state=tmp_path)
    assert code == 1
    assert "another `moorline redrive`" in text


def test_a_damaged_journal_and_a_broker_that_is_away_are_one_line(
    stream_settings: StreamSettings, tmp_path: Path
) -> None:
    ensure_topics(stream_settings)
    (tmp_path / "redriven.json").write_text("[")
    code, text = moorline("redrive", *options(stream_settings), state=tmp_path)
    assert (code, "is damaged: remove it" in text) == (1, True)
    (tmp_path / "redriven.json").unlink()
    away = stream_settings.model_copy(update={"bootstrap": "127.0.0.1:1"})
    more = [*options(away), "--set", "stream.connect_timeout_seconds=1"]
    code, text = moorline("redrive", *more, state=tmp_path)
    assert (code, text.count("\n")) == (1, 1)
    assert "does not answer" in text
    assert moorline("redrive", "--since", "soon", *more, state=tmp_path)[0] == 2
