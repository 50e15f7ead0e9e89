"""Events, records and releases for tests of the ledger and of what uses it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moorline.events import (
    ArtifactFile,
    Decision,
    Erasure,
    Feedback,
    FeedbackKind,
    Interaction,
    LogprobConvention,
    PolicySpan,
    Reason,
    Release,
    ReleaseKind,
    SamplingSettings,
    Verdict,
    artifact_digest,
    user_digest,
)
from moorline.settings import SIGNALS
from moorline.stream import Record, Topic
from updater.ingest import parse, why_untrainable
from updater.learning.advantages import why_no_credit
from updater.ledger import Ledger, Parsed

MEMORY = Path("/dev/shm")
FAST_DISK = str(MEMORY) if MEMORY.is_dir() and os.access(MEMORY, os.W_OK) else None
"""Where tests put ledgers whose rules they try, thousands of times, not their durability."""

NOW = 1_750_000_000.0
HOUR = 3600.0
HORIZON = 24 * HOUR
VOCABULARY = 100


def interaction(identity: str, at: float = NOW, **changes: Any) -> Interaction:
    """A trainable reply of three tokens."""
    values: dict[str, Any] = {
        "interaction_id": identity,
        "alias": "assistant",
        "created_at": at,
        "latency_seconds": 0.5,
        "prompt_token_ids": (1, 2, 3),
        "completion_token_ids": (4, 5, 6),
        "completion_logprobs": (-0.5, -1.0, -0.1),
        "logprob_convention": LogprobConvention.PROCESSED,
        "sampling": SamplingSettings(),
        "policy_spans": (PolicySpan(version=0, start=0, end=3),),
        "finish_reason": "stop",
    }
    return Interaction(**(values | changes))


def rating(
    identity: str, value: float = 1, rater: str = "ann", at: float = NOW, **changes: Any
) -> Feedback:
    """A thumb."""
    values: dict[str, Any] = {
        "feedback_id": f"fb-{identity}-{rater}-{at}-{value}",
        "interaction_id": identity,
        "value": value,
        "rater": rater,
        "created_at": at,
    }
    return Feedback(**(values | changes))


def score(identity: str, value: float = 0.5, **changes: Any) -> Feedback:
    """A number from 0 to 1."""
    changes = {"kind": FeedbackKind.SCORE, "score_min": 0, "score_max": 1, **changes}
    return rating(identity, value, **changes)


def correction(
    identity: str, text: str = "so", rater: str = "ann", at: float = NOW, **changes: Any
) -> Feedback:
    """The reply that somebody wanted instead."""
    kind = FeedbackKind.CORRECTION
    changes = {"feedback_id": f"fb-{identity}-{rater}-{at}-correction", **changes}
    return rating(identity, 1, rater, at, kind=kind, text=text, **changes)


def preference(
    identity: str, over: str, rater: str = "ann", at: float = NOW, **changes: Any
) -> Feedback:
    """A preference for one of two replies."""
    kind = FeedbackKind.PREFERENCE
    changes = {"feedback_id": f"fb-{identity}-{rater}-{at}-over-{over}", **changes}
    return rating(identity, 1, rater, at, kind=kind, over=over, **changes)


def signal(
    identity: str, name: str, rater: str = "ann", at: float = NOW, **changes: Any
) -> Feedback:
    """What somebody did with a reply."""
    kind = FeedbackKind.SIGNAL
    changes = {"feedback_id": f"fb-{identity}-{rater}-{at}-{name}", **changes}
    return rating(identity, 1, rater, at, kind=kind, signal=name, **changes)


def erasure(*users: str, at: float = NOW, **changes: Any) -> Erasure:
    """Somebody asks to be forgotten, under every name that they have."""
    return Erasure(users=tuple(map(user_digest, users)), erased_at=at, **changes)


class Log:
    """A stream in memory: gives each event its topic, partition and offset."""

    def __init__(self, partitions: int = 2, topic_id: str = "t0") -> None:
        self._partitions = partitions
        self._topic_id = topic_id
        self._ends: dict[tuple[Topic, int], int] = {}

    def record(
        self,
        event: Interaction | Feedback | Erasure | bytes,
        at: float = NOW,
        topic: Topic | None = None,
    ) -> Record:
        """The next record of its partition."""
        if isinstance(event, bytes):
            topic, key, value = topic or Topic.FEEDBACK, "", event
        elif isinstance(event, Erasure):
            topic, key, value = Topic.ERASURES, "", event.to_bytes()
        else:
            topic = Topic.INTERACTIONS if isinstance(event, Interaction) else Topic.FEEDBACK
            key, value = event.interaction_id, event.to_bytes()
        partition = sum(key.encode()) % self._partitions
        offset = self._ends.get((topic, partition), 0)
        self._ends[topic, partition] = offset + 1
        return Record(topic, self._topic_id, partition, offset, int(at * 1000), key.encode(), value)

    def parsed(self, event: Interaction | Feedback | Erasure | bytes, at: float = NOW) -> Parsed:
        """The next record of its partition, as ingest would hand it to the ledger."""
        return parsed(self.record(event, at))


def parsed(record: Record) -> Parsed:
    """A record, as ingest would hand it to the ledger."""
    found = parse(record, max_event_bytes=100_000)
    match found.event:
        case None | Erasure():
            return found
        case Interaction():
            reason = why_untrainable(found.event, VOCABULARY, "assistant", 1000)
        case Feedback():
            reason = why_no_credit(found.event, SIGNALS)
    return Parsed(record, found.event, reason or Reason.NONE)


def release(
    ledger: Ledger,
    examples: Iterable[object] = (),
    version: int | None = None,
    revokes_after: int | None = None,
) -> Release:
    """The release that the ledger expects next."""
    files = (ArtifactFile(name="adapter_model.safetensors", sha256="0" * 64, size_bytes=1),)
    digest = artifact_digest(files)
    return Release(
        alias="assistant",
        version=ledger.next_version() if version is None else version,
        parent=ledger.live_version() if revokes_after is None else revokes_after,
        revokes_after=revokes_after,
        kind=ReleaseKind.ADAPTER,
        artifact_digest=digest,
        files=files,
        base_model_digest="1" * 64,
        created_at=NOW,
        offsets=ledger.release_offsets(),
        examples=len(list(examples)),
        verdict=Verdict(decision=Decision.PASS, artifact_digest=digest, checks=(), seconds=0.0),
        lease_epoch=ledger.epoch,
    )
