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
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from moorline.events import Erasure, Reason, Release
from moorline.stream import Gap
from updater.learning.baselines import Baselines
from updater.ledger.bodies import Bodies, BodyErased
from updater.ledger.claims import Claims
from updater.ledger.crashes import Crashes
from updater.ledger.database import Database, LedgerError, lock_for_writing, make_home, set_meta
from updater.ledger.decisions import Decisions, check_release
from updater.ledger.erasure import Eraser, Forgotten
from updater.ledger.erasure_markers import ErasureMarkers
from updater.ledger.examples import read_named, read_ready, read_traffic
from updater.ledger.expiry import Expired, Expiry
from updater.ledger.fates import Fates, count
from updater.ledger.intake import Ingested, Intake
from updater.ledger.joins import Joins
from updater.ledger.keys import KeyRing
from updater.ledger.reader import LedgerReader
from updater.ledger.revocation import Revocation, check_revocation, wanted_revocation
from updater.ledger.rules import Parsed
from updater.ledger.watermark import Watermark
from updater.values import Example, TokenSequence

logger = logging.getLogger("moorline.ledger")

DEFAULT_HORIZON_SECONDS = 7 * 86400.0
_Read = TypeVar("_Read")
_NOTHING: Mapping[str, Reason] = MappingProxyType({})


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
        logger.info("ledger opened", extra={"path": str(path), "lease_epoch": self.epoch})

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
        """
        now = time.time() if now is None else now
        with self._database.transaction("ingest") as connection:
            self._keys.discard()  # of an attempt that was rolled back
            fates, erasure_markers = Fates(connection), ErasureMarkers(connection)
            joins = Joins(connection, fates, self._keys, erasure_markers, self._horizon_seconds)
            eraser = self._eraser(connection, fates, erasure_markers)
            intake = Intake(connection, joins, eraser)
            intake.record_gaps(gaps, now)
            new, replayed = intake.consume(records, now)
            changes = fates.by_topic()
            self._keys.save()
        count(changes)
        if eraser.carried_out:
            self._erased()
        return Ingested(new, replayed, changes)

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
        with self._database.transaction("expire") as connection:
            fates = Fates(connection)
            expired = Expiry(connection, fates).run(
                watermark, self._horizon_seconds, self._keep_seconds, limit
            )
            changes = fates.by_topic()
        count(changes)
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
        with self._database.transaction("forget") as connection:
            self._keys.discard()
            fates = Fates(connection)
            self._eraser(connection, fates, ErasureMarkers(connection)).carry_out(erasure, now, now)
            changes = fates.by_topic()
            self._keys.save()
        count(changes)
        self._erased()
        found = self.erasure(erasure.erasure_id)
        assert found is not None
        return found

    def commit_revocation(self, release: Release) -> None:
        """The policy is what ``release.revokes_after`` was, and what was learned since waits again.

        Raises:
            LedgerError: no erasure asks for it, or the release is not that. Nothing changed.
        """
        with self._database.transaction("revocation") as connection:
            check_revocation(
                release,
                wanted=wanted_revocation(connection),
                revoked=self.revoked_versions(),
                next_version=self.next_version(),
                epoch=self.epoch,
            )
            fates = Fates(connection)
            Revocation(connection, fates).run(release)
            changes = fates.by_topic()
        count(changes)
        self._claims.clear()

    def _eraser(
        self, connection: sqlite3.Connection, fates: Fates, erasure_markers: ErasureMarkers
    ) -> Eraser:
        return Eraser(
            connection, fates, self._keys, erasure_markers, self.release, self.live_version()
        )

    def _erased(self) -> None:
        """After the commit: the keys go, and every old page that is still in a file."""
        logger.info("an erasure was carried out")
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
        not read of it yet) is erased here too."""
        while True:
            try:
                with self._database.snapshot() as connection:
                    return read(connection, Bodies(connection, self._keys))
            except BodyErased as erased:
                body = erased
            with self._database.transaction("forget") as connection:
                fates = Fates(connection)
                eraser = self._eraser(connection, fates, ErasureMarkers(connection))
                eraser.erase_body(body)
                changes = fates.by_topic()
            count(changes)

    # --- what is learned from -----------------------------------------------------------------

    def ready_examples(self, limit: int) -> list[Example]:
        """Old and fresh examples that wait for a batch; they stay ready until they are decided.

        Half of them are the oldest, the others are spread over the rest by age.

        The ledger remembers which ratings it handed out under each id. A rating that arrives in
        the meantime is not part of the decision.
        """
        found = self._readable(lambda connection, bodies: read_ready(connection, bodies, limit))
        return self._claims.hand_out(found)

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
        self.crashes.measure_on(found)
        return list(found.values())

    # --- how it ends --------------------------------------------------------------------------

    def commit_release(
        self,
        release: Release,
        example_ids: Sequence[str],
        baselines: Baselines | None = None,
        *,
        set_aside: Mapping[str, Reason] = _NOTHING,
    ) -> None:
        """Examples are trained in ``release``, which enters the outbox and becomes live.

        Args:
            example_ids: the batch.
            set_aside: those of it that did not influence the release, and why: they end as not
                trainable, and ``release.examples`` does not count them.

        Raises:
            LedgerError: the release does not follow from the live policy and this lease, or an
                example is unknown or was decided before. Nothing changed.
        """
        trained, aside = self._claims.divided(example_ids, set_aside)
        with self._decision("release", example_ids, baselines) as settlement:
            check_release(
                release,
                trained,
                next_version=self.next_version(),
                live=self.live_version(),
                epoch=self.epoch,
            )
            settlement.release(release, trained)
            settlement.set_aside(aside, set_aside)

    def commit_rejection(
        self,
        record: Mapping[str, Any],
        example_ids: Sequence[str],
        reason: Reason,
        baselines: Baselines | None = None,
        *,
        set_aside: Mapping[str, Reason] = _NOTHING,
        now: float | None = None,
    ) -> int:
        """Examples end with their candidate.

        Args:
            example_ids: the batch.
            set_aside: those of it that did not influence the candidate, and why.
            record: what is known of the candidate (divergences, verdict, diagnostics), JSON-able;
                pydantic models are welcome. No prompts, no replies.

        Returns:
            The rejection's number.

        Raises:
            LedgerError: an example is unknown or was decided before. Nothing changed.
        """
        judged, aside = self._claims.divided(example_ids, set_aside)
        now = time.time() if now is None else now
        with self._decision("rejection", example_ids, baselines) as settlement:
            number = settlement.rejection(record, self.live_version(), judged, reason, now)
            settlement.set_aside(aside, set_aside)
        return number

    def commit_no_update(
        self,
        record: Mapping[str, Any],
        reasons: Mapping[str, Reason],
        baselines: Baselines | None = None,
        *,
        now: float | None = None,
    ) -> None:
        """Examples turned out to teach nothing; what they say of the baseline may be kept.

        Args:
            record: what is known of the batch, JSON-able.
            reasons: by example. One that lies in the reply (``mismatch``) also holds for later
                ratings of it; one that lies in the batch (``no_advantage``) does not.

        Raises:
            LedgerError: an example is unknown or was decided before. Nothing changed.
        """
        claims = self._claims.of(list(reasons))
        now = time.time() if now is None else now
        with self._decision("no_update", list(reasons), baselines) as settlement:
            settlement.no_update(record, claims, reasons, now)

    def mark_published(self, version: int) -> None:
        """The releases topic has acknowledged this release."""
        with self._database.transaction("published") as connection:
            connection.execute("UPDATE releases SET published = 1 WHERE version = ?", (version,))

    def set_live(self, version: int | None) -> None:
        """Train from ``version`` until the next release; None: from the newest.

        Raises:
            LedgerError: there is no such release.
        """
        with self._database.transaction("live") as connection:
            if version and (self.release(version) is None or version in self.revoked_versions()):
                raise LedgerError(f"there is no release {version}, or it was revoked")
            set_meta(connection, "live_version", None if version is None else str(version))

    @contextmanager
    def _decision(
        self, step: str, example_ids: Sequence[str], baselines: Baselines | None
    ) -> Iterator[Decisions]:
        """One transaction, and what follows when it has committed."""
        with self._database.transaction(step) as connection:
            fates = Fates(connection)
            settlement = Decisions(connection, fates)
            yield settlement
            settlement.conclude(baselines)
            changes = fates.by_topic()
        count(changes)
        self._claims.drop(example_ids)
        self.crashes.show()
