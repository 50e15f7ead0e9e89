"""When the client breaks: what it delivered is not sent again, and the rest goes on in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from kafka.future import Future

from moorline.settings import StreamSettings
from moorline.stream import Topic
from moorline.stream.outgoing import OutgoingEvent
from moorline.stream.publisher import Publisher
from moorline.stream.spool import Spool


class Client:
    """A Kafka client that takes everything and acknowledges what it is told to."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.futures: list[Any] = []

    def send(self, _topic: str, *, value: bytes, **_: Any) -> Any:
        self.sent.append(value)
        self.futures.append(Future())
        return self.futures[-1]


def event(value: bytes) -> OutgoingEvent:
    return OutgoingEvent(Topic.FEEDBACK, "k", value, value.decode(), 1)


@pytest.fixture
def publisher(tmp_path: Path) -> Publisher:
    """Not started: each step is taken by the test."""
    return Publisher(StreamSettings(bootstrap="127.0.0.1:1"), tmp_path / "spool")


def connected(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> Client:
    client = Client()
    monkeypatch.setattr(type(publisher._link), "producer", property(lambda _: client))
    return client


def test_events_of_a_broken_client_are_sent_again_first_and_in_order(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connected(publisher, monkeypatch)
    for value in (b"1", b"2", b"3"):
        assert publisher._accept(event(value))
    publisher._feed()
    client.futures[1].success(None)  # delivered before the one ahead of it
    assert publisher._accept(event(b"4"))
    publisher._take_back(ConnectionError("gone"))
    assert [one.value for one in publisher._queue] == [b"1", b"3", b"4"]
    assert publisher._queue_bytes == 3
    assert publisher.stats.delivered == 1
    again = connected(publisher, monkeypatch)
    publisher._feed()
    assert again.sent == [b"1", b"3", b"4"]


def test_a_spooled_event_that_was_delivered_early_is_not_sent_again(
    publisher: Publisher, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    publisher._spool = spool = Spool(tmp_path / "spool", 2**20)
    for value in (b"1", b"2", b"3"):
        spool.append(event(value).to_bytes())
    publisher._outstanding = 3
    client = connected(publisher, monkeypatch)
    publisher._feed()
    assert client.sent == [b"1", b"2", b"3"]
    client.futures[1].success(None)
    publisher._take_back(ConnectionError("gone"))
    again = connected(publisher, monkeypatch)
    publisher._feed()
    assert again.sent == [b"1", b"3"]
    for future in again.futures:
        future.success(None)
    publisher._reap()
    assert (spool.count, publisher.stats.delivered, publisher._outstanding) == (0, 3, 0)
    spool.close()


@pytest.mark.parametrize(("size", "taken"), [(1024, True), (1025, False)])
def test_the_largest_event_is_taken_and_one_byte_more_is_not(
    tmp_path: Path, size: int, taken: bool
) -> None:
    settings = StreamSettings(bootstrap="127.0.0.1:1", max_event_bytes=1024)
    publisher = Publisher(settings, tmp_path)
    assert publisher.publish(Topic.FEEDBACK, "k", b"x" * size) is taken
    assert publisher.stats.dropped == (0 if taken else 1)


def test_the_queue_holds_as_many_as_the_settings_say(tmp_path: Path) -> None:
    settings = StreamSettings(bootstrap="127.0.0.1:1", queue_max_events=3)
    publisher = Publisher(settings, tmp_path)
    assert [publisher.publish(Topic.FEEDBACK, "k", b"x") for _ in range(5)] == [True] * 3 + [
        False
    ] * 2
    assert (publisher.stats.queued, publisher.stats.dropped) == (3, 2)
