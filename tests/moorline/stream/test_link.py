"""The publisher's link says that Kafka is away once, then seldom, and once that it is back."""

from __future__ import annotations

import threading

import pytest

from moorline.settings import StreamSettings
from moorline.stream import StreamInvalid, StreamUnavailable, link
from moorline.stream.link import Link

AWAY, TIMED_OUT = StreamUnavailable("does not answer"), StreamUnavailable("timed out")
REFUSED, DENIED = StreamInvalid("refused the login"), StreamInvalid("may not write")


@pytest.fixture
def made() -> Link:
    return Link(StreamSettings(bootstrap="b:1"), threading.Event(), lambda: 3)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [str(vars(record)["event"]) for record in caplog.records]


def test_an_outage_is_one_line_and_its_end_another(
    made: Link, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        caplog.clear()
        for error in (AWAY, TIMED_OUT, AWAY):
            made._log_once(error)
            assert made.last_error == str(error), "the status says the newest cause"
        made._log_recovery()
        made._log_recovery()
        assert said(caplog) == ["kafka_unavailable", "kafka_available"]
        assert made.last_error == ""


def test_a_long_outage_is_said_again(
    made: Link, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "REPEATED_SECONDS", 0.0)
    for _ in range(3):
        made._log_once(AWAY)
    assert len(said(caplog)) == 3


def test_what_somebody_must_change_is_said_at_once(
    made: Link, caplog: pytest.LogCaptureFixture
) -> None:
    for error in (AWAY, REFUSED, AWAY, REFUSED, DENIED, DENIED):
        made._log_once(error)
    lines = [record.getMessage().split(": ")[1] for record in caplog.records]
    assert lines == [str(AWAY), str(REFUSED), str(DENIED)]
