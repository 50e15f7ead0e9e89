"""Waiting is logged once, and so is its end."""

from __future__ import annotations

import logging

import pytest

from updater.progress import Phase, Progress


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [vars(record)["event"] for record in caplog.records]


def test_a_wait_is_logged_once_however_many_cycles_it_lasts_and_so_is_its_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "moorline.progress")
    progress = Progress()
    for _ in range(3):
        progress.enter(Phase.TRAINING)  # each cycle tries before it has to wait
        progress.wait(Phase.DISK_UNAVAILABLE, OSError("full"))
        progress.end_cycle()
    assert events(caplog) == ["updater_waits"]
    for _ in range(2):
        progress.enter(Phase.WAITING)
        progress.end_cycle()
    assert events(caplog) == ["updater_waits", "updater_goes_on"]


def test_another_reason_to_wait_is_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moorline.progress")
    progress = Progress()
    progress.wait(Phase.STREAM_UNAVAILABLE, OSError("gone"))
    progress.wait(Phase.DISK_UNAVAILABLE, OSError("full"))
    assert [vars(record)["phase"] for record in caplog.records] == [
        "stream_unavailable",
        "disk_unavailable",
    ]


@pytest.mark.parametrize(("silent_seconds", "stalled"), [(10.0, False), (10.5, True)])
def test_an_updater_is_stalled_just_beyond_its_limit(
    monkeypatch: pytest.MonkeyPatch, silent_seconds: float, stalled: bool
) -> None:
    clock = [1000.0]
    monkeypatch.setattr("updater.progress.running_seconds", lambda: clock[0])
    alive: list[float] = []
    progress = Progress(10.0, lambda: alive.append(clock[0]))
    progress.enter(Phase.TRAINING)
    clock[0] += 5.0
    progress.note()
    assert alive[-1] == 1005.0
    clock[0] += silent_seconds
    assert progress.age_seconds == silent_seconds
    why = progress.why_stalled()
    assert (why is not None) is stalled
    if why:
        assert why.startswith("training without progress")
