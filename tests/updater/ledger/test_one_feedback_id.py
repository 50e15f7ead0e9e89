"""F12: whatever is sent under one feedback id, however often, whenever: the last word counts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moorline.events import Fate, Feedback, FeedbackKind, Reason
from moorline.stream import Topic
from tests.updater.ledger.fixtures import (
    FAST_DISK,
    HORIZON,
    HOUR,
    NOW,
    Log,
    interaction,
    rating,
)
from updater.ledger import Ledger, Parsed

UP: dict[str, Any] = {"value": 1}
DOWN: dict[str, Any] = {"value": -1}
SCORE: dict[str, Any] = {
    "kind": FeedbackKind.SCORE,
    "value": 1,
    "score_min": 0,
    "score_max": 5,
}
TEXT: dict[str, Any] = {"kind": FeedbackKind.CORRECTION, "value": None, "text": "A river of ice."}
BACK: dict[str, Any] = {"value": None}
ENDS = frozenset(
    {
        (Fate.PENDING, Reason.NONE),
        (Fate.DUPLICATE, Reason.REPEATED_EVENT),
        (Fate.DUPLICATE, Reason.SUPERSEDED_RATING),
        (Fate.RETRACTED, Reason.RATING_RETRACTED),
        (Fate.RETRACTED, Reason.RETRACTION),
        (Fate.EXPIRED, Reason.NO_INTERACTION),
        (Fate.LATE, Reason.NONE),
    }
)

Word = dict[str, Any]
WORDS = st.sampled_from([UP, DOWN, SCORE, TEXT, BACK])
ACTIONS = st.lists(
    st.one_of(
        WORDS.map(lambda word: ("say", word)),
        st.just(("reply", None)),
        st.just(("deliver the last again", None)),
        st.sampled_from([0.1, 0.5, 0.9]).map(lambda share: ("time passes", share * HORIZON)),
    ),
    max_size=14,
)


class World:
    """A ledger, one reply and one id; and what was said, so that it can be told what counts."""

    def __init__(self, folder: Path) -> None:
        self.ledger = Ledger(folder / "ledger.sqlite", horizon_seconds=HORIZON)
        self.log = Log(partitions=1)
        self.now = NOW
        self.replied_at: float | None = None
        self.said: list[tuple[Word, float]] = []
        """Each word that is not what was said just before, and when."""
        self.records: list[Parsed] = []
        self.repeats = 0

    def do(self, action: str, detail: Any) -> None:
        match action:
            case "say":
                self.say(detail)
            case "reply":
                self.replied_at = self.now if self.replied_at is None else self.replied_at
                self.ingest(self.log.parsed(interaction("r", at=self.now), self.now))
            case "deliver the last again":
                self.ledger.ingest(self.records[-1:], now=self.now)
            case "time passes":
                # Inside two horizons nothing of the id is forgotten.
                self.now = min(self.now + detail, NOW + 2 * HORIZON - HOUR)
                self.ledger.expire(self.now)

    def say(self, word: Word) -> None:
        event: Feedback = rating("r", at=self.now, feedback_id="f", **word)
        self.ingest(self.log.parsed(event, self.now))
        if self.said and self.said[-1][0] == word:
            self.repeats += 1
        else:
            self.said.append((word, self.now))

    def ingest(self, record: Parsed) -> None:
        self.records.append(record)
        self.ledger.ingest([record], now=self.now)

    @property
    def counts(self) -> list[Word]:
        """What must be learned: the last word, where it and the reply are inside a horizon."""
        if self.replied_at is None or not self.said:
            return []
        word, at = self.said[-1]
        taken_back_before = len(self.said) == 2 and self.said[0][0] == BACK
        in_time = abs(at - self.replied_at) <= HORIZON
        return [word] if in_time and word != BACK and not taken_back_before else []

    def check(self) -> None:
        taught = [one for e in self.ledger.ready_examples(9) for one in e.feedback]
        assert [(one.kind, one.value, one.text) for one in taught] == [
            (word.get("kind", FeedbackKind.THUMBS), word["value"], word.get("text"))
            for word in self.counts
        ]
        assert self.ledger.audit() == []
        accounting = self.ledger.accounting()
        assert accounting.balanced
        assert accounting.total == len(self.records)
        fates = {
            (fate, reason): n
            for fate, reasons in accounting.events.get(Topic.FEEDBACK, {}).items()
            for reason, n in reasons.items()
        }
        assert fates.keys() <= ENDS
        assert sum(fates.values()) == len(self.said) + self.repeats, "each has one fate"
        assert fates.get((Fate.DUPLICATE, Reason.REPEATED_EVENT), 0) == self.repeats
        came_first = bool(self.said) and self.said[0][0] == BACK  # it waits for what it takes back
        assert fates.get((Fate.PENDING, Reason.NONE), 0) <= 1 + came_first


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(ACTIONS)
@example([("say", UP), ("say", DOWN), ("reply", None), ("say", UP), ("say", UP)])
@example([("say", BACK), ("say", UP), ("reply", None), ("say", DOWN)])
@example([("reply", None), ("say", UP), ("time passes", 1.1 * HORIZON), ("say", DOWN)])
def test_the_last_word_under_an_id_counts_whenever_it_comes(
    actions: list[tuple[str, Any]],
) -> None:
    with tempfile.TemporaryDirectory(dir=FAST_DISK) as folder:
        world = World(Path(folder))
        for action, detail in actions:
            world.do(action, detail)
            world.check()
        world.ledger.close()
