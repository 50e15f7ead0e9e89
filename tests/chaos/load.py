"""The load: simulated people who ask, and rate until their rating is acknowledged.

A rating is sent again under its own id until somebody acknowledges it, as a careful client does,
so that the stream holds repetitions. Some ratings go over HTTP, some straight to Kafka; some
records are noise that cannot be parsed.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx
from kafka import KafkaProducer
from kafka.errors import KafkaError
from openai import AsyncOpenAI, OpenAIError

from moorline.settings import StreamSettings
from moorline.stream import Topic, topic_name
from tests.chaos.world import ALIAS

ASKING = 3
QUESTIONS = ("rivers", "sharks", "the moon", "trains", "bread", "violins", "deserts", "chess")
RETRY_SECONDS = 1.0
GIVE_UP_SECONDS = 90.0
NOISE = (b"", b"{", b'{"schema_version": 99}', b"\xff\xfe\x00", b'{"interaction_id": 3}')


@dataclass
class Tally:
    """What the simulated people counted."""

    requests: int = 0
    failed_requests: int = 0
    """While the server was up from before the request until after it."""
    excused: int = 0
    """Failed requests during which a fault was done to the server."""
    unattributed: int = 0
    acknowledged: set[str] = field(default_factory=set)
    """Ids of ratings that the server or the broker said it has."""
    abandoned: int = 0
    """Ratings that nobody acknowledged in time."""
    noise: int = 0
    versions: set[int] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)


class People:
    """Ask and rate until told to stop."""

    def __init__(
        self,
        url: Callable[[], str],
        up: Callable[[], int | None],
        stream: StreamSettings,
        seed: int,
    ) -> None:
        """
        Args:
            url: the server's, now.
            up: a number that changes with every fault of the server; None: it is not up;
                negative: a failpoint is armed and will kill it at an unknown moment.
        """
        self.tally = Tally()
        self._url = url
        self._up = up
        self._stream = stream
        self._seed = seed
        self._random = random.Random(f"people {seed}")
        self._producer: KafkaProducer | None = None
        self._connecting = threading.Lock()
        self._rated = 0

    async def live(self, stop: asyncio.Event) -> None:
        """Run everybody until ``stop`` is set and every rating has been acknowledged."""
        try:
            await asyncio.gather(*(self._one(stop) for _ in range(ASKING)))
        finally:
            if self._producer is not None:
                await asyncio.to_thread(self._producer.close, 5)

    async def _one(self, stop: asyncio.Event) -> None:
        ratings: set[asyncio.Task[None]] = set()
        while not stop.is_set():
            if self._up() is None:
                await asyncio.sleep(0.2)
                continue
            reply = await self._ask()
            if reply is not None and self._random.random() < 0.85:
                ratings.add(asyncio.create_task(self._rate(reply)))
            if self._random.random() < 0.06:
                ratings.add(asyncio.create_task(self._make_noise()))
            ratings = {task for task in ratings if not task.done()}
            await asyncio.sleep(self._random.uniform(0.1, 0.5))
        await asyncio.gather(*ratings)

    async def _ask(self) -> str | None:
        before = self._up()
        self.tally.requests += 1
        streamed = self._random.random() < 0.5
        client = AsyncOpenAI(
            base_url=f"{self._url()}/v1", api_key="none", max_retries=0, timeout=60.0
        )
        arguments: dict[str, Any] = {
            "model": ALIAS,
            "messages": [{"role": "user", "content": f"Tell me about {self._topic()}."}],
            "max_tokens": self._random.randint(2, 12),
            "temperature": 1.0,
            "top_p": self._random.choice((1.0, 1.0, 0.9)),
        }
        try:
            if streamed:
                identity, model = "", ""
                async for chunk in await client.chat.completions.create(**arguments, stream=True):
                    identity, model = chunk.id, chunk.model
            else:
                answer = await client.chat.completions.create(**arguments)
                identity, model = answer.id, answer.model
        except (OpenAIError, httpx.HTTPError) as error:
            if before is not None and before > 0 and self._up() == before:
                self.tally.failed_requests += 1
                when = f"{datetime.now(UTC):%H:%M:%S}"
                self.tally.failures.append(f"{when} {type(error).__name__}: {error}"[:200])
            else:
                self.tally.excused += 1
            return None
        finally:
            await client.close()
        name, _, version = model.partition("@v")
        if name != ALIAS or not version.isdecimal():
            self.tally.unattributed += 1
        else:
            self.tally.versions.add(int(version))
        return identity

    def _topic(self) -> str:
        return self._random.choice(QUESTIONS)

    async def _rate(self, interaction_id: str) -> None:
        self._rated += 1
        event = {
            "feedback_id": f"fb-{self._seed}-{self._rated}",
            "interaction_id": interaction_id,
            "kind": "thumbs",
            "value": self._random.choice((1, -1)),
            "rater": f"person-{self._random.randrange(12)}",
            "created_at": time.time(),
        }
        over_http = self._random.random() < 0.6
        times = 3 if self._random.random() < 0.1 else 1
        await asyncio.sleep(self._random.choice((0.0, 0.0, self._random.uniform(0.0, 8.0))))
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while times:
            if await (self._post(event) if over_http else self._produce(event)):
                self.tally.acknowledged.add(str(event["feedback_id"]))
                times -= 1
            elif time.monotonic() > deadline:
                self.tally.abandoned += 1
                return
            else:
                await asyncio.sleep(RETRY_SECONDS)

    async def _post(self, event: dict[str, Any]) -> bool:
        try:
            async with httpx.AsyncClient(timeout=10.0, trust_env=False) as client:
                answer = await client.post(f"{self._url()}/v1/feedback", json=event)
        except (httpx.HTTPError, ValueError):
            return False
        return answer.status_code == 202

    async def _produce(self, event: dict[str, Any]) -> bool:
        return await self._send(
            Topic.FEEDBACK, json.dumps(event).encode(), str(event["interaction_id"]).encode()
        )

    async def _make_noise(self) -> None:
        topic = self._random.choice((Topic.INTERACTIONS, Topic.FEEDBACK))
        if await self._send(topic, self._random.choice(NOISE), b"noise"):
            self.tally.noise += 1

    async def _send(self, topic: Topic, value: bytes, key: bytes) -> bool:
        try:
            return await asyncio.to_thread(self._send_now, topic, value, key)
        except (KafkaError, OSError):
            return False

    def _send_now(self, topic: Topic, value: bytes, key: bytes) -> bool:
        with self._connecting:
            if self._producer is None:
                self._producer = KafkaProducer(
                    bootstrap_servers=self._stream.bootstrap,
                    acks="all",
                    retries=3,
                    enable_idempotence=False,
                    request_timeout_ms=5_000,
                    delivery_timeout_ms=15_000,
                    max_block_ms=5_000,
                )
        self._producer.send(topic_name(self._stream, topic), value=value, key=key).get(20)
        return True
