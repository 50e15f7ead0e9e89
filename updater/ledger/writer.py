"""The updater's one commit point.

One transaction moves offsets and the rows that they produced; one transaction decides examples and
adds the release that learned from them. After a kill anywhere, the file holds the state before or
after a transaction, never between. Publishing comes after, from the outbox.
"""

from __future__ import annotations

import logging
import math
import sqlite3
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from daemon.events import Fate, Reason, Release
from daemon.stream import Gap
from updater.baselines import Baselines
from updater.ledger.database import (
    Database,
    LedgerError,
    WriterLock,
    make_home,
    set_meta,
)
from updater.ledger.examples import Claim, read_ready, read_traffic
from updater.ledger.expiry import Expired, Expiry
from updater.ledger.fates import Fates, count
from updater.ledger.intake import Intake
from updater.ledger.reader import LedgerReader
from updater.ledger.rules import Parsed
from updater.ledger.schema import FeedbackState
from updater.ledger.settlement import Outcome, Settlement, check_release
from updater.values import Example, TokenSequence

logger = logging.getLogger("moorline.ledger")

DEFAULT_HORIZON_SECONDS = 7 * 86400.0
_CLAIMS_KEPT = 65_536
_NOTHING: Mapping[str, Reason] = MappingProxyType({})


@dataclass(frozen=True)
class Ingested:
    """What one call of ``Ledger.ingest`` did."""

    records: int = 0
    """Newly consumed."""
    replayed: int = 0
    """Records that an earlier call had consumed already: skipped."""
    changes: Mapping[tuple[str, Fate, Reason], int] = field(default_factory=dict)
    """(topic, fate, reason) -> events that came to it, earlier events included."""


class Ledger(LedgerReader):
    """The one writer."""

    def __init__(
        self,
        path: Path,
        *,
        horizon_seconds: float = DEFAULT_HORIZON_SECONDS,
    ) -> None:
        """Take the lock, open or create the file, begin a new lease.

        Args:
            horizon_seconds: how long an interaction and its feedback wait for each other.

        Raises:
            LedgerLocked: another updater holds it.
            LedgerError: not a ledger, damaged, or of another version.
            LedgerUnavailable: the disk refused.
        """
        make_home(path)
        self._lock = WriterLock(path.with_name(f"{path.name}.lock"))
        try:
            super().__init__(Database(path))
            try:
                self.epoch = self._database.begin_lease()
            except BaseException:
                self._database.close()
                raise
        except BaseException:
            self._lock.close()
            raise
        self._horizon_seconds = horizon_seconds
        self._claims: dict[str, Claim] = {}
        self._behind: frozenset[tuple[str, int]] = frozenset()
        self._behind_as_of = math.inf
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
            fates = Fates(connection)
            intake = Intake(connection, fates, self._horizon_seconds)
            intake.record_gaps(gaps, now)
            new, replayed = intake.consume(records, now)
            changes = fates.by_topic()
        count(changes)
        return Ingested(new, replayed, changes)

    def set_behind(self, partitions: Collection[tuple[str, int]], as_of: float) -> None:
        """Say which (topic, partition)s held unread records at the moment ``as_of``, Unix seconds.

        They hold the horizon back at what was read of them; all others were read up to ``as_of``,
        so that a partition in which nothing happens keeps nothing from expiring.
        """
        self._behind = frozenset((str(topic), partition) for topic, partition in partitions)
        self._behind_as_of = as_of

    def watermark(self, now: float) -> float:
        """Everything that arrived before this moment was read, Unix seconds; never after ``now``.

        Arrival is monotonous in a partition, so that no event is forgotten while the one that it
        waits for lies unread.
        """
        read_until: dict[tuple[str, int], float] = {
            (topic, partition): float(arrived_at)
            for topic, partition, arrived_at, _ in self._database.rows(
                "SELECT topic, partition, arrived_at, max(id) FROM positions"
                " GROUP BY topic, partition"
            )
        }
        return min(
            [now, self._behind_as_of, *(read_until.get(place, 0.0) for place in self._behind)]
        )

    def expire(self, now: float | None = None, *, limit: int = 10_000) -> Expired:
        """Apply the horizon to at most ``limit`` rows of each kind; the rest at the next call."""
        watermark = self.watermark(time.time() if now is None else now)
        with self._database.transaction("expire") as connection:
            fates = Fates(connection)
            expired = Expiry(connection, fates).run(watermark, self._horizon_seconds, limit)
            changes = fates.by_topic()
        count(changes)
        return expired

    # --- what is learned from -----------------------------------------------------------------

    def ready_examples(self, limit: int) -> list[Example]:
        """Old and fresh examples that wait for a batch; they stay ready until they are decided.

        Half of them are the oldest, the others are spread over the rest by age.

        The ledger remembers which ratings it handed out under each id. A rating that arrives in
        the meantime is not part of the decision.
        """
        with self._database.snapshot() as connection:
            found = read_ready(connection, limit)
        # Of one reply only the newest hand-out can be decided: an older one may hold a rating that
        # has been replaced since, and both together would teach twice.
        handed_out = {claim.interaction for _, claim in found}
        self._claims = {
            name: claim
            for name, claim in self._claims.items()
            if claim.interaction not in handed_out
        }
        for example, claim in found:
            self._claims[example.example_id] = claim
        while len(self._claims) > max(_CLAIMS_KEPT, len(found)):
            self._claims.pop(next(iter(self._claims)))
        return [example for example, _ in found]

    def held_out_traffic(
        self, limit: int, *, exclude: Collection[str] = (), max_tokens: int = 1024
    ) -> list[TokenSequence]:
        """Recent replies that no release has learned from, unrated ones first, newest first.

        Args:
            exclude: example ids of the batch at hand.
            max_tokens: prompt and completion; longer ones are passed over.
        """
        claims = [self._claims[name] for name in exclude if name in self._claims]
        excluded = {identity for claim in claims for identity in (claim.interaction, *claim.over)}
        with self._database.snapshot() as connection:
            return read_traffic(connection, limit, max_tokens, excluded)

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
        trained, aside = self._divided(example_ids, set_aside)
        with self._database.transaction("release") as connection:
            check_release(
                release,
                trained,
                next_version=self.next_version(),
                live=self.live_version(),
                epoch=self.epoch,
            )
            fates = Fates(connection)
            settlement = Settlement(connection, fates)
            settlement.release(release, trained)
            settlement.set_aside(aside, set_aside)
            self._settled(connection, baselines)
            changes = fates.by_topic()
        self._forget(example_ids, changes)

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
        judged, aside = self._divided(example_ids, set_aside)
        now = time.time() if now is None else now
        with self._database.transaction("rejection") as connection:
            fates = Fates(connection)
            settlement = Settlement(connection, fates)
            number = settlement.rejection(record, self.live_version(), judged, reason, now)
            settlement.set_aside(aside, set_aside)
            self._settled(connection, baselines)
            changes = fates.by_topic()
        self._forget(example_ids, changes)
        return number

    def set_not_trainable(
        self, example_ids: Sequence[str], reason: Reason, baselines: Baselines | None = None
    ) -> None:
        """Examples turned out to teach nothing; what they say of the baseline may be kept.

        A reason that lies in the reply (``mismatch``) also holds for later ratings of it; one that
        lies in the batch (``no_advantage``, ``non_finite_update``) does not.

        Raises:
            LedgerError: an example is unknown or was decided before. Nothing changed.
        """
        claims = self._claimed(example_ids)
        with self._database.transaction("not_trainable") as connection:
            fates = Fates(connection)
            outcome = Outcome(Fate.NOT_TRAINABLE, FeedbackState.SETTLED, reason)
            Settlement(connection, fates).settle(claims, outcome)
            self._settled(connection, baselines)
            changes = fates.by_topic()
        self._forget(example_ids, changes)

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
            if version and self.release(version) is None:
                raise LedgerError(f"there is no release {version}: see `moorline releases`")
            set_meta(connection, "live_version", None if version is None else str(version))

    def _claimed(self, example_ids: Sequence[str]) -> dict[str, Claim]:
        if len(set(example_ids)) != len(example_ids):
            raise LedgerError("an example is named twice in one decision")
        unknown = [name for name in example_ids if name not in self._claims]
        if unknown:
            raise LedgerError(
                f"{len(unknown)} examples (first: {unknown[0]}) were not handed out by this "
                "ledger since it was opened, or were decided before: take a new batch"
            )
        return {name: self._claims[name] for name in example_ids}

    def _divided(
        self, example_ids: Sequence[str], set_aside: Mapping[str, Reason]
    ) -> tuple[dict[str, Claim], dict[str, Claim]]:
        """The claims of a batch: those that its candidate learned from, and the others."""
        claims = self._claimed(example_ids)
        strangers = set_aside.keys() - claims.keys()
        if strangers:
            raise LedgerError(f"{min(strangers)} is set aside but is not in the batch")
        aside = {name: claims.pop(name) for name in set_aside}
        return claims, aside

    def _settled(self, connection: sqlite3.Connection, baselines: Baselines | None) -> None:
        if baselines is not None:
            set_meta(connection, "baselines", baselines.to_json())

    def _forget(
        self, example_ids: Sequence[str], changes: Counter[tuple[str, Fate, Reason]]
    ) -> None:
        count(changes)
        for name in example_ids:
            self._claims.pop(name, None)
