"""Stream to ledger: read, parse, dead-letter what cannot be read, commit.

Nothing is skipped: a record that cannot be dead-lettered or committed now is held and tried again
at the next step, and nothing after it is read. A record is dead-lettered before its offset moves;
a kill in between sends it there twice, with the same origin in its headers.

No record stops the intake: whatever is raised for what a record is makes a dead letter of it. Only
the broker, the disk and the machine can stop it.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from pydantic import ValidationError

from moorline.errors import MoorlineError, cause_of
from moorline.events import Erasure, Fate, Feedback, Interaction, Reason
from moorline.failpoints import failpoint
from moorline.feedback import FeedbackInvalid, read_feedback, read_retraction
from moorline.stream import Gap, Record, StreamUnavailable, Topic
from moorline.trainability import why_recorded_in_vain
from updater.learning.advantages import why_no_credit
from updater.ledger import Ledger, Parsed, RecordInvalid

logger = logging.getLogger("moorline.ingest")

_STAGE = "ingest"
_PROGRESS_SECONDS = 1.0
"""Between looks at how much is unread: each asks the broker."""


class Source(Protocol):
    """What ingest needs of ``moorline.stream.Reader``."""

    def poll(self, max_records: int, timeout_seconds: float) -> list[Record]: ...
    def gaps(self) -> list[Gap]: ...
    def lag(self) -> Mapping[tuple[Topic, int], int]: ...
    def positions(self) -> Mapping[tuple[Topic, int], tuple[str, int]]: ...
    def commit(self, positions: Mapping[tuple[Topic, int], tuple[str, int]]) -> None: ...


class DeadLetterSink(Protocol):
    """What ingest needs of ``moorline.stream.DeadLetters``."""

    def send(self, record: Record, reason: Reason, stage: str, error: str = "") -> None: ...


@dataclass(frozen=True)
class StepCounts:
    """What one step did."""

    records: int = 0
    dead_lettered: int = 0
    replayed: int = 0
    gaps: int = 0
    stalled: bool = False
    """A dead letter is held that no topic takes; the log says why."""
    changes: Mapping[tuple[str, Fate, Reason], int] = field(default_factory=dict)


class Ingest:
    """Moves records from the stream into the ledger, a batch a step."""

    def __init__(
        self,
        reader: Source,
        dead_letters: DeadLetterSink,
        ledger: Ledger,
        *,
        alias: str,
        vocab_size: int,
        max_tokens: int,
        signals: Mapping[str, float],
        max_event_bytes: int = 900_000,
        max_records: int = 500,
    ) -> None:
        """Start where the ledger stands; the caller has sought ``reader`` to it.

        Args:
            max_tokens: prompt and completion that an update can learn from.
            signals: implicit signals that have a reward, by name.
            max_event_bytes: larger events are dead-lettered unread.
            max_records: of one step, and of one transaction.
        """
        self._reader = reader
        self._dead_letters = dead_letters
        self._ledger = ledger
        self._alias = alias
        self._vocab_size = vocab_size
        self._max_tokens = max_tokens
        self._signals = signals
        self._max_event_bytes = max_event_bytes
        self._max_records = max_records
        self._held: list[Parsed] = []
        self._held_gaps: list[Gap] = []
        self._acknowledged = 0  # so many of the held ones need no dead-lettering any more
        self._lettered: set[int] = set()  # the places in `_held` of those that were sent
        self._progress_noted_at = -math.inf
        self._announced: dict[tuple[Topic, int], tuple[str, int]] = {}
        ledger.set_behind(ledger.offsets(), as_of=0.0)  # nothing expires before the first look

    def step(self, timeout_seconds: float) -> StepCounts:
        """Read one batch and commit it, waiting at most so long for records.

        Raises:
            StreamUnavailable: the broker cannot be read.
            LedgerUnavailable: the disk refused; what was read is held for the next step.
            LeaseLost: another updater took over.
        """
        if not self._held:
            self._read(timeout_seconds)
        while True:
            dead_letters_ok = self._dead_letter_held()
            ready = self._held[: self._acknowledged]
            if not ready and not self._held_gaps:
                self._note_progress()
                return StepCounts(stalled=not dead_letters_ok)
            failpoint("ingest.before_ledger")
            try:
                done = self._ledger.ingest(ready, self._held_gaps)
                break
            except RecordInvalid as invalid:
                self._give_up(invalid)
        failpoint("ingest.after_ledger")
        gaps, self._held_gaps = len(self._held_gaps), []
        self._hold(self._held[self._acknowledged :])
        self._note_progress()
        return StepCounts(
            records=done.records,
            dead_lettered=sum(parsed.event is None for parsed in ready),
            replayed=done.replayed,
            gaps=gaps,
            stalled=not dead_letters_ok,
            changes=done.changes,
        )

    def _read(self, timeout_seconds: float) -> None:
        records = self._reader.poll(self._max_records, timeout_seconds)
        failpoint("ingest.polled")
        self._held_gaps += self._reader.gaps()
        newest = self._ledger.newest_version()
        self._hold([self._parse(record, newest) for record in records])

    def _hold(self, records: list[Parsed]) -> None:
        self._held, self._acknowledged, self._lettered = records, 0, set()

    def _give_up(self, invalid: RecordInvalid) -> None:
        """Make a dead letter of a record that the ledger cannot take."""
        held = self._held[invalid.index]
        if held.event is None:  # it cannot even be counted as a dead letter
            raise invalid
        self._held[invalid.index] = _unexpected(held.record, invalid.error)
        self._acknowledged = invalid.index

    def _parse(self, record: Record, newest_version: int) -> Parsed:
        try:
            return self._judge(record, newest_version)
        except (MoorlineError, MemoryError):
            raise
        except Exception as error:  # of this record: whatever it is, the next one is read
            return _unexpected(record, error)

    def _judge(self, record: Record, newest_version: int) -> Parsed:
        parsed = parse(record, self._max_event_bytes)
        match parsed.event:
            case Interaction():
                reason = why_untrainable(
                    parsed.event,
                    self._vocab_size,
                    self._alias,
                    self._max_tokens,
                    newest_version=newest_version,
                )
            case Feedback():
                reason = why_no_credit(parsed.event, self._signals)
            case _:
                return parsed
        return Parsed(record, parsed.event, reason or Reason.NONE)

    def erasures_unread(self) -> bool:
        """Whether somebody asks to be forgotten whom the ledger does not know of yet: nothing may
        be learned before. Asks the broker; one that is away has nothing to tell."""
        lag = self._reader.lag()
        held = (parsed.record.topic is Topic.ERASURES for parsed in self._held)
        unread = (events > 0 for (topic, _), events in lag.items() if topic is Topic.ERASURES)
        return any(unread) or any(held)

    def _dead_letter_held(self) -> bool:
        """Send what is unreadable away, in order, until one is not accepted."""
        for place, parsed in enumerate(self._held[self._acknowledged :], self._acknowledged):
            if parsed.event is None and place not in self._lettered:
                try:
                    self._dead_letters.send(parsed.record, parsed.reason, _STAGE, parsed.error)
                except StreamUnavailable as error:
                    logger.error(
                        "the dead-letter topic takes nothing: intake waits, nothing is skipped",
                        extra={"event": "dead_letters_unavailable", "error": str(error)},
                    )
                    return False
                self._lettered.add(place)
                failpoint("ingest.dead_lettered")
            self._acknowledged += 1
        return True

    def _note_progress(self) -> None:
        """Tell the ledger what is still unread, so that nothing expires that may have a partner."""
        if time.monotonic() - self._progress_noted_at < _PROGRESS_SECONDS:
            return
        as_of = time.time()
        lag = self._reader.lag()
        behind = {place for place, events in lag.items() if events > 0}
        behind |= {(held.record.topic, held.record.partition) for held in self._held}
        if not self._held and not self._held_gaps:
            self._ledger.pass_over(self._reader.positions())
        offsets = self._ledger.offsets()
        behind |= offsets.keys() - lag.keys()
        self._ledger.set_behind(behind, as_of)
        if offsets != self._announced:
            self._reader.commit(offsets)  # advisory, for lag tools
            self._announced = offsets
        self._progress_noted_at = time.monotonic()


def parse(record: Record, max_event_bytes: int) -> Parsed:
    """Read one record; what cannot be read has no event and a reason. Pure.

    An event that names no feedback id or time gets those of its record, so that reading it again
    gives the same.
    """
    value = record.value
    if record.corrupt:
        return Parsed(record, None, Reason.CORRUPT_RECORD, record.corrupt)
    if not value:
        retraction = read_retraction(record.key) if _takes_back(record) else None
        return Parsed(record, retraction, Reason.EMPTY_VALUE if retraction is None else Reason.NONE)
    if len(value) > max_event_bytes:
        return Parsed(record, None, Reason.TOO_LARGE)
    event: Interaction | Feedback | Erasure
    try:
        if record.topic is Topic.INTERACTIONS:
            event = Interaction.model_validate_json(value)
        elif record.topic is Topic.ERASURES:
            event = Erasure.model_validate_json(value)
        else:
            event = read_feedback(value)
            if "feedback_id" not in event.model_fields_set:
                name = f"fb-{_plain(record.topic_id)}.{record.partition}.{record.offset:020d}"
                event = event.model_copy(update={"feedback_id": name})
    except ValidationError as error:
        return Parsed(record, None, _unreadable(error))
    except FeedbackInvalid as error:
        return Parsed(record, None, error.reason)
    return Parsed(record, event)


def _takes_back(record: Record) -> bool:
    """Whether it may be a Kafka null for a rating; an empty text is no null."""
    return record.topic is Topic.FEEDBACK and record.value is None


def _unexpected(record: Record, error: Exception) -> Parsed:
    """The dead letter of a record that raised what no check foresaw."""
    logger.error(
        "taking in a record raised an error: it becomes a dead letter, and intake goes on",
        extra={
            "event": "record_unexpected",
            "error": cause_of(error),
            "topic": record.topic.value,
            "partition": record.partition,
            "offset": record.offset,
        },
    )
    return Parsed(record, None, Reason.UNEXPECTED, cause_of(error))


def _plain(topic_id: str) -> str:
    return topic_id.replace("/", "_").replace("=", "")


def _unreadable(error: ValidationError) -> Reason:
    details = error.errors(include_url=False, include_context=False, include_input=False)
    if any(detail["type"] == "json_invalid" for detail in details):
        return Reason.MALFORMED_JSON
    if any(detail["loc"] == ("schema_version",) for detail in details):
        return Reason.UNSUPPORTED_SCHEMA_VERSION
    return Reason.SCHEMA_MISMATCH


def why_untrainable(
    interaction: Interaction,
    vocab_size: int,
    alias: str,
    max_tokens: int,
    *,
    newest_version: int | None = None,
) -> Reason | None:
    """Why no honest gradient follows from this reply, or None. Pure.

    Args:
        max_tokens: prompt and completion together.
        newest_version: policies after it are unknown; None: any version is believed.
    """
    tokens = (interaction.prompt_token_ids, interaction.completion_token_ids)
    if interaction.alias != alias:
        return Reason.UNKNOWN_POLICY
    if newest_version is not None and any(
        span.version > newest_version for span in interaction.policy_spans
    ):
        return Reason.UNKNOWN_POLICY
    reason = why_recorded_in_vain(interaction)
    if reason is Reason.MULTIMODAL_PROMPT:  # its placeholders may be tokens of no vocabulary
        return reason
    if any(_out_of_vocabulary(token_ids, vocab_size) for token_ids in tokens):
        return Reason.TOKEN_OUT_OF_VOCABULARY
    return Reason.TOO_LONG if sum(map(len, tokens)) > max_tokens else reason


def _out_of_vocabulary(token_ids: Sequence[int], vocab_size: int) -> bool:
    return bool(token_ids) and not (min(token_ids) >= 0 and max(token_ids) < vocab_size)
