"""A poll that fails is logged once, changes nothing, and its recovery is logged too."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

import pytest

from moorline.store import ArtifactStore
from serving import swap
from serving.swap import SwapController
from serving.vllm.models import LivePolicy


def events(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [getattr(record, "event", None) for record in caplog.records]


async def until(caplog: pytest.LogCaptureFixture, event: str) -> None:
    async with asyncio.timeout(10):
        while event not in events(caplog):
            await asyncio.sleep(0.01)


async def test_a_pin_that_cannot_be_read_is_logged_once_and_its_repair_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swap, "POLL_SECONDS", 0.01)
    pin = tmp_path / "releases" / "assistant" / "pin.json"
    pin.parent.mkdir(parents=True)
    pin.write_text("{")
    swaps = SwapController(
        alias="assistant",
        store=ArtifactStore(tmp_path),
        live=LivePolicy("assistant"),
        strategy=None,  # type: ignore[arg-type]
        generate=None,  # type: ignore[arg-type]
        base_model_digest="0" * 64,
        parity_tolerance_nats=0.1,
    )
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
