"""A server never falls back to a release that was revoked for an erasure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moorline.events import Release, ReleaseKind
from moorline.store import ArtifactStore, RevokedReleases
from serving.strategies import PolicyInvalid
from serving.swap import SwapController
from serving.vllm.models import LivePolicy, ServedPolicy

ALIAS = "assistant"
BASE = "0" * 64


def release(store: ArtifactStore, version: int, revokes_after: int | None = None) -> None:
    store.record_release(
        Release(
            alias=ALIAS,
            version=version,
            parent=version - 1 if revokes_after is None else revokes_after,
            kind=ReleaseKind.BASE,
            revokes_after=revokes_after,
            artifact_digest=None,
            files=(),
            base_model_digest=BASE,
            created_at=1e9,
        )
    )


class Flip:
    """A way to swap that takes no time, and may be unable to."""

    mode = "adapter"
    live_adapter = None

    def __init__(self, live: LivePolicy, unusable: int | None = None) -> None:
        self._live = live
        self._unusable = unusable

    def has_room(self, target: ServedPolicy) -> bool:
        del target
        return True

    async def remove_unused(self) -> None:
        """Nothing is loaded that could be unused."""

    async def swap(self, target: ServedPolicy, check: Any) -> float:
        if target.version == self._unusable:
            raise PolicyInvalid("not this one")
        await check(None)
        self._live.policy = target
        return 0.0


def controller(store: ArtifactStore, unusable: int | None = None) -> SwapController:
    live = LivePolicy(ALIAS)
    return SwapController(
        alias=ALIAS,
        store=store,
        live=live,
        strategy=Flip(live, unusable),  # type: ignore[arg-type]
        generate=None,  # type: ignore[arg-type]
        base_model_digest=BASE,
        parity_tolerance_nats=0.1,
    )


@pytest.mark.parametrize(("unusable", "served"), [(None, 5), (5, 1)])
async def test_what_was_withdrawn_is_not_fallen_back_to(
    tmp_path: Path, unusable: int | None, served: int
) -> None:
    store = ArtifactStore(tmp_path)
    for version in (1, 2, 3, 4):
        release(store, version)
    swaps = controller(store, unusable)
    await swaps.serve_wanted()
    assert swaps._live.version == 4
    release(store, 5, revokes_after=1)
    await swaps.serve_wanted()
    assert swaps._live.version == served


def test_only_what_lies_between_is_withdrawn(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    for version, revokes_after in ((1, None), (2, None), (3, 1), (4, None), (5, 3), (6, None)):
        release(store, version, revokes_after)
    assert RevokedReleases(store).among(ALIAS, store.versions(ALIAS)) == {2, 4}
    release(store, 7, revokes_after=0)
    assert RevokedReleases(store).among(ALIAS, store.versions(ALIAS)) == {1, 2, 3, 4, 5, 6}
    (tmp_path / "releases" / ALIAS / "v000007.json").write_text("{")
    assert RevokedReleases(store).among(ALIAS, store.versions(ALIAS)) == {2, 4}
