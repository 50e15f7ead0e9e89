"""How much anybody's words weigh in one batch. Pure.

A *voice* is a (tenant, rater). Inside a tenant no rater has more than a share of the tenant's
weight, and in the batch no tenant has more than a share of all weight; where there are too few
raters or tenants for that, the shares are equal. Caps only ever lower a weight, and a tenant's cap
lowers all its raters alike, so that both bounds hold at once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from itertools import accumulate
from typing import NamedTuple

MAX_RATER_SHARE = 0.25
"""Of the weight of a tenant in a batch, where it has at least four raters; with fewer, an equal
share: a single person's own assistant learns from that person."""
MAX_TENANT_SHARE = 0.5
"""Of the weight of a batch, where it has at least two tenants. A batch is the window: it is what
one release learns from."""


class Voice(NamedTuple):
    """Who speaks."""

    tenant: str
    rater: str


def capped(
    amounts: Mapping[str, float],  # name -> what it would weigh, each > 0
    max_share: float,
) -> dict[str, float]:
    """A factor in (0, 1] for each, so that none weighs more than a share of all that is left.

    The share is ``max_share``, or an equal one where there are too few names for that.
    """
    share = max(max_share, 1.0 / len(amounts)) if amounts else 1.0
    heaviest_first = sorted(amounts, key=lambda name: (-amounts[name], name))
    lightest_first = [amounts[name] for name in reversed(heaviest_first)]
    rests = list(accumulate(lightest_first))[::-1]  # of each name and all that are lighter
    limit = math.inf
    for cut, (name, rest) in enumerate(zip(heaviest_first, rests, strict=True)):
        # With `cut` names at the limit L and the rest free: L = share * (cut * L + rest).
        left = 1.0 - share * cut
        if left <= 1e-9:
            limit = amounts[name]  # all cut: everybody weighs as much as the lightest of them
            continue
        limit = share * rest / left
        if amounts[name] <= limit * (1 + 1e-9):
            break
    return {name: min(1.0, limit / amount) for name, amount in amounts.items()}


def voice_weights(
    amounts: Mapping[Voice, float],  # voice -> what it would weigh in this batch, each > 0
    max_rater_share: float = MAX_RATER_SHARE,
    max_tenant_share: float = MAX_TENANT_SHARE,
) -> dict[Voice, float]:
    """A factor in (0, 1] for each voice: both caps at once."""
    tenants: defaultdict[str, dict[str, float]] = defaultdict(dict)
    for voice, amount in amounts.items():
        tenants[voice.tenant][voice.rater] = amount
    of_raters = {name: capped(raters, max_rater_share) for name, raters in tenants.items()}
    left = {
        name: math.fsum(amount * of_raters[name][rater] for rater, amount in raters.items())
        for name, raters in tenants.items()
    }
    of_tenants = capped(left, max_tenant_share)
    return {
        voice: of_raters[voice.tenant][voice.rater] * of_tenants[voice.tenant] for voice in amounts
    }


def largest_share(amounts: Mapping[Voice, float], *, of_tenants: bool) -> float:
    """The largest part of the whole that one voice, or one tenant, has."""
    sums: defaultdict[object, list[float]] = defaultdict(list)
    for voice, amount in amounts.items():
        sums[voice.tenant if of_tenants else voice].append(amount)
    whole = math.fsum(amounts.values())
    return max(map(math.fsum, sums.values())) / whole if whole else 0.0
