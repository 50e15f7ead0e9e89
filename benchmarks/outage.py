"""Does a reply take longer while the broker is gone, silent or slow?

Serves a real model with vLLM, whose events go to a broker through a proxy, and asks it questions
without a pause while the broker is killed (kill -9; the proxy still lets everybody in, and hangs
up), stopped (SIGSTOP) and slowed down (every 64 bytes wait a second). Before and after each fault
the same load runs with a sound broker: latencies are compared with those, in one run, so that a
slow machine is slow on both sides.

    python -m benchmarks.outage
    python -m benchmarks.outage --quick
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console

from daemon.broker import broker_binary, command, free_port
from daemon.demo.model import prepare_model
from daemon.demo.people import training_questions
from tests.proxy import Proxy
from tests.serving.server_process import ServerProcess

REPLY_TOKENS = 16
TRICKLE = {"seconds": 1.0, "piece_bytes": 64}
RECOVERY_SECONDS = 120.0


@dataclass
class Phase:
    """What clients saw while the broker was in one state."""

    broker: str
    replies: int
    failed: int
    p50_seconds: float
    p95_seconds: float
    spooled_events: int
    """At its end."""
    dropped_events: int
    """Since the start of the server."""


class Broker:
    """The embedded broker, told to have its clients come through a proxy."""

    def __init__(self, port: int, advertised: str) -> None:
        self._command = command(broker_binary(), "127.0.0.1", port)
        self._command[self._command.index("--advertised-listener-url") + 1] = f"tcp://{advertised}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
        )

    def send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path(".models/SmolLM2-135M-Instruct"))
    parser.add_argument("--seconds", type=float, default=60.0, help="each phase (default 60)")
    parser.add_argument("--clients", type=int, default=2, help="at the same time (default 2)")
    parser.add_argument("--quick", action="store_true", help="10 seconds each")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    seconds = 10.0 if options.quick else options.seconds
    model = prepare_model(options.model)
    console = Console()
    with (
        tempfile.TemporaryDirectory() as directory,
        Proxy(f"127.0.0.1:{free_port('127.0.0.1')}") as proxy,
    ):
        phases = measure(model, Path(directory), proxy, seconds, options.clients, console)
    ratios = compare(phases)
    result = {
        "model": model.name,
        "cores": os.cpu_count(),
        "load_at_end": os.getloadavg()[0],
        "seconds": seconds,
        "clients": options.clients,
        "reply_tokens": REPLY_TOKENS,
        "phases": [asdict(phase) for phase in phases],
        "ratios": ratios,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "outage.json").write_text(json.dumps(result, indent=2) + "\n")
    text = report(result)
    (options.output / "outage.md").write_text(text)
    console.print(text, markup=False, soft_wrap=True)
    return 0


def measure(
    model: Path, directory: Path, proxy: Proxy, seconds: float, clients: int, console: Console
) -> list[Phase]:
    """One server; a sound broker before and after every fault."""
    broker = Broker(proxy.upstream_port, proxy.address)
    settings = {
        "MOORLINE_STREAM__BOOTSTRAP": proxy.address,
        "MOORLINE_SERVING__KV_CACHE_GIB": "0.5",
    }
    server = ServerProcess(directory / "state", model, settings)
    faults: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
        "gone": (broker.kill, broker.start),
        "silent": (
            lambda: broker.send(signal.SIGSTOP),
            lambda: broker.send(signal.SIGCONT),
        ),
        "slow": (lambda: proxy.delay(**TRICKLE), proxy.pass_on),
    }
    try:
        broker.start()
        server.launch()
        server.wait_listening()
        load(server, "warm-up", min(seconds, 10.0), clients)
        wait_sound(server)
        phases = [load(server, "sound", seconds, clients)]
        for name, (strike, mend) in faults.items():
            strike()
            phases.append(load(server, name, seconds, clients))
            console.print(phases[-1])
            mend()
            wait_sound(server)
            phases.append(load(server, "sound", seconds, clients))
        return phases
    finally:
        if server.process is not None:
            server.stop()
        broker.kill()


def load(server: ServerProcess, name: str, seconds: float, clients: int) -> Phase:
    """Questions, one after the other, from each client."""
    questions = [question.text for question in training_questions(0)]
    end = time.monotonic() + seconds

    def client(number: int) -> tuple[list[float], int]:
        latencies, failed = [], 0
        with httpx.Client(base_url=server.url, timeout=120) as http:
            while time.monotonic() < end:
                question = questions[(number + clients * len(latencies)) % len(questions)]
                body = {
                    "messages": [{"role": "user", "content": question}],
                    "max_tokens": REPLY_TOKENS,
                    "ignore_eos": True,
                }
                begun = time.monotonic()
                failed += http.post("/v1/chat/completions", json=body).status_code != 200
                latencies.append(time.monotonic() - begun)
        return latencies, failed

    with ThreadPoolExecutor(clients) as threads:
        seen = list(threads.map(client, range(clients)))
    latencies = [latency for some, _ in seen for latency in some]
    publisher = server.status()["publisher"]
    return Phase(
        broker=name,
        replies=len(latencies),
        failed=sum(failed for _, failed in seen),
        p50_seconds=float(np.quantile(latencies, 0.5)),
        p95_seconds=float(np.quantile(latencies, 0.95)),
        spooled_events=publisher["spooled"],
        dropped_events=publisher["dropped"],
    )


def wait_sound(server: ServerProcess) -> None:
    """Until everything that waited is delivered."""
    deadline = time.monotonic() + RECOVERY_SECONDS
    while time.monotonic() < deadline:
        publisher = server.status()["publisher"]
        if publisher["connected"] and not publisher["spooled"] and not publisher["queued"]:
            return
        time.sleep(0.5)
    sys.exit(f"the events do not drain: {publisher}")


def compare(phases: list[Phase]) -> list[dict[str, Any]]:
    """Each fault against the sound phases around it, and these against each other: the noise."""
    rows = []
    for before, fault, after in zip(phases[0::2], phases[1::2], phases[2::2], strict=False):
        row: dict[str, Any] = {"broker": fault.broker}
        for name in ("p50_seconds", "p95_seconds"):
            sound = statistics.fmean((getattr(before, name), getattr(after, name)))
            key = name.removesuffix("_seconds")
            row[f"{key}_ratio"] = getattr(fault, name) / sound
            row[f"{key}_ratio_of_sound"] = getattr(after, name) / getattr(before, name)
        rows.append(row)
    return rows


def report(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "# Reply latency while the broker is gone, silent or slow",
        "",
        f"`make bench-outage`: {result['model']} on {result['cores']} cores, {result['clients']} "
        f"clients without a pause, {result['reply_tokens']} tokens a reply, "
        f"{result['seconds']:.0f} s a phase. The machine was shared with other work "
        f"(load {result['load_at_end']:.1f} at the end), so ratios count, not seconds: a fault "
        "against the mean of the sound phases before and after it. The last two columns compare "
        "those two with each other: what noise alone does.",
        "",
        "| broker | p50, fault / sound | p95, fault / sound "
        "| p50, after / before | p95, after / before |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['broker']} | {row['p50_ratio']:.2f} | {row['p95_ratio']:.2f} "
        f"| {row['p50_ratio_of_sound']:.2f} | {row['p95_ratio_of_sound']:.2f} |"
        for row in result["ratios"]
    ]
    lines += [
        "",
        "| phase | replies | failed | p50, s | p95, s | in the spool at its end | dropped so far |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {phase['broker']} | {phase['replies']} | {phase['failed']} "
        f"| {phase['p50_seconds']:.3f} | {phase['p95_seconds']:.3f} "
        f"| {phase['spooled_events']} | {phase['dropped_events']} |"
        for phase in result["phases"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
