"""Erases a person: the bodies, the events, and the names.

Bodies are deleted, and the triggers doom their keys. Events that nothing had decided end as
``erased``; the others keep their fates, because a release that has learned from somebody has
learned from them, and the accounting says so until it is revoked (``revocation.py``). Names are
taken out of what stays.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from moorline.events import Erasure, Fate, Release, user_digest
from updater.learning.baselines import Baselines
from updater.ledger.bodies import Bodies, BodyErased
from updater.ledger.database import read_meta, set_meta
from updater.ledger.erasure_markers import ErasureMarkers
from updater.ledger.fates import Fates
from updater.ledger.keys import KeyRing
from updater.ledger.schema import FeedbackState, InteractionState

_REPLIES_OF_NAMES = """
    SELECT s.user, s.tenant, i.id, i.event_time
    FROM subjects s JOIN interactions i ON i.subject = s.id
    UNION ALL
    SELECT o.user, s.tenant, i.id, i.event_time
    FROM other_users o JOIN interactions i ON i.id = o.interaction
    JOIN subjects s ON s.id = i.subject
"""
_UNDECIDED = (FeedbackState.WAITING, FeedbackState.READY)


@dataclass(frozen=True)
class Forgotten:
    """What an erasure did, or would do."""

    interactions: int
    """Replies erased."""
    feedback: int
    """Words erased: the person's own, and those on their replies."""
    releases: tuple[int, ...]
    """Versions that had learned from them, and were not revoked."""
    last_clean_version: int
    """The newest version in the live one's line that had not, nor its own ancestors; 0: the base.
    The live version itself where it is clean."""
    revoke: bool = False
    """Whether the updater goes back to it."""
    revocation_version: int | None = None
    """The release that it went back by."""


@dataclass(frozen=True)
class Concerned:
    """The rows that an erasure is about."""

    interactions: tuple[int, ...]
    feedback: tuple[int, ...]
    """Their own; feedback of others on their replies is not in it."""


def concerned(connection: sqlite3.Connection, erasure: Erasure) -> Concerned:
    """Everything of the subject that is here and not erased yet. Reads whole tables."""
    if erasure.interaction_id is not None:
        name = erasure.interaction_id
        interactions = _ids(
            connection,
            "SELECT id FROM interactions WHERE key >= ? AND key < ? AND topic_partition IS NOT NULL"
            " AND state <> 'erased'",
            (f"{name}/", f"{name}0"),  # "0" follows "/"
        )
        waiting = _ids(
            connection,
            "SELECT f.id FROM interactions i JOIN feedback f ON f.interaction = i.id"
            " WHERE i.key >= ?1 AND i.key < ?2 AND f.state <> 'erased' UNION"
            " SELECT f.id FROM interactions i JOIN feedback f ON f.over = i.id"
            " WHERE i.key >= ?1 AND i.key < ?2 AND f.state <> 'erased'",
            (f"{name}/", f"{name}0"),
        )
        return Concerned(interactions, waiting)
    whose, names = _whose(erasure)
    interactions = _ids(
        connection,
        f"SELECT DISTINCT s.id FROM ({_REPLIES_OF_NAMES}) s WHERE {whose} AND s.event_time <= ?",
        (*names, erasure.erased_at),
    )
    return Concerned(interactions, _own_words(connection, erasure))


def _own_words(connection: sqlite3.Connection, erasure: Erasure) -> tuple[int, ...]:
    """Ratings by the users, of any reply; only of the tenant's, where one is named."""
    raters = [
        rater
        for (rater,) in connection.execute("SELECT DISTINCT rater FROM feedback WHERE rater <> ''")
        if user_digest(rater) in erasure.users
    ]
    of_tenant = "" if erasure.tenant is None else " AND s.tenant = ?"
    tenant = () if erasure.tenant is None else (erasure.tenant,)
    return tuple(
        identity
        for rater in raters
        for identity in _ids(
            connection,
            "SELECT f.id FROM feedback f LEFT JOIN interactions i ON i.id = f.interaction"
            " LEFT JOIN subjects s ON s.id = i.subject"
            f" WHERE f.rater = ? AND f.event_time <= ?{of_tenant}",
            (rater, erasure.erased_at, *tenant),
        )
    )


def taught_versions(connection: sqlite3.Connection, erasure: Erasure) -> tuple[int, ...]:
    """Versions that learned from the subject and were not revoked, ascending."""
    if erasure.interaction_id is not None:
        name = erasure.interaction_id
        return _ids(
            connection,
            "SELECT DISTINCT decided_by FROM decisions WHERE key >= ? AND key < ?"
            " AND fate = 'trained' ORDER BY decided_by",
            (f"{name}/", f"{name}0"),
        )
    whose, names = _whose(erasure)
    return _ids(
        connection,
        f"SELECT DISTINCT s.version FROM taught s WHERE {whose} ORDER BY s.version",
        names,
    )


def last_clean_version(
    live: int, taught: Sequence[int], release: Callable[[int], Release | None]
) -> int:
    """The newest version of the live one's line that is not in ``taught``, nor descends from one.

    Args:
        release: a version's manifest.
    """
    line = [live]
    while line[-1]:
        found = release(line[-1])
        line.append((found.parent if found is not None else None) or 0)
    touched = [place for place, version in enumerate(line) if version in taught]
    return line[max(touched) + 1] if touched else live


def _whose(erasure: Erasure) -> tuple[str, tuple[str, ...]]:
    """A condition on ``s.user`` and ``s.tenant``, and its parameters."""
    conditions, names = [], tuple(erasure.users)
    if names:
        conditions.append(f"s.user IN ({', '.join('?' * len(names))})")
    if erasure.tenant is not None:
        conditions.append("s.tenant = ?")
        names += (erasure.tenant,)
    return " AND ".join(conditions), names


def _ids(connection: sqlite3.Connection, sql: str, parameters: Iterable[object]) -> tuple[int, ...]:
    return tuple(identity for (identity,) in connection.execute(sql, tuple(parameters)).fetchall())


class Eraser:
    """Carries erasures out, inside one transaction. ``keys`` still holds the doomed ones after."""

    def __init__(
        self,
        connection: sqlite3.Connection,
        fates: Fates,
        keys: KeyRing,
        erasure_markers: ErasureMarkers,
        release: Callable[[int], Release | None],
        live: int,
    ) -> None:
        """``release`` and ``live``: of the ledger, to find the clean ancestor."""
        self._connection = connection
        self._execute = connection.execute
        self._fates = fates
        self._keys = keys
        self._bodies = Bodies(connection, keys)
        self._erasure_markers = erasure_markers
        self._release = release
        self._live = live
        self.carried_out = False
        """Whether anything was erased since."""

    def carry_out(self, erasure: Erasure, arrived_at: float, now: float) -> None:
        """Erase what is here, and leave a marker for what still comes. Repeating it does nothing.

        Args:
            arrived_at: nothing later is erased, whatever the clock of whoever asked says.
        """
        if self._execute("SELECT 1 FROM erasures WHERE id = ?", (erasure.erasure_id,)).fetchone():
            return
        erasure = erasure.model_copy(update={"erased_at": min(erasure.erased_at, arrived_at)})
        self._execute("PRAGMA secure_delete = ON")  # names, in pages that become free
        rows = concerned(self._connection, erasure)
        taught = taught_versions(self._connection, erasure)
        ancestor = last_clean_version(self._live, taught, self._release)
        subjects = self._subjects(erasure, rows.interactions)
        words = sum(self.erase_interaction(identity) for identity in rows.interactions)
        words += sum(self.erase_rating(identity) for identity in rows.feedback)
        for subject, key in subjects:
            self._retire(subject, key)
        if erasure.interaction_id is None:
            self._drop_names(erasure)
        self._erasure_markers.put(erasure)
        self._execute(
            "INSERT INTO erasures (id, request, applied_at, interactions, feedback, releases,"
            " last_clean_version, revoke) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                erasure.erasure_id,
                erasure.model_dump_json(),
                now,
                len(rows.interactions),
                words,
                json.dumps(taught),
                ancestor,
                erasure.revoke and ancestor != self._live,
            ),
        )
        self.carried_out = True

    def erase_body(self, body: BodyErased) -> None:
        """Erase the row of a body whose key turned out to be gone."""
        if body.kind == "interaction":
            self.erase_interaction(body.identity)
        else:
            self.erase_rating(body.identity)

    def erase_interaction(self, identity: int) -> int:
        """Erase a reply and all feedback that names it; returns how many ratings that were."""
        topic_partition, offset, state = self._execute(
            "SELECT topic_partition, offset, state FROM interactions WHERE id = ?", (identity,)
        ).fetchone()
        if state == InteractionState.PENDING:
            self._fates.move(topic_partition, offset, Fate.ERASED)
        ratings = _ids(
            self._connection,
            "SELECT id FROM feedback WHERE interaction = ?1 UNION"
            " SELECT id FROM feedback WHERE over = ?1",
            (identity,),
        )
        erased = sum(self.erase_rating(rating) for rating in ratings)
        self._execute("DELETE FROM interaction_bodies WHERE id = ?", (identity,))
        self._execute(
            "UPDATE interactions SET state = ?, retained = 0, prompt = NULL, subject = NULL"
            " WHERE id = ?",
            (InteractionState.ERASED, identity),
        )
        return erased

    def erase_rating(self, identity: int) -> int:
        """Erase one rating; returns 1, or 0 where it was erased before."""
        topic_partition, offset, state = self._execute(
            "SELECT topic_partition, offset, state FROM feedback WHERE id = ?",
            (identity,),
        ).fetchone()
        if state == FeedbackState.ERASED:
            return 0
        if state in _UNDECIDED:
            self._fates.move(topic_partition, offset, Fate.ERASED)
        self._execute("DELETE FROM feedback_bodies WHERE id = ?", (identity,))
        self._execute(
            "UPDATE feedback SET state = ?, latest = 0, rater = '', content = NULL WHERE id = ?",
            (FeedbackState.ERASED, identity),
        )
        return 1

    def _subjects(
        self, erasure: Erasure, interactions: Sequence[int]
    ) -> list[tuple[int, int | None]]:
        """(id, key) of every subject that is erased or has a reply erased."""
        found = dict[int, int | None]()
        if erasure.interaction_id is None:
            whose, names = _whose(erasure)
            found |= self._execute(f"SELECT id, key FROM subjects s WHERE {whose}", names)
        for identity in interactions:
            found |= self._execute(
                "SELECT s.id, s.key FROM interactions i JOIN subjects s ON s.id = i.subject"
                " WHERE i.id = ?",
                (identity,),
            )
        return list(found.items())

    def _retire(self, subject: int, key: int | None) -> None:
        """Doom the subject's key, and so every copy of its bodies; kept bodies get a new one."""
        kept = _ids(self._connection, "SELECT id FROM interactions WHERE subject = ?", (subject,))
        if not kept:
            self._execute("DELETE FROM subjects WHERE id = ?", (subject,))
        elif key is not None:
            self._change_key(subject)
        if key is not None:
            self._execute("INSERT OR IGNORE INTO doomed_keys VALUES (?)", (key,))

    def _change_key(self, subject: int) -> None:
        new = self._keys.new()
        self._execute("UPDATE subjects SET key = ? WHERE id = ?", (new, subject))
        for body in _ids(
            self._connection,
            "SELECT b.id FROM interactions i JOIN interaction_bodies b ON b.id = i.id"
            " WHERE i.subject = ?",
            (subject,),
        ):
            with contextlib.suppress(BodyErased):  # it is found to be so when it is read
                self._bodies.change_key("interaction", body, new)

    def _drop_names(self, erasure: Erasure) -> None:
        """Remove what the baselines remember of them by name."""
        stored = read_meta(self._connection, "baselines")
        if stored is None:
            return
        baselines = Baselines.from_json(stored)
        cells = baselines.cells
        if not erasure.users:  # a tenant's; a user has none of their own
            cells = {name: cell for name, cell in cells.items() if not _is_of(erasure, name)}
        raters = baselines.agreements
        kept = Baselines(
            cells, {name: cell for name, cell in raters.items() if not _is_of(erasure, name)}
        )
        set_meta(self._connection, "baselines", kept.to_json())


def _is_of(erasure: Erasure, name: str) -> bool:
    """Whether a name of the baselines is of the erased tenant, or is the erased rater's there."""
    if not name:
        return False  # the cell of everything
    tenant, second = json.loads(name)
    if erasure.tenant is not None and tenant != erasure.tenant:
        return False
    return not erasure.users or user_digest(second) in erasure.users
