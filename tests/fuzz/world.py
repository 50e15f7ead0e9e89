"""A real broker, a real intake over a real ledger, and the feedback route: one round of fuzzing."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from kafka import KafkaProducer
from kafka import errors as kafka_errors

from moorline.events import Feedback
from moorline.settings import StreamSettings
from moorline.stream import Publisher, Topic, ensure_topics, topic_name
from serving.feedback import feedback_router
from tests.field.raw_batches import Raw, RawName, RawProducer, batch
from tests.field.streams import RunningIntake
from tests.fuzz.deliveries import REPLIES, Delivery, Ending, Request
from tests.fuzz.oracle import Saying, sayings, taught
from tests.integration.streams import with_admin
from tests.updater.ledger.fixtures import interaction, rating
from updater.audit import audit_stream
from updater.ledger.inspection import LedgerInspector

WITNESS_EVERY = 10
"""Deliveries between two plain ratings, of replies of their own, that must be ready at the end."""
_CONFIGS = {
    "max.message.bytes": str(20 * 2**20),
    "message.timestamp.after.max.ms": str(2**63 - 1),
    "retention.ms": "-1",  # a timestamp in seconds is of 1970
}


@dataclass
class Findings:
    """What was sent, and what went wrong."""

    records: int = 0
    """On the topics, those of aborted transactions too."""
    refused: int = 0
    """Deliveries that the broker did not take."""
    requests: int = 0
    accepted: int = 0
    server_errors: int = 0
    crashes: int = 0
    without_fate: int = 0
    taught_wrong: int = 0
    ready: int = 0
    """Words that were ready to be taught, each compared with what was sent."""
    details: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> int:
        return self.server_errors + self.crashes + self.without_fate + self.taught_wrong

    def add(self, other: Findings) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def note(self, kind: str, detail: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        if len(self.details) < 20:
            self.details.append(f"{kind}: {detail[:2000]}")


class World:
    """One topic prefix and one ledger."""

    def __init__(self, bootstrap: str, prefix: str, directory: Path) -> None:
        self.findings = Findings()
        self._said: set[Saying] = set()
        self._witnesses: set[Saying] = set()
        self._deliveries = 0
        self._ledger_path = directory / "ledger.sqlite"
        self._settings = StreamSettings(
            bootstrap=bootstrap, topic_prefix=prefix, partitions=2, connect_timeout_seconds=20
        )
        for topic in (Topic.INTERACTIONS, Topic.FEEDBACK, Topic.ERASURES):
            self._make(topic)
        ensure_topics(self._settings)
        self._raw = RawProducer(bootstrap)
        self._transactions = KafkaProducer(
            bootstrap_servers=bootstrap, transactional_id=f"{prefix}fuzz"
        )
        self._transactions.init_transactions()
        self._publisher = Publisher(self._settings, directory / "spool")
        self._publisher.start()
        self._app = FastAPI()
        self._app.include_router(
            feedback_router(self._publish, max_bytes=self._settings.max_event_bytes)
        )
        self._intake = RunningIntake(self._settings, self._ledger_path)
        for name in REPLIES:
            self._serve(name)

    def close(self) -> None:
        self._publisher.close()
        self._transactions.close()
        self._raw.close()

    # --- what is sent -------------------------------------------------------------------------

    def deliver(self, delivery: Delivery) -> None:
        """Send it; now and then let the intake read, and somebody say something plain."""
        self._deliveries += 1
        name, partition = self._place(delivery)
        try:
            if delivery.ending is Ending.PLAIN:
                data = batch(delivery.records, delivery.codec, **delivery.broken)  # type: ignore[arg-type]
                self._raw.send(name, partition, data)
            else:
                self._transact(name, partition, delivery)
        except kafka_errors.KafkaError:
            self.findings.refused += 1
            return
        self.findings.records += len(delivery.records)
        if delivery.topic is Topic.FEEDBACK and delivery.ending is not Ending.ABORTED:
            for record in delivery.records:
                self._said |= sayings(record.value)
        if self._deliveries % WITNESS_EVERY == 0:
            self._witness()
            self.step()

    async def request(self, request: Request) -> None:
        """Post it; what is accepted was said."""
        self.findings.requests += 1
        try:
            status = await post(self._app, request)
        except Exception:  # a server would answer 500
            self.findings.note("server_errors", f"{request!r}: {traceback.format_exc(limit=-3)}")
            return
        if status >= 500:
            self.findings.note("server_errors", f"{status} for {request!r}")
        if status == 202:
            self.findings.accepted += 1
            self._said |= sayings(request.body)

    def step(self) -> None:
        """The intake reads on; whatever it raises would have ended the updater."""
        try:
            self._intake.step()
        except Exception:
            self.findings.note("crashes", traceback.format_exc(limit=-6))
            self._reopen()

    # --- what became of it --------------------------------------------------------------------

    def judge(self) -> Findings:
        """Read everything, then compare the ledger with the topics and with what was said."""
        assert self._publisher.flush(60)
        try:
            self._intake.read_all(300)
        except Exception:
            self.findings.note("crashes", traceback.format_exc(limit=-6))
            self._reopen()
        ledger = self._intake.ledger
        ready = {
            taught(one) for example in ledger.ready_examples(1_000_000) for one in example.feedback
        }
        self.findings.ready += len(ready)
        for said in sorted(ready - self._said - self._witnesses, key=str):
            self.findings.note("taught_wrong", f"nobody said {said!r}")
        for said in sorted(self._witnesses - ready, key=str):
            self.findings.note("taught_wrong", f"not ready though said: {said!r}")
        try:
            self._intake.close()
        except AssertionError:
            self.findings.note("without_fate", traceback.format_exc(limit=-2))
        with LedgerInspector(self._ledger_path) as inspector:
            for line in audit_stream(self._settings, inspector).differences:
                self.findings.note("without_fate", line)
        return self.findings

    # --- inside -------------------------------------------------------------------------------

    async def _publish(self, feedback: Feedback) -> bool:
        return self._publisher.publish(Topic.FEEDBACK, feedback.interaction_id, feedback.to_bytes())

    def _make(self, topic: Topic) -> None:
        compacted = topic is Topic.ERASURES
        options = {
            "num_partitions": 1 if compacted else self._settings.partitions,
            "replication_factor": 1,
            "configs": _CONFIGS | ({"cleanup.policy": "compact"} if compacted else {}),
        }
        name = topic_name(self._settings, topic)
        with_admin(self._settings.bootstrap, lambda admin: admin.create_topics({name: options}))

    def _place(self, delivery: Delivery) -> tuple[str, int]:
        partitions = 1 if delivery.topic is Topic.ERASURES else self._settings.partitions
        return topic_name(self._settings, delivery.topic), self._deliveries % partitions

    def _transact(self, name: str, partition: int, delivery: Delivery) -> None:
        self._transactions.begin_transaction()
        try:
            for record in delivery.records:
                nothing = record.key is None and record.value is None
                self._transactions.send(
                    name,
                    b"" if nothing else record.value,
                    record.key,
                    [(RawName(one), value or b"") for one, value in record.headers],
                    partition=partition,
                ).get(30)
            if delivery.ending is Ending.COMMITTED:
                self._transactions.commit_transaction()
                return
            unsaid = rating(REPLIES[0], 1, f"unsaid-{self._deliveries}").to_bytes()
            self._transactions.send(topic_name(self._settings, Topic.FEEDBACK), unsaid).get(30)
        except kafka_errors.KafkaError:
            self._transactions.abort_transaction()
            raise
        self._transactions.abort_transaction()

    def _serve(self, name: str) -> None:
        reply = interaction(name, at=time.time()).to_bytes()
        self._raw.send(topic_name(self._settings, Topic.INTERACTIONS), 0, batch([Raw(reply)]))

    def _witness(self) -> None:
        name = f"witness-{self._deliveries}"
        self._serve(name)
        value = 1 if self._deliveries % 20 else -1
        said = rating(name, value, name, at=time.time()).to_bytes()
        self._raw.send(topic_name(self._settings, Topic.FEEDBACK), 0, batch([Raw(said)]))
        self._witnesses.add((f"{name}/0", name, "thumbs", float(value)))
        self.findings.records += 2

    def _reopen(self) -> None:
        self._intake.reader.close()
        self._intake.letters.close()
        self._intake.ledger.close()
        self._intake = RunningIntake(self._settings, self._ledger_path)


async def post(app: Any, request: Request) -> int:
    """The status with which the application answers; an error that it raises is raised."""
    size = -(-len(request.body) // request.chunks) or 1
    parts = [request.body[at : at + size] for at in range(0, len(request.body), size)] or [b""]
    messages = [
        {"type": "http.request", "body": part, "more_body": index + 1 < len(parts)}
        for index, part in enumerate(parts)
    ]
    answers: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        answers.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/feedback",
        "raw_path": b"/v1/feedback",
        "query_string": b"",
        "root_path": "",
        "headers": list(request.headers),
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    await app(scope, receive, send)
    return int(answers[0]["status"])


@contextmanager
def world(bootstrap: str, prefix: str, directory: Path) -> Iterator[World]:
    made = World(bootstrap, prefix, directory)
    try:
        yield made
    finally:
        made.close()
