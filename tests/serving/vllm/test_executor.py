"""The engine never sleeps on a message that may have been dropped."""

from __future__ import annotations

import pytest

from serving.vllm.executor import LOOK_AGAIN_MS, look_again_soon


@pytest.mark.parametrize(("asked", "waited"), [(None, 1), (5000, 1), (1, 1), (0, 0)])
def test_no_wait_is_longer_than_a_look(asked: int | None, waited: int) -> None:
    seen: list[int | None] = []

    def wait(timeout_ms: int | None = None) -> None:
        seen.append(timeout_ms)

    look_again_soon(wait, timeout_ms=asked)
    assert seen == [waited]
    assert waited <= LOOK_AGAIN_MS
