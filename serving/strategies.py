"""The two ways to change the policy of a running engine.

*Adapter flip*: the new LoRA adapter is loaded beside the old one, scored, and one assignment gives
it to new requests; running replies finish on theirs. *Weight reload*: generation is paused for
a moment, base + adapter are loaded in place, and running replies go on with the new weights (their
tokens are attributed by spans).

The order differs in where parity is measured. An adapter is scored before any user gets it. Weights
can only be scored by an engine that runs, so a reload is scored right after it resumes; a release
that fails was served for as long as that takes (a fraction of a second) before it is taken back.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

from moorline.clock import running_seconds
from moorline.errors import MoorlineError
from moorline.events import policy_name
from moorline.failpoints import failpoint
from serving.context import Admission
from serving.parity import ParityError
from serving.vllm.models import (
    LivePolicy,
    LoRARequest,
    PolicyModels,
    ServedPolicy,
    adapter_request,
    adapters_in_use,
)

logger = logging.getLogger("moorline.serving.swap")

NAMED_TO_SUBMITTED_SECONDS = 0.05
"""Time for a request that was given its policy's name to be rendered and reach the engine."""

_LOOK_SECONDS = 0.5

Check = Callable[[LoRARequest | None], Awaitable[None]]
"""Scores what the engine serves; raises ParityError."""


class EngineInvalid(MoorlineError):
    """A load broke off half-way, or the engine hangs: the process must restart."""


class PolicyInvalid(MoorlineError):
    """The engine refused these files before anything changed."""


async def in_time(asked: Awaitable[Any], timeout_seconds: float) -> None:
    """Wait for the engine, not for ever: it may hang. Time in which we were suspended is not ours.

    Raises:
        TimeoutError: no answer in time; what was asked is cancelled.
    """
    call = asyncio.ensure_future(asked)
    deadline = running_seconds() + timeout_seconds
    try:
        while not call.done():
            left = deadline - running_seconds()
            if left <= 0:
                raise TimeoutError(f"no answer in {timeout_seconds:g} s")
            await asyncio.wait({call}, timeout=min(left, _LOOK_SECONDS))
        call.result()
    finally:
        call.cancel()


class SwapStrategy(Protocol):
    """One way to swap."""

    mode: str

    @property
    def live_adapter(self) -> LoRARequest | None:
        """What a request must carry to be answered by the live policy."""
        ...

    async def remove_unused(self) -> None:
        """Unload what no reply uses any more."""
        ...

    def has_room(self, target: ServedPolicy) -> bool:
        """Whether a swap to ``target`` can begin now; if not, running replies must end first."""
        ...

    async def swap(self, target: ServedPolicy, check: Check) -> float:
        """Make ``target`` live; there must be room. Returns the pause of running replies, seconds.

        Raises:
            ParityError, PolicyInvalid: the policy before is live (again).
            EngineInvalid: nothing may be served any more.
        """
        ...


class AdapterFlip(SwapStrategy):
    """LoRA adapters side by side, each under a name, an integer id and a path of its own.

    An adapter holds its slot while it is live and while the engine computes a reply with it, so a
    client that does not read its reply holds none.
    """

    mode = "adapter"

    def __init__(
        self,
        engine: Any,
        models: PolicyModels,
        live: LivePolicy,
        max_loras: int,
        timeout_seconds: float,
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._engine = engine
        self._models = models
        self._live = live
        self._max_loras = max_loras
        self._next_id = 1
        self._loaded: dict[int, LoRARequest] = {}
        """Version -> adapter, of every adapter in the engine."""

    @property
    def live_adapter(self) -> LoRARequest | None:
        return self._models.lora_requests.get(self._live.alias)

    async def remove_unused(self) -> None:
        used = adapters_in_use(self._engine)
        for version, adapter in list(self._loaded.items()):
            if adapter.lora_int_id in used or adapter == self.live_adapter:
                continue
            del self._loaded[version]
            await self._engine.remove_lora(adapter.lora_int_id)
            logger.info(
                "no reply uses the adapter any more: removed it from the engine",
                extra={"event": "adapter_removed", "version": version},
            )

    def has_room(self, target: ServedPolicy) -> bool:
        needs_none = target.directory is None or target.version in self._loaded
        return needs_none or len(self._loaded) < self._max_loras

    async def swap(self, target: ServedPolicy, check: Check) -> float:
        adapter = None
        if target.directory is not None:
            adapter = self._loaded.get(target.version) or await self._load(target, target.directory)
        await check(adapter)
        self._models.serve(target, adapter)
        await asyncio.sleep(NAMED_TO_SUBMITTED_SECONDS)  # until then the one before looks unused
        return 0.0

    async def _load(self, target: ServedPolicy, directory: Path) -> LoRARequest:
        name = policy_name(self._live.alias, target.version)
        adapter = adapter_request(name, self._next_id, directory)
        self._next_id += 1
        try:
            await in_time(self._engine.add_lora(adapter), self._timeout_seconds)
        except TimeoutError as error:
            raise EngineInvalid(f"the engine does not load an adapter: {error}") from error
        except Exception as error:
            raise PolicyInvalid(f"vLLM refused the adapter ({type(error).__name__})") from error
        self._loaded[target.version] = adapter
        failpoint("swap.adapter_loaded")
        return adapter


class WeightReload(SwapStrategy):
    """Base + adapter are loaded into the engine's own weights, while generation is paused."""

    mode = "reload"

    def __init__(
        self,
        engine: Any,
        live: LivePolicy,
        base_dir: Path,
        admission: Admission,
        timeout_seconds: float,
    ) -> None:
        self._engine = engine
        self._live = live
        self._base_dir = base_dir
        self._admission = admission
        self._timeout_seconds = timeout_seconds

    @property
    def live_adapter(self) -> None:
        return None

    async def remove_unused(self) -> None:
        """There is one policy in the engine, and it is live."""

    def has_room(self, target: ServedPolicy) -> bool:
        del target
        return True

    async def swap(self, target: ServedPolicy, check: Check) -> float:
        before = self._live.policy
        pause_seconds = await self._load(target)
        try:
            await check(None)
        except ParityError:
            logger.error(
                "the engine does not serve what the release says: loading the policy before again",
                extra={"event": "swap_taken_back", "version": target.version},
            )
            try:
                await self._load(before)
            except PolicyInvalid as error:
                raise EngineInvalid("the policy before cannot be loaded again") from error
            raise
        return pause_seconds

    async def _load(self, target: ServedPolicy) -> float:
        adapter_dir = None if target.directory is None else str(target.directory)
        try:
            await self._call_workers("moorline_prepare", str(self._base_dir), adapter_dir)
        except TimeoutError as error:
            raise EngineInvalid(f"the engine does not merge an adapter: {error}") from error
        except Exception as error:
            raise PolicyInvalid(f"the adapter cannot be merged: {error}") from error
        self._admission.hold()
        try:
            await asyncio.sleep(NAMED_TO_SUBMITTED_SECONDS)
            return await self._load_paused(target)
        except Exception as error:  # the engine is paused, or its weights are half of each
            raise EngineInvalid(f"a weight reload broke off: {error}") from error
        finally:
            self._admission.resume()

    async def _load_paused(self, target: ServedPolicy) -> float:
        start = time.monotonic()
        await self._in_time(self._engine.pause_generation(mode="keep", clear_cache=True))
        failpoint("swap.paused")
        await self._call_workers("moorline_load_prepared")
        failpoint("swap.reloaded")
        self._live.policy = target
        await self._in_time(self._engine.update_weight_version(self._live.name))
        await self._in_time(self._engine.resume_generation())
        return time.monotonic() - start

    async def _call_workers(self, method: str, *arguments: Any) -> None:
        await self._in_time(self._engine.collective_rpc(method, args=arguments))

    async def _in_time(self, asked: Awaitable[Any]) -> None:
        await in_time(asked, self._timeout_seconds)
