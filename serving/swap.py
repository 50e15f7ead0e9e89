"""Which release is served, and how it came to be: the store is followed, every byte is checked.

The artifact store is the truth: a pin if an operator set one, else the newest release that was not
refused. Kafka's releases topic only wakes this loop early, so swapping needs neither Kafka nor the
updater. A release that is corrupt, unusable or fails parity is refused until this process restarts,
and the next older one is tried, but none that was revoked for an erasure. A store that does not
answer is waited for; what is live stays.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict

from moorline import metrics
from moorline.adapter_format import ParityBatch
from moorline.events import Release, ReleaseKind
from moorline.failpoints import failpoint
from moorline.logs import describe
from moorline.store import ArtifactStore, Pin, PinInvalid, RevokedReleases, StoreError
from serving.parity import (
    Logprobs,
    ParityError,
    candidate_logprobs,
    compare,
    parent_logprobs,
    read_parity,
)
from serving.store_reader import StoreReader
from serving.strategies import EngineInvalid, Mechanism, PolicyInvalid
from serving.vllm.models import LivePolicy, Policy
from serving.vllm.scoring import Generate, score

logger = logging.getLogger("moorline.serving.swap")

POLL_SECONDS = 1.0
REMEMBERED_SWAPS = 100


class SwapOutcome(StrEnum):
    """How a swap ended: label of ``moorline_swaps_total`` and field of the status."""

    SWAPPED = "swapped"
    PARITY_FAILED = "parity_failed"
    """The engine did not serve what the release says; the policy before is live again."""
    CORRUPT = "corrupt"
    """Files or manifest are missing or changed; nothing was loaded."""
    REFUSED = "refused"
    """Of another base model, or an adapter that cannot be served here."""
    FAILED = "failed"
    """The engine broke; the process restarts."""


class SwapRecord(BaseModel):
    """One line of the status."""

    model_config = ConfigDict(frozen=True)

    version: int
    mode: str
    outcome: SwapOutcome
    seconds: float
    pause_seconds: float = 0.0
    at: float
    """Unix seconds at the end."""
    parity_nats: float | None = None
    detail: str = ""


class SwapController:
    """Follows the store and drives one mechanism. One instance, one task."""

    def __init__(
        self,
        *,
        alias: str,
        store: ArtifactStore,
        live: LivePolicy,
        mechanism: Mechanism,
        generate: Generate,
        base_model_digest: str,
        parity_tolerance_nats: float,
    ) -> None:
        self._alias = alias
        self._store = store
        self._revoked = RevokedReleases(store)
        self._live = live
        self._mechanism = mechanism
        self._generate = generate
        self._base_model_digest = base_model_digest
        self._tolerance_nats = parity_tolerance_nats
        self._wake = asyncio.Event()
        self._trouble = ""
        self.refused: dict[int, SwapOutcome] = {}
        self.history: deque[SwapRecord] = deque(maxlen=REMEMBERED_SWAPS)
        self.pinned_version: int | None = None
        self.settled = False
        """Whether the policy that should be live at start was found and is live."""
        self.looked = False
        """Whether a first look at the store came to an end, good or bad."""
        self.reader = StoreReader()
        metrics.POLICY_VERSION.labels("serving").set(live.version)

    def wake(self) -> None:
        """Look at the store now. Only from the event loop's thread."""
        self._wake.set()

    async def follow(self) -> None:
        """Swap whenever the store says so, until cancelled.

        Raises:
            EngineInvalid: the process must restart.
        """
        while True:
            self._wake.clear()
            try:
                await self.settle()
                self._trouble = ""
            except EngineInvalid:
                raise
            except PinInvalid as error:  # an operator wanted something: nothing changes
                self._say("pin_invalid", error)
            except Exception as error:  # a store that cannot be listed, for instance: serve on
                self._say("swap_loop_failed", error)
            self.looked = True
            try:
                await asyncio.wait_for(self._wake.wait(), POLL_SECONDS)
            except TimeoutError:
                continue

    async def settle(self) -> None:
        """Bring the wanted policy live: the first of the candidates that can be served.

        Raises:
            PinInvalid: nobody knows which one is wanted.
            OSError: the store cannot be read.
            EngineInvalid: the process must restart.
        """
        pin, versions = await self.reader.read(self._look)
        self.pinned_version = None if pin is None else pin.version
        metrics.PINNED.set(pin is not None)
        metrics.STORE_NEWEST_VERSION.set(versions[-1] if versions else 0)
        for version in self._wanted(pin, versions):
            if version == self._live.version or await self._swap_to(version):
                break
        self.settled = True
        metrics.POLICY_VERSION.labels("serving").set(self._live.version)

    def _look(self) -> tuple[Pin | None, list[int]]:
        versions = self._store.versions(self._alias)
        revoked = self._revoked.among(self._alias, versions)
        kept = [version for version in versions if version not in revoked]
        return self._store.pinned(self._alias), kept

    def _wanted(self, pin: Pin | None, versions: list[int]) -> Iterator[int]:
        """Versions to try, best first; the base model closes the list."""
        newest_first = reversed(versions)
        if pin is not None:
            if pin.version not in self.refused:
                yield pin.version
            if self.settled:
                return  # the pinned one cannot be served: stay
            newest_first = (version for version in newest_first if version < pin.version)
        for version in (*newest_first, 0):
            if version not in self.refused:
                yield version

    def _say(self, what: str, error: Exception) -> None:
        """Once, not at every look."""
        if describe(error) != self._trouble:
            self._trouble = describe(error)
            logger.error(what, exc_info=error)

    async def _swap_to(self, version: int) -> bool:
        start = time.monotonic()
        record: dict[str, Any] = {"version": version, "mode": self._mechanism.mode}
        try:
            policy = await self.reader.read(self._open, version)
            failpoint("swap.verified")
            record |= await self._change(policy)
            record["outcome"] = SwapOutcome.SWAPPED
        except StoreError as error:
            record |= {"outcome": SwapOutcome.CORRUPT, "detail": str(error)}
        except PolicyInvalid as error:
            record |= {"outcome": SwapOutcome.REFUSED, "detail": str(error)}
        except ParityError as error:
            record |= {"outcome": SwapOutcome.PARITY_FAILED, "detail": str(error)}
        except Exception as error:
            self._note(record | {"outcome": SwapOutcome.FAILED, "detail": describe(error)}, start)
            raise
        self._note(record, start)
        return record["outcome"] is SwapOutcome.SWAPPED

    def _open(self, version: int) -> Policy:
        """Read and verify everything that can be verified without the engine."""
        if version == 0:
            return Policy(0)
        release = self._store.release(self._alias, version)
        if release.base_model_digest != self._base_model_digest:
            raise PolicyInvalid(
                f"{release.name} was trained on another base model "
                f"({release.base_model_digest[:12]}, served: {self._base_model_digest[:12]})"
            )
        if release.kind is ReleaseKind.BASE:
            return Policy(version, release)
        directory = self._store.open(release.artifact_digest or "", release.files)
        return Policy(version, release, directory)

    async def _change(self, policy: Policy) -> dict[str, float | None]:
        measured: dict[str, float | None] = {"parity_nats": None}
        batch, expected, before = await self._references(policy)

        async def check(lora_request: Any) -> None:
            if batch is None or expected is None or before is None:
                return
            served = await self._score(batch, lora_request)
            measured["parity_nats"] = compare(served, expected, before, self._tolerance_nats)

        measured["pause_seconds"] = await self._mechanism.swap(policy, check)
        return measured

    async def _references(
        self, policy: Policy
    ) -> tuple[ParityBatch | None, Logprobs | None, Logprobs | None]:
        """The sequences, the target's logprobs, and those of the policy that is live now."""
        if policy.directory is not None:
            batch = await self.reader.read(read_parity, policy.directory)
            if policy.release is not None and policy.release.parent == self._live.version:
                return batch, candidate_logprobs(batch), parent_logprobs(batch)
            return batch, candidate_logprobs(batch), await self._score_live(batch)
        # The base model has no file of its own; its first child knows the logprobs of its parent.
        child = await self.reader.read(self._child_of_base)
        if child is None or child.directory is None:
            return None, None, None
        batch = await self.reader.read(read_parity, child.directory)
        return batch, parent_logprobs(batch), await self._score_live(batch)

    async def _score_live(self, batch: ParityBatch) -> Logprobs:
        return await self._score(batch, self._mechanism.live_adapter)

    async def _score(self, batch: ParityBatch, lora_request: Any) -> Logprobs:
        try:
            return await score(self._generate, batch, lora_request)
        except Exception as error:  # too long a sequence, a token that the model does not have
            raise ParityError(f"the parity batch cannot be scored ({describe(error)})") from error

    def _child_of_base(self) -> Policy | None:
        for version in self._store.versions(self._alias):
            try:
                release: Release = self._store.release(self._alias, version)
                if release.parent == 0:
                    return self._open(version)
            except (StoreError, PolicyInvalid):
                continue
        return None

    def _note(self, record: dict[str, Any], start: float) -> None:
        entry = SwapRecord(**record, seconds=time.monotonic() - start, at=time.time())
        self.history.append(entry)
        metrics.SWAPS.labels(entry.mode, entry.outcome).inc()
        fields = entry.model_dump(exclude={"at"}, exclude_defaults=True)
        if entry.outcome is not SwapOutcome.SWAPPED:
            self.refused[entry.version] = entry.outcome
            logger.error("release_not_served", extra=fields)
            return
        metrics.SWAP_SECONDS.labels(entry.mode).observe(entry.seconds)
        metrics.SWAP_PAUSE_SECONDS.observe(entry.pause_seconds)
        if entry.parity_nats is not None:
            metrics.PARITY_NATS.set(entry.parity_nats)
        logger.info("policy_swapped", extra=fields)
