"""Markers of past erasures: whether an arriving event is older than the erasure of its subject."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable

from moorline.events import Erasure, Feedback, Interaction, user_digest


def scopes_of(event: Interaction | Feedback) -> list[str]:
    """Every scope of an ``Erasure`` that this event alone says it is in."""
    if isinstance(event, Interaction):
        scopes = [f"interaction/{event.interaction_id}", f"tenant/{event.tenant}"]
        for digest in map(user_digest, event.users):
            scopes += [f"user/{digest}", f"user/{digest}/{event.tenant}"]
        return scopes
    scopes = [f"interaction/{event.interaction_id}", f"user/{user_digest(event.rater)}"]
    if event.over_key is not None:
        scopes.append(f"interaction/{event.over}")
    return scopes


class ErasureMarkers:
    """Reads and writes the markers, inside one transaction."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._execute = connection.execute
        # Most ledgers have none, and then nobody's name need be hashed.
        (last,) = self._execute("SELECT max(scope) FROM erasure_markers").fetchone()
        self.any = last is not None

    def add(self, erasure: Erasure) -> None:
        """Add an erasure's markers. Of one scope the latest moment counts."""
        # An erased reply stays erased whenever feedback on it was given.
        at = erasure.erased_at if erasure.interaction_id is None else math.inf
        for scope in erasure.scopes:
            self._execute(
                "INSERT INTO erasure_markers VALUES (?, ?)"
                " ON CONFLICT DO UPDATE SET at = max(at, excluded.at)",
                (scope, at),
            )
        self.any = True

    def erases(self, event: Interaction | Feedback, event_time: float) -> bool:
        """Whether this event happened before an erasure of its subject."""
        return self.any and self._marked(scopes_of(event), event_time)

    def erases_rater(self, rater: str, tenant: str, event_time: float) -> bool:
        """Whether the rater had their ratings of this tenant's replies erased."""
        return self.any and self._marked([f"user/{user_digest(rater)}/{tenant}"], event_time)

    def _marked(self, scopes: Iterable[str], event_time: float) -> bool:
        scopes = list(scopes)
        (at,) = self._execute(
            f"SELECT max(at) FROM erasure_markers WHERE scope IN ({', '.join('?' * len(scopes))})",
            scopes,
        ).fetchone()
        return at is not None and event_time <= float(at)
