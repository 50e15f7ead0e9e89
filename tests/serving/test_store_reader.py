"""Reads that block, on a real path that blocks: the event loop goes on, and it shows."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from moorline import metrics
from serving import store_reader
from serving.store_reader import StoreReader


@pytest.fixture
def silent_path(tmp_path: Path) -> Path:
    """Opening it waits for a writer."""
    path = tmp_path / "pin.json"
    os.mkfifo(path)
    return path


async def test_a_read_that_blocks_holds_up_nothing_and_is_seen(
    silent_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store_reader, "SLOW_READ_SECONDS", 0.05)
    reader = StoreReader()
    reading = asyncio.create_task(reader.read(silent_path.read_bytes))
    while "store_not_answering" not in [getattr(r, "event", "") for r in caplog.records]:
        await asyncio.sleep(0.01)
    assert not reading.done()
    assert reader.waiting_seconds() >= 0.05
    (sample,) = next(iter(metrics.STORE_WAIT_SECONDS.collect())).samples
    assert sample.value >= 0.05
    silent_path.write_bytes(b"late")
    assert await reading == b"late"
    assert reader.waiting_seconds() == 0.0


async def test_an_error_of_the_read_is_the_readers(tmp_path: Path) -> None:
    reader = StoreReader()
    with pytest.raises(FileNotFoundError):
        await reader.read((tmp_path / "missing").read_bytes)
    assert await reader.read(lambda: 7) == 7


def test_a_stop_does_not_wait_for_it(silent_path: Path) -> None:
    async def stop_while_reading() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(StoreReader().read(silent_path.read_bytes), 0.05)

    asyncio.run(stop_while_reading())  # would hang in the default executor
    os.close(os.open(silent_path, os.O_WRONLY | os.O_NONBLOCK))  # fails if nobody read
