"""The engine never sleeps on a message that may have been dropped."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from serving.vllm import executor
from serving.vllm.executor import MAX_WAIT_MS, AnswerWait, wait_briefly


@pytest.mark.parametrize(("asked", "waited"), [(None, 1), (5000, 1), (1, 1), (0, 0)])
def test_no_wait_is_longer_than_a_millisecond(asked: int | None, waited: int) -> None:
    seen: list[int | None] = []

    def wait(timeout_ms: int | None = None) -> None:
        seen.append(timeout_ms)

    wait_briefly(wait, timeout_ms=asked)
    assert seen == [waited]
    assert waited <= MAX_WAIT_MS


class Queue:
    """As vLLM's: it waits until there is an answer or its limit by the clock is over."""

    def __init__(self) -> None:
        self.answers: list[str] = []
        self._spin_condition = SimpleNamespace(
            wait=lambda timeout_ms: time.sleep(timeout_ms / 1000)
        )

    def dequeue(self, timeout: float | None = None, indefinite: bool = False) -> str:
        del indefinite
        assert timeout is None, "a limit by the clock would end the engine after a suspension"
        while not self.answers:
            self._spin_condition.wait(timeout_ms=5000)
        return self.answers.pop()


def test_what_is_left_of_a_limit_after_a_suspension_is_not_nothing() -> None:
    queue = Queue()
    AnswerWait(queue)
    threading.Timer(0.3, queue.answers.append, ["late"]).start()
    assert queue.dequeue(0.0) == "late"


def test_a_worker_that_hangs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "LEAST_LIMIT_SECONDS", 0.2)
    queue = Queue()
    AnswerWait(queue)
    with pytest.raises(TimeoutError):
        queue.dequeue(0.1)
