"""Puts dead letters back on the topics that they came from.

A letter is noted as redriven after its topic has acknowledged it, in a file of the state directory.
After a kill in between it is sent again: the ledger knows a repeated event by its id (or, where a
producer gave none, lets the same rater's latest rating count), so that it has no effect twice.

A redriven record is the original, with two more headers. It arrives anew: at a new offset, with a
fate of its own, while the old offset stays ``dead_lettered``. One that cannot be read again comes
back as a new letter, at most ``max_redrives`` times.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain
from pathlib import Path
from typing import Any

from kafka import KafkaProducer
from kafka import errors as kafka_errors

from moorline.durable import make_directory, write_file
from moorline.failpoints import failpoint
from moorline.locks import FileLock, LockHeld
from moorline.settings import StreamSettings
from moorline.stream.batches import RawRecord
from moorline.stream.client import (
    StreamUnavailable,
    admin_session,
    close_producer,
    connect,
    explained,
)
from moorline.stream.scan import Scanner
from moorline.stream.topics import (
    DEAD_LETTER_MAX_BYTES,
    JOINED,
    Headers,
    Topic,
    describe_names,
    dlq_name,
    topic_name,
)

REDRIVES_HEADER = "moorline_redrives"
"""How many times a record was put back."""
FROM_HEADER = "moorline_redriven_from"
"""The letter that it was last put back from: topic/partition/offset."""
_ORIGIN_HEADER = "moorline_origin_topic"
"""The first of those that ``DeadLetters`` adds behind the original's."""
_ACKNOWLEDGE_SECONDS = 10.0
BATCH_LETTERS = 100
"""Acknowledged and noted together."""


class Refusal(StrEnum):
    """Why a letter is not put back."""

    TOO_OFTEN = "redriven_too_often"
    TRUNCATED = "truncated"
    """The dead-letter topic did not take all of it: the original is not whole."""
    NO_ORIGIN = "no_origin"
    """Its headers do not say that it came from one of these topics."""
    TOO_LARGE = "too_large"
    """Its topic does not take a record of this size any more."""


@dataclass(frozen=True)
class Letter:
    """One record of a dead-letter topic."""

    topic: Topic
    """Where it came from, by the dead-letter topic that it is on."""
    name: str
    """The name of the dead-letter topic."""
    incarnation: str
    partition: int
    offset: int
    timestamp_ms: int
    """When it became a dead letter."""
    key: bytes | None = field(repr=False)
    value: bytes | None = field(repr=False)
    original_headers: Headers = field(repr=False)
    about: dict[str, str] = field(hash=False)
    """What ``DeadLetters`` wrote of it, by header name."""

    @property
    def reason(self) -> str:
        return self.about.get("moorline_reason", "unknown")

    @property
    def origin(self) -> str:
        """topic/partition/offset, as far as it is known."""
        where = (self.about.get(f"moorline_origin_{part}", "?") for part in ("partition", "offset"))
        return "/".join((self.topic.value, *where))

    @property
    def place(self) -> str:
        return f"{self.name}/{self.partition}/{self.offset}"

    @property
    def redrives(self) -> int:
        """How many times it was put back before."""
        count = dict(self.original_headers).get(REDRIVES_HEADER, b"")
        return int(count[:9]) if count.isdigit() else 0

    @property
    def came_from(self) -> str:
        """The letter that this record was put back from; "" if it never was one."""
        return dict(self.original_headers).get(FROM_HEADER, b"").decode(errors="replace")


@dataclass(frozen=True)
class Wanted:
    """Which letters to put back; a field that is None or empty selects all."""

    topics: Collection[Topic] = ()
    reasons: Collection[str] = ()
    since: float | None = None
    """Dead letters of this moment or later, Unix seconds."""
    limit: int | None = None
    """How many letters may go; those that must stay are not counted."""
    max_redrives: int = 3

    def takes(self, letter: Letter) -> bool:
        return (not self.reasons or letter.reason in self.reasons) and (
            self.since is None or letter.timestamp_ms / 1000 >= self.since
        )


class Redriver:
    """One run of ``moorline redrive``. Use it in ``redriving``."""

    def __init__(self, settings: StreamSettings, journal: Journal) -> None:
        self._settings = settings
        self._journal = journal
        self._sent: set[str] = set()

    def letters(self, wanted: Wanted) -> Iterator[Letter]:
        """The dead letters that were not put back yet, oldest first by partition.

        Raises:
            StreamUnavailable: no broker answered.
        """
        left = wanted.limit
        names = {dlq_name(self._settings, topic): topic for topic in wanted.topics or JOINED}
        with admin_session(self._settings) as admin:
            found = describe_names(admin, names)
        with Scanner(self._settings, "redrive") as scanner:
            for name, (incarnation, partitions) in sorted(found.items()):
                for partition in range(partitions):
                    start = scanner.beginning(name, partition)
                    records = chain.from_iterable(scanner.read(name, partition, start))
                    for raw in records:
                        letter = _letter(names[name], name, incarnation, raw)
                        if self._journal.has(letter) or not wanted.takes(letter):
                            continue
                        if letter.came_from in self._sent:  # an updater runs: not twice in one run
                            continue
                        if self.refusal(letter, wanted) is None and left is not None:
                            if left == 0:
                                return
                            left -= 1
                        yield letter

    def refusal(self, letter: Letter, wanted: Wanted) -> Refusal | None:
        """Why a letter must stay; None: it may go."""
        if letter.about.get(_ORIGIN_HEADER) != topic_name(self._settings, letter.topic):
            return Refusal.NO_ORIGIN
        if "moorline_truncated_from_bytes" in letter.about:
            return Refusal.TRUNCATED
        if letter.redrives >= wanted.max_redrives:
            return Refusal.TOO_OFTEN
        return None

    def send(self, letters: Sequence[Letter]) -> dict[Letter, Refusal]:
        """Put letters back, wait until all are acknowledged, and note it.

        Returns:
            Those that their topic refused.

        Raises:
            StreamUnavailable: some were not acknowledged; those that were are noted.
        """
        with admin_session(self._settings) as admin:
            names = [topic_name(self._settings, topic) for topic in JOINED]
            partitions = {name: n for name, (_, n) in describe_names(admin, names).items()}
        connection = connect(
            KafkaProducer,
            self._settings,
            "redrive",
            acks="all",
            max_block_ms=int(self._settings.connect_timeout_seconds * 1000),
            max_request_size=DEAD_LETTER_MAX_BYTES,
            allow_auto_create_topics=False,
        )
        refused: dict[Letter, Refusal] = {}
        acknowledged: list[Letter] = []
        try:
            with explained(self._settings, connection):
                waiting = deque(
                    (letter, self._start(connection.client, letter, partitions))
                    for letter in letters
                )
                while waiting:
                    letter, future = waiting.popleft()
                    try:
                        future.get(timeout=_ACKNOWLEDGE_SECONDS)
                    except (
                        kafka_errors.MessageSizeTooLargeError,
                        kafka_errors.RecordListTooLargeError,
                    ):
                        refused[letter] = Refusal.TOO_LARGE
                        continue
                    acknowledged.append(letter)
        finally:
            failpoint("redrive.acknowledged")
            self._journal.note(acknowledged)
            self._sent.update(letter.place for letter in acknowledged)
            close_producer(connection.client)
        return refused

    def _start(self, client: Any, letter: Letter, partitions: dict[str, int]) -> Any:
        name = topic_name(self._settings, letter.topic)
        if name not in partitions:
            raise StreamUnavailable(f"topic {name} is gone: start the updater, which makes it")
        origin = letter.about.get("moorline_origin_partition", "")
        # Where its partner is, whichever way its producer chose partitions.
        same = origin.isdigit() and int(origin) < partitions[name]
        return client.send(
            name,
            # Kafka takes no record that has neither.
            value=letter.value if letter.value is not None or letter.key is not None else b"",
            key=letter.key,
            headers=[
                *(one for one in letter.original_headers if one[0] not in _OURS),
                (REDRIVES_HEADER, str(letter.redrives + 1).encode()),
                (FROM_HEADER, letter.place.encode()),
            ],
            partition=int(origin) if same else None,
        )


_OURS = (REDRIVES_HEADER, FROM_HEADER)


def _letter(topic: Topic, name: str, incarnation: str, raw: RawRecord) -> Letter:
    headers = raw.headers
    begin = max((i for i, one in enumerate(headers) if one[0] == _ORIGIN_HEADER), default=None)
    return Letter(
        topic,
        name,
        incarnation,
        raw.partition,
        raw.offset,
        raw.timestamp,
        raw.key,
        raw.value,
        original_headers=headers if begin is None else headers[:begin],
        about={}
        if begin is None
        else {one: value.decode(errors="replace") for one, value in headers[begin:]},
    )


class Journal:
    """Which letters were put back: ranges of offsets by partition of one dead-letter topic's life.

    A file, not a committed offset: with a filter, letters are put back out of order.
    """

    def __init__(self, path: Path) -> None:
        """Read it.

        Raises:
            ValueError: the file is damaged.
        """
        self._path = path
        self._ranges: dict[str, list[tuple[int, int]]] = {}
        if path.exists():
            try:
                stored = json.loads(path.read_bytes())
                self._ranges = {
                    place: [(int(start), int(stop)) for start, stop in ranges]
                    for place, ranges in stored.items()
                }
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path} is damaged: remove it (letters that were put back go again, which the "
                    "ledger counts as duplicates)"
                ) from error

    def has(self, letter: Letter) -> bool:
        ranges = self._ranges.get(_life(letter), ())
        return any(start <= letter.offset < stop for start, stop in ranges)

    def note(self, letters: Sequence[Letter]) -> None:
        """Note these letters as put back; durable on return."""
        if not letters:
            return
        for letter in letters:
            ranges = self._ranges.setdefault(_life(letter), [])
            ranges.append((letter.offset, letter.offset + 1))
        for letter in letters:
            self._ranges[_life(letter)] = _merged(self._ranges[_life(letter)])
        write_file(self._path, json.dumps(self._ranges).encode(), "redrive.journal")


def _life(letter: Letter) -> str:
    return f"{letter.name} {letter.incarnation} {letter.partition}"


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


@contextmanager
def redriving(settings: StreamSettings, state_dir: Path) -> Iterator[Redriver]:
    """The only redriver of a state directory.

    Raises:
        StreamUnavailable: another one is at work.
        ValueError: the journal is damaged.
    """
    make_directory(state_dir)
    try:
        lock = FileLock(state_dir / "redrive.lock")
    except LockHeld as error:
        raise StreamUnavailable(
            f"another `moorline redrive` ({error.holder}) uses {state_dir}: wait until it has ended"
        ) from None
    with lock:
        yield Redriver(settings, Journal(state_dir / "redriven.json"))
