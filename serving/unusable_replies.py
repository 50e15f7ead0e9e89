"""What this server knows of replies that no rating can teach, for the answer to whoever rates one.

It lives in memory and is bounded: another replica, or this one after a restart, answers as for any
reply, and the updater says later what became of the rating.
"""

from __future__ import annotations

from collections import OrderedDict

from moorline.events import Reason, interaction_key
from serving.context import NotRecorded

REPLIES = 100_000
"""So many are remembered, the newest; some 20 MB."""


class UnusableReplies:
    """The newest replies that were not recorded, or were and cannot teach, each with its reason."""

    def __init__(self, limit: int = REPLIES) -> None:
        self._limit = limit
        self._why: OrderedDict[str, NotRecorded | Reason] = OrderedDict()

    def note_not_recorded(self, reply_id: str, why: NotRecorded) -> None:
        """A reply with all its choices."""
        self._note(reply_id, why)

    def note_untrainable(self, reply_id: str, choice: int, why: Reason) -> None:
        """One choice that was recorded."""
        self._note(interaction_key(reply_id, choice), why)

    def why(self, reply_id: str, choice: int) -> NotRecorded | Reason | None:
        """Why no rating of it can teach; None: nothing is known against it."""
        return self._why.get(reply_id) or self._why.get(interaction_key(reply_id, choice))

    def _note(self, name: str, why: NotRecorded | Reason) -> None:
        self._why[name] = why
        while len(self._why) > self._limit:
            self._why.popitem(last=False)
