"""``python -m tests.fuzz``: sends whatever can be sent for as long as you like, and judges it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fuzz.rounds import run_round
from tests.fuzz.world import Findings
from tests.kafka_fixtures import SKIPPED, TEST_KAFKA_VARIABLE, ApacheKafka, find_broker_program

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "fuzz.json"
ROUND_EXAMPLES = 500


def main() -> int:
    """Rounds until the time is over; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None, help="draws the same again")
    parser.add_argument("--output", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    wanted = parser.parse_args()
    seed = random.randrange(10**6) if wanted.seed is None else wanted.seed
    logging.disable(logging.CRITICAL)  # thousands of dead letters
    with _broker() as bootstrap:
        found, seconds = _run(bootstrap, seed, wanted.minutes * 60)
    for detail in found.details:
        print(detail, file=sys.stderr)
    result = _summary(found) | {
        "seconds": round(seconds),
        "seed": seed,
        "commit": _commit(),
    }
    print(json.dumps(result, indent=2))
    if wanted.output:
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if found.wrong else 0


def _run(bootstrap: str, seed: int, seconds: float) -> tuple[Findings, float]:
    began = time.monotonic()
    found = Findings()
    number = 0
    while time.monotonic() < began + seconds:
        prefix = f"fuzz-{uuid.uuid4().hex[:8]}."
        with tempfile.TemporaryDirectory(prefix="moorline-fuzz-") as directory:
            until = began + seconds
            round_seed = seed * 10_000 + number
            found.add(
                run_round(bootstrap, prefix, Path(directory), round_seed, ROUND_EXAMPLES, until)
            )
        number += 1
        done = round(time.monotonic() - began)
        print(f"round {number}, {done} s: {_summary(found)}", file=sys.stderr, flush=True)
    return found, time.monotonic() - began


def _summary(found: Findings) -> dict[str, int]:
    return {name: count for name, count in vars(found).items() if name != "details"}


@contextmanager
def _broker() -> Iterator[str]:
    given = os.environ.get(TEST_KAFKA_VARIABLE)
    if given:
        yield given
        return
    program = find_broker_program()
    if program is None:
        raise SystemExit(SKIPPED)
    with tempfile.TemporaryDirectory(prefix="moorline-kafka-") as directory:
        broker = ApacheKafka(program, Path(directory) / "broker").start()
        try:
            yield broker.bootstrap
        finally:
            broker.kill()


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    return done.stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
