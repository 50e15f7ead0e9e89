"""The caps on what one rater and one tenant weigh in a batch. Pure.

A rater is known by tenant and name (``RaterKey``). Inside a tenant no rater has more than a share
of the tenant's weight, and in the batch no tenant has more than a share of all weight; where there
are too few raters or tenants for that, tenants have equal shares, and raters shares in proportion
to the trust in them. Caps only ever lower a weight, and a tenant's cap lowers all its raters alike,
so that both bounds hold at once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from itertools import accumulate
from typing import NamedTuple

MAX_RATER_SHARE = 0.25
"""A rater's largest share of a tenant's weight in a batch, where it has at least four raters; with
fewer, an equal share: a single person's own assistant learns from that person."""
MAX_TENANT_SHARE = 0.5
"""A tenant's largest share of the weight of a batch, where it has at least two tenants. A batch is
the window: it is what one release learns from."""


class RaterKey(NamedTuple):
    """A rater: raters of different tenants are different people, whatever their names."""

    tenant: str
    rater: str


def capped(
    amounts: Mapping[str, float],  # name -> what it would weigh, each > 0
    shares: Mapping[str, float],  # name -> the largest share it may have; together at least 1
) -> dict[str, float]:
    """A factor in (0, 1] for each, so that none weighs more than its share of all that is left."""

    def crowding(name: str) -> float:
        return amounts[name] / shares[name]

    worst_first = sorted(amounts, key=lambda name: (-crowding(name), name))
    rests = list(accumulate(amounts[name] for name in reversed(worst_first)))[::-1]
    whole, cut_share = math.inf, 0.0
    for name, rest in zip(worst_first, rests, strict=True):
        # With the names before it at their shares and the rest free: whole = cut * whole + rest.
        left = 1.0 - cut_share
        whole = rest / left if left > 1e-9 else crowding(name)
        if crowding(name) <= whole * (1 + 1e-9):
            break
        cut_share += shares[name]
    return {name: min(1.0, whole / crowding(name)) for name in amounts}


def fair_shares(standing: Mapping[str, float], max_share: float) -> dict[str, float]:
    """``max_share`` for each, or the share that its standing (above 0) gives it if that is more."""
    whole = math.fsum(standing.values())
    return {name: max(max_share, one / whole) for name, one in standing.items()}


def rater_caps(
    amounts: Mapping[RaterKey, float],  # what each would weigh in this batch, > 0
    trust: Mapping[RaterKey, float],  # in (0, 1]; already in the amounts
    max_rater_share: float = MAX_RATER_SHARE,
    max_tenant_share: float = MAX_TENANT_SHARE,
) -> dict[RaterKey, float]:
    """A factor in (0, 1] for each rater: both caps at once.

    Where raters are too few for ``max_rater_share``, their shares are as their trust is, so that
    making them equal does not undo the distrust in one of them.
    """
    tenants: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for rater_key, amount in amounts.items():
        tenants[rater_key.tenant][rater_key.rater] = amount
    of_raters, left = {}, {}
    for tenant, raters in tenants.items():
        standing = {rater: trust[RaterKey(tenant, rater)] for rater in raters}
        caps = of_raters[tenant] = capped(raters, fair_shares(standing, max_rater_share))
        left[tenant] = math.fsum(amount * caps[rater] for rater, amount in raters.items())
    of_tenants = capped(left, fair_shares(dict.fromkeys(left, 1.0), max_tenant_share))
    return {
        rater_key: of_raters[rater_key.tenant][rater_key.rater] * of_tenants[rater_key.tenant]
        for rater_key in amounts
    }


def largest_share(amounts: Mapping[RaterKey, float], *, of_tenants: bool) -> float:
    """The largest share of all weight that one rater, or one tenant, has."""
    sums: defaultdict[object, list[float]] = defaultdict(list)
    for rater_key, amount in amounts.items():
        sums[rater_key.tenant if of_tenants else rater_key].append(amount)
    whole = math.fsum(amounts.values())
    return max(map(math.fsum, sums.values())) / whole if whole else 0.0
