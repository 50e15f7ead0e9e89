"""What is served follows the pin; a poll that fails changes nothing, and is logged once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moorline.adapter_format import PARITY_FILE, ParityBatch, ParitySequence
from moorline.events import Decision, Release, ReleaseKind, Verdict
from moorline.store import ArtifactStore
from serving import swap
from serving.parity import candidate_logprobs
from serving.strategies import PolicyInvalid, SwapStrategy
from serving.swap import SwapController, SwapOutcome
from serving.vllm.models import LivePolicy, ServedPolicy


def events(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [getattr(record, "event", None) for record in caplog.records]


async def until(caplog: pytest.LogCaptureFixture, event: str) -> None:
    async with asyncio.timeout(10):
        while event not in events(caplog):
            await asyncio.sleep(0.01)


class Strategy(SwapStrategy):
    """Makes live what has room, and notes each attempt; ``meanwhile`` happens in each swap."""

    mode = "adapter"

    def __init__(self, live: LivePolicy) -> None:
        self.live = live
        self.full = False
        self.refuse: set[int] = set()
        self.attempts: list[int] = []
        self.meanwhile: Callable[[], object] = lambda: None

    @property
    def live_adapter(self) -> None:
        return None

    async def remove_unused(self) -> None: ...

    def has_room(self, target: ServedPolicy) -> bool:
        return target.version == 0 or not self.full

    async def swap(self, target: ServedPolicy, check: Any) -> float:
        del check
        self.attempts.append(target.version)
        self.meanwhile()
        if target.version in self.refuse:
            raise PolicyInvalid("of another shape")
        self.live.policy = target
        return 0.0


def controller(store_dir: Path) -> SwapController:
    live = LivePolicy("assistant")
    return SwapController(
        alias="assistant",
        store=ArtifactStore(store_dir),
        live=live,
        strategy=Strategy(live),
        generate=None,  # type: ignore[arg-type]
        base_model_digest="0" * 64,
        parity_tolerance_nats=0.1,
    )


@dataclass
class World:
    """A store, and what swaps to its releases."""

    store: ArtifactStore
    swaps: SwapController
    strategy: Strategy

    def release(self, version: int) -> None:
        """One that needs no files."""
        self.store.record_release(
            Release(
                alias="assistant",
                version=version,
                parent=version - 1,
                kind=ReleaseKind.BASE,
                artifact_digest=None,
                files=(),
                base_model_digest="0" * 64,
                created_at=1e9,
            )
        )


@pytest.fixture
def world(tmp_path: Path) -> World:
    swaps = controller(tmp_path)
    strategy = swaps._strategy
    assert isinstance(strategy, Strategy)
    return World(swaps._store, swaps, strategy)


async def test_a_rollback_passes_a_release_that_waits_for_a_slot(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.release(1)
    await world.swaps.serve_wanted()
    world.strategy.full = True
    world.release(2)
    for _ in range(3):
        await world.swaps.serve_wanted()
    assert world.strategy.live.version == 1
    assert events(caplog).count("swap_waits_for_slot") == 1
    world.store.pin("assistant", 0, "test")
    await world.swaps.serve_wanted()
    assert world.strategy.live.version == 0
    world.store.unpin("assistant")
    await world.swaps.serve_wanted()
    assert world.strategy.live.version == 0
    world.strategy.full = False
    await world.swaps.serve_wanted()
    assert world.strategy.live.version == 2
    assert world.strategy.attempts == [1, 0, 2]


async def test_a_rollback_that_arrives_during_a_swap_is_the_next_one(world: World) -> None:
    for version in (1, 2, 3):
        world.release(version)
    world.strategy.meanwhile = lambda: world.store.pin("assistant", 1, "test")
    await world.swaps.serve_wanted()
    assert world.strategy.attempts == [3, 1]
    assert world.strategy.live.version == 1


async def test_a_rollback_that_arrives_while_releases_are_refused_is_the_next_one(
    world: World,
) -> None:
    for version in (1, 2, 3, 4):
        world.release(version)
    world.strategy.refuse = {3, 4}
    world.strategy.meanwhile = lambda: world.store.pin("assistant", 1, "test")
    await world.swaps.serve_wanted()
    assert world.strategy.attempts == [4, 1]
    assert world.strategy.live.version == 1


async def test_a_pin_that_cannot_be_read_is_logged_once_and_its_repair_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swap, "POLL_SECONDS", 0.01)
    pin = tmp_path / "releases" / "assistant" / "pin.json"
    pin.parent.mkdir(parents=True)
    pin.write_text("{")
    swaps = controller(tmp_path)
    following = asyncio.create_task(swaps.follow())
    await until(caplog, "pin_invalid")
    await asyncio.sleep(0.1)
    assert events(caplog) == ["pin_invalid"]
    assert swaps.first_poll_done
    assert not swaps.first_policy_live
    pin.unlink()
    await until(caplog, "swap_loop_recovered")
    assert swaps.first_policy_live
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following
    assert events(caplog) == ["pin_invalid", "swap_loop_recovered"]


# --- which version is loaded ----------------------------------------------------------------------

BASE = "0" * 64
PARITY = ParityBatch(
    sequences=(
        ParitySequence(
            prompt_token_ids=(1,),
            completion_token_ids=(2,),
            candidate_logprobs=(-1.0,),
            parent_logprobs=(-2.0,),
        ),
    )
)


class Loads:
    """A strategy that loads whatever it is told."""

    mode = "reload"
    live_adapter = None

    def __init__(self, live: LivePolicy) -> None:
        self._live = live
        self.loaded: list[int] = []

    async def swap(self, target: ServedPolicy, check: Any) -> float:
        del check
        self.loaded.append(target.version)
        self._live.policy = target
        return 0.0

    async def remove_unused(self) -> None:
        """Nothing is."""

    def has_room(self, target: ServedPolicy) -> bool:
        del target
        return True


class Server:
    """A controller over a real store, and what it loaded."""

    def __init__(self, root: Path) -> None:
        self.store = ArtifactStore(root)
        live = LivePolicy("assistant")
        self.strategy = Loads(live)
        self.swaps = SwapController(
            alias="assistant",
            store=self.store,
            live=live,
            strategy=self.strategy,
            generate=None,  # type: ignore[arg-type]
            base_model_digest=BASE,
            parity_tolerance_nats=0.1,
        )

    def release(self, version: int, parent: int = 0, base: str = BASE) -> Release:
        files = {"weights": b"%d" % version, PARITY_FILE: PARITY.model_dump_json().encode()}
        digest, listed = self.store.put(files)
        verdict = Verdict(decision=Decision.PASS, artifact_digest=digest, checks=(), seconds=0.0)
        made = Release(
            alias="assistant",
            version=version,
            parent=parent,
            kind=ReleaseKind.ADAPTER,
            artifact_digest=digest,
            files=listed,
            base_model_digest=base,
            created_at=1.0,
            verdict=verdict,
        )
        self.store.record_release(made)
        return made

    def damage(self, release: Release) -> None:
        weights = self.store.root / "artifacts" / str(release.artifact_digest) / "weights"
        weights.write_bytes(b"x")


async def test_the_newest_release_is_loaded_once(tmp_path: Path) -> None:
    server = Server(tmp_path)
    for version in (1, 2):
        server.release(version)
    for _ in range(2):
        await server.swaps.serve_wanted()
    assert server.strategy.loaded == [2]
    assert [one.outcome for one in server.swaps.history] == [SwapOutcome.SWAPPED]


async def test_a_release_of_another_base_model_is_refused_and_the_one_before_it_served(
    tmp_path: Path,
) -> None:
    server = Server(tmp_path)
    server.release(1)
    server.release(2, base="1" * 64)
    for _ in range(3):
        await server.swaps.serve_wanted()
    assert server.strategy.loaded == [1]
    assert server.swaps.refused == {2: SwapOutcome.REFUSED}
    assert [one.version for one in server.swaps.history] == [2, 1], "each was tried once"


async def test_a_damaged_release_is_tried_once(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.damage(server.release(1))
    for _ in range(3):
        await server.swaps.serve_wanted()
    assert server.strategy.loaded == []
    assert server.swaps.refused == {1: SwapOutcome.CORRUPT}
    assert len(server.swaps.history) == 1


async def test_a_pin_serves_its_version_and_nothing_newer(tmp_path: Path) -> None:
    server = Server(tmp_path)
    for version in (1, 2, 3):
        server.release(version)
    server.store.pin("assistant", 2, "a test")
    await server.swaps.serve_wanted()
    assert server.strategy.loaded == [2]
    assert server.swaps.pinned_version == 2


async def test_at_start_a_damaged_pinned_version_gives_way_to_an_older_one_only(
    tmp_path: Path,
) -> None:
    server = Server(tmp_path)
    releases = {version: server.release(version) for version in (1, 2, 3)}
    server.store.pin("assistant", 2, "a test")
    server.damage(releases[2])
    for _ in range(2):
        await server.swaps.serve_wanted()
    assert server.strategy.loaded == [1]
    assert server.swaps.refused == {2: SwapOutcome.CORRUPT}


async def test_while_serving_a_damaged_pinned_version_changes_nothing(tmp_path: Path) -> None:
    server = Server(tmp_path)
    first = server.release(1)
    server.release(2)
    await server.swaps.serve_wanted()
    server.store.pin("assistant", 1, "a test")
    server.damage(first)
    for _ in range(2):
        await server.swaps.serve_wanted()
    assert server.strategy.loaded == [2]
    assert [one.version for one in server.swaps.history] == [2, 1], "no other was tried"


@pytest.mark.parametrize(("off_by_nats", "served"), [(0.09, True), (0.11, False)])
async def test_the_tolerance_of_the_settings_decides_parity(
    tmp_path: Path, off_by_nats: float, served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server(tmp_path)
    server.release(1)

    async def checked(target: ServedPolicy, check: Any) -> float:
        await check(None)
        return await Loads.swap(server.strategy, target, check)

    async def scored(*_: Any) -> Any:
        return candidate_logprobs(PARITY) + off_by_nats

    monkeypatch.setattr(server.strategy, "swap", checked)
    monkeypatch.setattr(swap, "score", scored)
    await server.swaps.serve_wanted()
    assert (server.strategy.loaded == [1]) is served
    (record,) = server.swaps.history
    assert record.outcome is (SwapOutcome.SWAPPED if served else SwapOutcome.PARITY_FAILED)
    assert record.parity_nats == (pytest.approx(off_by_nats) if served else None)
