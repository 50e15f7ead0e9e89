"""``moorline demo``: a real model, served and taught by simulated people, on this machine.

Starts ``moorline up`` (embedded broker, vLLM server, updater), lets a crowd ask and rate, asks
held-out questions after every swap, stops everything and writes a report.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from daemon.demo.crowd import THINKING_SECONDS, Crowd
from daemon.demo.display import Display
from daemon.demo.model import ModelUnavailable, prepare_model
from daemon.demo.people import held_out_questions, is_good, training_questions
from daemon.demo.report import Evaluation, write_report
from daemon.demo.settings import DEMO_SETTINGS, up_arguments
from moorline.errors import MoorlineError
from moorline.http import ServerUnavailable, request_json
from moorline.store import ArtifactStore

ALIAS = "assistant"
PEOPLE = 8
PEOPLE_WHILE_TRAINING = 1
HELD_OUT_CONCURRENCY = 12
SAMPLES_SHOWN = 4
DRAIN_SECONDS = 30.0
START_SECONDS = 300.0
RULE = "a complete sentence within 40 tokens that names the topic asked about"


class DemoError(MoorlineError):
    """The demo cannot go on; the line says why and what to do."""


class Demo:
    """One run of the demo: its processes, its crowd and its report."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self._options = options
        self._console = console
        self._output: Path = options.output
        self._state = self._output / "state"
        self._started_at = time.monotonic()
        self._started_unix = time.time()
        self.evaluations: list[Evaluation] = []
        self.display = Display(DEMO_SETTINGS)

    # --- the tree ---------------------------------------------------------------------------

    def run(self) -> int:
        """Run the demo from its start to its report; returns the exit code."""
        self._console.print(
            "[bold]Moorline demo[/]: a real model learns from feedback while it serves"
        )
        self._console.print(f"preparing SmolLM2-135M-Instruct in {self._options.model}")
        model = prepare_model(self._options.model)
        shutil.rmtree(self._state, ignore_errors=True)
        self._state.mkdir(parents=True)
        overrides = dict(item.split("=", 1) for item in self._options.set or [])
        command = [
            sys.executable,
            "-m",
            "daemon.cli",
            *up_arguments(model.resolve(), self._state, overrides),
        ]
        self._started_at, self._started_unix = time.monotonic(), time.time()
        with (self._output / "up.log").open("wb") as log:
            tree = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            try:
                addresses = self._wait_until_ready(tree)
                asyncio.run(self._learn(addresses["server"], addresses["updater"], tree))
            finally:
                self._stop(tree)
        return 0

    def _wait_until_ready(self, tree: subprocess.Popen[bytes]) -> dict[str, Any]:
        with self._console.status("starting broker, vLLM server and updater (about a minute)"):
            deadline = time.monotonic() + START_SECONDS
            while time.monotonic() < deadline:
                self._check_alive(tree)
                with contextlib.suppress(OSError, ValueError, ServerUnavailable, KeyError):
                    run: dict[str, Any] = json.loads((self._state / "run.json").read_text())
                    request_json("GET", f"{run['server']}/readyz")
                    request_json("GET", f"{run['updater']}/readyz")
                    self._console.print(
                        f"ready after {self._elapsed():.0f} s: {run['server']}/v1 "
                        f"(OpenAI API), broker {run['bootstrap']}"
                    )
                    return run
                time.sleep(0.5)
        raise DemoError(f"not ready after {START_SECONDS:.0f} s: see {self._output / 'up.log'}")

    def _check_alive(self, tree: subprocess.Popen[bytes]) -> None:
        if tree.poll() is not None:
            tail = (self._output / "up.log").read_text(errors="replace").strip().splitlines()
            why = tail[-1] if tail else "no output"
            raise DemoError(f"`moorline up` ended ({tree.returncode}): {why}")

    def _stop(self, tree: subprocess.Popen[bytes]) -> None:
        if tree.poll() is None:
            tree.send_signal(signal.SIGINT)
        with self._console.status("stopping server, updater and broker"):
            try:
                tree.wait(timeout=90)
            except subprocess.TimeoutExpired:
                tree.kill()
                tree.wait()

    # --- learning ---------------------------------------------------------------------------

    async def _learn(self, server: str, updater: str, tree: subprocess.Popen[bytes]) -> None:
        crowd = Crowd(server, ALIAS, training_questions(self._options.seed), self._options.seed)
        stop = asyncio.Event()
        status: dict[str, Any] = {"server": {}, "updater": {}}
        with Live(self.display, console=self._console, refresh_per_second=4):
            await self._evaluate(crowd, 0)
            people = [
                asyncio.create_task(crowd.live(stop, self._pace(number, status)))
                for number in range(PEOPLE)
            ]
            try:
                while not self._finished():
                    self._check_alive(tree)
                    await self._refresh(server, updater, status, crowd)
                    version = status["server"].get("policy_version", 0)
                    if version > self.evaluations[-1].version:
                        await self._evaluate(crowd, version)
                    await asyncio.sleep(0.5)
            finally:
                stop.set()
                await asyncio.gather(*people)
            self.display.set_note("people have gone home; waiting until every event has its fate")
            await self._drain(server, updater, status, crowd)
            version = status["server"].get("policy_version", 0)
            if version > self.evaluations[-1].version:
                await self._evaluate(crowd, version)
            await self._refresh(server, updater, status, crowd)  # the last swap is in its history
        await crowd.close()
        self._report(crowd, status)

    def _pace(self, number: int, status: dict[str, Any]) -> Callable[[], float | None]:
        """How long person ``number`` pauses: most wait while the updater works, a few ask on."""

        def pause_seconds() -> float | None:
            busy = status["updater"].get("phase") in ("training", "measuring", "gating")
            ready = status["updater"].get("ready_examples", 0)
            if not busy and ready < int(DEMO_SETTINGS["learning.batch_examples"]):
                return 0.0
            return THINKING_SECONDS if number < PEOPLE_WHILE_TRAINING else None

        return pause_seconds

    def _finished(self) -> bool:
        if self._elapsed() >= self._options.minutes * 60:
            return True
        releases = self.evaluations[-1].version
        last = [evaluation.reward for evaluation in self.evaluations[-2:]]
        reached = min(last) >= float(self._options.target)
        return reached and releases >= int(self._options.min_releases)

    async def _refresh(
        self, server: str, updater: str, status: dict[str, Any], crowd: Crowd
    ) -> None:
        """Read the status of both processes; one that does not answer keeps its last one."""
        for name, url in (
            ("server", f"{server}/v1/moorline/status"),
            ("updater", f"{updater}/status"),
        ):
            with contextlib.suppress(ServerUnavailable):
                status[name] = await asyncio.to_thread(request_json, "GET", url)
        self.display.update(self._elapsed(), status, crowd.tally, self.evaluations)

    async def _evaluate(self, crowd: Crowd, version: int) -> None:
        """Ask the served policy the held-out questions; their replies are not recorded."""
        self.display.set_note(f"asking held-out questions of v{version}")
        questions = held_out_questions()
        room = asyncio.Semaphore(HELD_OUT_CONCURRENCY)

        async def one(index: int) -> tuple[int, str, bool] | None:
            question = questions[index]
            async with room:
                reply = await crowd.ask(question, streamed=False, recorded=False, seed=index)
            if reply is None:
                return None
            return reply.version, reply.text, is_good(question, reply.text, reply.finish_reason)

        answers = await asyncio.gather(*(one(index) for index in range(len(questions))))
        answered = [answer for answer in answers if answer is not None]
        if not answered:
            raise DemoError(f"no held-out question was answered: see {self._state / 'logs'}")
        samples = tuple(
            (questions[index].text, answer[1], answer[2])
            for index, answer in enumerate(answers[:SAMPLES_SHOWN])
            if answer is not None
        )
        self.evaluations.append(
            Evaluation(
                version=max(version, min(answer[0] for answer in answered)),
                at_seconds=self._elapsed(),
                reward=sum(answer[2] for answer in answered) / len(answered),
                replies=len(answered),
                samples=samples,
            )
        )
        last = self.evaluations[-1]
        self._console.print(
            f"{last.at_seconds / 60:5.1f} min  v{last.version}: {last.reward:.2f} of "
            f"{last.replies} held-out replies are good"
        )
        self.display.set_note("")

    async def _drain(self, server: str, updater: str, status: dict[str, Any], crowd: Crowd) -> None:
        """Wait until every event is read, the updater idle and its last release served.

        At most ``DRAIN_SECONDS``.
        """
        deadline = time.monotonic() + DRAIN_SECONDS
        while time.monotonic() < deadline:
            await self._refresh(server, updater, status, crowd)
            lag = sum(status["updater"].get("lag_events", {}).values())
            unsent = status["server"].get("publisher", {}).get("queued", 0)
            served = status["server"].get("policy_version") == status["updater"].get("live_version")
            idle = status["updater"].get("phase") == "waiting"
            if lag == 0 and unsent == 0 and idle and served:
                return
            await asyncio.sleep(1.0)

    # --- report -----------------------------------------------------------------------------

    def _report(self, crowd: Crowd, status: dict[str, Any]) -> None:
        releases = ArtifactStore(self._state / "store").releases(ALIAS)
        table = [_release_row(release, self._started_unix) for release in releases]
        swaps = [swap for swap in status["server"].get("swaps", []) if swap["outcome"] == "swapped"]
        tally = crowd.tally
        facts: dict[str, Any] = {
            "rule": RULE,
            "reward_before": self.evaluations[0].reward,
            "reward_after": self.evaluations[-1].reward,
            "held_out_questions": self.evaluations[-1].replies,
            "releases": len(releases),
            "rejected": status["updater"].get("updates", {}).get("rejected", 0),
            "requests": tally.requests,
            "streamed_requests": tally.streamed,
            "failed_requests": tally.failed_requests,
            "failures": tally.failures,
            "unattributed_replies": tally.unattributed_replies,
            "ratings": tally.rated,
            "ratings_late": tally.rated_late,
            "ratings_repeated": tally.rated_twice,
            "failed_ratings": tally.failed_ratings,
            "swap_mode": status["server"].get("swap_mode", ""),
            "swap_pause_seconds": [swap["pause_seconds"] for swap in swaps],
            "swap_at_seconds": [swap["at"] - self._started_unix for swap in swaps],
            "parity_nats": [swap["parity_nats"] for swap in swaps],
            "max_stream_gap_seconds": tally.max_stream_gap_seconds,
            "kl_live_nats": [row["kl_live_nats"] for row in table],
            "kl_anchor_nats": [row["kl_anchor_nats"] for row in table],
            "kl_anchor_limit_nats": float(DEMO_SETTINGS["bound.anchor_kl_nats"]),
            "release_table": table,
            "accounting": status["updater"].get("accounting", {}),
            "wall_seconds": self._elapsed(),
        }
        as_json, as_text, picture = write_report(self._output, facts, self.evaluations)
        print_line = self._console.print
        print_line(
            f"\n[bold]held-out reward {facts['reward_before']:.2f} -> "
            f"{facts['reward_after']:.2f}[/] "
            f"over {facts['releases']} releases; {facts['requests']} requests, "
            f"{facts['failed_requests']} failed"
        )
        for what, path in (("report", as_text), ("numbers", as_json), ("picture", picture)):
            print_line(f"  {what:<8} {path}")

    def _elapsed(self) -> float:
        return time.monotonic() - self._started_at


def _release_row(release: Any, started_unix: float) -> dict[str, Any]:
    def kl(reference: str) -> float:
        measured = {
            (one.measured_from, one.tokens_from): one.mean_kl_nats for one in release.divergences
        }
        fallback = measured.get((reference, "probes"), 0.0)
        return float(measured.get((reference, "traffic"), fallback))

    return {
        "version": release.version,
        "name": release.name,
        "at_seconds": release.created_at - started_unix,
        "kl_live_nats": kl("live"),
        "kl_anchor_nats": kl("anchor"),
        "step_scale": release.step_scale,
        "examples": release.examples,
        "checks_passed": sum(check.passed for check in release.verdict.checks),
        "diagnostics": release.diagnostics,
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="moorline demo",
        description="Watch a real model, served by vLLM, learn from simulated people's thumbs.\n"
        "Everything runs on this machine and stops by itself.",
        epilog="Examples:\n\n"
        "  moorline demo\n"
        "  moorline demo --minutes 5\n"
        "  moorline demo --set learning.objective=ppo_clip --output demo-ppo\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, default=Path("demo"), help="default: ./demo")
    parser.add_argument(
        "--model",
        type=Path,
        default=Path(".models/SmolLM2-135M-Instruct"),
        help="unpacked here once; default: %(default)s",
    )
    parser.add_argument(
        "--minutes", type=float, default=10.5, help="end after so long; default: %(default)s"
    )
    parser.add_argument(
        "--target",
        type=float,
        default=0.75,
        help="end when two evaluations in a row reach this share of good replies; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--min-releases",
        type=int,
        default=4,
        help="do not end before so many releases; default: %(default)s",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of questions and people; default: %(default)s"
    )
    parser.add_argument(
        "--set", action="append", metavar="NAME=VALUE", help="any setting; repeat at will"
    )
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    console = Console()
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell had them ignored
        signal.signal(number, signal.default_int_handler)
    try:
        return Demo(options, console).run()
    except KeyboardInterrupt:
        console.print("stopped; everything was shut down")
        return 130
    except (DemoError, ModelUnavailable) as error:
        Console(stderr=True).print(f"moorline demo: {error}", highlight=False)
        return 1


if __name__ == "__main__":
    sys.exit(main())
