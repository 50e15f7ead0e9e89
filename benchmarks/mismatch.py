"""Is the recorded probability the one that the updater computes, for every sampling setting?

Serves a real model with vLLM in float32 and in bfloat16, asks it questions under several sampling
settings, reads the recorded interactions back from a broker, and recomputes every logprob with the
updater's float32 policy. At lag 0 both are one policy, so log r = log p - log q is numerical noise.

    python -m benchmarks.mismatch
    python -m benchmarks.mismatch --model DIR --replies 16 --output benchmarks/results
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import openai
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from daemon.broker import EmbeddedBroker
from daemon.demo.model import prepare_model
from daemon.demo.people import training_questions
from moorline.events import Interaction
from moorline.settings import StreamSettings
from moorline.stream import Reader, Topic
from updater.learning.policy import Policy
from updater.learning.sampling import processed_logprobs
from updater.values import TokenSequence

SAMPLING = [{"temperature": t, "top_p": p} for t in (0.7, 1.0) for p in (0.9, 1.0)]
DTYPES = ("float32", "bfloat16")
START_SECONDS = 300.0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path(".models/SmolLM2-135M-Instruct"))
    parser.add_argument("--replies", type=int, default=12, help="per setting (default 12)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    console = Console()
    model = prepare_model(options.model)
    policy = Policy(model, rank=4, alpha=8, seed=0)
    rows: list[dict[str, Any]] = []
    for dtype in DTYPES:
        console.print(f"serving {model.name} in {dtype} (about a minute)")
        with tempfile.TemporaryDirectory() as directory:
            rows += measure(model, dtype, policy, options.replies, Path(directory))
    table = Table(
        "dtype", "temperature", "top_p", "tokens", "mean |log r|", "max |log r|", "mean r"
    )
    for row in rows:
        table.add_row(
            *(
                f"{v:.6f}" if isinstance(v, float) and k > 2 else str(v)
                for k, v in enumerate(row.values())
            )
        )
    console.print(table)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "mismatch.json"
    path.write_text(json.dumps({"model": model.name, "rows": rows}, indent=2) + "\n")
    console.print(f"written to {path}")
    return 0


def measure(
    model: Path, dtype: str, policy: Policy, replies: int, directory: Path
) -> list[dict[str, Any]]:
    """One server, every sampling setting."""
    broker = EmbeddedBroker()
    bootstrap = broker.start()
    clean = {name: value for name, value in os.environ.items() if "MOORLINE_" not in name}
    environment = clean | {
        "MOORLINE_STATE_DIR": str(directory / "state"),
        "MOORLINE_MODEL__PATH": str(model),
        "MOORLINE_MODEL__DTYPE": dtype,
        "MOORLINE_SERVING__PORT": "0",
        "MOORLINE_STREAM__BOOTSTRAP": bootstrap,
    }
    log = directory / "server.log"
    with log.open("wb") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "serving"], env=environment, stdout=out, stderr=out
        )
    reader = Reader(StreamSettings(bootstrap=bootstrap), [Topic.INTERACTIONS])
    try:
        client = openai.OpenAI(base_url=f"{wait_for_url(server, log)}/v1", api_key="none")
        wanted: dict[str, dict[str, float]] = {}
        questions = training_questions(0)[:replies]
        for sampling in SAMPLING:
            for question in track(questions, f"{dtype} {sampling}"):
                reply = client.chat.completions.create(
                    model="assistant",
                    messages=[{"role": "user", "content": question.text}],
                    max_tokens=40,
                    **sampling,
                )
                wanted[reply.id] = sampling
        return compare(read(reader, wanted), wanted, policy, dtype)
    finally:
        reader.close()
        server.send_signal(signal.SIGTERM)
        server.wait(90)
        broker.stop()


def wait_for_url(server: subprocess.Popen[bytes], log: Path) -> str:
    """The address that the server prints when it listens."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith("moorline serving "):
                return line.split()[-1]
        time.sleep(0.2)
    sys.exit(f"the server did not start:\n{log.read_text(errors='replace')[-2000:]}")


def read(reader: Reader, wanted: dict[str, Any]) -> list[Interaction]:
    """The interactions of these replies, as they were recorded."""
    found: dict[str, Interaction] = {}
    deadline = time.monotonic() + 60
    while len(found) < len(wanted) and time.monotonic() < deadline:
        for record in reader.poll(500, 1.0):
            interaction = Interaction.model_validate_json(record.value or b"")
            if interaction.interaction_id in wanted:
                found[interaction.interaction_id] = interaction
    return list(found.values())


@torch.no_grad()
def compare(
    interactions: list[Interaction], wanted: dict[str, dict[str, float]], policy: Policy, dtype: str
) -> list[dict[str, Any]]:
    """log r of every token, by sampling setting."""
    rows = []
    for sampling in SAMPLING:
        log_ratios = []
        for interaction in interactions:
            if wanted[interaction.interaction_id] != sampling:
                continue
            sequence = TokenSequence(interaction.prompt_token_ids, interaction.completion_token_ids)
            logits, sampled = policy.completion_logits([sequence])
            log_p = processed_logprobs(logits, sampled, interaction.sampling)
            log_ratios.append(log_p - torch.tensor(interaction.completion_logprobs))
        log_r = torch.cat(log_ratios)
        rows.append(
            {
                "dtype": dtype,
                **sampling,
                "tokens": log_r.numel(),
                "mean_abs_log_r_nats": float(log_r.abs().mean()),
                "max_abs_log_r_nats": float(log_r.abs().max()),
                "mean_ratio": float(log_r.exp().mean()),
            }
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
