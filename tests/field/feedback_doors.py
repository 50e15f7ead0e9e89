"""The two doors of feedback, HTTP and the topic, each into a real ledger."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from moorline.events import Fate, Feedback, Interaction, Reason
from moorline.settings import SIGNALS
from moorline.stream import Topic
from serving.feedback import feedback_router
from tests.updater.ledger.fixtures import (
    HORIZON,
    NOW,
    Log,
    erasure,
    interaction,
    parsed,
    release,
)
from updater.learning.advantages import reward
from updater.ledger import BatchDecision, Ledger

DOORS = ("http", "topic")
Body = Mapping[str, Any] | bytes


class Door:
    """Takes feedback as a client sends it; ``taken`` and ``fates`` tell what became of it."""

    def __init__(self, name: str, folder: Path) -> None:
        self._name = name
        self._log = Log(partitions=1)
        self._at = NOW
        self.ledger = Ledger(folder / "ledger.sqlite", horizon_seconds=HORIZON)
        self.answer: Any = None
        """What the route answered last; nothing at the topic."""

    def record(self, *names: str, **fields: Any) -> None:
        """Replies of these ids are recorded."""
        self._ingest(*(interaction(name, **fields) for name in names))

    def send(self, body: Body, after_seconds: float = 1.0) -> bool:
        """Send it so long after what was sent before; returns whether it was taken."""
        self._at += after_seconds
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        if self._name == "topic":
            return self._ingest(sent)
        kept: list[Feedback] = []

        async def keep(event: Feedback) -> bool:
            kept.append(event)
            return True

        response = asyncio.run(_post(keep, sent))
        self.answer = response.json()
        assert response.status_code == (202 if kept else 422)
        return self._ingest(*(event.to_bytes() for event in kept)) and bool(kept)

    def send_null(self, key: str) -> None:
        """A record without a value; only the topic has these."""
        record = self._log.record(b"", self._at)
        found = parsed(replace(record, key=key.encode(), value=None))
        self.ledger.ingest([found], now=self._at)

    def _ingest(self, *events: Interaction | bytes) -> bool:
        found = [self._log.parsed(event, self._at) for event in events]
        self.ledger.ingest(found, now=self._at)
        return all(one.event is not None for one in found)

    def take_batch(self) -> list[str]:
        """Begin an update of what is ready; returns its examples' ids."""
        return [one.example_id for one in self.ledger.ready_examples(9)]

    def release(self, batch: list[str]) -> None:
        """End it with a release."""
        self.ledger.commit_release(release(self.ledger, batch), BatchDecision(batch))

    def refuse(self, batch: list[str], max_tries: int) -> None:
        """End it with a candidate that the bound refuses."""
        record = {"verdict": None, "divergences": [], "diagnostics": {}, "cause": ""}
        self.ledger.commit_rejection(
            Reason.DIVERGENCE_BOUND,
            BatchDecision(batch, record=record),
            max_tries=max_tries,
            now=self._at,
        )

    def revoke_for(self, user: str) -> None:
        """Everything that was learned since this person's first word is taken back."""
        self.ledger.forget(erasure(user, at=self._at, revoke=True), now=self._at)
        self.ledger.commit_revocation(release(self.ledger, revokes_after=0))

    @property
    def taught(self) -> list[float | None]:
        """The reward of every rating that an update would learn from now."""
        return [
            reward(one, SIGNALS)
            for example in self.ledger.ready_examples(9)
            for one in example.feedback
        ]

    @property
    def fates(self) -> dict[tuple[Fate, Reason], int]:
        """Where all feedback is now; the books balance."""
        assert self.ledger.audit() == []
        events = self.ledger.accounting().events.get(Topic.FEEDBACK, {})
        return {
            (fate, reason): n for fate, reasons in events.items() for reason, n in reasons.items()
        }


async def _post(keep: Any, body: bytes) -> httpx.Response:
    app = FastAPI()
    app.include_router(feedback_router(keep, 100_000))
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.post("/v1/feedback", content=body)
