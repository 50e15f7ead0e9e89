"""What is served follows the pin; a poll that fails changes nothing, and is logged once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moorline.events import Release, ReleaseKind
from moorline.store import ArtifactStore
from serving import swap
from serving.strategies import PolicyInvalid, SwapStrategy
from serving.swap import SwapController
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
    assert [event for event in events(caplog) if event] == ["swap_waits_for_slot"]
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
