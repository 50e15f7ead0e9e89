"""A small budget of what ``make fuzz`` does for as long as you like."""

from __future__ import annotations

import math
from pathlib import Path

from tests.fuzz.rounds import run_round

EXAMPLES = 250


def test_nothing_that_is_sent_stops_the_intake_or_is_taught_as_what_it_does_not_say(
    apache_kafka: str, topic_prefix: str, tmp_path: Path
) -> None:
    found = run_round(apache_kafka, topic_prefix, tmp_path, 0, EXAMPLES, math.inf)
    assert found.wrong == 0, "\n".join(found.details)
    assert found.records > 2 * EXAMPLES
    assert found.accepted > 10
    assert found.ready > 50
