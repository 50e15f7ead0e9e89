"""The updater's way in from Kafka: assigned partitions, positions that the ledger dictates.

No consumer group, so no rebalance and no eviction during a long training step. No automatic reset:
whatever could not be read is an explicit ``Gap``, or a refusal that says what to do.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence

from kafka import KafkaAdminClient, KafkaConsumer, TopicPartition
from kafka import errors as kafka_errors
from kafka.structs import OffsetAndMetadata

from moorline import metrics
from moorline.failpoints import failpoint
from moorline.settings import StreamSettings
from moorline.stream.batches import RawRecord
from moorline.stream.client import (
    Connection,
    StreamInvalid,
    StreamUnavailable,
    connect,
    explained,
)
from moorline.stream.consumer import connect_consumer
from moorline.stream.lag import Lag, end_offsets
from moorline.stream.records import Gap, GapCause, Record, record_from
from moorline.stream.topics import (
    Topic,
    TopicState,
    check_not_compacted,
    check_partitions,
    describe,
    describe_configs,
    require,
    topic_name,
)

logger = logging.getLogger("moorline.stream")

GROUP = "moorline-updater"
"""Its committed offsets are advisory: for lag tools. The ledger is the truth."""
DESCRIBE_SECONDS = 5.0
"""How often the topics are looked at while nothing arrives."""


class Reader:
    """Reads topics from stated positions.

    Connects at the first ``poll`` (or ``connect``); a failed one may simply be tried again.
    ``poll``, ``seek`` and ``close`` belong to one thread; ``lag``, ``lag_seconds``, ``commit`` and
    ``gaps`` may be called from any.
    """

    def __init__(self, settings: StreamSettings, topics: Sequence[Topic]) -> None:
        self._settings = settings
        self._topics = tuple(topics)
        self._wanted: dict[tuple[Topic, int], tuple[str, int]] = {}
        self._consumer: Connection[KafkaConsumer] | None = None
        self._admin: Connection[KafkaAdminClient] | None = None
        self._states: dict[Topic, TopicState] = {}
        self._next: dict[tuple[Topic, int], int] = {}
        self._gaps: list[Gap] = []
        self._described_at = 0.0
        self._lock = threading.Lock()  # guards what other threads read
        self._commit_refused = False
        self._corrupt: set[tuple[TopicPartition, int]] = set()
        self._lag = Lag(settings, self._topics)

    @property
    def connected(self) -> bool:
        """Whether the last contact with a broker succeeded."""
        consumer = self._consumer
        return consumer is not None and consumer.alive

    def seek(self, positions: Mapping[tuple[Topic, int], tuple[str, int]]) -> None:
        """Read on from here: (topic, partition) -> (topic id, next offset).

        A partition that is not named is read from its beginning. Call it before the first ``poll``,
        and whenever records that ``poll`` gave were not stored.
        """
        self._wanted = dict(positions)
        self._next = {}
        self._described_at = 0.0
        if self._consumer is not None:
            self._drop_clients()  # and with them everything fetched ahead

    def connect(self) -> None:
        """Connect, check the topics, and go to the stated positions.

        Raises:
            StreamUnavailable: no broker answered in ``connect_timeout_seconds``, or a topic does
                not exist yet.
            StreamInvalid: a login or permission is wrong, partition counts differ, a topic was
                made again, or compaction takes events away; the message has the remedy.
        """
        if self._consumer is not None:
            return
        timeout_ms = int(self._settings.connect_timeout_seconds * 1000)
        try:
            self._admin = connect(
                KafkaAdminClient, self._settings, "reader-admin", request_timeout_ms=timeout_ms
            )
            self._consumer = connect_consumer(
                self._settings, "reader", request_timeout_ms=max(timeout_ms, 10_000)
            )
            with explained(self._settings, self._admin):
                names = [topic_name(self._settings, topic) for topic in self._topics]
                check_not_compacted(self._settings, describe_configs(self._admin.client, names))
                self._place(self._describe_topics())
        except BaseException:
            self._drop_clients()
            raise

    def poll(self, max_records: int, timeout_seconds: float) -> list[Record]:
        """The next records, at most ``max_records``; empty after ``timeout_seconds`` without any.

        Records of one partition come in order. A record is given once, unless ``seek`` goes back.

        Raises:
            StreamUnavailable: as ``connect``; or reading failed. The next ``poll`` tries again.
            StreamInvalid: as ``connect``.
        """
        self.connect()
        assert self._consumer is not None
        try:
            with explained(self._settings, self._consumer):
                batches = self._fetch(max_records, timeout_seconds)
                # After fetching: an id that is still the same was the same when these were read.
                # A topic that was made again meanwhile has other records at our offsets.
                due = batches or time.monotonic() - self._described_at > DESCRIBE_SECONDS
                changed = due and self._changed(self._describe_topics())
                if changed or self._newly_corrupt(batches):
                    self._keep_place()
                    self._drop_clients()
                    return []
        except StreamUnavailable:
            self._keep_place()
            self._drop_clients()
            raise
        except MemoryError:
            raise
        except Exception as error:  # of the client: what it holds cannot be trusted any more
            self._keep_place()
            self._drop_clients()
            raise StreamUnavailable(
                f"the Kafka client failed while reading ({type(error).__name__}): it is made anew"
            ) from error
        failpoint("reader.after_fetch")
        return self._take(batches)

    def gaps(self) -> list[Gap]:
        """The gaps found since the last call."""
        with self._lock:
            found, self._gaps = self._gaps, []
        return found

    def positions(self) -> dict[tuple[Topic, int], tuple[str, int]]:
        """(topic, partition) -> (topic id, next offset): whatever is before it was given by
        ``poll``, or is nobody's word (an aborted transaction, a transaction's marker)."""
        with self._lock:
            return {
                key: (self._states[key[0]].topic_id, offset) for key, offset in self._next.items()
            }

    def commit(self, positions: Mapping[tuple[Topic, int], tuple[str, int]]) -> None:
        """Tell the broker how far the ledger is, for lag tools. Advisory: never raises."""
        admin = self._admin
        if admin is None or self._commit_refused or not positions:
            return
        offsets = {
            TopicPartition(topic_name(self._settings, topic), partition): OffsetAndMetadata(
                offset, "", -1
            )
            for (topic, partition), (_, offset) in positions.items()
        }
        try:
            results = admin.client.alter_group_offsets(self.group, offsets)
            refused = next((r for r in results.values() if r is not kafka_errors.NoError), None)
        except kafka_errors.AuthorizationError as error:
            refused = type(error)
        except (kafka_errors.KafkaError, OSError, RuntimeError) as error:
            logger.debug(
                "offsets were not committed to the consumer group; the ledger has them",
                extra={"event": "offsets_not_committed", "error": type(error).__name__},
            )
            return
        if refused is not None and issubclass(refused, kafka_errors.AuthorizationError):
            self._commit_refused = True
            logger.warning(
                "may not commit offsets to group %s: lag tools will see none; the ledger has them",
                self.group,
                extra={"event": "offset_commit_refused", "error": refused.__name__},
            )

    @property
    def group(self) -> str:
        """The group under which offsets are committed."""
        return f"{self._settings.topic_prefix}{GROUP}"

    def lag(self) -> dict[tuple[Topic, int], int]:
        """Events that are in a partition and were not given by ``poll`` yet."""
        with self._lock:
            following = dict(self._next)
        return self._lag.events(following, self._end_offsets(following))

    def lag_seconds(self) -> dict[tuple[Topic, int], float]:
        """The age of the oldest unread event of each partition, where it is known; 0 without any.

        Looks at the record, so it may take a moment.
        """
        with self._lock:
            following = dict(self._next)
        lags = self._lag.events(following, self._end_offsets(following))
        return self._lag.seconds(following, lags)

    def close(self) -> None:
        """Disconnect. Idempotent."""
        self._drop_clients()
        self._lag.close()

    # --- where to read ---

    def _describe_topics(self) -> dict[Topic, TopicState]:
        assert self._admin is not None
        states = describe(self._admin.client, self._settings, self._topics)
        require(self._settings, states, self._topics)
        check_partitions(self._settings, states)
        self._described_at = time.monotonic()
        return states

    def _place(self, states: dict[Topic, TopicState]) -> None:
        """Assign every partition and seek each to its position."""
        assert self._consumer is not None
        partitions = {
            (topic, number): TopicPartition(topic_name(self._settings, topic), number)
            for topic, state in states.items()
            for number in range(state.partitions)
        }
        self._consumer.client.assign(list(partitions.values()))
        beginnings = self._consumer.client.beginning_offsets(
            list(partitions.values()),
            timeout_ms=int(self._settings.connect_timeout_seconds * 1000),
        )
        starts: dict[tuple[Topic, int], int] = {}
        gaps: list[Gap] = []
        for key, partition in partitions.items():
            starts[key], gap = self._start_of(states[key[0]], key, beginnings[partition])
            gaps += [gap] if gap else []
        for key, partition in partitions.items():
            self._consumer.client.seek(partition, starts[key])
        self._record_gaps(gaps)
        with self._lock:
            self._states = states
            self._next = starts
        # From now on these are the positions to come back to.
        self._wanted = {key: (states[key[0]].topic_id, offset) for key, offset in starts.items()}

    def _start_of(
        self, state: TopicState, key: tuple[Topic, int], beginning: int
    ) -> tuple[int, Gap | None]:
        """Where to start in a partition, and what cannot be read.

        Raises:
            StreamInvalid: the topic was made again, and ``accept_new_topics`` is off.
        """
        topic, partition = key
        ids = {topic_id for (other, _), (topic_id, _) in self._wanted.items() if other is topic}
        old_id, expected = self._wanted.get(key, (state.topic_id, 0))
        if ids - {state.topic_id}:
            self._require_acceptance(topic)
            if old_id == state.topic_id:
                return beginning, None
            return beginning, Gap(topic, partition, expected, beginning, GapCause.TOPIC_RECREATED)
        if expected < beginning:
            if not ids:  # never read before: what is gone was never expected
                return beginning, None
            return beginning, Gap(topic, partition, expected, beginning, GapCause.RETENTION)
        return expected, None

    def _require_acceptance(self, topic: Topic) -> None:
        if not self._settings.accept_new_topics:
            name = topic_name(self._settings, topic)
            raise StreamInvalid(
                f"topic {name} was deleted and made again since it was last read: its old events "
                "are gone and its offsets mean other events now. If that was intended, start once "
                "with MOORLINE_STREAM__ACCEPT_NEW_TOPICS=true (it reads the new topic from its "
                "start and records the gap); if not, check MOORLINE_STREAM__BOOTSTRAP"
            )

    def _changed(self, states: Mapping[Topic, TopicState]) -> bool:
        """Whether we must begin again from our positions: new partitions, or accepted new topics.

        Raises:
            StreamInvalid: a topic was made again.
        """
        if states == self._states:
            return False
        for topic, state in states.items():
            if state.topic_id != self._states[topic].topic_id:
                self._require_acceptance(topic)
        logger.warning(
            "topics have new partitions or were made again: reading them anew from known offsets",
            extra={"event": "topics_changed", "topic": ",".join(topic.value for topic in states)},
        )
        return True

    def _record_gaps(self, gaps: Sequence[Gap]) -> None:
        for gap in gaps:
            metrics.GAPS.labels(gap.topic.value, gap.cause.value).inc()
            logger.error(
                "events were gone from Kafka before they were read: reading goes on at offset %d",
                gap.resumed_offset,
                extra={
                    "event": "events_lost",
                    "topic": gap.topic.value,
                    "partition": gap.partition,
                    "offset": gap.expected_offset,
                    "reason": gap.cause.value,
                },
            )
        with self._lock:
            self._gaps += gaps

    # --- reading ---

    def _fetch(
        self, max_records: int, timeout_seconds: float
    ) -> dict[TopicPartition, list[RawRecord]]:
        assert self._consumer is not None
        try:
            batches: dict[TopicPartition, list[RawRecord]] = self._consumer.client.poll(
                timeout_ms=int(timeout_seconds * 1000), max_records=max_records
            )
        except (kafka_errors.OffsetOutOfRangeError, kafka_errors.NoOffsetForPartitionError):
            self._keep_place()
            states = self._describe_topics()
            self._refuse_lost_ends(states)
            self._place(states)
            return {}
        return batches

    def _newly_corrupt(self, batches: Mapping[TopicPartition, list[RawRecord]]) -> bool:
        """Whether a record cannot be decoded that was not met before: its bytes may have been hurt
        on their way only, so they are fetched once more."""
        corrupt = {
            (place, record.offset)
            for place, batch in batches.items()
            for record in batch
            if record.corrupt
        }
        newly = not corrupt <= self._corrupt
        self._corrupt = corrupt
        return newly

    def _take(self, batches: Mapping[TopicPartition, list[RawRecord]]) -> list[Record]:
        by_name = {topic_name(self._settings, topic): topic for topic in self._topics}
        records: list[Record] = []
        for partition, batch in batches.items():
            topic = by_name[partition.topic]
            topic_id = self._states[topic].topic_id
            records += [record_from(topic, topic_id, raw) for raw in batch]
        with self._lock:
            for record in records:
                self._next[record.topic, record.partition] = record.offset + 1
            self._pass_markers()
        self._keep_place()
        return records

    def _pass_markers(self) -> None:
        """Step over a transaction's marker behind the last record: it would look like lag."""
        assert self._consumer is not None
        for key, offset in self._next.items():
            partition = TopicPartition(topic_name(self._settings, key[0]), key[1])
            self._next[key] = max(offset, self._consumer.client.position(partition) or 0)

    def _keep_place(self) -> None:
        """Remember for ``connect`` the position behind the last record that was given."""
        self._wanted = self.positions() or self._wanted

    def _refuse_lost_ends(self, states: Mapping[Topic, TopicState]) -> None:
        """Refuse a partition that ends before our position: it has lost records.

        Raises:
            StreamInvalid: there is one. Reading on would take new records for old ones.
        """
        ends = self._end_offsets(dict(self._next))
        for key, following in self._next.items():
            topic, partition = key
            same = states[topic].topic_id == self._states[topic].topic_id
            if same and key in ends and ends[key] < following:
                name = topic_name(self._settings, topic)
                raise StreamInvalid(
                    f"topic {name} partition {partition} ends at {ends[key]}, but events up to "
                    f"{following} were read: the broker lost data. Restore it; or delete the topic "
                    "and start with MOORLINE_STREAM__ACCEPT_NEW_TOPICS=true"
                )

    def _end_offsets(self, keys: Mapping[tuple[Topic, int], int]) -> dict[tuple[Topic, int], int]:
        admin, consumer = self._admin, self._consumer
        if admin is None or consumer is None:
            return {}
        return end_offsets(self._settings, admin.client, consumer.client, list(keys))

    def _drop_clients(self) -> None:
        consumer, self._consumer = self._consumer, None
        admin, self._admin = self._admin, None
        for connection, options in ((consumer, {"autocommit": False}), (admin, {})):
            if connection is not None:
                try:
                    connection.client.close(**options)
                except (kafka_errors.KafkaError, OSError, RuntimeError) as error:
                    logger.debug(
                        "a Kafka client did not close cleanly; it is dropped all the same",
                        extra={"event": "kafka_close_failed", "error": type(error).__name__},
                    )
