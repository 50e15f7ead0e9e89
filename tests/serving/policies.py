"""Policies for swap tests: an adapter, its release, and the model that a trainer would run."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import torch

from moorline.events import Interaction, Release
from tests.serving.make_release import (
    make_release,
    parity_json,
    random_adapter,
    raw_logprobs,
    reference_model,
)
from tests.serving.server_process import ServerProcess

MESSAGES: Any = [{"role": "user", "content": "Tell me about rivers."}]
LONG_TOKENS = 800


@dataclass
class Lineage:
    """The releases of one server's store, and the reference model of each version."""

    server: ServerProcess
    model_dir: Path
    work_dir: Path

    def __post_init__(self) -> None:
        self.adapters: dict[int, Path | None] = {0: None}
        self._references: dict[int, torch.nn.Module] = {}

    def reference(self, version: int) -> torch.nn.Module:
        if version not in self._references:
            self._references[version] = reference_model(self.model_dir, self.adapters[version])
        return self._references[version]

    def adapter(self, name: str, seed: int, size: float = 0.05) -> Path:
        return random_adapter(self.model_dir, self.work_dir / name, seed, size)

    def release(self, size: float = 0.05, **changes: Any) -> int:
        """Release one more version; ``changes`` override what an honest release would say."""
        return self.announce(self.prepare(size, **changes))

    def announce(self, release: Release) -> int:
        """From now on servers want this version."""
        self.server.store.record_release(release)
        return release.version

    def restore(self, ancestor: int) -> int:
        """What a revocation does: the bytes of ``ancestor`` again, as a new version."""
        version = max(self.adapters) + 1
        self.adapters[version] = self.adapters[ancestor]
        changes = {"version": version, "parent": ancestor, "restores": ancestor}
        old = self.server.store.release("assistant", ancestor)
        return self.announce(old.model_copy(update=changes))

    def prepare(self, size: float = 0.05, **changes: Any) -> Release:
        """Make one more version and put its bytes into the store: the slow part of a release."""
        version = max(self.adapters) + 1
        parent = self.server.status()["policy_version"] if self.server.url else version - 1
        adapter = changes.pop("adapter_dir", None) or self.adapter(f"v{version}", version, size)
        self.adapters[version] = adapter
        return make_release(
            self.server.store,
            self.model_dir,
            adapter,
            version,
            parent=parent,
            parent_adapter_dir=self.adapters[parent],
            **changes,
        )

    def parity_of(self, candidate_dir: Path | None, parent: int) -> bytes:
        return parity_json(reference_model(self.model_dir, candidate_dir), self.reference(parent))

    def mean_difference_nats(self, event: Interaction) -> float:
        """Mean |recorded - recomputed| over a reply at temperature 1, each span by its version."""
        differences: list[float] = []
        for span in event.policy_spans:
            expected = raw_logprobs(
                self.reference(span.version), event.prompt_token_ids, event.completion_token_ids
            )
            for position in range(span.start, span.end):
                recorded = event.completion_logprobs[position]
                assert recorded is not None
                differences.append(abs(recorded - expected[position]))
        return sum(differences) / len(differences)


@dataclass
class StreamedReply:
    """What a streaming client saw."""

    reply_id: str = ""
    tokens: int = 0
    model: str = ""
    finish_reason: str | None = None


async def begin_streams(
    client: openai.AsyncOpenAI, count: int, max_tokens: int = LONG_TOKENS
) -> list[asyncio.Task[StreamedReply]]:
    """Streams that are under way: each has brought its first token."""
    seen = [StreamedReply() for _ in range(count)]
    streams = [asyncio.create_task(read_stream(client, max_tokens, one)) for one in seen]
    while not all(one.reply_id for one in seen):
        for failed in (stream for stream in streams if stream.done()):
            failed.result()
        await asyncio.sleep(0.01)
    return streams


async def read_stream(
    client: openai.AsyncOpenAI, max_tokens: int = LONG_TOKENS, seen: StreamedReply | None = None
) -> StreamedReply:
    """Ask for a reply of exactly ``max_tokens`` and read it to its end, into ``seen``."""
    seen = seen or StreamedReply()
    stream = await client.chat.completions.create(
        model="assistant",
        messages=MESSAGES,
        temperature=1.0,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    async for chunk in stream:
        seen.reply_id, seen.model = chunk.id, chunk.model
        if chunk.usage is not None:
            seen.tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            seen.finish_reason = choice.finish_reason or seen.finish_reason
    return seen


def one_reply(server: ServerProcess, **options: Any) -> Any:
    """A short reply at temperature 1."""
    return server.openai().chat.completions.create(
        model="assistant", messages=MESSAGES, max_tokens=16, temperature=1.0, **options
    )
