"""Ingest over a real broker: produced records reach the ledger, once, also after a restart."""

from __future__ import annotations

import time
from pathlib import Path

from moorline.events import Fate, Reason
from moorline.settings import StreamSettings
from moorline.stream import DeadLetters, Publisher, Reader, Topic, ensure_topics
from tests.kafka_fixtures import wait_until
from tests.updater.ledger.fixtures import VOCABULARY, interaction, rating
from updater.ingest import Ingest
from updater.ledger import Ledger

TOPICS = (Topic.INTERACTIONS, Topic.FEEDBACK)


def read(settings: StreamSettings, path: Path, until_total: int) -> None:
    """One life of an updater's intake."""
    letters, reader = DeadLetters(settings), Reader(settings, TOPICS)
    try:
        with Ledger(path) as ledger:
            reader.seek(ledger.offsets())
            ingest = Ingest(
                reader,
                letters,
                ledger,
                alias="assistant",
                vocab_size=VOCABULARY,
                max_tokens=100,
                signals={},
                max_records=3,
            )

            def all_read() -> bool:
                ingest.step(0.2)
                return ledger.accounting().total >= until_total

            wait_until(all_read)
            assert ingest.step(0.2).records == 0
            ledger.expire()
    finally:
        reader.close()
        letters.close()


def test_produced_records_reach_the_ledger_once(
    stream_settings: StreamSettings, tmp_path: Path
) -> None:
    ensure_topics(stream_settings)
    publisher = Publisher(stream_settings, tmp_path / "spool")
    publisher.start()
    path = tmp_path / "ledger.sqlite"

    def publish(topic: Topic, key: str, value: bytes) -> None:
        assert publisher.publish(topic, key, value)

    try:
        for i in range(8):
            reply = interaction(f"r{i}", at=time.time())
            publish(Topic.INTERACTIONS, reply.interaction_id, reply.to_bytes())
        for i in range(4):
            publish(Topic.FEEDBACK, f"r{i}", rating(f"r{i}", at=time.time()).to_bytes())
        publish(Topic.FEEDBACK, "r0", b"not json")
        assert publisher.flush(10)
        read(stream_settings, path, until_total=13)
        again = rating("r7", at=time.time())
        for _ in range(2):
            publish(Topic.FEEDBACK, "r7", again.to_bytes())
        assert publisher.flush(10)
        read(stream_settings, path, until_total=15)
    finally:
        publisher.close()
    with Ledger.open_readonly(path) as ledger:
        assert ledger.audit() == []
        assert ledger.count_ready() == 5
        accounting = ledger.accounting()
        assert accounting.balanced
        assert accounting.consumed == {Topic.INTERACTIONS: 8, Topic.FEEDBACK: 7}
        assert accounting.events[Topic.FEEDBACK] == {
            Fate.PENDING: {Reason.NONE: 5},
            Fate.DUPLICATE: {Reason.REPEATED_EVENT: 1},
            Fate.DEAD_LETTERED: {Reason.MALFORMED_JSON: 1},
        }
