"""Does a reply take longer while the broker is gone, silent or slow?

Two servers of one real model, each with a broker of its own. One broker is killed (kill -9; the
proxy in front of it still lets everybody in, and hangs up), stopped (SIGSTOP) and slowed down
(every 64 bytes wait a second); the other stays sound. Every client asks the two in turn without a
pause, so that whatever else the machine does hits both: what counts is the ratio of their
latencies, and how it differs from the ratio while both brokers are sound.

    python -m benchmarks.outage
    python -m benchmarks.outage --quick
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

REPLY_TOKENS = 8
TRICKLE = {"seconds": 1.0, "piece_bytes": 64}
RECOVERY_SECONDS = 120.0
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Else both servers' threads spin on the same cores, and one is five times as slow as the other."""


@dataclass
class Phase:
    """What clients saw while the one broker was in one state."""

    broker: str
    replies: int
    """How many each server gave."""
    failed: int
    p50_seconds: float
    """At the server whose broker is at fault."""
    p50_sound_seconds: float
    """At the other server."""
    p95_seconds: float
    p95_sound_seconds: float
    spooled_events: int
    """At its end."""
    dropped_events: int
    """Since the start."""

    @property
    def p50_ratio(self) -> float:
        return self.p50_seconds / self.p50_sound_seconds

    @property
    def p95_ratio(self) -> float:
        return self.p95_seconds / self.p95_sound_seconds


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
    result = {
        "model": model.name,
        "cores": os.cpu_count(),
        "load_at_end": os.getloadavg()[0],
        "seconds": seconds,
        "clients": options.clients,
        "reply_tokens": REPLY_TOKENS,
        "phases": [
            asdict(phase) | {"p50_ratio": phase.p50_ratio, "p95_ratio": phase.p95_ratio}
            for phase in phases
        ],
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
    """The faults, one after the other, with sound brokers before and after."""
    broker = Broker(proxy.upstream_port, proxy.address)
    port = free_port("127.0.0.1")
    sound_broker = Broker(port, f"127.0.0.1:{port}")
    servers = [
        ServerProcess(
            directory / name,
            model,
            {
                "MOORLINE_STREAM__BOOTSTRAP": bootstrap,
                "MOORLINE_SERVING__KV_CACHE_GIB": "0.25",
                **ONE_THREAD,
            },
        )
        for name, bootstrap in (("faulty", proxy.address), ("sound", f"127.0.0.1:{port}"))
    ]
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
        sound_broker.start()
        for server in servers:
            server.launch()
        for server in servers:
            server.wait_listening()
        load(servers, "warm-up", min(seconds, 10.0), clients)
        wait_sound(servers[0])
        phases = [load(servers, "sound, before", seconds, clients)]
        for name, (strike, mend) in faults.items():
            strike()
            phases.append(load(servers, name, seconds, clients))
            mend()
            wait_sound(servers[0])
        phases.append(load(servers, "sound, after", seconds, clients))
        for phase in phases:
            console.print(phase)
        return phases
    finally:
        for server in servers:
            if server.process is not None:
                server.stop()
        broker.kill()
        sound_broker.kill()


def load(servers: list[ServerProcess], name: str, seconds: float, clients: int) -> Phase:
    """Each client asks each question of both servers, in turns first of the one or of the other."""
    questions = [question.text for question in training_questions(0)]
    end = time.monotonic() + seconds

    def client(number: int) -> tuple[list[list[float]], int]:
        latencies: list[list[float]] = [[], []]
        failed = 0
        with httpx.Client(timeout=120) as http:
            while time.monotonic() < end:
                asked = len(latencies[0])
                question = questions[(number + clients * asked) % len(questions)]
                body = {
                    "messages": [{"role": "user", "content": question}],
                    "max_tokens": REPLY_TOKENS,
                    "ignore_eos": True,
                }
                for which in (0, 1) if (asked + number) % 2 else (1, 0):
                    begun = time.monotonic()
                    url = f"{servers[which].url}/v1/chat/completions"
                    failed += http.post(url, json=body).status_code != 200
                    latencies[which].append(time.monotonic() - begun)
        return latencies, failed

    with ThreadPoolExecutor(clients) as threads:
        seen = list(threads.map(client, range(clients)))
    faulty, sound = ([x for latencies, _ in seen for x in latencies[which]] for which in (0, 1))
    publisher = servers[0].status()["publisher"]
    return Phase(
        broker=name,
        replies=len(faulty),
        failed=sum(failed for _, failed in seen),
        p50_seconds=float(np.quantile(faulty, 0.5)),
        p50_sound_seconds=float(np.quantile(sound, 0.5)),
        p95_seconds=float(np.quantile(faulty, 0.95)),
        p95_sound_seconds=float(np.quantile(sound, 0.95)),
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


def report(result: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "# Reply latency while the broker is gone, silent or slow",
        "",
        f"`make bench-outage`: two servers of {result['model']} on {result['cores']} cores, one "
        "whose broker is at fault and one whose broker is sound, asked in turn by "
        f"{result['clients']} clients without a pause; {result['reply_tokens']} tokens a reply, "
        f"{result['seconds']:.0f} s a phase; load {result['load_at_end']:.1f} at the end. "
        "Each computes with one thread. What counts are the ratios of the two servers in the same "
        "minute; the first and the last row show how far noise alone takes them.",
        "",
        "| broker | p50, faulty / sound | p95, faulty / sound | replies of each | failed "
        "| p50, s | p95, s | in the spool at the end | dropped so far |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {phase['broker']} | {phase['p50_ratio']:.2f} | {phase['p95_ratio']:.2f} "
        f"| {phase['replies']} | {phase['failed']} "
        f"| {phase['p50_seconds']:.3f} | {phase['p95_seconds']:.3f} "
        f"| {phase['spooled_events']} | {phase['dropped_events']} |"
        for phase in result["phases"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
