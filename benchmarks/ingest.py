"""How fast the ledger takes interactions, and how much memory it holds with many pending.

Generates interactions one batch at a time, parses and commits them as the updater does, then rates
some and lets the rest expire. Prints JSON. No broker, no model.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moorline.events import (
    Feedback,
    Interaction,
    LogprobConvention,
    PolicySpan,
    Reason,
    SamplingSettings,
)
from moorline.stream import Record, Topic
from updater.ingest import parse, why_untrainable
from updater.ledger import Ledger, Parsed

VOCABULARY = 50_000
PARTITIONS = 4
WINDOWS = 5
"""The run is timed in so many equal parts: the last should be as fast as the first."""


def interaction(number: int, tokens: int, users: int, generator: random.Random) -> Interaction:
    """A reply of the given length, a third of it prompt, to one of so many users (0: to nobody
    known, so that its body has a key of its own)."""
    prompt = tokens // 3
    reply = tokens - prompt
    return Interaction(
        interaction_id=f"chatcmpl-{generator.getrandbits(128):032x}",
        alias="assistant",
        user=f"u{number % users}" if users else None,
        created_at=time.time(),
        latency_seconds=1.0,
        prompt_token_ids=tuple(generator.choices(range(VOCABULARY), k=prompt)),
        completion_token_ids=tuple(generator.choices(range(VOCABULARY), k=reply)),
        completion_logprobs=tuple(-generator.expovariate(1.0) for _ in range(reply)),
        logprob_convention=LogprobConvention.PROCESSED,
        sampling=SamplingSettings(temperature=0.7),
        policy_spans=(PolicySpan(version=0, start=0, end=reply),),
        finish_reason="stop",
    )


class Feeder:
    """Hands events to the ledger as ingest does, and keeps the time that it takes."""

    def __init__(self, ledger: Ledger, batch: int) -> None:
        self._ledger = ledger
        self._batch = batch
        self._offsets: dict[tuple[Topic, int], int] = {}
        self._records: list[Record] = []
        self.cpu_seconds = 0.0
        self.parse_seconds = 0.0
        self.commit_seconds = 0.0

    def add(self, topic: Topic, key: str, value: bytes) -> None:
        partition = sum(key.encode()) % PARTITIONS
        offset = self._offsets.get((topic, partition), 0)
        self._offsets[topic, partition] = offset + 1
        now_ms = int(time.time() * 1000)
        self._records.append(Record(topic, "bench", partition, offset, now_ms, None, value))
        if len(self._records) >= self._batch:
            self.flush()

    def flush(self) -> None:
        started, cpu_started = time.perf_counter(), time.process_time()
        parsed = [self._parsed(record) for record in self._records]
        read = time.perf_counter()
        self._ledger.ingest(parsed)
        self.parse_seconds += read - started
        self.commit_seconds += time.perf_counter() - read
        self.cpu_seconds += time.process_time() - cpu_started
        self._records = []

    @staticmethod
    def _parsed(record: Record) -> Parsed:
        found = parse(record, max_event_bytes=900_000)
        if not isinstance(found.event, Interaction):
            return found
        reason = why_untrainable(found.event, VOCABULARY, "assistant", 4096)
        return Parsed(record, found.event, reason or Reason.NONE)


def resident_mib() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """How long ``action`` takes, in ms, and what it gives."""
    started = time.perf_counter()
    result = action()
    return round((time.perf_counter() - started) * 1000, 2), result


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """One benchmark run in an empty folder."""
    generator = random.Random(arguments.seed)
    path = folder / "ledger.sqlite"
    rated: list[str] = []
    with Ledger(path) as ledger:
        feeder = Feeder(ledger, arguments.batch)
        before_mib = resident_mib()
        windows = list(fill(feeder, arguments, generator, rated))
        pending_mib = resident_mib()
        for key in rated:
            feeder.add(Topic.FEEDBACK, key, Feedback(interaction_id=key, value=1).to_bytes())
        feeder.flush()
        first_ms, examples = timed(lambda: ledger.ready_examples(24))
        traffic_ms, _ = timed(lambda: ledger.held_out_traffic(24))
        accounting_ms, accounting = timed(ledger.accounting)
        size_mib = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
        expire_ms, expired = timed(lambda: ledger.expire(time.time() + 8 * 86400))
        assert accounting.balanced
        assert accounting.total == arguments.interactions + len(rated)
        assert len(examples) == min(24, len(rated))
    return {
        "interactions": arguments.interactions,
        "tokens": arguments.tokens,
        "users": arguments.users,
        "batch": arguments.batch,
        "events_per_second": [round(n / wall) for n, wall, _ in windows],
        "events_per_cpu_second": [round(n / cpu) for n, _, cpu in windows],
        "parse_share": round(
            feeder.parse_seconds / (feeder.parse_seconds + feeder.commit_seconds), 3
        ),
        "ready_examples_24_ms": first_ms,
        "held_out_traffic_24_ms": traffic_ms,
        "accounting_ms": accounting_ms,
        "expire_ms": expire_ms,
        "expired": expired.interactions,
        "resident_before_mib": round(before_mib, 1),
        "resident_pending_mib": round(pending_mib, 1),
        "resident_peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "disk_mib": round(size_mib, 1),
        "disk_bytes_per_interaction": round(size_mib * 2**20 / arguments.interactions),
    }


def fill(
    feeder: Feeder, arguments: argparse.Namespace, generator: random.Random, rated: list[str]
) -> Iterator[tuple[int, float, float]]:
    """Pending interactions; yields each window's events, seconds and CPU seconds of the ledger."""
    for window in range(WINDOWS):
        wall = feeder.parse_seconds + feeder.commit_seconds
        cpu = feeder.cpu_seconds
        numbers = range(
            window * arguments.interactions // WINDOWS,
            (window + 1) * arguments.interactions // WINDOWS,
        )
        for number in numbers:
            event = interaction(number, arguments.tokens, arguments.users, generator)
            feeder.add(Topic.INTERACTIONS, event.interaction_id, event.to_bytes())
            if number % 100 == 0:
                rated.append(event.interaction_id)
        feeder.flush()
        wall = feeder.parse_seconds + feeder.commit_seconds - wall
        yield len(numbers), wall, feeder.cpu_seconds - cpu
        print(f"{numbers.stop} interactions", file=sys.stderr)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--interactions", type=int, default=200_000, help="pending at once")
    parser.add_argument("--tokens", type=int, default=300, help="prompt and reply of each")
    parser.add_argument("--users", type=int, default=1000, help="0: nobody is known")
    parser.add_argument("--batch", type=int, default=500, help="records in one transaction")
    parser.add_argument("--folder", type=Path, help="on which disk; default: the temporary one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        text = json.dumps(run(arguments, Path(folder)), indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
