"""Topics get as many copies as the cluster can keep, and fewer are said."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from moorline.settings import StreamSettings
from moorline.stream.copies import copies_wanted, count_brokers, warn_of_few_copies


class Cluster:
    """What an admin client says of a cluster whose topics have one copy."""

    def __init__(self, brokers: int, fenced: int = 0) -> None:
        self._brokers = [{"broker_id": n, "is_fenced": n < fenced} for n in range(brokers)]

    def describe_cluster(self) -> dict[str, Any]:
        return {"brokers": self._brokers}

    def describe_topics(self, names: list[str]) -> list[dict[str, Any]]:
        return [
            {"name": name, "error_code": 0, "partitions": [{"replica_nodes": [1]}]}
            for name in names
        ]


@pytest.mark.parametrize(("brokers", "copies"), [(1, 1), (2, 2), (3, 3), (7, 3), (0, 1)])
def test_the_default_follows_the_cluster(brokers: int, copies: int) -> None:
    assert copies_wanted(StreamSettings(), brokers) == copies
    assert copies_wanted(StreamSettings(replication_factor=1), brokers) == 1
    assert copies_wanted(StreamSettings(replication_factor=5), brokers) == 5


def test_a_broker_that_is_down_takes_no_copy() -> None:
    assert count_brokers(Cluster(3, fenced=1)) == 2  # type: ignore[arg-type]


def test_one_copy_is_said_where_three_could_be(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        warn_of_few_copies(Cluster(1), StreamSettings(), ["a"])  # type: ignore[arg-type]
        asked = StreamSettings(replication_factor=1)
        warn_of_few_copies(Cluster(3), asked, ["a"])  # type: ignore[arg-type]
        assert caplog.records == []
        warn_of_few_copies(Cluster(3), StreamSettings(), ["a"])  # type: ignore[arg-type]
    (told,) = caplog.records
    assert told.event == "topic_copies_few"  # type: ignore[attr-defined]
    assert (told.measured, told.limit) == (1, 3)  # type: ignore[attr-defined]
