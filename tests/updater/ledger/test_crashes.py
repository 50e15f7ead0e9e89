"""kill -9 at every failpoint of the ledger: the old state or the new one, and then the same end."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest

from moorline import failpoints
from moorline.events import Reason, SamplingSettings
from tests.updater.ledger.fixtures import (
    HORIZON,
    HOUR,
    NOW,
    Log,
    correction,
    erasure,
    interaction,
    preference,
    rating,
    release,
    signal,
)
from updater.ledger import BatchDecision, Ledger, Parsed, examples_digest

STEPS = (
    *("ingest", "release", "rejection", "no_update", "expire", "published"),
    *("forget", "revocation", "keys"),
    *("attempt", "measured", "undecided", "succeeded", "crashes"),
)
POINTS = (
    *(
        f"ledger.{step}.{point}"
        for step in STEPS
        for point in ("begun", "before_commit", "committed")
    ),
    *("keys.saved", "keys.destroyed", "keys.wiped"),
)
ONCE = ("expire", "no_update", "forget", "revocation", "crashes")
GONE = "r4"
BATCH_RECORDS = 7
BATCH_EXAMPLES = 3


def stream() -> list[Parsed]:
    """A day of everything: repeated, superseded, late, unreadable, untrainable, unrated, erased."""
    log = Log(partitions=3)
    found = [log.parsed(b"{"), log.parsed(rating("never"))]
    for i in range(24):
        name = f"r{i}"
        greedy = {"sampling": SamplingSettings(temperature=0.0)} if i % 8 == 7 else {}
        events = [interaction(name, at=NOW + i, **greedy), rating(name, -1, "ann", at=NOW + i)]
        if i % 3 == 0:
            events.reverse()
        if i % 4 == 0:
            events += [rating(name, 1, "ann", at=NOW + i + 9), rating(name, 1, "bob")]
        if i % 3 == 1:
            events += [preference(name, f"r{i + 2}", "cy", at=NOW + i), signal(name, "copied")]
        if i % 6 == 2:
            events += [correction(name, "so", at=NOW + i)]
        found += [log.parsed(event) for event in events * (2 if i % 5 == 0 else 1)]
        if i == 12:
            found.append(log.parsed(erasure("cy", erasure_id="er-cy")))
        if i == 20:
            gone = erasure(interaction_id=GONE, erasure_id="er-reply", revoke=True)
            found.append(log.parsed(gone))
    found.append(log.parsed(interaction("unrated", at=NOW)))
    found.append(log.parsed(rating("r1", 1, "dan"), at=NOW + HORIZON + HOUR))
    return found


def update(path: Path, outbox: Path) -> None:
    """What an updater does, from wherever the ledger stands to the end of the stream."""
    records = stream()
    with Ledger(path, horizon_seconds=HORIZON) as ledger:
        while True:
            publish(ledger, outbox)
            if (ancestor := ledger.revocation_wanted()) is not None:
                ledger.commit_revocation(release(ledger, revokes_after=ancestor))
                continue
            if ledger.count_ready() >= BATCH_EXAMPLES:
                decide(ledger)
                continue
            offsets = ledger.offsets()
            unread = [
                parsed
                for parsed in records
                if parsed.record.offset
                >= offsets.get((parsed.record.topic, parsed.record.partition), ("", 0))[1]
            ]
            if not unread:
                break
            ledger.ingest(unread[:BATCH_RECORDS], now=NOW + 2 * HORIZON)
        ledger.forget(erasure("bob", erasure_id="er-bob"), now=NOW)
        ledger.expire(NOW + 2 * HORIZON)
        assert ledger.audit() == []


def decide(ledger: Ledger) -> None:
    """Decides by content, so that a repeated decision is the same one."""
    ids = [example.example_id for example in ledger.ready_examples(BATCH_EXAMPLES)]
    ledger.crashes.mark_update(ids[:1], alone=True)
    ledger.crashes.clear_counts()
    ledger.crashes.mark_update(ids)
    ledger.crashes.remove_marks()
    ledger.crashes.mark_update(ids)
    ledger.held_out_traffic(2, exclude=ids)
    match int(examples_digest(ids)[:8], 16) % 5:
        case 0 | 1:
            ledger.commit_rejection(
                Reason.GATE_BLOCKED, BatchDecision(ids, record={"ids": ids}), now=NOW
            )
        case 2:
            ledger.commit_no_update(BatchDecision(ids, dict.fromkeys(ids, Reason.MISMATCH)))
        case _:
            trained, aside = ids[:-1], {ids[-1]: Reason.OFF_POLICY}
            made = release(ledger, trained)
            digest = {"examples_digest": examples_digest(trained)}
            ledger.commit_release(
                made.model_copy(update=digest), BatchDecision(ids, set_aside=aside)
            )


def publish(ledger: Ledger, outbox: Path) -> None:
    for made in ledger.unpublished():
        with outbox.open("a") as topic:
            topic.write(f"{made.version} {made.examples_digest}\n")
        ledger.mark_published(made.version)


def outcome(path: Path, outbox: Path) -> dict[str, Any]:
    """Everything that must be the same after any crash."""
    with Ledger.open_readonly(path) as reader:
        assert reader.audit() == []
        assert reader.unpublished() == []
        assert reader._database.rows("SELECT key FROM doomed_keys") == []
        assert reader._database.rows("SELECT 1 FROM crash_counts WHERE in_update IS NOT NULL") == []
        return {
            "accounting": reader.accounting().as_dict(),
            "offsets": sorted(map(repr, reader.offsets().items())),
            "releases": [(r.version, r.parent, r.examples_digest) for r in reader.releases()],
            "lineage": [reader.trained_examples(r.version) for r in reader.releases()],
            "revoked": reader.revoked_versions(),
            "erasures": [reader.erasure(name) for name in ("er-cy", "er-reply", "er-bob")],
            "rejections": [json.loads(r["record"]) for r in reader.rejections()],
            # Published again after a kill is the same release again.
            "published": list(dict.fromkeys(outbox.read_text().splitlines())),
        }


def run(path: Path, outbox: Path, armed: str = "") -> int:
    """``update`` in a process of its own; its exit code."""

    def child() -> None:
        failpoints._passes.clear()
        os.environ[failpoints.FAILPOINTS_VARIABLE] = armed
        update(path, outbox)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The end of a run without faults."""
    folder = tmp_path_factory.mktemp("reference")
    assert run(folder / "ledger.sqlite", folder / "outbox") == 0
    found = outcome(folder / "ledger.sqlite", folder / "outbox")
    fates = found["accounting"]
    assert set(fates["topics"]["feedback.v1"]) == {
        *("trained", "rejected", "not_trainable", "duplicate", "late", "expired"),
        *("dead_lettered", "pending", "erased"),
    }
    assert fates["balanced"]
    assert found["revoked"]
    assert all(erased.feedback for erased in found["erasures"])
    assert len(found["releases"]) == len(found["published"]) >= 2
    return found


@pytest.mark.parametrize("strike", [1, 2])
@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_any_step_changes_nothing_of_the_end(
    reference: dict[str, Any], point: str, strike: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, outbox = Path(folder) / "ledger.sqlite", Path(folder) / "outbox"
        code = run(path, outbox, f"{point}=kill@{strike}")
        if code == 0:
            assert strike == 2, f"{point} was never passed"
            assert point.split(".")[1] in ONCE, f"{point} was passed only once"
        else:
            assert code == -SIGKILL
            with Ledger.open_readonly(path) as reader:
                assert reader.audit() == []
                assert reader.accounting().balanced
            assert run(path, outbox) == 0
        assert outcome(path, outbox) == reference


def test_kill_after_kill_still_ends_the_same(reference: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, outbox = Path(folder) / "ledger.sqlite", Path(folder) / "outbox"
        armed = "ledger.ingest.committed=kill@2,ledger.release.before_commit=kill@2"
        kills = 0
        while run(path, outbox, armed) != 0:
            kills += 1
            assert kills < 50
        assert kills >= 3
        assert outcome(path, outbox) == reference
