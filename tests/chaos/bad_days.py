"""An operator's bad days: stalled clients, a lost ledger, a spent budget, a paused watcher.

Other faults last for a while and then are over. Each of these has a way out that is promised, so
each is also walked to its end, and what was not as promised is a violation.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from moorline.store import StoreError
from tests.chaos.oracle import Loss, copy_ledger, decisions, drop_ledger
from tests.chaos.schedule import Fault
from tests.chaos.world import ALIAS, BATCH_EXAMPLES, World, wait_until
from tests.daemon.supervisor_process import Tree
from tests.serving.deaf_clients import client_that_does_not_read
from updater.ledger import Ledger

PATIENCE_SECONDS = 90.0
ROLLBACK_SECONDS = 20.0  # two cores for all of it: benchmarks measure how long it takes in peace
STALL_SECONDS = 15.0
HANG_SECONDS = 8.0
SPENT = {"MOORLINE_BOUND__ANCHOR_KL_NATS": "1e-12"}


class Terms:
    """Terms of office of the server: from one fault to the next."""

    def __init__(self) -> None:
        self._number = 0
        self.now: int | None = None
        """A number that changes with every fault; None: it is not up; negative: it has a failpoint
        that will kill it at an unknown moment."""

    def end(self) -> None:
        self.now = None

    def begin(self, *, armed: bool = False) -> None:
        self._number += 1
        self.now = -self._number if armed else self._number


class BadDays:
    """Strikes that walk the way out, too. One that returns False found nothing to strike."""

    def __init__(
        self, world: World, terms: Terms, disk: asyncio.Lock, violated: Callable[[str], None]
    ) -> None:
        """``disk``: whoever has it keeps the disk from filling up."""
        self._world = world
        self._disk = disk
        self._terms = terms
        self._violated = violated
        self.updater = asyncio.Lock()
        """Whoever has it says which updater runs."""
        self.losses: list[Loss] = []

    # --- clients that do not read, and a rollback -------------------------------------------

    async def roll_back(self, _: Fault) -> None:
        """A rollback is served though replies hold each adapter slot, and then these are ended."""
        async with self._serving(
            MOORLINE_SERVING__SWAP_MODE="adapter",
            MOORLINE_SERVING__MAX_LORAS="2",
            MOORLINE_SERVING__STREAM_STALL_SECONDS=str(STALL_SECONDS),
        ):
            await asyncio.to_thread(self._roll_back)

    def _roll_back(self) -> None:
        server = self._world.server
        with ExitStack() as clients:
            clients.enter_context(client_that_does_not_read(server.url))
            first = self._version_served()
            wait_until(lambda: self._version_served() != first, 20.0)
            clients.enter_context(client_that_does_not_read(server.url))
            time.sleep(2.0)
            if not wait_until(lambda: self._pin(0), PATIENCE_SECONDS):
                self._violated("a rollback could not be written")
                return
            began = time.monotonic()
            try:
                if wait_until(lambda: self._version_served() == 0, ROLLBACK_SECONDS):
                    self._world.counts.rollback_seconds.append(time.monotonic() - began)
                else:
                    self._violated(f"a rollback was not served in {ROLLBACK_SECONDS:g} s")
                ended = "moorline_stalled_clients_total"
                if not wait_until(lambda: server.metric(ended) >= 2, PATIENCE_SECONDS):
                    self._violated("clients that do not read were not ended")
            finally:
                wait_until(self._unpin, PATIENCE_SECONDS)

    def _version_served(self) -> int:
        return int(self._world.server.status()["policy_version"])

    def _pin(self, version: int) -> bool:
        """False: the disk refused."""
        with suppress(StoreError):
            self._world.store.pin(ALIAS, version, "chaos")
            return True
        return False

    def _unpin(self) -> bool:
        with suppress(StoreError):
            self._world.store.unpin(ALIAS)
            return True
        return False

    # --- the ledger is lost, or an older one is put back --------------------------------------

    async def lose_ledger(self, _: Fault) -> bool:
        """All of it: the next start goes on from the releases that the store has."""
        async with self.updater, self._disk:
            return await asyncio.to_thread(self._lose, None)

    async def put_back_older_ledger(self, _: Fault) -> bool:
        """A copy of the ledger takes its place when there are newer releases."""
        path = self._world.settings.ledger_path
        copy = self._world.root / "older-ledgers" / str(len(self.losses))
        async with self.updater:
            if not path.exists():
                return False
            await asyncio.to_thread(copy_ledger, path, copy)
        before = self._live_version()
        newer = await asyncio.to_thread(
            wait_until, lambda: self._live_version() > before, PATIENCE_SECONDS
        )
        if not newer:
            return False
        async with self.updater, self._disk:
            return await asyncio.to_thread(self._lose, copy / path.name)

    def _publish_all(self) -> bool:
        """What the ledger has decided, servers know, so that the ledger alone is lost."""
        for _ in range(3):
            self._world.start_updater()
            wait_until(lambda: not self._unpublished(), PATIENCE_SECONDS)
            self._end_updater()
            if not self._unpublished():
                return True
        return False

    def _lose(self, copy: Path | None) -> bool:
        """Put the copy in the ledger's place, if there is one."""
        if not self._publish_all():
            return False
        path = self._world.settings.ledger_path
        lost = copy_ledger(path, self._world.root / "lost-ledgers" / str(len(self.losses)))
        drop_ledger(path)
        if copy is not None:
            copy_ledger(copy, path.parent)
        self.losses.append(Loss(time.time(), lost, copy))
        return True

    def _unpublished(self) -> bool:
        return bool(self._ask(lambda ledger: ledger.unpublished(), [None]))

    def _live_version(self) -> int:
        return int(self._ask(lambda ledger: ledger.live_version(), 0))

    def _ask(self, question: Callable[[Any], Any], otherwise: Any) -> Any:
        """Ask the ledger; ``otherwise`` is the answer while there is none yet."""
        if not self._world.settings.ledger_path.exists():
            return otherwise
        with Ledger.open_readonly(self._world.settings.ledger_path) as ledger:
            return question(ledger)

    # --- the anchor's budget is spent ---------------------------------------------------------

    async def spend_anchor_budget(self, _: Fault) -> bool:
        """Nothing is consumed while it is spent, and a person's `reanchor` is the way on."""
        async with self.updater:
            return await asyncio.to_thread(self._spend_anchor_budget)

    def _spend_anchor_budget(self) -> bool:
        moved = self._ask(lambda ledger: ledger.live_version() - ledger.anchor().version, 0)
        if moved < 2:
            return False
        before = self._ask(decisions, [])
        said = self._world.updater_log.stat().st_size
        self._world.start_updater(**SPENT)
        spent = wait_until(lambda: "anchor_exhausted" in self._log_since(said), PATIENCE_SECONDS)
        self._end_updater()
        if self._ask(decisions, []) != before:
            self._violated("a batch was decided though the anchor's budget was spent")
        if not spent:
            if self._ask(lambda ledger: ledger.count_ready(), 0) >= BATCH_EXAMPLES:
                self._violated("the anchor's budget was spent, and the updater did not say so")
            return False
        if not wait_until(self._reanchor, PATIENCE_SECONDS):
            self._violated("`moorline reanchor` did not work")
        return True

    def _log_since(self, position: int) -> str:
        with self._world.updater_log.open(errors="replace") as log:
            log.seek(position)
            return log.read()

    def _reanchor(self) -> bool:
        """As a person does it; False: the disk refused."""
        done = subprocess.run(
            [sys.executable, "-m", "daemon.cli", "reanchor", "--reason", "chaos", "--by", "chaos"],
            env=os.environ | self._world.variables,
            capture_output=True,
            check=False,
        )
        return done.returncode == 0

    def _end_updater(self) -> None:
        self._world.signal_updater(signal.SIGKILL)
        self._world.updater_exit(PATIENCE_SECONDS)
        self._world.counts.kills += 1

    # --- a watcher is paused --------------------------------------------------------------------

    async def pause_supervisor(self, fault: Fault) -> None:
        """Whoever watches is paused, alone and with what it watches: nothing healthy is killed."""
        self._terms.end()
        await asyncio.to_thread(self._world.server.terminate)
        tree = await asyncio.to_thread(self._supervised)
        try:
            await asyncio.to_thread(tree.wait_for, "all_ready")
            self._world.server.url = self._world.server_url
            server = _children(tree.process.pid)
            for group in ([], server):
                self._terms.begin()
                await self._pause(tree.process.pid, group, fault.lasts_seconds)
                await asyncio.sleep(HANG_SECONDS)
            if _children(tree.process.pid) != server:
                self._violated("a healthy server was ended after its watcher had been paused")
        finally:
            self._terms.end()
            tree.process.terminate()
            code = await asyncio.to_thread(tree.end)
        if code != 0:
            self._violated(f"the supervisor ended with {code}: {tree.said}")
        await asyncio.to_thread(self._world.start_server)
        self._terms.begin()

    def _supervised(self) -> Tree:
        """The server under a supervisor."""
        url = self._world.server_url
        child = {
            "name": "server",
            "argv": [sys.executable, "-m", "serving"],
            "ready_url": f"{url}/readyz",
            "alive_url": f"{url}/healthz",
            "hang_seconds": HANG_SECONDS,
            "grace_seconds": 60.0,
        }
        folder = self._world.root / "supervisor"
        folder.mkdir(exist_ok=True)
        return Tree(folder, {"children": [child]}, **self._world.server.environment)

    async def _pause(self, supervisor: int, groups: list[int], seconds: float) -> None:
        os.kill(supervisor, signal.SIGSTOP)
        if groups:
            self._terms.end()
        for group in groups:
            os.killpg(group, signal.SIGSTOP)
        await asyncio.sleep(seconds)
        for group in groups:
            os.killpg(group, signal.SIGCONT)
        os.kill(supervisor, signal.SIGCONT)
        if groups:
            self._terms.begin()

    @asynccontextmanager
    async def _serving(self, **changes: str) -> AsyncIterator[None]:
        """The server with other settings for a while."""
        await self._restart(**changes)
        try:
            yield
        except httpx.HTTPError as error:
            self._violated(f"the server did not answer: {error!r}")
        await self._restart()

    async def _restart(self, **changes: str) -> None:
        self._terms.end()
        code = await asyncio.to_thread(self._world.server.terminate)
        if code != 0:
            self._violated(f"the server ended with {code} after SIGTERM")
        await asyncio.to_thread(self._world.start_server, "", **changes)
        self._terms.begin()


def _children(pid: int) -> list[int]:
    """Processes that it started; each leads a group."""
    with contextlib.suppress(FileNotFoundError):
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []
