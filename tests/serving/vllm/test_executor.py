"""The engine never sleeps on a message that may have been dropped."""

from __future__ import annotations

import pytest

from serving.vllm.executor import MAX_WAIT_MS, wait_briefly


@pytest.mark.parametrize(("asked", "waited"), [(None, 1), (5000, 1), (1, 1), (0, 0)])
def test_no_wait_is_longer_than_a_millisecond(asked: int | None, waited: int) -> None:
    seen: list[int | None] = []

    def wait(timeout_ms: int | None = None) -> None:
        seen.append(timeout_ms)

    wait_briefly(wait, timeout_ms=asked)
    assert seen == [waited]
    assert waited <= MAX_WAIT_MS
