"""Adapter slots: held while live or while the engine computes with them, and by nothing else."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serving.context import Admission
from serving.parity import ParityError
from serving.strategies import AdapterFlip, EngineInvalid, WeightReload
from serving.vllm.models import LivePolicy, LoRARequest, PolicyModels, ServedPolicy

ALIAS = "assistant"


class Engine:
    """What AdapterFlip knows of vLLM's: which adapters it has, and its unfinished requests."""

    def __init__(self) -> None:
        self.adapters: list[str] = []
        self.output_processor = SimpleNamespace(request_states={})

    async def add_lora(self, adapter: LoRARequest) -> None:
        self.adapters.append(adapter.lora_name)

    async def remove_lora(self, adapter_id: int) -> None:
        self.adapters = [name for name in self.adapters if not name.endswith(f"{adapter_id}")]

    def begin(self, request: str, adapter: LoRARequest | None) -> None:
        """A request that the engine computes until ``end``."""
        self.output_processor.request_states[request] = SimpleNamespace(lora_request=adapter)

    def end(self, request: str) -> None:
        del self.output_processor.request_states[request]


class World:
    """A strategy with two slots; the integer id of each adapter is its version."""

    def __init__(self) -> None:
        self.live = LivePolicy(ALIAS)
        self.engine = Engine()
        models = PolicyModels.__new__(PolicyModels)  # its own start needs an engine
        models._live, models.lora_requests = self.live, {}
        self.flip = AdapterFlip(self.engine, models, self.live, max_loras=2, timeout_seconds=60.0)

    def policy(self, version: int) -> ServedPolicy:
        return ServedPolicy(version, None, Path("adapters") / str(version) if version else None)

    async def serve(self, version: int, check: Any = None) -> None:
        async def passes(_: Any) -> None: ...

        await self.flip.remove_unused()
        assert self.flip.has_room(self.policy(version))
        await self.flip.swap(self.policy(version), check or passes)
        assert self.live.version == version

    def ask(self, request: str) -> None:
        self.engine.begin(request, self.flip.live_adapter)


def name(version: int) -> str:
    return f"{ALIAS}@v{version:06d}"


async def test_an_adapter_stays_while_the_engine_computes_with_it_and_no_longer() -> None:
    world = World()
    await world.serve(1)
    world.ask("slow")
    await world.serve(2)
    await world.flip.remove_unused()
    assert world.engine.adapters == [name(1), name(2)]
    assert not world.flip.has_room(world.policy(3))
    world.engine.end("slow")  # whether its client has read the reply does not matter
    await world.flip.remove_unused()
    assert world.engine.adapters == [name(2)]
    assert world.flip.has_room(world.policy(3))


async def test_full_slots_leave_the_way_back_open() -> None:
    world = World()
    await world.serve(1)
    world.ask("slow")
    await world.serve(2)
    world.ask("slow too")
    assert not world.flip.has_room(world.policy(3))
    await world.serve(0)
    assert world.flip.live_adapter is None
    await world.serve(1)
    assert world.engine.adapters == [name(1), name(2)], "it was loaded again"
    await world.serve(2)
    assert world.flip.live_adapter is not None
    assert world.flip.live_adapter.lora_name == name(2)


async def test_an_adapter_that_fails_its_check_gives_its_slot_back() -> None:
    world = World()
    await world.serve(1)

    async def fails(_: Any) -> None:
        raise ParityError("something else")

    with pytest.raises(ParityError):
        await world.serve(2, fails)
    assert world.live.version == 1
    await world.flip.remove_unused()
    assert world.engine.adapters == [name(1)]


class HungEngine:
    """An engine of the reload strategy that never answers at one step."""

    def __init__(self, hangs_at: str) -> None:
        self._hangs_at = hangs_at

    async def _step(self, name: str) -> None:
        if name == self._hangs_at:
            await asyncio.Event().wait()

    async def collective_rpc(self, method: str, args: Any) -> None:
        del args
        await self._step(method)

    async def pause_generation(self, **_: Any) -> None:
        await self._step("pause")

    async def update_weight_version(self, _: str) -> None:
        await self._step("name")

    async def resume_generation(self) -> None:
        await self._step("resume")


@pytest.mark.parametrize(
    "step", ["moorline_prepare", "pause", "moorline_load_prepared", "name", "resume"]
)
async def test_an_engine_that_hangs_in_an_exchange_is_broken_and_holds_nobody_back(
    step: str, tmp_path: Path
) -> None:
    async def passes(_: Any) -> None: ...

    admission = Admission()
    reload = WeightReload(HungEngine(step), LivePolicy(ALIAS), tmp_path, admission, 0.2)
    with pytest.raises(EngineInvalid, match=r"no answer in 0\.2 s"):
        await reload.swap(ServedPolicy(1, None, tmp_path), passes)
    assert not admission.held_back


async def test_an_engine_that_hangs_on_an_adapter_is_broken_and_the_release_is_not() -> None:
    world = World()

    async def hangs(_: LoRARequest) -> None:
        await asyncio.Event().wait()

    world.engine.add_lora = hangs  # type: ignore[method-assign]
    world.flip._timeout_seconds = 0.2
    with pytest.raises(EngineInvalid, match=r"no answer in 0\.2 s"):
        await world.serve(1)
    assert world.live.version == 0
