"""The updater's one commit point.

One transaction moves offsets and the rows that they produced; one transaction decides examples and
adds the release that learned from them. After a kill anywhere, the file holds the state before or
after a transaction, never between. Publishing comes after, from the outbox; so does the destruction
of keys that nothing needs any more.
"""

from __future__ import annotations

import logging
import math
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from moorline.events import Erasure, Fate, Reason, Release
from moorline.stream import Gap, Topic
from updater.ledger.adoption import adopt
from updater.ledger.anchors import Anchor, write_anchor
from updater.ledger.bodies import Bodies, BodyErased, WordInvalid
from updater.ledger.claims import Claims
from updater.ledger.crashes import Crashes
from updater.ledger.database import Database, LedgerError, lock_for_writing, make_home
from updater.ledger.decisions import BatchDecision, Decisions, check_release
from updater.ledger.erasure import Eraser, Forgotten
from updater.ledger.erasure_markers import ErasureMarkers
from updater.ledger.examples import read_named, read_ready, read_traffic
from updater.ledger.expiry import Expired, Expiry
from updater.ledger.fates import Fates, count
from updater.ledger.intake import Ingested, Intake
from updater.ledger.joins import Joins
from updater.ledger.keys import KeyRing
from updater.ledger.reader import LedgerReader
from updater.ledger.refusals import refusals_of
from updater.ledger.revocation import Revocation, check_revocation, wanted_revocation
from updater.ledger.rules import Parsed
from updater.ledger.watermark import Watermark
from updater.values import Example, TokenSequence

logger = logging.getLogger("moorline.ledger")

DEFAULT_HORIZON_SECONDS = 7 * 86400.0
_Read = TypeVar("_Read")


@dataclass
class UnitOfWork:
    """One transaction of the ledger while it is open, and what it came to."""

    connection: sqlite3.Connection
    fates: Fates
    erases: bool = False
    """Set inside it: keys and old pages are to be destroyed once it has committed."""
    changes: Mapping[tuple[str, Fate, Reason], int] = field(default_factory=dict)
    """(topic, fate, reason) -> events that came to it; known when it has committed."""

    @cached_property
    def erasure_markers(self) -> ErasureMarkers:
        return ErasureMarkers(self.connection)


class Ledger(LedgerReader):
    """The one writer."""

    def __init__(
        self,
        path: Path,
        *,
        horizon_seconds: float = DEFAULT_HORIZON_SECONDS,
        keep_decided_seconds: float = math.inf,
        suspect_after_crashes: int = 3,
    ) -> None:
        """Take the lock, open or create the file, begin a new lease.

        Args:
            horizon_seconds: how long an interaction and its feedback wait for each other.
            keep_decided_seconds: bodies of decided replies are kept so long, if not for less.
            suspect_after_crashes: a reply with which the process has died so often is suspected.

        Raises:
            LedgerLocked: another updater holds it.
            LedgerError: not a ledger, damaged, of another version, or without its keys.
            LedgerUnavailable: the disk refused.
        """
        make_home(path)
        with ExitStack() as opened:
            self._lock = lock_for_writing(path.with_name(f"{path.name}.lock"))
            opened.callback(self._lock.close)
            super().__init__(Database(path))
            opened.callback(self._database.close)
            needed = bool(self._database.rows("SELECT 1 FROM subjects LIMIT 1"))
            self._keys = KeyRing(path.with_name(f"{path.name}.keys"), needed=needed)
            opened.callback(self._keys.close)
            self.epoch = self._database.begin_lease()
            self._claims = Claims()
            self.crashes = Crashes(self._database, self._claims, suspect_after_crashes)
            self.crashes.count_crashes()
            self._wipe_due = True  # a kill may have come between an erasure and its wiping
            self._destroy_doomed()
            opened.pop_all()
        self._horizon_seconds = horizon_seconds
        self._keep_seconds = keep_decided_seconds
        self._watermark = Watermark(self._database)
        logger.info(
            "the ledger is open for writing",
            extra={"event": "ledger_opened", "path": str(path), "epoch": self.epoch},
        )

    def __enter__(self) -> Ledger:
        return self

    @staticmethod
    def open_readonly(path: Path) -> LedgerReader:
        """A look at a ledger, whether or not an updater is running on it.

        Raises:
            LedgerError: there is none, or it cannot be read.
        """
        return LedgerReader(Database(path, readonly=True))

    def close(self) -> None:
        """Close the file and give the lock back."""
        super().close()
        self._keys.close()
        self._lock.close()

    # --- what comes in ------------------------------------------------------------------------

    def ingest(
        self, records: Sequence[Parsed], gaps: Iterable[Gap] = (), *, now: float | None = None
    ) -> Ingested:
        """Consume records: their fates, their joins and their offsets, in one transaction.

        Args:
            now: Unix seconds; the clock if None.

        Raises:
            LedgerUnavailable: the disk refused; nothing was consumed, call again.
            LeaseLost: another updater took over.
            RecordInvalid: one record raised an error; nothing was consumed, call again without it.
        """
        now = time.time() if now is None else now
        with self._unit_of_work("ingest") as work:
            joins = Joins(
                work.connection,
                work.fates,
                self._keys,
                work.erasure_markers,
                self._horizon_seconds,
            )
            eraser = self._eraser(work)
            intake = Intake(work.connection, joins, eraser)
            intake.record_gaps(gaps, now)
            new, replayed = intake.consume(records, now)
            work.erases = eraser.carried_out
        return Ingested(new, replayed, work.changes)

    def pass_over(self, positions: Mapping[tuple[Topic, int], tuple[str, int]]) -> None:
        """Move offsets over what holds no event, so that its retention is no gap. Idempotent.

        Args:
            positions: (topic, partition) -> (topic id, next offset) of what was read to its end.

        Raises:
            LedgerUnavailable: the disk refused; call again.
        """
        known = self.offsets()
        moved = {
            place: (topic_id, offset)
            for place, (topic_id, offset) in positions.items()
            if place in known and known[place][0] == topic_id and known[place][1] < offset
        }
        if not moved:
            return
        with self._database.transaction("pass_over") as connection:
            connection.executemany(
                "UPDATE topic_partitions SET next_offset = max(next_offset, ?)"
                " WHERE topic = ? AND partition = ? AND topic_id = ?",
                [
                    (offset, topic, partition, topic_id)
                    for (topic, partition), (topic_id, offset) in moved.items()
                ],
            )

    def set_behind(self, partitions: Collection[tuple[str, int]], as_of: float) -> None:
        """Say which (topic, partition)s held unread records at the moment ``as_of``, Unix seconds.

        They hold the horizon back at what was read of them; all others were read up to ``as_of``,
        so that a partition in which nothing happens keeps nothing from expiring.
        """
        self._watermark.set_behind(partitions, as_of)

    def watermark(self, now: float) -> float:
        """Everything that arrived before this moment was read, Unix seconds; never after ``now``.

        Arrival is monotonous in a partition, so that no event is forgotten while the one that it
        waits for lies unread.
        """
        return self._watermark.at(now)

    def expire(self, now: float | None = None, *, limit: int = 10_000) -> Expired:
        """Apply the horizon to at most ``limit`` rows of each kind; the rest at the next call.

        What became free in the file goes back to the disk, likewise bit by bit.
        """
        watermark = self.watermark(time.time() if now is None else now)
        with self._unit_of_work("expire") as work:
            expired = Expiry(work.connection, work.fates).run(
                watermark, self._horizon_seconds, self._keep_seconds, limit
            )
        self._destroy_doomed()
        self._database.give_back()
        return expired

    # --- who is forgotten ---------------------------------------------------------------------

    def forget(self, erasure: Erasure, *, now: float | None = None) -> Forgotten:
        """Carry an erasure out, as ``ingest`` does one on the stream. Again is a no-op.

        Raises:
            LedgerUnavailable: the disk refused; call again.
            LeaseLost: another updater took over.
        """
        now = time.time() if now is None else now
        with self._unit_of_work("forget") as work:
            self._eraser(work).carry_out(erasure, now, now)
            work.erases = True
        found = self.erasure(erasure.erasure_id)
        assert found is not None
        return found

    def commit_revocation(self, release: Release) -> None:
        """The policy is what ``release.revokes_after`` was, and what was learned since waits again.

        Raises:
            LedgerError: no erasure asks for it, or the release is not that. Nothing changed.
        """
        with self._unit_of_work("revocation") as work:
            check_revocation(
                release,
                wanted=wanted_revocation(work.connection),
                revoked=self.revoked_versions(),
                next_version=self.next_version(),
                epoch=self.epoch,
            )
            Revocation(work.connection, work.fates).run(release)
        self._claims.clear()

    def _eraser(self, work: UnitOfWork) -> Eraser:
        return Eraser(
            work.connection,
            work.fates,
            self._keys,
            work.erasure_markers,
            self.release,
            self.live_version(),
        )

    def _finish_erasure(self) -> None:
        """After the commit: destroy the keys, and wipe every old page that is still in a file."""
        logger.info("erasure carried out", extra={"event": "erasure_carried_out"})
        self._claims.clear()
        self._wipe_due = True
        self._destroy_doomed()

    def _destroy_doomed(self) -> None:
        """Destroy the keys that nothing needs; after a kill the next start does it."""
        while doomed := self._database.rows("SELECT key FROM doomed_keys ORDER BY key LIMIT 10000"):
            self._keys.destroy([key for (key,) in doomed])
            with self._database.transaction("keys") as connection:
                connection.executemany("DELETE FROM doomed_keys WHERE key = ?", doomed)
        if self._wipe_due:
            self._keys.wipe()
            self._wipe_due = not self._database.wipe()  # a reader's old pages go at the next call

    def _readable(self, read: Callable[[sqlite3.Connection, Bodies], _Read]) -> _Read:
        """Read bodies. One whose key is gone (the ledger is a copy from before an erasure, and has
        not read of it yet) is erased here too; one that the rules of today refuse is passed by."""
        while True:
            try:
                with self._database.snapshot() as connection:
                    return read(connection, Bodies(connection, self._keys))
            except (BodyErased, WordInvalid) as error:
                unreadable = error
            with self._unit_of_work("forget") as work:
                if isinstance(unreadable, BodyErased):
                    self._eraser(work).erase_body(unreadable)
                else:
                    Decisions(work.connection, work.fates).refuse_word(unreadable.identity)

    # --- what is learned from -----------------------------------------------------------------

    def ready_examples(self, limit: int) -> list[Example]:
        """Old and fresh examples that wait for a batch; they stay ready until they are decided.

        Half of them are the oldest, the others are spread over the rest by age.

        The ledger remembers which ratings it handed out under each id. A rating that arrives in
        the meantime is not part of the decision.
        """
        found = self._readable(lambda connection, bodies: read_ready(connection, bodies, limit))
        return self._claims.hand_out(found)

    def refusals(self, example_ids: Sequence[str]) -> int:
        """How many candidates were refused with the most refused of these examples."""
        with self._database.snapshot() as connection:
            return refusals_of(connection, self._claims.interactions(example_ids))

    def examples_of(self, keys: Sequence[str]) -> list[Example]:
        """The same, of those of these replies that wait for a batch."""
        found = self._readable(lambda connection, bodies: read_named(connection, bodies, keys))
        return self._claims.hand_out(found)

    def held_out_traffic(
        self, limit: int, *, exclude: Collection[str] = (), max_tokens: int = 1024
    ) -> list[TokenSequence]:
        """Recent replies that no release has learned from, unrated ones first, newest first: what
        the update under way, if one is, goes on to measure on.

        Args:
            exclude: example ids of the batch at hand.
            max_tokens: prompt and completion; longer ones are passed over.
        """
        excluded = self._claims.interactions(exclude) | self.crashes.excluded()
        found = self._readable(
            lambda connection, bodies: read_traffic(connection, bodies, limit, max_tokens, excluded)
        )
        self.crashes.mark_measured(found)
        return list(found.values())

    # --- how it ends --------------------------------------------------------------------------

    def commit_release(self, release: Release, decision: BatchDecision) -> None:
        """Examples are trained in ``release``, which enters the outbox and becomes live.

        Those set aside did not influence it, and ``release.examples`` does not count them.

        Raises:
            LedgerError: the release does not follow from the live policy and this lease, or an
                example is unknown or was decided before. Nothing changed.
        """
        trained, aside = self._claims.divided(decision.example_ids, decision.set_aside)
        with self._decision("release", decision) as decisions:
            check_release(
                release,
                trained,
                next_version=self.next_version(),
                live=self.live_version(),
                epoch=self.epoch,
            )
            decisions.release(release, trained)
            decisions.set_aside(aside, decision.set_aside)

    def commit_rejection(
        self,
        reason: Reason,
        decision: BatchDecision,
        *,
        max_tries: int = 1,
        now: float | None = None,
    ) -> int:
        """Examples end with their candidate; those set aside did not influence it.

        Args:
            max_tries: examples of which fewer candidates were refused stay ready.

        Returns:
            The rejection's number.

        Raises:
            LedgerError: an example is unknown or was decided before. Nothing changed.
        """
        judged, aside = self._claims.divided(decision.example_ids, decision.set_aside)
        now = time.time() if now is None else now
        with self._decision("rejection", decision) as decisions:
            number = decisions.rejection(
                decision.record, self.live_version(), judged, reason, now, max_tries
            )
            decisions.set_aside(aside, decision.set_aside)
        return number

    def commit_no_update(self, decision: BatchDecision, *, now: float | None = None) -> None:
        """Examples, all set aside, taught nothing; what they say of the baseline may be kept.

        A reason that lies in the reply (``mismatch``) also holds for later ratings of it; one that
        lies in the batch (``no_advantage``) does not.

        Raises:
            LedgerError: an example is not set aside, is unknown or was decided before. Nothing
                changed.
        """
        others, aside = self._claims.divided(decision.example_ids, decision.set_aside)
        if others:
            raise LedgerError(f"{min(others)} ends without an update and without a reason")
        now = time.time() if now is None else now
        with self._decision("no_update", decision) as decisions:
            decisions.no_update(decision.record, aside, decision.set_aside, now)

    def adopt(self, releases: Sequence[Release], *, taken: int) -> None:
        """Enter releases of the store that are not here; the newest is live.

        Open ratings, and those that had been read when the newest of them was made, end as
        `may_have_taught`: nobody knows any more which of them it has learned from.

        Args:
            taken: the highest version in the store; no new release gets a number up to it.
        """
        with self._unit_of_work("adopt") as work:
            adopt(work.connection, work.fates, releases, taken)
        self._claims.clear()

    def commit_anchor(self, anchor: Anchor) -> None:
        """Distances are measured from this policy from now on.

        Raises:
            LedgerError: there is no such release, or it is revoked. Nothing changed.
        """
        known = anchor.version == 0 or self.release(anchor.version) is not None
        if not known or anchor.version in self.revoked_versions():
            raise LedgerError(f"version {anchor.version} cannot be the anchor: no such release")
        with self._database.transaction("anchor") as connection:
            write_anchor(connection, anchor)

    def mark_published(self, version: int) -> None:
        """The releases topic has acknowledged this release."""
        with self._database.transaction("published") as connection:
            connection.execute("UPDATE releases SET published = 1 WHERE version = ?", (version,))

    @contextmanager
    def _decision(self, step: str, decision: BatchDecision) -> Iterator[Decisions]:
        """One transaction, and what follows when it has committed."""
        with self._unit_of_work(step) as work:
            decisions = Decisions(work.connection, work.fates)
            yield decisions
            decisions.finish(decision.baselines)
        self._claims.drop(decision.example_ids)
        self.crashes.export_metrics()

    @contextmanager
    def _unit_of_work(self, step: str) -> Iterator[UnitOfWork]:
        """One transaction, with new keys durable before it commits; then changes of fate are
        counted, and an erasure is finished."""
        with self._database.transaction(step) as connection:
            self._keys.discard()  # of an attempt that was rolled back
            work = UnitOfWork(connection, Fates(connection))
            yield work
            work.changes = work.fates.by_topic()
            self._keys.save()
        count(work.changes)
        if work.erases:
            self._finish_erasure()
