"""What may be asked of a ledger, also while an updater is writing it."""

from __future__ import annotations

import json
from typing import Any

from moorline.events import Release
from moorline.stream import Topic
from updater.learning.baselines import Baselines
from updater.ledger.accounting import Accounting, audit, read_accounting
from updater.ledger.adoption import TAKEN, adopted_versions
from updater.ledger.anchors import Anchor, current_anchor, read_anchors
from updater.ledger.database import Database
from updater.ledger.erasure import Forgotten
from updater.ledger.recent_feedback import RecentFeedback, read_recent_feedback
from updater.ledger.refusals import RefusedReply, most_refused
from updater.ledger.revocation import wanted_revocation


class LedgerReader:
    """What may be asked of a ledger while another process writes it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def __enter__(self) -> LedgerReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def lease_epoch(self) -> int:
        """How many times an updater has opened this ledger."""
        return int(self._database.meta("lease_epoch") or 0)

    def offsets(self) -> dict[tuple[Topic, int], tuple[str, int]]:
        """(topic, partition) -> (topic id, next offset), for ``Reader.seek``."""
        return {
            (Topic(topic), partition): (topic_id, next_offset)
            for topic, partition, topic_id, next_offset in self._positions()
        }

    def release_offsets(self) -> dict[str, dict[int, int]]:
        """topic -> partition -> next offset, for a release's manifest."""
        found: dict[str, dict[int, int]] = {}
        for topic, partition, _, next_offset in self._positions():
            found.setdefault(topic, {})[partition] = next_offset
        return found

    def _positions(self) -> list[tuple[str, int, str, int]]:
        # Of a topic that was made again, the last incarnation (max(id) picks its row).
        return [
            (topic, partition, topic_id, next_offset)
            for topic, partition, topic_id, next_offset, _ in self._database.rows(
                "SELECT topic, partition, topic_id, next_offset, max(id) FROM topic_partitions"
                " GROUP BY topic, partition"
            )
        ]

    def count_ready(self) -> int:
        """Examples that wait for a batch."""
        return int(self._database.meta("ready_examples") or 0)

    def oldest_ready_at(self) -> float | None:
        """When the rating that has waited longest for a batch arrived, Unix seconds."""
        ((oldest,),) = self._database.rows(
            "SELECT min(arrived_at) FROM feedback WHERE state = 'ready'"
        )
        return None if oldest is None else float(oldest)

    def recent_feedback(self, now: float, horizon_seconds: float) -> RecentFeedback:
        """How much of the newest feedback names a reply that was not recorded. Cheap."""
        with self._database.snapshot() as connection:
            return read_recent_feedback(connection, now, horizon_seconds)

    def accounting(self) -> Accounting:
        """Where every consumed record is now. Cheap."""
        with self._database.snapshot() as connection:
            return read_accounting(connection)

    def audit(self) -> list[str]:
        """Recount everything from the rows; one line a difference. Reads the whole ledger."""
        with self._database.snapshot() as connection:
            return audit(connection)

    def newest_version(self) -> int:
        """The newest release, 0 before the first."""
        ((newest,),) = self._database.rows("SELECT max(version) FROM releases")
        return int(newest or 0)

    def next_version(self) -> int:
        """The number of the next release. A rejected candidate takes none."""
        return max(self.newest_version(), int(self._database.meta(TAKEN) or 0)) + 1

    def live_version(self) -> int:
        """The policy that the next update starts from: the newest release."""
        return self.newest_version()

    def release(self, version: int) -> Release | None:
        """One release's manifest."""
        rows = self._database.rows("SELECT manifest FROM releases WHERE version = ?", version)
        return Release.model_validate_json(rows[0][0]) if rows else None

    def releases(self, newest: int = 100) -> list[Release]:
        """The newest releases, ascending."""
        rows = self._database.rows(
            "SELECT manifest FROM releases ORDER BY version DESC LIMIT ?", newest
        )
        return [Release.model_validate_json(row[0]) for row in reversed(rows)]

    def rejections(self, newest: int = 100) -> list[dict[str, Any]]:
        """The newest rejected candidates, ascending; ``record`` is the JSON that was given."""
        rows = self._database.rows(
            "SELECT id, reason, parent, examples, at, record, returned FROM rejections"
            " ORDER BY id DESC LIMIT ?",
            newest,
        )
        names = ("id", "reason", "parent", "examples", "at", "record", "returned")
        return [dict(zip(names, row, strict=True)) for row in reversed(rows)]

    def no_updates(self, newest: int = 100) -> list[dict[str, Any]]:
        """The newest batches that taught nothing, ascending; ``record`` as for ``rejections``."""
        rows = self._database.rows(
            "SELECT id, examples, at, record FROM no_updates ORDER BY id DESC LIMIT ?", newest
        )
        names = ("id", "examples", "at", "record")
        return [dict(zip(names, row, strict=True)) for row in reversed(rows)]

    def count_rejections(self) -> int:
        """Candidates that the bound or the gate refused."""
        return int(self._database.rows("SELECT count(*) FROM rejections")[0][0])

    def policy_versions_referenced(self) -> set[int]:
        """Versions that wrote a reply which may still be trained on: keep their adapters.

        A reply may be until the horizon has passed it by, also after a first release has learned
        from it: others may still speak of it.
        """
        # A seek for each version; DISTINCT would walk over all replies.
        return {
            int(version)
            for (version,) in self._database.rows(
                "WITH RECURSIVE known (version) AS ("
                " SELECT min(version) FROM behaviour_policies UNION ALL"
                " SELECT (SELECT min(b.version) FROM behaviour_policies b"
                "  WHERE b.version > known.version)"
                " FROM known WHERE known.version IS NOT NULL)"
                " SELECT version FROM known WHERE version IS NOT NULL"
            )
        }

    def unpublished(self) -> list[Release]:
        """Releases that nobody has heard of yet, ascending."""
        rows = self._database.rows(
            "SELECT manifest FROM releases WHERE published = 0 ORDER BY version"
        )
        return [Release.model_validate_json(row[0]) for row in rows]

    def erasure(self, erasure_id: str) -> Forgotten | None:
        """What an erasure came to; None: it was not carried out yet."""
        rows = self._database.rows(
            "SELECT interactions, feedback, releases, last_clean_version, revoke,"
            " revocation_version"
            " FROM erasures WHERE id = ?",
            erasure_id,
        )
        if not rows:
            return None
        interactions, feedback, releases, ancestor, revoke, revocation_version = rows[0]
        return Forgotten(
            interactions,
            feedback,
            tuple(json.loads(releases)),
            ancestor,
            bool(revoke),
            revocation_version,
        )

    def revocation_wanted(self) -> int | None:
        """The version that an erasure wants the policy to go back to; None: none does."""
        with self._database.snapshot() as connection:
            return wanted_revocation(connection)

    def most_refused(self, limit: int) -> list[RefusedReply]:
        """Ready replies in the most refused candidates, all in equally many, oldest first."""
        with self._database.snapshot() as connection:
            return most_refused(connection, limit)

    def anchor(self) -> Anchor:
        """The policy that the line's distance is measured from."""
        with self._database.snapshot() as connection:
            return current_anchor(connection)

    def anchors(self) -> list[Anchor]:
        """Every policy that somebody made the anchor, oldest first."""
        with self._database.snapshot() as connection:
            return read_anchors(connection)

    def pseudonym_keys(self) -> dict[str, float]:
        """Fingerprint of every key that somebody is recorded under ("": of replies that do not
        name theirs) -> when the last such reply arrived, Unix seconds."""
        return dict(self._database.rows("SELECT fingerprint, last_arrival FROM pseudonym_keys"))

    def adopted_versions(self) -> tuple[int, ...]:
        """Releases taken over from the store: who taught them is not known here."""
        with self._database.snapshot() as connection:
            return adopted_versions(connection)

    def revoked_versions(self) -> set[int]:
        """Releases that a revocation took back."""
        return {
            int(version)
            for (version,) in self._database.rows("SELECT version FROM releases WHERE revoked")
        }

    def trained_examples(self, version: int) -> list[tuple[str, str]]:
        """(example id, interaction key) of everything that a release learned from."""
        return [
            (example_id, key)
            for example_id, key in self._database.rows(
                "SELECT example_id, key FROM decisions WHERE fate = 'trained' AND decided_by = ?"
                " ORDER BY example_id",
                version,
            )
        ]

    def baselines(self) -> Baselines:
        """The credit state of the newest committed decision."""
        stored = self._database.meta("baselines")
        return Baselines() if stored is None else Baselines.from_json(stored)
