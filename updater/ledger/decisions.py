"""How examples end: trained in a release, rejected with a candidate, or not trainable."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json

from moorline.events import Fate, Reason, Release, ReleaseKind, user_digest
from updater.learning.baselines import Baselines
from updater.ledger.crashes import clear_counts
from updater.ledger.database import LedgerError, set_meta
from updater.ledger.examples import Claim
from updater.ledger.fates import Fates
from updater.ledger.joins import NOT_MEASURABLE
from updater.ledger.refusals import count_refusal, forget_refusals
from updater.ledger.schema import FeedbackState, InteractionState

OF_THE_BATCH = frozenset(
    {
        Reason.NO_ADVANTAGE,
        Reason.OFF_POLICY,
        Reason.NON_FINITE_UPDATE,
        Reason.UPDATE_FAILED,
        Reason.DIVERGENCE_BOUND,
        Reason.GATE_BLOCKED,
    }
)
"""Reasons that say nothing of the reply itself: later feedback on it is welcome."""


_FINAL = (FeedbackState.TRAINED, FeedbackState.REJECTED, FeedbackState.ERASED)


@dataclass(frozen=True)
class BatchDecision:
    """How a batch ends, as its update decided it."""

    example_ids: Sequence[str]
    """Every example that was handed out with the batch."""
    set_aside: Mapping[str, Reason] = field(default_factory=dict)
    """By id: those that influenced nothing, and why. They end as not trainable."""
    baselines: Baselines | None = None
    """What the credit knows from now on; None: what it knew before."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """What is known of the candidate or the batch (divergences, verdict, diagnostics), JSON-able;
    pydantic models are welcome. No prompts, no replies."""


@dataclass(frozen=True)
class ExampleOutcome:
    """What is decided of a set of examples."""

    fate: Fate
    state: FeedbackState
    reason: Reason = Reason.NONE
    decided_by: int | None = None

    @property
    def makes_untrainable(self) -> bool:
        """Whether further ratings of these replies are useless too."""
        of_the_reply = self.fate is Fate.NOT_TRAINABLE and self.reason not in OF_THE_BATCH
        return of_the_reply or self.reason is Reason.UPDATE_CRASHED


_TAUGHT = "INSERT OR IGNORE INTO taught (user, tenant, version) VALUES (?, ?, ?)"
_OVERRIDDEN = ExampleOutcome(
    Fate.NOT_TRAINABLE, FeedbackState.NOT_TRAINABLE, Reason.OVERRIDDEN_SIGNAL
)


class Decisions:
    """Writes outcomes, inside one transaction."""

    def __init__(self, connection: sqlite3.Connection, fates: Fates) -> None:
        self._execute = connection.execute
        self._connection = connection
        self._fates = fates

    def release(self, release: Release, claims: Mapping[str, Claim]) -> None:
        """Examples are trained in ``release``, which goes to the outbox and becomes live."""
        self._execute(
            "INSERT INTO releases (version, manifest) VALUES (?, ?)",
            (release.version, release.model_dump_json()),
        )
        outcome = ExampleOutcome(Fate.TRAINED, FeedbackState.TRAINED, decided_by=release.version)
        self.decide(claims, outcome)
        for claim in claims.values():
            self._note_who_taught(claim, release.version)

    def _note_who_taught(self, claim: Claim, version: int) -> None:
        """So that an erasure knows its releases, also when these rows are long gone."""
        tenants = {}
        for reply in (claim.interaction, *claim.over):
            user, tenants[reply] = self._execute(
                "SELECT s.user, s.tenant FROM interactions i JOIN subjects s ON s.id = i.subject"
                " WHERE i.id = ?",
                (reply,),
            ).fetchone()
            others = self._execute("SELECT user FROM other_users WHERE interaction = ?", (reply,))
            for name in (user, *(other for (other,) in others.fetchall())):
                self._execute(_TAUGHT, (name, tenants[reply], version))
        for rating in claim.feedback:
            (rater,) = self._execute(
                "SELECT rater FROM feedback WHERE id = ?", (rating,)
            ).fetchone()
            self._execute(_TAUGHT, (user_digest(rater), tenants[claim.interaction], version))

    def rejection(
        self,
        record: Mapping[str, Any],
        parent: int,
        claims: Mapping[str, Claim],
        reason: Reason,
        now: float,
        max_tries: int = 1,
    ) -> int:
        """Examples end with their candidate, once so many candidates were refused with them.

        Returns:
            The rejection's number.
        """
        claims, returned = count_refusal(self._connection, claims, max_tries)
        (number,) = self._execute(
            "INSERT INTO rejections (reason, parent, examples, at, record, returned)"
            " VALUES (?, ?, ?, ?, ?, ?) RETURNING id",
            (reason, parent, len(claims), now, _json(record), len(returned)),
        ).fetchone()
        self.decide(claims, ExampleOutcome(Fate.REJECTED, FeedbackState.REJECTED, reason, number))
        return int(number)

    def no_update(
        self,
        record: Mapping[str, Any],
        claims: Mapping[str, Claim],
        reasons: Mapping[str, Reason],
        now: float,
    ) -> None:
        """Examples that taught nothing."""
        self._execute(
            "INSERT INTO no_updates (examples, at, record) VALUES (?, ?, ?)",
            (len(claims), now, _json(record)),
        )
        self.set_aside(claims, reasons)

    def set_aside(self, claims: Mapping[str, Claim], reasons: Mapping[str, Reason]) -> None:
        """Examples of a batch that its candidate did not learn from."""
        for example_id, claim in claims.items():
            outcome = ExampleOutcome(
                Fate.NOT_TRAINABLE, FeedbackState.NOT_TRAINABLE, reasons[example_id]
            )
            self.decide({example_id: claim}, outcome)

    def finish(self, baselines: Baselines | None) -> None:
        """End the update under way, and keep what the credit knows now."""
        clear_counts(self._connection)
        if baselines is not None:
            set_meta(self._connection, "baselines", baselines.to_json())

    def decide(self, claims: Mapping[str, Claim], outcome: ExampleOutcome) -> None:
        """Decide these examples.

        Raises:
            LedgerError: one of them was decided before.
        """
        for example_id, claim in claims.items():
            try:
                self._execute(
                    "INSERT INTO decisions (example_id, key, fate, reason, decided_by)"
                    " VALUES (?, ?, ?, ?, ?)",
                    (example_id, claim.key, outcome.fate, outcome.reason, outcome.decided_by),
                )
            except sqlite3.IntegrityError as error:
                raise LedgerError(f"example {example_id} was decided before") from error
            for rating in claim.feedback:
                self._decide_rating(rating, outcome)
            for rating in claim.overridden_signals:
                self._decide_rating(rating, _OVERRIDDEN)
            self._end_example(claim.interaction, outcome)
            if outcome.fate is not Fate.NOT_TRAINABLE:
                for loser in claim.over:
                    self._decide_interaction(loser, outcome)

    def refuse_word(self, rating: int) -> None:
        """A word that the rules of today refuse teaches nothing."""
        self._decide_rating(
            rating,
            ExampleOutcome(Fate.NOT_TRAINABLE, FeedbackState.NOT_TRAINABLE, Reason.SCHEMA_MISMATCH),
        )

    def _decide_rating(self, rating: int, outcome: ExampleOutcome) -> None:
        row = self._execute(
            "SELECT interaction, rater, aspect, topic_partition, offset, state, latest FROM"
            " feedback"
            " WHERE id = ?",
            (rating,),
        ).fetchone()
        if row is None or row[5] in _FINAL:
            raise LedgerError("a rating of this batch was decided before: discard the batch")
        interaction, rater, aspect, topic_partition, offset, _, latest = row
        is_latest = bool(latest)
        if outcome.fate is Fate.TRAINED and not is_latest:
            # The rater spoke again while the batch was in training: too late for that word.
            self._supersede(interaction, rater, aspect)
            is_latest = True
        self._execute(
            "UPDATE feedback SET state = ?, latest = ? WHERE id = ?",
            (outcome.state, is_latest, rating),
        )
        if outcome.fate is not Fate.TRAINED:
            self._execute("DELETE FROM feedback_bodies WHERE id = ?", (rating,))
        self._fates.move(topic_partition, offset, outcome.fate, outcome.reason, outcome.decided_by)

    def _supersede(self, interaction: int, rater: str, aspect: str) -> None:
        for identity, topic_partition, offset in self._execute(
            "UPDATE feedback SET latest = 0, state = 'closed'"
            " WHERE interaction = ? AND rater = ? AND aspect = ? AND latest = 1"
            " RETURNING id, topic_partition, offset",
            (interaction, rater, aspect),
        ).fetchall():
            self._execute("DELETE FROM feedback_bodies WHERE id = ?", (identity,))
            self._fates.move(topic_partition, offset, Fate.DUPLICATE, Reason.ALREADY_TRAINED)

    def _end_example(self, identity: int, outcome: ExampleOutcome) -> None:
        if outcome.makes_untrainable:
            self._mark_untrainable(identity, outcome.reason)
        self._decide_interaction(identity, outcome)
        self._execute("DELETE FROM crash_counts WHERE interaction = ?", (identity,))
        forget_refusals(self._connection, identity)

    def _decide_interaction(self, identity: int, outcome: ExampleOutcome) -> None:
        """An interaction keeps the first fate that was decided of it."""
        pending = self._execute(
            "UPDATE interactions SET state = ? WHERE id = ? AND state = ?"
            " RETURNING topic_partition, offset",
            (InteractionState.DECIDED, identity, InteractionState.PENDING),
        ).fetchone()
        if pending is not None:
            topic_partition, offset = pending
            self._fates.move(
                topic_partition, offset, outcome.fate, outcome.reason, outcome.decided_by
            )

    def _mark_untrainable(self, identity: int, reason: Reason) -> None:
        """Feedback that came since the batch was made shares the reply's fate, and so do
        preferences over it."""
        self._execute(
            "UPDATE interactions SET untrainable = ?, measurable = measurable AND ? WHERE id = ?",
            (reason, reason not in NOT_MEASURABLE, identity),
        )
        for side in ("interaction", "over"):
            for rating, topic_partition, offset in self._execute(
                f"UPDATE feedback SET state = ? WHERE {side} = ? AND latest = 1 AND state = 'ready'"
                " RETURNING id, topic_partition, offset",
                (FeedbackState.UNUSABLE, identity),
            ).fetchall():
                self._execute("DELETE FROM feedback_bodies WHERE id = ?", (rating,))
                self._fates.move(topic_partition, offset, Fate.NOT_TRAINABLE, reason)


def check_release(
    release: Release, example_ids: Collection[str], *, next_version: int, live: int, epoch: int
) -> None:
    """Refuse a release that does not follow from what the ledger knows.

    Raises:
        LedgerError: which field is wrong, and what it must be.
    """
    if release.kind is ReleaseKind.BASE:
        if release.version != 0 or next_version != 1 or example_ids:
            raise LedgerError("the base model is version 0, comes first and has no examples")
        return
    expected: dict[str, int] = {
        "version": next_version,
        "parent": live,
        "lease_epoch": epoch,
        "examples": len(example_ids),
    }
    for name, value in expected.items():
        if getattr(release, name) != value:
            raise LedgerError(
                f"release {release.name} has {name} {getattr(release, name)}, "
                f"the ledger expects {value}: make it anew from the live policy"
            )


def _json(record: Mapping[str, Any]) -> str:
    return to_json(record, inf_nan_mode="strings").decode()
