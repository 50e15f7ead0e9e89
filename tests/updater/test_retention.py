"""Which releases' bytes stay: the newest, the live one, who wrote what may teach; none revoked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from updater.ledger import Anchor
from updater.retention import versions_to_keep


def ledger(newest: int, live: int, referenced: set[int], revoked: set[int], anchor: int = 0) -> Any:
    return SimpleNamespace(
        newest_version=lambda: newest,
        live_version=lambda: live,
        policy_versions_referenced=lambda: referenced,
        revoked_versions=lambda: revoked,
        anchor=lambda: Anchor(anchor),
    )


@pytest.mark.parametrize(
    ("newest", "live", "referenced", "revoked", "kept"),
    [
        (9, 9, set(), set(), {7, 8, 9}),
        (3, 3, set(), set(), {1, 2, 3}),
        (2, 2, set(), set(), {1, 2}),
        (9, 4, set(), set(), {4, 7, 8, 9}),
        (9, 9, {2}, set(), {2, 7, 8, 9}),
        (9, 9, {2}, {2, 8}, {7, 9}),
    ],
)
def test_versions_to_keep(
    newest: int, live: int, referenced: set[int], revoked: set[int], kept: set[int]
) -> None:
    assert versions_to_keep(ledger(newest, live, referenced, revoked), 3) == kept


def test_the_anchor_is_kept() -> None:
    assert versions_to_keep(ledger(9, 9, set(), set(), anchor=2), 3) == {2, 7, 8, 9}
