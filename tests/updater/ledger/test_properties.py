"""The ledger against any order, repetition and interleaving of events, decisions and restarts."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from moorline.events import Fate, Feedback, FeedbackKind, Interaction, Reason, SamplingSettings
from moorline.stream import Topic
from tests.updater.ledger.fixtures import (
    FAST_DISK,
    HORIZON,
    NOW,
    Log,
    correction,
    erasure,
    interaction,
    parsed,
    preference,
    rating,
    release,
    signal,
)
from updater.ledger import BatchDecision, Ledger, LedgerError, Parsed

END = NOW + 10 * HORIZON
KEYS = ("a", "b", "c", "d")
CHANGES: dict[str, dict[str, Any]] = {
    "c": {"sampling": SamplingSettings(temperature=0.0)},
    "d": {"prompt_token_ids": (9,)},
}
"""One content for one key: two servers never give the same id."""
RATERS = ("ann", "bob")
NUMBERS = st.integers(0, 1)
"""Few replies at a time, so that much happens to each."""
TIMES = st.sampled_from([NOW + share * HORIZON for share in (0.0, 0.1, 0.9, 1.0, 1.1, 2.2)])


@dataclass(frozen=True)
class Sent:
    """An event and when the broker got it."""

    event: Interaction | Feedback | bytes
    at: float


@st.composite
def replies(draw: st.DrawFn) -> Sent:
    at = draw(TIMES)
    name = draw(st.sampled_from(KEYS))
    return Sent(interaction(name, at=NOW + 5, **CHANGES.get(name, {})), at)


@st.composite
def ratings(draw: st.DrawFn) -> Sent:
    identity = draw(st.integers(0, 99))
    key, over = draw(st.permutations(KEYS))[:2]
    kind = draw(st.sampled_from([FeedbackKind.THUMBS, *FeedbackKind, FeedbackKind.PREFERENCE]))
    polar = kind in (FeedbackKind.THUMBS, FeedbackKind.SCORE)
    event = rating(
        key,
        draw(st.sampled_from([1, -1] if polar else [1])),
        RATERS[identity % 2],
        at=NOW + draw(st.integers(-3, 3)) + draw(st.sampled_from([0, 5 * HORIZON])),
        feedback_id=f"fb-{identity:02d}",
        kind=kind,
        retracted=draw(st.sampled_from([False, False, True])),
        score_min=-1.0,
        score_max=1.0,
        text="so",
        over=over,
        signal=draw(st.sampled_from(["copied", "sneezed"])),
    )
    return Sent(event, draw(TIMES))


def unlike(sent: Sent) -> tuple[str, ...]:
    """Events with the same answer are repeats of each other."""
    if isinstance(sent.event, Interaction):
        return ("reply", sent.event.key)
    if isinstance(sent.event, Feedback):
        return ("rating", sent.event.key, sent.event.feedback_id)
    return (repr(sent.event),)


EVENTS = st.tuples(
    st.lists(replies(), max_size=4, unique_by=unlike),
    st.lists(ratings(), max_size=8, unique_by=unlike),
    st.lists(st.just(Sent(b"{", NOW)), max_size=1),
).map(lambda parts: [sent for part in parts for sent in part])


def inspector(
    path: Path, order: list[Sent], batches: list[int], until: float | None = None
) -> tuple[object, ...]:
    """Read events in this order, in batches of these sizes; the examples and counts after it."""
    log, sizes, left = Log(partitions=3), iter(batches), list(order)
    with Ledger(path, horizon_seconds=HORIZON) as ledger:
        while left:
            size = next(sizes, len(left))
            ledger.ingest([log.parsed(s.event, s.at) for s in left[:size]], now=END)
            left = left[size:]
        if until is not None:
            ledger.expire(until)
        assert ledger.audit() == []
        accounting = ledger.accounting()
        assert accounting.balanced
        assert accounting.total == len(order)
        examples = ledger.ready_examples(100)
        assert ledger.count_ready() == len(examples)
        return examples, accounting.events


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    EVENTS,
    st.randoms(use_true_random=False),
    st.lists(st.integers(1, 5), max_size=8),
    st.booleans(),
)
def test_order_repetition_and_batching_do_not_matter(
    events: list[Sent], random: object, batches: list[int], expire: bool
) -> None:
    until = END if expire else None
    with tempfile.TemporaryDirectory(dir=FAST_DISK) as folder:
        shuffled = list(events)
        random.shuffle(shuffled)  # type: ignore[attr-defined]
        plain = inspector(Path(folder) / "plain.sqlite", events, [], until)
        other = inspector(Path(folder) / "other.sqlite", shuffled, batches, until)
        assert plain == other
        repeats = [sent for sent in events for _ in range(3)]
        random.shuffle(repeats)  # type: ignore[attr-defined]
        examples, counts = inspector(Path(folder) / "repeats.sqlite", repeats, batches, until)
        assert examples == plain[0]
        # Beyond the repeats themselves, every event ends where it ended without them.
        readable = sum(not isinstance(sent.event, bytes) for sent in events)
        total = flat(counts)
        assert total[Fate.DUPLICATE, Reason.REPEATED_EVENT] == 2 * readable
        assert total[Fate.DEAD_LETTERED, Reason.MALFORMED_JSON] == 3 * (len(events) - readable)
        for name, n in flat(plain[1]).items():
            assert total[name] == (3 * n if name[0] is Fate.DEAD_LETTERED else n)


@settings(max_examples=150, deadline=None)
@given(EVENTS)
def test_fates_are_those_of_a_second_derivation(events: list[Sent]) -> None:
    with tempfile.TemporaryDirectory(dir=FAST_DISK) as folder:
        _, counts = inspector(Path(folder) / "ledger.sqlite", events, [])
    assert flat(counts) == derived(events)


def flat(counts: object) -> Counter[tuple[Fate, Reason]]:
    summed: Counter[tuple[Fate, Reason]] = Counter()
    for by_fate in counts.values():  # type: ignore[attr-defined]
        for fate, by_reason in by_fate.items():
            for reason, n in by_reason.items():
                summed[fate, reason] += n
    return summed


def derived(events: list[Sent]) -> Counter[tuple[Fate, Reason]]:
    """The rules once more, from the whole set at once."""
    fates: Counter[tuple[Fate, Reason]] = Counter()
    known = {s.event.key: s for s in events if isinstance(s.event, Interaction)}
    for sent in known.values():
        fates[not_trainable(sent) or (Fate.PENDING, Reason.NONE)] += 1
    fates[Fate.DEAD_LETTERED, Reason.MALFORMED_JSON] += sum(
        isinstance(sent.event, bytes) for sent in events
    )
    in_time: dict[tuple[str, str, str], list[tuple[tuple[Any, ...], bool, list[Sent]]]] = {}
    for sent in events:
        if not isinstance(sent.event, Feedback):
            continue
        retracts = sent.event.retracted
        keys = [sent.event.key, None if retracts else sent.event.over_key]
        replies = [known.get(key) for key in keys if key is not None]
        arrived = [reply.at for reply in replies if reply is not None]
        times = [min(reply.event.created_at, reply.at) for reply in replies if reply is not None]
        if sent.event.kind is FeedbackKind.SIGNAL and sent.event.signal == "sneezed":
            fates[Fate.NOT_TRAINABLE, Reason.UNKNOWN_SIGNAL] += 1
        elif None in replies:
            fates[Fate.PENDING, Reason.NONE] += 1
        elif max(arrived) > sent.at + HORIZON:
            fates[Fate.EXPIRED, Reason.NO_INTERACTION] += 1
        elif sent.at > min(times) + HORIZON and not retracts:
            fates[Fate.LATE, Reason.NONE] += 1
        else:
            rater_key = (sent.event.key, sent.event.rater, sent.event.aspect)
            order = (min(sent.event.created_at, sent.at), sent.at, sent.event.feedback_id)
            in_time.setdefault(rater_key, []).append((order, retracts, replies))  # type: ignore[arg-type]
    for words in in_time.values():
        _, taken_back, replies = max(words)
        earlier = len(words) - 1
        ratings_before = sum(not retracts for _, retracts, _ in words) - (not taken_back)
        if taken_back:
            fates[Fate.RETRACTED, Reason.RETRACTION] += 1
            fates[Fate.RETRACTED, Reason.RATING_RETRACTED] += ratings_before
            earlier -= ratings_before
        else:
            fates[verdict(replies)] += 1
        fates[Fate.DUPLICATE, Reason.SUPERSEDED_RATING] += earlier
    return +fates


def verdict(replies: list[Sent]) -> tuple[Fate, Reason]:
    """Feedback that names these replies."""
    wrong = [found for found in map(not_trainable, replies) if found]
    if wrong:
        return wrong[0]
    if len({reply.event.prompt_token_ids for reply in replies}) > 1:  # type: ignore[union-attr]
        return Fate.NOT_TRAINABLE, Reason.PROMPTS_DIFFER
    return Fate.PENDING, Reason.NONE


def not_trainable(sent: Sent) -> tuple[Fate, Reason] | None:
    assert isinstance(sent.event, Interaction)
    greedy = sent.event.sampling.temperature == 0.0
    return (Fate.NOT_TRAINABLE, Reason.GREEDY_SAMPLING) if greedy else None


class Updater(RuleBasedStateMachine):
    """An updater that reads, decides, erases, forgets and restarts as it likes."""

    records = Bundle("records")
    batches = Bundle("batches")

    @initialize()
    def start(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=FAST_DISK))
        self.log = Log(partitions=2)
        self.now = NOW
        self.consumed = 0
        self.taught: list[tuple[int, str, str, str]] = []  # (version, key, rater, aspect)
        self.erased_at: dict[str, float] = {}
        self.epoch = 0
        self.names = 0
        self.generation = 0
        self.under_way: set[str] = set()
        self.deaths: Counter[str] = Counter()
        self.reopen()

    def reopen(self) -> None:
        self.ledger = Ledger(self.folder / "ledger.sqlite", horizon_seconds=HORIZON)
        assert self.ledger.epoch == self.epoch + 1
        self.epoch = self.ledger.epoch
        self.deaths.update(self.under_way)
        self.under_way = set()

    def take(self, records: list[Parsed]) -> None:
        done = self.ledger.ingest(records, now=self.now)
        assert done.records + done.replayed == len(records)
        self.consumed += done.records

    def read(self, *events: Interaction | Feedback) -> list[Parsed]:
        batch = [parsed(self.log.record(event, self.now)) for event in events]
        self.take(batch)
        return batch

    def key(self, number: int) -> str:
        return f"k{self.generation}-{number}"

    @rule(target=records, number=NUMBERS, user=st.sampled_from([None, *RATERS]))
    def serve(self, number: int, user: str | None = None) -> list[Parsed]:
        return self.read(interaction(self.key(number), at=self.now, user=user))

    @rule(
        target=records,
        number=NUMBERS,
        rater=st.sampled_from(RATERS),
        ages=st.lists(st.sampled_from([0, 10, 1000]), min_size=1, max_size=3),
    )
    def rate(self, number: int, rater: str, ages: list[int]) -> list[Parsed]:
        self.names += 1
        return self.read(
            *[
                rating(
                    self.key(number),
                    1,
                    rater,
                    at=self.now - age,
                    feedback_id=f"f{self.names}-{place}",
                )
                for place, age in enumerate(ages)
            ]
        )

    @rule(target=records, number=NUMBERS, rater=st.sampled_from(RATERS))
    def prefer(self, number: int, rater: str) -> list[Parsed]:
        self.names += 1
        winner, loser = self.key(number), self.key(1 - number)
        return self.read(
            preference(winner, loser, rater, at=self.now, feedback_id=f"f{self.names}")
        )

    @rule(
        target=records,
        number=NUMBERS,
        rater=st.sampled_from(RATERS),
        name=st.sampled_from(["copied", "edited", "sneezed", ""]),
    )
    def correct_or_hint(self, number: int, rater: str, name: str) -> list[Parsed]:
        self.names += 1
        what = {"at": self.now, "feedback_id": f"f{self.names}"}
        key = self.key(number)
        if name:
            return self.read(signal(key, name, rater, **what))
        return self.read(correction(key, "so", rater, **what))

    @rule(target=batches, number=NUMBERS, rater=st.sampled_from(RATERS))
    def serve_rate_and_hand_out(self, number: int, rater: str) -> object:
        self.serve(number)
        self.rate(number, rater, [0])
        return self.hand_out(3)

    @rule(batch=records)
    def read_again(self, batch: list[Parsed]) -> None:
        before = self.consumed
        self.take(batch)
        assert self.consumed == before

    @rule(target=batches, limit=st.integers(1, 3))
    def hand_out(self, limit: int) -> object:
        examples = self.ledger.ready_examples(limit)
        for example in examples:
            self.assert_not_erased(example.interaction.user, example.interaction.created_at)
            for lost in example.rejected.values():
                self.assert_not_erased(lost.user, lost.created_at)
            for one in example.feedback:
                self.assert_not_erased(one.rater, one.created_at)
        return multiple(examples) if examples else multiple()

    @rule(batch=batches, alone=st.booleans(), measure=st.booleans())
    def begin(self, batch: list[Any], alone: bool, measure: bool) -> None:
        ids = [example.example_id for example in batch]
        try:
            self.ledger.crashes.mark_update(ids, alone=alone)
        except LedgerError as error:
            self.check_refusal(error)
            return
        self.under_way = {example.interaction.key for example in batch}
        if measure:
            self.ledger.held_out_traffic(1, exclude=ids)
            self.under_way |= self.attempted("in_update IS NOT NULL").keys()

    @rule(target=batches, number=NUMBERS, measure=st.booleans())
    def die_in_an_update(self, number: int, measure: bool) -> object:
        self.serve(number)
        self.rate(number, "ann", [0])
        self.begin(self.ledger.ready_examples(2), False, measure)
        self.restart()
        return self.hand_out(2)

    @rule()
    def stop_in_order(self) -> None:
        self.ledger.crashes.remove_marks()
        self.under_way = set()

    @rule()
    def succeeded(self) -> None:
        self.ledger.crashes.clear_counts()
        self.ended([])

    def ended(self, batch: Iterable[Any]) -> None:
        for key in self.under_way | {example.interaction.key for example in batch}:
            del self.deaths[key]
        self.under_way = set()

    def attempted(self, condition: str) -> dict[str, int]:
        return dict(
            self.ledger._database.rows(
                "SELECT i.key, c.crash_count FROM crash_counts c JOIN interactions i"
                f" ON i.id = c.interaction WHERE {condition}"
            )
        )

    @rule(batch=consumes(batches), publish=st.booleans(), left_out=st.sampled_from([0, 0, 1]))
    def train(self, batch: list[object], publish: bool, left_out: int) -> None:
        ids = [example.example_id for example in batch]  # type: ignore[attr-defined]
        aside = dict.fromkeys(ids[len(ids) - left_out :], Reason.OFF_POLICY)
        version = self.ledger.next_version()
        made = release(self.ledger, ids[: len(ids) - left_out])
        try:
            self.ledger.commit_release(made, BatchDecision(ids, set_aside=aside))
        except LedgerError as error:
            self.check_refusal(error)
            return
        self.ended(batch)
        for example in batch[: len(batch) - len(aside)]:
            for one in example.feedback:  # type: ignore[attr-defined]
                self.taught.append((version, one.key, one.rater, one.aspect))
        assert self.ledger.live_version() == version
        if publish:
            self.ledger.mark_published(version)
        assert (version in [r.version for r in self.ledger.unpublished()]) is not publish

    @rule(
        batch=consumes(batches),
        reason=st.sampled_from(
            [Reason.GATE_BLOCKED, Reason.UPDATE_CRASHED, Reason.NO_ADVANTAGE, Reason.MISMATCH]
        ),
    )
    def refuse(self, batch: list[object], reason: Reason) -> None:
        ids = [example.example_id for example in batch]  # type: ignore[attr-defined]
        try:
            if reason in (Reason.GATE_BLOCKED, Reason.UPDATE_CRASHED):
                self.ledger.commit_rejection(reason, BatchDecision(ids), now=self.now)
            else:
                self.ledger.commit_no_update(BatchDecision(ids, dict.fromkeys(ids, reason)))
        except LedgerError as error:
            self.check_refusal(error)
        else:
            self.ended(batch)

    def check_refusal(self, error: LedgerError) -> None:
        """Handed out twice, or before a restart, and decided once."""
        assert "decided before" in str(error)

    def assert_not_erased(self, who: str | None, at: float) -> None:
        assert who is None or at > self.erased_at.get(who, 0.0)

    @rule(who=st.sampled_from(RATERS), revoke=st.booleans(), on_the_stream=st.booleans())
    def erase(self, who: str, revoke: bool, on_the_stream: bool) -> None:
        asked = erasure(who, at=self.now, revoke=revoke)
        if on_the_stream:
            self.ledger.ingest([parsed(self.log.record(asked, self.now))], now=self.now)
        else:
            self.ledger.forget(asked, now=self.now)
        found = self.ledger.erasure(asked.erasure_id)
        assert found is not None
        assert found.last_clean_version < min(found.releases, default=math.inf)
        self.erased_at[who] = self.now
        # Their words stay in the weights, but nobody knows any more whose they were.
        self.taught = [
            (version, key, "" if rater == who else rater, aspect)
            for version, key, rater, aspect in self.taught
        ]

    @precondition(lambda self: self.ledger.revocation_wanted() is not None)
    @rule(older=st.booleans())
    def restore(self, older: bool) -> None:
        ancestor = self.ledger.revocation_wanted()
        assert ancestor is not None
        made = self.ledger.release(ancestor) if older else None
        ancestor = made.parent or 0 if made is not None else ancestor
        self.ledger.commit_revocation(release(self.ledger, revokes_after=ancestor))
        assert self.ledger.revocation_wanted() is None
        self.taught = [one for one in self.taught if one[0] <= ancestor]

    @rule(hours=st.sampled_from([1, 1, 13, 60]))
    def time_passes(self, hours: int) -> None:
        self.generation += hours == 60
        self.now += hours * 3600.0
        self.ledger.expire(self.now)

    @rule()
    def restart(self) -> None:
        self.ledger.close()
        self.reopen()

    @invariant()
    def the_books_are_right(self) -> None:
        assert self.ledger.audit() == []
        accounting = self.ledger.accounting()
        assert accounting.balanced
        assert accounting.total == self.consumed

    @invariant()
    def a_death_is_counted_until_an_update_survives(self) -> None:
        known = {key for (key,) in self.ledger._database.rows("SELECT key FROM interactions")}
        assert self.attempted("crash_count > 0") == {
            key: deaths for key, deaths in self.deaths.items() if key in known
        }
        suspects = self.ledger.crashes.suspects()
        assert all(self.deaths[one.key] == one.crash_count >= 3 for one in suspects)

    @invariant()
    def a_word_teaches_once(self) -> None:
        counted = self.ledger.accounting().fates.get(Topic.FEEDBACK, {}).get(Fate.TRAINED, 0)
        assert counted == len(self.taught)
        words = Counter((key, rater, aspect) for _, key, rater, aspect in self.taught if rater)
        assert max(words.values(), default=0) <= 1

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.ledger.close()
            shutil.rmtree(self.folder)


TestUpdater = Updater.TestCase
TestUpdater.settings = settings(
    max_examples=80,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
