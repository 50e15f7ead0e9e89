"""The topics: their names, how they are created, and the checks of every start."""

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

from moorline.settings import StreamSettings
from moorline.stream.client import StreamInvalid, StreamUnavailable, admin_session
from moorline.stream.copies import copies_wanted, count_brokers, warn_of_few_copies

logger = logging.getLogger("moorline.stream")

Headers = tuple[tuple[str, bytes], ...]

DEAD_LETTER_MAX_BYTES = 4 * 2**20
"""A dead letter is the original plus headers, so its topic must take more than the original's."""


class Topic(StrEnum):
    INTERACTIONS = "interactions.v1"
    """Every served reply, keyed by interaction id."""
    FEEDBACK = "feedback.v1"
    """What people and systems said of replies, keyed by interaction id."""
    RELEASES = "releases.v1"
    """Manifests of released policies, keyed by alias, compacted."""
    ERASURES = "erasures.v1"
    """Who asked to be forgotten, keyed by subject, compacted."""


COMPACTED = (Topic.RELEASES, Topic.ERASURES)
"""One partition each: the last record of a key is what counts, and its order."""
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
    """The installed version of Moorline, for headers."""
    try:
        return importlib.metadata.version("moorline")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def ensure_topics(settings: StreamSettings, horizon_seconds: float = 0.0) -> bool:
    """Create the topics that are missing, and check all of them.

    Args:
        horizon_seconds: topics that keep events for less are warned of.

    Returns:
        Whether any was created.

    Raises:
        StreamUnavailable: no broker answered in ``connect_timeout_seconds``.
        StreamInvalid: a topic is missing and may not be created, has partitions that do not fit,
            or would lose events by compaction; the message has the command that repairs it.
    """
    with admin_session(settings) as admin:
        created = _create_missing(admin, settings)
        check_partitions(settings, describe(admin, settings, tuple(Topic)))
        configs = describe_configs(admin, _names(settings, Topic))
        check_not_compacted(settings, configs)
        _warn_unless_compacted(settings, configs)
        _warn_of_short_retention(settings, configs, horizon_seconds)
        warn_of_few_copies(admin, settings, _names(settings, Topic))
    return created


def describe(
    admin: KafkaAdminClient, settings: StreamSettings, topics: Sequence[Topic]
) -> dict[Topic, TopicState]:
    """Ids and partition counts of the topics that exist.

    Raises:
        StreamInvalid: we may not see a topic.
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
        StreamInvalid: they do not; with the command that repairs it.
    """
    joined = [states[topic] for topic in JOINED if topic in states]
    if len({state.partitions for state in joined}) > 1:
        fewer, more = sorted(joined, key=lambda state: state.partitions)
        name = topic_name(settings, fewer.topic)
        raise StreamInvalid(
            f"topic {name} has {fewer.partitions} partitions and "
            f"{topic_name(settings, more.topic)} has {more.partitions}, but both must have the "
            f"same number: run `kafka-topics.sh --bootstrap-server {settings.bootstrap} --alter "
            f"--topic {name} --partitions {more.partitions}`"
        )
    for topic in COMPACTED:
        if topic in states and states[topic].partitions != 1:
            name = topic_name(settings, topic)
            raise StreamInvalid(
                f"topic {name} has {states[topic].partitions} partitions, but it needs one order: "
                f"delete it (`kafka-topics.sh --bootstrap-server {settings.bootstrap} --delete "
                f"--topic {name}`) and start again; releases are in the artifact store too, and "
                "erasures that the updater has read are in the ledger"
            )


def describe_configs(admin: KafkaAdminClient, names: Collection[str]) -> dict[str, dict[str, str]]:
    """Topic -> setting -> value, as far as this user may see them."""
    resources = [ConfigResource(ConfigResourceType.TOPIC, name) for name in names]
    try:
        described = admin.describe_configs(resources, config_filter="all")["topic"]
        return {
            name: {setting: str(found["value"]) for setting, found in configs.items()}
            for name, configs in described.items()
        }
    except (kafka_errors.KafkaError, KeyError, TypeError, AttributeError):
        return {}  # a restricted user cannot be told


def check_not_compacted(settings: StreamSettings, configs: Mapping[str, Mapping[str, str]]) -> None:
    """Check that no event is removed because a later one has its key: all have a reply's id.

    Raises:
        StreamInvalid: a topic is compacted; with the command that repairs it.
    """
    for name in _names(settings, JOINED):
        if "compact" in configs.get(name, {}).get("cleanup.policy", ""):
            raise StreamInvalid(
                f"topic {name} is compacted: of all events of one reply the broker keeps only the "
                f"last. {_alter(settings, name, 'cleanup.policy=delete')}"
            )


def _names(settings: StreamSettings, topics: Iterable[Topic]) -> list[str]:
    """The names of the topics and of their dead-letter topics."""
    return [name(settings, topic) for topic in topics for name in (topic_name, dlq_name)]


def _alter(settings: StreamSettings, name: str, config: str) -> str:
    return (
        f"Run `kafka-configs.sh --bootstrap-server {settings.bootstrap} --alter --entity-type "
        f"topics --entity-name {name} --add-config {config}`"
    )


def _warn_unless_compacted(
    settings: StreamSettings, configs: Mapping[str, Mapping[str, str]]
) -> None:
    """Warn of a topic whose retention would delete the newest release, or erasures."""
    for name in (topic_name(settings, topic) for topic in COMPACTED):
        if "compact" not in configs.get(name, {}).get("cleanup.policy", "compact"):
            remedy = _alter(settings, name, "cleanup.policy=compact")
            logger.warning(
                "topic is not compacted, so its newest records may expire. %s",
                remedy,
                extra={"event": "topic_not_compacted", "topic": name},
            )


def _warn_of_short_retention(
    settings: StreamSettings, configs: Mapping[str, Mapping[str, str]], horizon_seconds: float
) -> None:
    """Warn of retention below the horizon: events that could still be joined would be deleted."""
    for name in (topic_name(settings, topic) for topic in JOINED):
        kept_ms = int(configs.get(name, {}).get("retention.ms", "-1"))
        if 0 <= kept_ms < horizon_seconds * 1000:
            remedy = _alter(settings, name, f"retention.ms={settings.retention_seconds * 1000:.0f}")
            logger.warning(
                "topic keeps events for less than learning.horizon_seconds. %s",
                remedy,
                extra={
                    "event": "topic_retention_short",
                    "topic": name,
                    "measured": kept_ms / 1000,
                    "limit": horizon_seconds,
                    "setting": "learning.horizon_seconds",
                },
            )


def _create_missing(admin: KafkaAdminClient, settings: StreamSettings) -> bool:
    wanted: dict[str, dict[str, object]] = {}
    copies = copies_wanted(settings, count_brokers(admin))
    for topic in Topic:
        retention_ms = int(settings.retention_seconds * 1000)
        configs = {"cleanup.policy": "delete", "retention.ms": str(retention_ms)}
        dead_configs = configs | {"max.message.bytes": str(DEAD_LETTER_MAX_BYTES)}
        if topic in COMPACTED:
            configs = {"cleanup.policy": "compact"}
        partitions = 1 if topic in COMPACTED else settings.partitions
        for name, count, chosen in (
            (topic_name(settings, topic), partitions, configs),
            (dlq_name(settings, topic), 1, dead_configs),
        ):
            wanted[name] = {
                "num_partitions": count,
                "replication_factor": copies,
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
        logger.info(
            "topics created on the broker",
            extra={"event": "topics_created", "topic": ",".join(sorted(created))},
        )
    return bool(created)


def _cannot_create(
    settings: StreamSettings,
    name: str,
    partitions: object,
    error: type[Exception],
    answer: Mapping[str, object],
) -> StreamInvalid:
    detail = str(answer.get("error_message") or error.__name__)
    user = settings.sasl_username or "ANONYMOUS"
    return StreamInvalid(
        f"topic {name} is missing, and user {user!r} cannot create it ({detail}): run "
        f"`kafka-topics.sh --bootstrap-server {settings.bootstrap} --create --topic {name} "
        f"--partitions {partitions}`, or allow it: `kafka-acls.sh --add --allow-principal "
        f"User:{user} --operation Create --operation Describe --topic {name}`"
    )
