"""Reader and dead letters when the broker goes away (an embedded one returns empty)."""

from __future__ import annotations

import pytest

from daemon.broker import EmbeddedBroker
from moorline.events import Reason
from moorline.settings import StreamSettings
from moorline.stream import (
    DeadLetters,
    Reader,
    Record,
    StreamUnavailable,
    Topic,
    ensure_topics,
)
from tests.integration.streams import BOTH, Start, put
from tests.kafka_fixtures import wait_until

pytest_plugins = ("tests.kafka_fixtures",)


def test_an_age_that_cannot_be_known_now_is_left_out(
    own_tansu: EmbeddedBroker, topic_prefix: str, start: Start
) -> None:
    settings = StreamSettings(
        bootstrap=own_tansu.bootstrap, topic_prefix=topic_prefix, connect_timeout_seconds=1
    )
    ensure_topics(settings)
    put(start(settings), Topic.FEEDBACK, range(1))
    known, unknown = Reader(settings, BOTH), Reader(settings, BOTH)
    for reader in (known, unknown):
        reader.connect()
        wait_until(lambda reader=reader: sum(reader.lag().values()) == 1)  # type: ignore[misc]
    before = max(known.lag_seconds().values())
    own_tansu.stop()
    assert max(known.lag_seconds().values()) >= before
    assert set(unknown.lag_seconds().values()) == {0.0}
    assert len(unknown.lag_seconds()) == 7, "of eight partitions"
    for reader in (known, unknown):
        reader.close()


def test_a_broker_that_goes_away_is_told_and_reading_goes_on_after(
    own_tansu: EmbeddedBroker, topic_prefix: str
) -> None:
    settings = StreamSettings(
        bootstrap=own_tansu.bootstrap,
        topic_prefix=topic_prefix,
        connect_timeout_seconds=1,
        accept_new_topics=True,
    )
    ensure_topics(settings)
    reader = Reader(settings, BOTH)
    assert reader.poll(1, 0.1) == []
    assert reader.connected
    own_tansu.stop()

    def unavailable() -> bool:
        try:
            reader.poll(1, 0.2)
        except StreamUnavailable as error:
            return "does not answer" in str(error)
        return False

    wait_until(unavailable)
    assert not reader.connected
    own_tansu.start()
    ensure_topics(settings)
    assert reader.poll(1, 0.1) == []
    reader.close()


def test_a_dead_letter_that_is_not_acknowledged_raises(topic_prefix: str) -> None:
    with EmbeddedBroker() as broker:
        settings = StreamSettings(
            bootstrap=broker.bootstrap, topic_prefix=topic_prefix, connect_timeout_seconds=1
        )
        letters = DeadLetters(settings)
        letters.start()
    record = Record(Topic.FEEDBACK, "id", 0, 0, 1, b"k", b"v")
    for _ in range(2):
        with pytest.raises(StreamUnavailable):
            letters.send(record, Reason.MALFORMED_JSON, "ingest")
    letters.close()
