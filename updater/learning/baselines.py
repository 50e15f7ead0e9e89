"""The memory of credit: what rewards to expect, and how far raters agree. Pure.

There is one sample for a prompt and so no group to compare with. The baseline is a Beta tracker as
in SPO (arXiv 2509.13232): a cell per (tenant, task) with pseudo-counts alpha (good) and beta (bad),
which forget faster the further the policy has moved since. With u in [0, 1] the reward of an
example as a share and w its weight:

    keep  = clip(2^(-moved_nats / HALF_LIFE_NATS), KEEP_LEAST, KEEP_MOST)
    alpha <- keep * alpha + sum w u          beta <- keep * beta + sum w (1 - u)

Cells with few counts lean on the whole, and the whole on the batch (PRIOR_COUNT pseudo-ratings):

    v_all  = (alpha_all + PRIOR * mean(u)) / (alpha_all + beta_all + PRIOR)
    v_cell = (alpha + PRIOR * v_all) / (alpha + beta + PRIOR)

The same tracker remembers, for each rater, how often the others who rated the same reply agreed.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

HALF_LIFE_NATS = 0.06
KEEP_LEAST = 0.3
KEEP_MOST = 0.6
"""Most of the counts kept from batch to batch. A policy that learns leaves an older mean behind: a
baseline that lags praises everything, which moves the policy and teaches nothing."""
PRIOR_COUNT = 8.0

AGREEMENT_KEEP = 0.95
"""Share of a rater's counts of agreement that is kept from batch to batch: people do not change as
fast as policies, but whoever stops contradicting everybody gets full weight again."""
ENOUGH_SHARED_REPLIES = 5.0
"""Before a rater's agreement with others says anything."""
FULL_TRUST_SHARE = 0.5
"""Whoever agrees on this share of shared replies gets full weight. To disagree is no fault; to
contradict everybody nearly always is what spam and a misread scale look like."""
LEAST_TRUST = 0.2

_ALL = ""  # the cell of everything; no tenant's cell has this name
_FORGOTTEN_COUNT = 0.05


@dataclass(frozen=True)
class Cell:
    """A decayed Beta tracker."""

    good: float = 0.0
    bad: float = 0.0

    @property
    def count(self) -> float:
        """Effective number of observations in memory."""
        return self.good + self.bad

    def leaning_on(self, prior: float) -> float:
        """The expected share of good, with PRIOR_COUNT pseudo-ratings at ``prior``."""
        return (self.good + PRIOR_COUNT * prior) / (self.count + PRIOR_COUNT)


_Cells = Mapping[str, Cell]


@dataclass(frozen=True)
class Baselines:
    """Committed in the same transaction as the decision on the batch that they have seen."""

    cells: _Cells = field(default_factory=dict)
    """Rewards, by ``cell_name``."""
    agreements: _Cells = field(default_factory=dict)
    """By ``rater_name``: replies whose other raters agreed (good) or not (bad)."""

    def to_json(self) -> str:
        """As the ledger keeps it."""
        return json.dumps(
            {
                "cells": {name: [cell.good, cell.bad] for name, cell in self.cells.items()},
                "agreements": {name: [c.good, c.bad] for name, c in self.agreements.items()},
            }
        )

    @classmethod
    def from_json(cls, text: str) -> Baselines:
        """The inverse of ``to_json``.

        Raises:
            ValueError: not made by it.
        """
        stored = json.loads(text)
        return cls(
            *(
                {name: Cell(float(good), float(bad)) for name, (good, bad) in stored[part].items()}
                for part in ("cells", "agreements")
            )
        )

    def cell(self, name: str) -> Cell:
        return self.cells.get(name, Cell())

    def expected_shares(
        self, names: Sequence[str], shares: Sequence[float], weights: Sequence[float]
    ) -> list[float]:
        """v_cell of each example of a batch, in [0, 1].

        Args:
            names: ``cell_name`` of each.
            shares: u of each.
            weights: w of each, above 0.
        """
        if not names:
            return []
        batch = math.fsum(w * u for w, u in zip(weights, shares, strict=True)) / math.fsum(weights)
        overall = self.cell(_ALL).leaning_on(batch)
        return [self.cell(name).leaning_on(overall) for name in names]

    def trust(self, rater: str) -> float:
        """The trust in one rater (``rater_name``), in [LEAST_TRUST, 1]; 1 at first:

        trust = clip(agreed / shared / FULL_TRUST_SHARE, LEAST_TRUST, 1)
        """
        cell = self.agreements.get(rater, Cell())
        if cell.count < ENOUGH_SHARED_REPLIES:
            return 1.0
        return min(1.0, max(LEAST_TRUST, cell.good / cell.count / FULL_TRUST_SHARE))

    def after(
        self,
        names: Sequence[str],
        shares: Sequence[float],
        weights: Sequence[float],
        agreed: Iterable[tuple[str, bool]],
        moved_nats: float,
    ) -> Baselines:
        """With a batch added; arguments as in ``expected_shares``.

        Args:
            agreed: a rater, and whether the others who rated the same reply agreed.
            moved_nats: measured mean KL between the live policy and its parent, per token.
        """
        keep = min(KEEP_MOST, max(KEEP_LEAST, 2.0 ** (-max(0.0, moved_nats) / HALF_LIFE_NATS)))
        seen = [
            (cell, w * u, w * (1.0 - u))
            for name, u, w in zip(names, shares, weights, strict=True)
            for cell in (name, _ALL)
        ]
        opinions = [(rater, float(same), float(not same)) for rater, same in agreed]
        return Baselines(
            _decayed(self.cells, keep, seen), _decayed(self.agreements, AGREEMENT_KEEP, opinions)
        )


def cell_name(tenant: str, task: str = "default") -> str:
    """The name of a (tenant, task) cell."""
    return json.dumps([tenant, task])


def rater_name(tenant: str, rater: str) -> str:
    """The name of a rater; those of different tenants are different people."""
    return json.dumps([tenant, rater])


def _decayed(
    cells: _Cells, keep: float, seen: Iterable[tuple[str, float, float]]
) -> dict[str, Cell]:
    """The cells after one batch of (name, good, bad), in any order; without the forgotten ones."""
    good: defaultdict[str, list[float]] = defaultdict(list)
    bad: defaultdict[str, list[float]] = defaultdict(list)
    for name, more_good, more_bad in seen:
        good[name].append(more_good)
        bad[name].append(more_bad)
    after = {}
    for name in sorted(cells.keys() | good.keys()):
        before = cells.get(name, Cell())
        after[name] = Cell(
            math.fsum([keep * before.good, *good[name]]), math.fsum([keep * before.bad, *bad[name]])
        )
    return {name: cell for name, cell in after.items() if cell.count >= _FORGOTTEN_COUNT}
