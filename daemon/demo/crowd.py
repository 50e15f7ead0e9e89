"""The crowd: simulated people who ask through the official ``openai`` client, and rate.

Some stream and some do not; most rate at once, some only after further releases, some twice, some
never. Each reply's attribution to a policy version is checked, and the longest pause that any
stream felt is kept.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle

import httpx
from openai import AsyncOpenAI, OpenAIError

from daemon.demo.people import MAX_REPLY_TOKENS, Question, is_good

TEMPERATURE = 0.7
LATE_SHARE = 0.15
TWICE_SHARE = 0.10
SILENT_SHARE = 0.15
LATE_BY_RELEASES = 2
THINKING_SECONDS = 6.0
"""Pause between one person's questions while the updater works: both share two cores."""

_POLICY_NAME = re.compile(r"^[A-Za-z0-9._-]+@v(\d{6,})$")


@dataclass
class Tally:
    """What the crowd saw."""

    requests: int = 0
    failed_requests: int = 0
    unattributed_replies: int = 0
    streamed: int = 0
    rated: int = 0
    rated_late: int = 0
    rated_twice: int = 0
    failed_ratings: int = 0
    max_stream_gap_seconds: float = 0.0
    failures: list[str] = field(default_factory=list)
    """What went wrong, by kind; never a prompt or a reply."""
    ratings_by_version: dict[int, list[int]] = field(default_factory=dict)

    def fail(self, what: str) -> None:
        self.failed_requests += 1
        self.failures.append(what)


@dataclass(frozen=True)
class Reply:
    """One answer as a client saw it."""

    interaction_id: str
    text: str
    finish_reason: str
    version: int


@dataclass(frozen=True)
class _LateRating:
    reply: Reply
    value: int
    rater: str
    due_at_version: int


class Crowd:
    """Asks and rates until told to stop."""

    def __init__(self, server: str, alias: str, questions: list[Question], seed: int) -> None:
        self.tally = Tally()
        self.newest_version = 0
        self._alias = alias
        self._client = AsyncOpenAI(
            base_url=f"{server}/v1", api_key="demo", max_retries=0, timeout=180.0
        )
        self._http = httpx.AsyncClient(base_url=server, timeout=30.0, trust_env=False)
        self._questions: Iterator[Question] = cycle(questions)
        self._random = random.Random(seed)
        self._late: list[_LateRating] = []

    async def close(self) -> None:
        await self._client.close()
        await self._http.aclose()

    # --- one person -------------------------------------------------------------------------

    async def live(self, stop: asyncio.Event, pause_seconds: Callable[[], float | None]) -> None:
        """Ask and rate as one person after another, until ``stop``.

        Args:
            pause_seconds: how long to think before the next question; None: ask nothing now.
        """
        while not stop.is_set():
            await self._rate_what_is_due()
            pause = pause_seconds()
            await asyncio.sleep(0.2 if pause is None else pause)
            if pause is None:
                continue
            question = next(self._questions)
            rater = f"person-{self._random.randrange(40):02d}"
            reply = await self.ask(question, streamed=self._random.random() < 0.5)
            if reply is not None:
                await self._react(question, reply, rater)

    async def ask(
        self, question: Question, *, streamed: bool, recorded: bool = True, seed: int | None = None
    ) -> Reply | None:
        """Ask one question; ``None`` when the request failed (counted)."""
        self.tally.requests += 1
        headers = {} if recorded else {"x-moorline-no-store": "1"}
        arguments = {
            "model": self._alias,
            "messages": [{"role": "user", "content": question.text}],
            "max_tokens": MAX_REPLY_TOKENS,
            "temperature": TEMPERATURE,
            "extra_headers": headers,
            "seed": seed,
        }
        try:
            reply = await (self._streamed(arguments) if streamed else self._whole(arguments))
        except (OpenAIError, httpx.HTTPError) as error:
            self.tally.fail(type(error).__name__)
            return None
        if reply.finish_reason not in ("stop", "length"):
            self.tally.fail(f"cut off: {reply.finish_reason or 'no finish reason'}")
            return None
        if reply.version < 0:
            self.tally.unattributed_replies += 1
        self.newest_version = max(self.newest_version, reply.version)
        return reply

    async def _whole(self, arguments: dict[str, object]) -> Reply:
        answer = await self._client.chat.completions.create(**arguments)  # type: ignore[call-overload]
        choice = answer.choices[0]
        return Reply(
            answer.id, choice.message.content or "", choice.finish_reason, _version(answer.model)
        )

    async def _streamed(self, arguments: dict[str, object]) -> Reply:
        self.tally.streamed += 1
        parts: list[str] = []
        identity, finish_reason, version = "", "", -1
        last = None
        stream = await self._client.chat.completions.create(**arguments, stream=True)  # type: ignore[call-overload]
        async for chunk in stream:
            now = time.monotonic()
            if last is not None:
                gap = now - last
                self.tally.max_stream_gap_seconds = max(self.tally.max_stream_gap_seconds, gap)
            last = now
            identity, version = chunk.id, _version(chunk.model)
            for choice in chunk.choices:
                parts.append(choice.delta.content or "")
                finish_reason = choice.finish_reason or finish_reason
        return Reply(identity, "".join(parts), finish_reason, version)

    # --- ratings ----------------------------------------------------------------------------

    async def _react(self, question: Question, reply: Reply, rater: str) -> None:
        value = 1 if is_good(question, reply.text, reply.finish_reason) else -1
        self.tally.ratings_by_version.setdefault(reply.version, []).append(value)
        mood = self._random.random()
        if mood < SILENT_SHARE:
            return
        if mood < SILENT_SHARE + LATE_SHARE:
            due = reply.version + LATE_BY_RELEASES
            self._late.append(_LateRating(reply, value, rater, due))
            return
        await self.rate(reply, value, rater)
        if mood > 1.0 - TWICE_SHARE:
            self.tally.rated_twice += 1
            await self.rate(reply, value, rater)

    async def rate(self, reply: Reply, value: int, rater: str) -> None:
        """Send one thumbs rating."""
        self.tally.rated += 1
        feedback = {
            "interaction_id": reply.interaction_id,
            "kind": "thumbs",
            "value": value,
            "rater": rater,
        }
        try:
            answer = await self._http.post("/v1/feedback", json=feedback)
        except httpx.HTTPError as error:
            self.tally.failed_ratings += 1
            self.tally.failures.append(f"rating: {type(error).__name__}")
            return
        if answer.status_code != 202:
            self.tally.failed_ratings += 1
            self.tally.failures.append(f"rating: HTTP {answer.status_code}")

    async def _rate_what_is_due(self) -> None:
        due = [late for late in self._late if late.due_at_version <= self.newest_version]
        self._late = [late for late in self._late if late.due_at_version > self.newest_version]
        for late in due:
            self.tally.rated_late += 1
            await self.rate(late.reply, late.value, late.rater)


def _version(model: str) -> int:
    """The policy version in a reply's ``model`` field; -1 when there is none."""
    match = _POLICY_NAME.match(model)
    return int(match.group(1)) if match else -1
