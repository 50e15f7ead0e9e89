"""Rounds of fuzzing: hypothesis draws what is sent, a ``World`` takes it and is judged."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.deliveries import Delivery, Request, deliveries, requests
from tests.fuzz.world import Findings, World, world


def run_round(
    bootstrap: str, prefix: str, directory: Path, number: int, examples: int, until: float
) -> Findings:
    """One world, with so many examples at most, each of a few deliveries and requests.

    Args:
        number: draws the same examples whenever it is the same.
        until: ``time.monotonic`` at which no more is sent.
    """
    with world(bootstrap, prefix, directory) as made:
        _send(made, number, examples, until)
        return made.judge()


def _send(made: World, number: int, examples: int, until: float) -> None:
    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(deliveries(), min_size=1, max_size=4), st.lists(requests(), max_size=3))
    def send(sent: list[Delivery], posted: list[Request]) -> None:
        if time.monotonic() > until:
            return
        for delivery in sent:
            made.deliver(delivery)
        for request in posted:
            asyncio.run(made.request(request))

    send()
