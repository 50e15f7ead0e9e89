"""The caps on one rater's and one tenant's influence."""

from __future__ import annotations

import math
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from updater.learning.influence import (
    MAX_RATER_SHARE,
    MAX_TENANT_SHARE,
    RaterKey,
    capped,
    fair_shares,
    largest_share,
    rater_caps,
)

AMOUNTS = st.floats(0.05, 10_000) | st.integers(1, 10_000).map(float)


def equally(amounts: dict[str, float], max_share: float) -> dict[str, float]:
    return capped(amounts, fair_shares(dict.fromkeys(amounts, 1.0), max_share))


def test_equal_amounts_are_left_alone() -> None:
    assert set(equally(dict.fromkeys("abcdefgh", 3.0), 0.25).values()) == {1.0}
    assert equally({}, 0.25) == {}


def test_one_alone_is_heard_in_full_and_two_are_made_equal() -> None:
    assert equally({"a": 40.0}, 0.25) == {"a": 1.0}
    assert equally({"a": 40.0, "b": 10.0}, 0.25) == {"a": 0.25, "b": 1.0}


@given(st.dictionaries(st.text(max_size=3), AMOUNTS, min_size=1, max_size=12), st.floats(0.01, 1.0))
def test_none_exceeds_the_share(amounts: dict[str, float], max_share: float) -> None:
    weights = equally(amounts, max_share)
    influence = {name: amount * weights[name] for name, amount in amounts.items()}
    share = max(max_share, 1 / len(amounts))
    assert max(influence.values()) <= share * math.fsum(influence.values()) * (1 + 1e-6)
    assert all(0 < weight <= 1 for weight in weights.values())
    # Nobody is cut who need not be: the cut ones all have the same, largest influence.
    cut = [influence[name] for name, weight in weights.items() if weight < 1]
    assert all(one == pytest.approx(max(influence.values())) for one in cut)


@given(
    st.dictionaries(
        st.builds(RaterKey, st.sampled_from("xyz"), st.sampled_from("abcdefg")),
        st.tuples(AMOUNTS, st.sampled_from([0.2, 0.6, 1.0])),
        min_size=1,
        max_size=15,
    )
)
def test_both_caps_hold_at_once(raters: dict[RaterKey, tuple[float, float]]) -> None:
    amounts = {rater_key: amount for rater_key, (amount, _) in raters.items()}
    trust = {rater_key: one for rater_key, (_, one) in raters.items()}
    weights = rater_caps(amounts, trust)
    assert all(0 < weight <= 1 for weight in weights.values())
    tenants: defaultdict[str, list[float]] = defaultdict(list)
    for rater_key, amount in amounts.items():
        tenants[rater_key.tenant].append(amount * weights[rater_key])
    sums = {tenant: math.fsum(influence) for tenant, influence in tenants.items()}
    of_tenants = max(MAX_TENANT_SHARE, 1 / len(sums)) * math.fsum(sums.values())
    assert max(sums.values()) <= of_tenants * (1 + 1e-6)
    for rater_key, amount in amounts.items():
        standing = [one for other, one in trust.items() if other.tenant == rater_key.tenant]
        share = max(MAX_RATER_SHARE, trust[rater_key] / math.fsum(standing))
        assert amount * weights[rater_key] <= share * sums[rater_key.tenant] * (1 + 1e-6)


def test_making_few_raters_equal_does_not_undo_distrust() -> None:
    trust = {RaterKey("x", "ann"): 1.0, RaterKey("x", "troll"): 0.2}
    assert set(rater_caps(trust, trust).values()) == {1.0}
    flood = {RaterKey("x", "ann"): 1.0, RaterKey("x", "troll"): 0.2 * 30}
    caps = rater_caps(flood, trust)
    assert 6 * caps[RaterKey("x", "troll")] == pytest.approx(1 / 3), "a quarter of the whole"


def test_a_name_means_somebody_else_in_another_tenant() -> None:
    same = {RaterKey("x", "ann"): 1.0, RaterKey("y", "ann"): 1.0}
    assert set(rater_caps(same, same).values()) == {1.0}
    assert largest_share(same, of_tenants=False) == 0.5


def test_shares_are_of_the_whole() -> None:
    amounts = {RaterKey("x", "a"): 3.0, RaterKey("x", "b"): 1.0, RaterKey("y", "c"): 4.0}
    assert largest_share(amounts, of_tenants=False) == 0.5
    assert largest_share(amounts, of_tenants=True) == 0.5
    assert largest_share({}, of_tenants=True) == 0.0
