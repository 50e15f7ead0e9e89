"""Polls the store each second and brings the wanted release live, after checking every byte.

The artifact store is the truth: a pin if an operator set one, else the newest release that was not
refused. So swapping needs neither Kafka nor the updater. A release that is corrupt, unusable or
fails parity is refused until this process restarts, and the next older one is tried, but none that
was revoked for an erasure. While the store does not answer, the live policy goes on.

The pin is read again before every attempt, and a release that must wait for running replies is left
for the next poll: an operator's rollback waits for nothing but the swap that is under way.
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
from serving.strategies import EngineInvalid, PolicyInvalid, SwapStrategy
from serving.vllm.models import LivePolicy, ServedPolicy
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
    """It was trained on another base model, or its adapter cannot be served here."""
    FAILED = "failed"
    """The engine broke; the process restarts."""


class SwapRecord(BaseModel):
    """One swap that was tried, as the status shows it."""

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
    """Polls the store and swaps by one strategy. One instance, one task."""

    def __init__(
        self,
        *,
        alias: str,
        store: ArtifactStore,
        live: LivePolicy,
        strategy: SwapStrategy,
        generate: Generate,
        base_model_digest: str,
        parity_tolerance_nats: float,
    ) -> None:
        self._alias = alias
        self._store = store
        self._revoked = RevokedReleases(store)
        self._live = live
        self._strategy = strategy
        self._generate = generate
        self._base_model_digest = base_model_digest
        self._tolerance_nats = parity_tolerance_nats
        self._logged_error = ""
        self._waiting_version: int | None = None
        self.refused: dict[int, SwapOutcome] = {}
        self.history: deque[SwapRecord] = deque(maxlen=REMEMBERED_SWAPS)
        self.pinned_version: int | None = None
        self.first_policy_live = False
        """Whether the policy that should be live at start was found and is live."""
        self.first_poll_done = False
        """Whether the store was polled once, with success or without."""
        self.reader = StoreReader()
        metrics.POLICY_VERSION.labels("serving").set_function(lambda: live.version)

    async def follow(self) -> None:
        """Swap whenever the store says so, until cancelled.

        Raises:
            EngineInvalid: the process must restart.
        """
        while True:
            try:
                await self.serve_wanted()
                self._log_recovery()
            except EngineInvalid:
                raise
            except PinInvalid as error:  # an operator wanted something: nothing changes
                self._log_once(
                    "pin_invalid",
                    "the pin cannot be read, so the wanted version is unknown: "
                    "keeping the live policy",
                    error,
                )
            except Exception as error:  # a store that cannot be listed, for instance: serve on
                self._log_once(
                    "swap_loop_failed",
                    "cannot find out or load the wanted policy: keeping the live one, trying again",
                    error,
                )
            self.first_poll_done = True
            await asyncio.sleep(POLL_SECONDS)

    async def serve_wanted(self) -> None:
        """Bring the wanted policy live: the first of the candidates that can be served.

        Raises:
            PinInvalid: nobody knows which one is wanted.
            OSError: the store cannot be read.
            EngineInvalid: the process must restart.
        """
        await self._strategy.remove_unused()
        while (version := await self._wanted_version()) != self._live.version:
            if not await self._swap_to(version):
                break
        self.first_policy_live = True

    async def _wanted_version(self) -> int:
        """What the store wants to be live now; the live version if that cannot be served."""
        pin, versions = await self.reader.read(self._pin_and_versions)
        self.pinned_version = None if pin is None else pin.version
        metrics.PINNED.set(pin is not None)
        metrics.STORE_NEWEST_VERSION.set(versions[-1] if versions else 0)
        self._live.newest_released = max(self._live.newest_released, *versions, 0)
        return next(self._wanted(pin, versions), self._live.version)

    def _pin_and_versions(self) -> tuple[Pin | None, list[int]]:
        """The pin, and the versions that may be served, oldest first."""
        versions = self._store.versions(self._alias)
        revoked = self._revoked.among(self._alias, versions)
        kept = [version for version in versions if version not in revoked]
        return self._store.pinned(self._alias), kept

    def _wanted(self, pin: Pin | None, versions: list[int]) -> Iterator[int]:
        """Versions to try, best first; the base model comes last."""
        newest_first = reversed(versions)
        if pin is not None:
            if pin.version not in self.refused:
                yield pin.version
            if self.first_policy_live:
                return  # the pinned one cannot be served: stay
            newest_first = (version for version in newest_first if version < pin.version)
        for version in (*newest_first, 0):
            if version not in self.refused:
                yield version

    def _log_once(self, event: str, message: str, error: Exception) -> None:
        """Log an error when it is new, not at every poll."""
        if describe(error) != self._logged_error:
            self._logged_error = describe(error)
            logger.error(message, extra={"event": event}, exc_info=error)

    def _log_recovery(self) -> None:
        if self._logged_error:
            self._logged_error = ""
            logger.warning(
                "the store and its pin can be read again: following them",
                extra={"event": "swap_loop_recovered", "version": self._live.version},
            )

    async def _swap_to(self, version: int) -> bool:
        """Try to bring a version live; False when it must wait for running replies to end."""
        start = time.monotonic()
        record: dict[str, Any] = {"version": version, "mode": self._strategy.mode}
        try:
            policy = await self.reader.read(self._verified_policy, version)
            if not self._strategy.has_room(policy):
                self._log_waiting(version)
                return False
            failpoint("swap.verified")
            record |= await self._swap_checked(policy)
            record["outcome"] = SwapOutcome.SWAPPED
        except StoreError as error:
            record |= {"outcome": SwapOutcome.CORRUPT, "detail": str(error)}
        except PolicyInvalid as error:
            record |= {"outcome": SwapOutcome.REFUSED, "detail": str(error)}
        except ParityError as error:
            record |= {"outcome": SwapOutcome.PARITY_FAILED, "detail": str(error)}
        except Exception as error:
            self._record_swap(
                record | {"outcome": SwapOutcome.FAILED, "detail": describe(error)}, start
            )
            raise
        self._record_swap(record, start)
        return True

    def _log_waiting(self, version: int) -> None:
        """Log once for each version, not at every poll."""
        if version != self._waiting_version:
            self._waiting_version = version
            logger.warning(
                "a release waits: running replies use every adapter slot (serving.max_loras)",
                extra={"event": "swap_waits_for_slot", "version": version},
            )

    def _verified_policy(self, version: int) -> ServedPolicy:
        """Read and verify everything that can be verified without the engine."""
        if version == 0:
            return ServedPolicy(0)
        release = self._store.release(self._alias, version)
        if release.base_model_digest != self._base_model_digest:
            raise PolicyInvalid(
                f"{release.name} was trained on another base model "
                f"({release.base_model_digest[:12]}, served: {self._base_model_digest[:12]})"
            )
        if release.kind is ReleaseKind.BASE:
            return ServedPolicy(version, release)
        directory = self._store.open(release.artifact_digest or "", release.files)
        return ServedPolicy(version, release, directory)

    async def _swap_checked(self, policy: ServedPolicy) -> dict[str, float | None]:
        measured: dict[str, float | None] = {"parity_nats": None}
        batch, expected, before = await self._reference_logprobs(policy)

        async def check(lora_request: Any) -> None:
            if batch is None or expected is None or before is None:
                return
            served = await self._score(batch, lora_request)
            measured["parity_nats"] = compare(served, expected, before, self._tolerance_nats)

        measured["pause_seconds"] = await self._strategy.swap(policy, check)
        return measured

    async def _reference_logprobs(
        self, policy: ServedPolicy
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
        return await self._score(batch, self._strategy.live_adapter)

    async def _score(self, batch: ParityBatch, lora_request: Any) -> Logprobs:
        try:
            return await score(self._generate, batch, lora_request)
        except Exception as error:  # too long a sequence, a token that the model does not have
            raise ParityError(f"the parity batch cannot be scored ({describe(error)})") from error

    def _child_of_base(self) -> ServedPolicy | None:
        for version in self._store.versions(self._alias):
            try:
                release: Release = self._store.release(self._alias, version)
                if release.parent == 0:
                    return self._verified_policy(version)
            except (StoreError, PolicyInvalid):
                continue
        return None

    def _record_swap(self, record: dict[str, Any], start: float) -> None:
        entry = SwapRecord(**record, seconds=time.monotonic() - start, at=time.time())
        self.history.append(entry)
        metrics.SWAPS.labels(entry.mode, entry.outcome).inc()
        fields = {
            "version": entry.version,
            "mode": entry.mode,
            "outcome": entry.outcome,
            "seconds": entry.seconds,
        }
        if entry.outcome is not SwapOutcome.SWAPPED:
            self.refused[entry.version] = entry.outcome
            logger.error(
                "release not served: it is refused until this server restarts",
                extra={"event": "release_not_served", "error": entry.detail} | fields,
            )
            return
        metrics.SWAP_SECONDS.labels(entry.mode).observe(entry.seconds)
        metrics.SWAP_PAUSE_SECONDS.observe(entry.pause_seconds)
        if entry.parity_nats is not None:
            metrics.PARITY_NATS.set(entry.parity_nats)
        logger.info(
            "policy swapped; running replies paused for %.2f s",
            entry.pause_seconds,
            extra={"event": "policy_swapped", "measured": entry.parity_nats} | fields,
        )
