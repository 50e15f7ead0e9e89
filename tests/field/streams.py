"""An intake over a real broker and a real ledger, to give it records and see their fates."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moorline.settings import SIGNALS, StreamSettings
from moorline.stream import DeadLetters, Reader, Topic, ensure_topics
from tests.kafka_fixtures import wait_until
from tests.updater.ledger.fixtures import VOCABULARY
from updater.ingest import Ingest, StepCounts
from updater.ledger import Ledger

TOPICS = (Topic.INTERACTIONS, Topic.FEEDBACK, Topic.ERASURES)


class RunningIntake:
    """Reader, dead letters, ledger, and what moves records from one to the other."""

    def __init__(self, settings: StreamSettings, path: Path) -> None:
        ensure_topics(settings)
        self.settings = settings
        self.ledger = Ledger(path)
        self.letters = DeadLetters(settings)
        self.reader = Reader(settings, TOPICS)
        self.reader.seek(self.ledger.offsets())
        self.ingest = Ingest(
            self.reader,
            self.letters,
            self.ledger,
            alias="assistant",
            vocab_size=VOCABULARY,
            max_tokens=1000,
            signals=SIGNALS,
            max_event_bytes=settings.max_event_bytes,
        )

    def step(self) -> StepCounts:
        return self.ingest.step(0.2)

    def read_all(self, timeout_seconds: float = 60.0) -> None:
        """Until nothing is unread."""

        def caught_up() -> bool:
            self.step()
            lag = self.reader.lag()
            return bool(lag) and not any(lag.values()) and not self.step().records

        wait_until(caught_up, timeout_seconds)

    def consumed(self) -> int:
        return sum(self.ledger.accounting().consumed.values())

    def reasons(self, topic: Topic = Topic.FEEDBACK) -> dict[str, int]:
        """Reason -> dead letters of this topic."""
        fates = self.ledger.accounting().events.get(topic, {})
        return {str(r): n for r, n in fates.get("dead_lettered", {}).items()}  # type: ignore[call-overload]

    def close(self) -> None:
        self.reader.close()
        self.letters.close()
        assert self.ledger.audit() == []
        assert self.ledger.accounting().balanced
        self.ledger.close()


@contextmanager
def running_intake(settings: StreamSettings, path: Path) -> Iterator[RunningIntake]:
    """One life of an updater's intake; its books are checked at the end."""
    intake = RunningIntake(settings, path)
    try:
        yield intake
    finally:
        intake.close()


def now_ms() -> int:
    return int(time.time() * 1000)
