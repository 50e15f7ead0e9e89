"""A hung engine is told from an idle one, a slow client, a swap and a paused process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator

import pytest

from serving.engine_watch import EngineWatch


class World:
    """An engine whose outputs and whose time the test gives."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.held_back = False
        self.watch = EngineWatch(120.0, lambda: self.held_back, lambda: self.seconds)
        self.queues: list[asyncio.Queue[int | None]] = []

    async def outputs(self, queue: asyncio.Queue[int | None]) -> AsyncGenerator[int, None]:
        while (output := await queue.get()) is not None:
            yield output

    async def ask(self) -> asyncio.Task[int | None]:
        """A request that waits for its first output, which ``answer`` gives."""
        self.queues.append(asyncio.Queue())
        task = asyncio.create_task(self.watch.next_output(self.outputs(self.queues[-1])))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return task

    async def passes(self, seconds: float) -> None:
        self.seconds += seconds
        self.watch.report()


async def test_an_engine_that_gives_nothing_while_somebody_waits_hangs() -> None:
    world = World()
    task = await world.ask()
    await world.passes(119.0)
    assert world.watch.why_hung() is None
    await world.passes(2.0)
    assert "for 121 s in which replies waited" in str(world.watch.why_hung())
    world.queues[0].put_nowait(1)
    assert await task == 1
    assert world.watch.why_hung() is None


async def test_an_output_for_anybody_shows_that_it_works() -> None:
    world = World()
    waits = await world.ask()
    for _ in range(3):
        other = await world.ask()
        await world.passes(100.0)
        world.queues[-1].put_nowait(1)
        await other
        assert world.watch.why_hung() is None
    waits.cancel()


async def test_clients_that_give_up_and_come_again_do_not_hide_it() -> None:
    world = World()
    for _ in range(3):
        task = await world.ask()
        await world.passes(50.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await world.passes(1000.0)  # nobody waits: this is no silence of the engine's
    assert "for 150 s" in str(world.watch.why_hung())


async def test_clients_that_leave_at_once_are_no_witnesses() -> None:
    world = World()
    for _ in range(1000):
        task = await world.ask()
        await world.passes(1.0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert world.watch.why_hung() is None


async def test_time_in_which_replies_are_held_back_does_not_count() -> None:
    world = World()
    task = await world.ask()
    await world.passes(10.0)
    world.held_back = True
    await world.passes(500.0)
    world.held_back = False
    await world.passes(109.0)
    assert world.watch.why_hung() is None
    await world.passes(2.0)
    assert "for 121 s" in str(world.watch.why_hung())
    task.cancel()


async def test_an_engine_that_has_ended_the_reply_does_not_hang() -> None:
    world = World()
    task = await world.ask()
    world.queues[0].put_nowait(None)
    assert await task is None
    await world.passes(500.0)
    assert world.watch.why_hung() is None


async def test_it_is_said_once_and_the_recovery_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "moorline.serving")
    world = World()
    task = await world.ask()
    for _ in range(3):
        await world.passes(100.0)
    world.queues[0].put_nowait(1)
    await task
    await world.passes(1.0)
    said = [record.__dict__["event"] for record in caplog.records]
    assert said == ["engine_hung", "engine_works_again"]
