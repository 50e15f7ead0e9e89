"""The topics: their names, their making, and what is checked of them at every start."""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from kafka import KafkaAdminClient
from kafka import errors as kafka_errors
from kafka.admin import ConfigResource, ConfigResourceType

from daemon.settings import StreamSettings
from daemon.stream.client import StreamRefused, StreamUnavailable, admin_session

logger = logging.getLogger("moorline.stream")

Headers = tuple[tuple[str, bytes], ...]

RETENTION_MS = 14 * 86_400_000
"""Of the topics that Moorline makes: twice the default horizon of feedback."""
DEAD_LETTER_MAX_BYTES = 4 * 2**20
"""A dead letter is the original plus headers, so its topic must take more than the original's."""


class Topic(StrEnum):
    INTERACTIONS = "interactions.v1"
    """Every served reply, keyed by interaction id."""
    FEEDBACK = "feedback.v1"
    """What people and systems said of replies, keyed by interaction id."""
    RELEASES = "releases.v1"
    """Manifests of released policies, keyed by alias, compacted."""


JOINED = (Topic.INTERACTIONS, Topic.FEEDBACK)
"""Same key and same partition count, so that a join is local to a partition."""


@dataclass(frozen=True)
class TopicState:
    """A topic as the broker describes it."""

    topic: Topic
    topic_id: str
    """Changes when a topic is deleted and made again; "" where the broker gives none."""
    partitions: int


def topic_name(settings: StreamSettings, topic: Topic) -> str:
    """The name on the broker."""
    return f"{settings.topic_prefix}{topic.value}"


def dlq_name(settings: StreamSettings, topic: Topic) -> str:
    """The name of the topic's dead-letter topic."""
    return f"{topic_name(settings, topic)}.dlq"


def cloud_event_headers(topic: Topic, event_id: str, source: str, timestamp_ms: int) -> Headers:
    """CloudEvents 1.0, Kafka binary mode."""
    moment = datetime.fromtimestamp(timestamp_ms / 1000, UTC)
    return (
        ("ce_specversion", b"1.0"),
        ("ce_type", f"moorline.{topic.value}".encode()),
        ("ce_source", source.encode()),
        ("ce_id", event_id.encode()),
        ("ce_time", moment.isoformat(timespec="milliseconds").replace("+00:00", "Z").encode()),
        ("content-type", b"application/json"),
    )


def software_version() -> str:
    """Of this Moorline, for headers."""
    try:
        return importlib.metadata.version("moorline")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def ensure_topics(settings: StreamSettings) -> bool:
    """Create the topics that are missing, and check all of them.

    Returns:
        Whether any was created.

    Raises:
        StreamUnavailable: no broker answered in ``connect_timeout_seconds``.
        StreamRefused: a topic is missing and may not be created, or has partitions that do not
            fit; the message has the command that repairs it.
    """
    with admin_session(settings) as admin:
        created = _create_missing(admin, settings)
        check_partitions(settings, describe(admin, settings, tuple(Topic)))
        _warn_unless_compacted(admin, settings)
    return created


def describe(
    admin: KafkaAdminClient, settings: StreamSettings, topics: Sequence[Topic]
) -> dict[Topic, TopicState]:
    """Ids and partition counts of the topics that exist.

    Raises:
        StreamRefused: we may not see a topic.
    """
    names = {topic_name(settings, topic): topic for topic in topics}
    return {
        names[name]: TopicState(names[name], topic_id, partitions)
        for name, (topic_id, partitions) in describe_names(admin, names).items()
    }


def describe_names(admin: KafkaAdminClient, names: Collection[str]) -> dict[str, tuple[str, int]]:
    """(topic id, partitions) of the topics that exist.

    Raises:
        AuthorizationError: we may not see a topic.
    """
    described: dict[str, tuple[str, int]] = {}
    for found in admin.describe_topics(list(names)):
        error = kafka_errors.for_code(found["error_code"])
        if found["name"] not in names or error is kafka_errors.UnknownTopicOrPartitionError:
            continue
        if issubclass(error, kafka_errors.AuthorizationError):
            raise error(found["name"])
        if found["partitions"]:  # else it is being made or being deleted
            described[found["name"]] = (str(found["topic_id"] or ""), len(found["partitions"]))
    return described


def require(
    settings: StreamSettings, states: Mapping[Topic, TopicState], topics: Iterable[Topic]
) -> None:
    """Check that the topics exist.

    Raises:
        StreamUnavailable: one does not.
    """
    for topic in topics:
        if topic not in states:
            raise StreamUnavailable(
                f"Kafka at {settings.bootstrap} has no topic {topic_name(settings, topic)}: start "
                "the server or the updater, which make it, or make it yourself"
            )


def check_partitions(settings: StreamSettings, states: Mapping[Topic, TopicState]) -> None:
    """Check that the partition counts fit.

    Raises:
        StreamRefused: they do not; with the command that repairs it.
    """
    joined = [states[topic] for topic in JOINED if topic in states]
    if len({state.partitions for state in joined}) > 1:
        fewer, more = sorted(joined, key=lambda state: state.partitions)
        name = topic_name(settings, fewer.topic)
        raise StreamRefused(
            f"topic {name} has {fewer.partitions} partitions and "
            f"{topic_name(settings, more.topic)} has {more.partitions}, but both must have the "
            f"same number: run `kafka-topics.sh --bootstrap-server {settings.bootstrap} --alter "
            f"--topic {name} --partitions {more.partitions}`"
        )
    releases = states.get(Topic.RELEASES)
    if releases is not None and releases.partitions != 1:
        name = topic_name(settings, Topic.RELEASES)
        raise StreamRefused(
            f"topic {name} has {releases.partitions} partitions, but releases need one order: "
            f"delete it (`kafka-topics.sh --bootstrap-server {settings.bootstrap} --delete "
            f"--topic {name}`) and start again; releases are in the artifact store too"
        )


def _create_missing(admin: KafkaAdminClient, settings: StreamSettings) -> bool:
    wanted: dict[str, dict[str, object]] = {}
    for topic in Topic:
        configs = {"cleanup.policy": "delete", "retention.ms": str(RETENTION_MS)}
        dead_configs = configs | {"max.message.bytes": str(DEAD_LETTER_MAX_BYTES)}
        if topic is Topic.RELEASES:
            configs = {"cleanup.policy": "compact"}
        partitions = 1 if topic is Topic.RELEASES else settings.partitions
        for name, count, chosen in (
            (topic_name(settings, topic), partitions, configs),
            (dlq_name(settings, topic), 1, dead_configs),
        ):
            wanted[name] = {
                "num_partitions": count,
                "replication_factor": settings.replication_factor,
                "configs": chosen,
            }
    unseen = set(wanted)
    for found in admin.describe_topics(list(wanted)):
        if found["error_code"] == 0:
            unseen.discard(found["name"])
    if not unseen:
        return False
    answer = admin.create_topics({name: wanted[name] for name in unseen}, raise_errors=False)
    created = []
    for topic_answer in answer["topics"]:
        name, error = topic_answer["name"], kafka_errors.for_code(topic_answer["error_code"])
        if error is kafka_errors.NoError:
            created.append(name)
        elif error is not kafka_errors.TopicAlreadyExistsError:
            raise _cannot_create(
                settings, name, wanted[name]["num_partitions"], error, topic_answer
            )
    admin.wait_for_topics(list(unseen), timeout_ms=int(settings.connect_timeout_seconds * 1000))
    if created:
        logger.info("topics created", extra={"topics": sorted(created)})
    return bool(created)


def _cannot_create(
    settings: StreamSettings,
    name: str,
    partitions: object,
    error: type[Exception],
    answer: Mapping[str, object],
) -> StreamRefused:
    detail = str(answer.get("error_message") or error.__name__)
    user = settings.sasl_username or "ANONYMOUS"
    return StreamRefused(
        f"topic {name} is missing, and user {user!r} cannot create it ({detail}): run "
        f"`kafka-topics.sh --bootstrap-server {settings.bootstrap} --create --topic {name} "
        f"--partitions {partitions}`, or allow it: `kafka-acls.sh --add --allow-principal "
        f"User:{user} --operation Create --operation Describe --topic {name}`"
    )


def _warn_unless_compacted(admin: KafkaAdminClient, settings: StreamSettings) -> None:
    """An uncompacted releases topic forgets the newest release with its retention."""
    name = topic_name(settings, Topic.RELEASES)
    try:
        described = admin.describe_configs(
            [ConfigResource(ConfigResourceType.TOPIC, name)], config_filter="all"
        )
        policy = described["topic"][name]["cleanup.policy"]["value"]
    except (kafka_errors.KafkaError, KeyError, TypeError):
        return  # the embedded broker and restricted users cannot be asked
    if "compact" not in str(policy):
        logger.warning(
            "releases topic is not compacted: run kafka-configs.sh --alter --entity-type topics "
            "--entity-name %s --add-config cleanup.policy=compact",
            name,
            extra={"topic": name},
        )
