"""Failpoints strike where and when a test says, and otherwise are not there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from moorline import failpoints
from moorline.failpoints import FAILPOINTS_VARIABLE, FailpointError, failpoint


@pytest.fixture(autouse=True)
def _fresh_passes() -> None:
    failpoints._passes.clear()


def test_nothing_is_armed_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FAILPOINTS_VARIABLE, raising=False)
    failpoint("a.b")


def test_only_the_named_one_strikes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAILPOINTS_VARIABLE, "a.b=raise, c.d=raise")
    failpoint("a")
    failpoint("a.b.c")
    with pytest.raises(FailpointError, match=r"a\.b"):
        failpoint("a.b")
    with pytest.raises(FailpointError, match=r"c\.d"):
        failpoint("c.d")


def test_it_can_wait_for_a_later_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FAILPOINTS_VARIABLE, "a=raise@3")
    failpoint("a")
    failpoint("a")
    with pytest.raises(FailpointError):
        failpoint("a")
    failpoint("a")


def test_sleep_delays_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setenv(FAILPOINTS_VARIABLE, "a=sleep:2.5")
    failpoint("a")
    assert slept == [2.5]


def test_kill_is_a_kill() -> None:
    code = "from moorline.failpoints import failpoint; failpoint('a'); print('alive')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {FAILPOINTS_VARIABLE: "a=kill"},
        stdout=subprocess.PIPE,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == b""
