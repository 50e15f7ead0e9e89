"""`moorline forget` over real brokers: a running updater is told, and so is a ledger made anew."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from moorline.events import Fate, Reason
from moorline.pseudonyms import Pseudonyms
from moorline.settings import StreamSettings
from moorline.stream import DeadLetters, Publisher, Reader, Topic, ensure_topics
from tests.kafka_fixtures import wait_until
from tests.updater.ledger.fixtures import VOCABULARY, correction, interaction, rating
from tests.updater.ledger.test_inspection import moorline
from updater.ingest import Ingest
from updater.ledger import Ledger

pytest_plugins = ("tests.kafka_fixtures",)

TOPICS = (Topic.INTERACTIONS, Topic.FEEDBACK, Topic.ERASURES)


@pytest.fixture(params=["tansu", "apache_kafka"])
def settings(request: pytest.FixtureRequest, topic_prefix: str) -> StreamSettings:
    """Both kinds of broker."""
    bootstrap = str(request.getfixturevalue(request.param))
    return StreamSettings(bootstrap=bootstrap, topic_prefix=topic_prefix, partitions=2)


@contextmanager
def intake(settings: StreamSettings, path: Path) -> Iterator[tuple[Ledger, Ingest]]:
    """An updater's way in, connected; nothing is read yet."""
    letters, reader = DeadLetters(settings), Reader(settings, TOPICS)
    try:
        with Ledger(path) as ledger:
            reader.seek(ledger.offsets())
            reader.connect()
            yield (
                ledger,
                Ingest(
                    reader,
                    letters,
                    ledger,
                    alias="assistant",
                    vocab_size=VOCABULARY,
                    max_tokens=100,
                    signals={},
                ),
            )
    finally:
        reader.close()
        letters.close()


def publish(settings: StreamSettings, spool: Path) -> None:
    """Three replies to ana and three to ben, each rated by the other; ana corrects one."""
    ensure_topics(settings)
    key = Pseudonyms.from_file(spool.parent / "pseudonym.key")
    publisher = Publisher(settings, spool)
    publisher.start()
    now = time.time()
    for number in range(6):
        who, other = ("ana", "ben") if number % 2 == 0 else ("ben", "ana")
        reply = interaction(
            f"r{number}", at=now, user=key.pseudonym_of(who), pseudonym_key=key.fingerprint
        )
        assert publisher.publish(Topic.INTERACTIONS, reply.interaction_id, reply.to_bytes())
        said = rating(f"r{number}", rater=other, at=now)
        assert publisher.publish(Topic.FEEDBACK, said.interaction_id, said.to_bytes())
    for said in (correction("r1", rater="ana", at=now), rating("r1", rater="cy", at=now)):
        assert publisher.publish(Topic.FEEDBACK, said.interaction_id, said.to_bytes())
    assert publisher.flush(30)
    publisher.close()


def check(ledger: Ledger) -> None:
    assert ledger.audit() == []
    accounting = ledger.accounting()
    assert accounting.events[Topic.INTERACTIONS] == {
        Fate.ERASED: {Reason.NONE: 3},
        Fate.PENDING: {Reason.NONE: 3},
    }
    assert accounting.events[Topic.FEEDBACK] == {
        Fate.ERASED: {Reason.NONE: 7},
        Fate.PENDING: {Reason.NONE: 1},
    }
    (example,) = ledger.ready_examples(10)
    assert [one.rater for one in example.feedback] == ["cy"]


def test_a_running_updater_and_a_ledger_made_anew_both_erase(
    settings: StreamSettings, tmp_path: Path
) -> None:
    publish(settings, tmp_path / "spool")
    command = ("--set", f"stream.bootstrap={settings.bootstrap}")
    command += ("--set", f"stream.topic_prefix={settings.topic_prefix}")
    with intake(settings, tmp_path / "ledger.sqlite") as (ledger, ingest):

        def all_read() -> bool:
            ingest.step(0.2)
            return ledger.accounting().total == 14

        wait_until(all_read)
        assert ledger.count_ready() == 6
        stop = threading.Event()

        def run() -> None:
            while not stop.is_set():
                ingest.step(0.2)

        updater = threading.Thread(target=run)
        updater.start()
        try:
            code, told = moorline("forget", "--user", "ana", "--yes", *command, state=tmp_path)
        finally:
            stop.set()
            updater.join()
        assert code == 0, told
        assert "Erased: 3 replies, 7 ratings and corrections." in told
        check(ledger)
    code, told = moorline("audit", *command, state=tmp_path)
    assert code == 0, told
    assert "Audit passed: 14 events" in told
    assert "note:" not in told

    (tmp_path / "anew").mkdir()
    with intake(settings, tmp_path / "anew" / "ledger.sqlite") as (ledger, ingest):
        assert ingest.erasures_unread()

        def whole_log_read() -> bool:
            ingest.step(0.2)
            return ledger.accounting().total == 14 and not ingest.erasures_unread()

        wait_until(whole_log_read)
        check(ledger)
