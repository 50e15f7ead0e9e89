"""On how many brokers each topic lies: what is asked for, and what there is."""

from __future__ import annotations

import logging
from collections.abc import Collection

from kafka import KafkaAdminClient

from moorline.settings import StreamSettings

logger = logging.getLogger("moorline.stream")

ENOUGH = 3
"""Copies with which a topic outlives one broker while another is down for maintenance."""


def copies_wanted(settings: StreamSettings, brokers: int) -> int:
    """How many copies a topic shall have on a cluster of so many brokers."""
    return settings.replication_factor or max(1, min(ENOUGH, brokers))


def count_brokers(admin: KafkaAdminClient) -> int:
    """The brokers that can take a copy now."""
    brokers = admin.describe_cluster()["brokers"]
    return sum(not broker.get("is_fenced", False) for broker in brokers)


def count_copies(admin: KafkaAdminClient, names: Collection[str]) -> dict[str, int]:
    """Topic -> the fewest copies that a partition of it has; of the topics that exist."""
    return {
        found["name"]: min(len(partition["replica_nodes"]) for partition in found["partitions"])
        for found in admin.describe_topics(list(names))
        if found["error_code"] == 0 and found["partitions"]
    }


def too_few_copies(
    admin: KafkaAdminClient, settings: StreamSettings, names: Collection[str]
) -> dict[str, int]:
    """Topic -> copies, of those with fewer than wanted."""
    wanted = copies_wanted(settings, count_brokers(admin))
    return {name: n for name, n in count_copies(admin, names).items() if n < wanted}


def warn_of_few_copies(
    admin: KafkaAdminClient, settings: StreamSettings, names: Collection[str]
) -> None:
    """Warn of topics that die with fewer brokers than the cluster could lose."""
    few = too_few_copies(admin, settings, names)
    if few:
        logger.warning(
            "topics have fewer copies than this cluster could keep: losing a broker may lose what"
            " was acknowledged; add replicas with kafka-reassign-partitions.sh",
            extra={
                "event": "topic_copies_few",
                "topic": ",".join(sorted(few)),
                "measured": min(few.values()),
                "limit": copies_wanted(settings, count_brokers(admin)),
                "setting": "stream.replication_factor",
            },
        )
