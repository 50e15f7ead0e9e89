"""Events and records that were sent or stored under an earlier wire schema are still read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from moorline.events import (
    SCHEMA_VERSION,
    Divergence,
    Erasure,
    Event,
    Feedback,
    FeedbackKind,
    Interaction,
    Reason,
    Release,
    Verdict,
)
from moorline.store.artifacts import Pin
from moorline.stream import Record, Topic
from serving.parity import read_parity
from updater.ingest import parse

EVENTS = Path(__file__).parent / "events"
SCHEMA_1_0 = Path(__file__).parent / "format4" / "events"
MODELS: dict[str, type[Event]] = {
    "interaction": Interaction,
    "feedback": Feedback,
    "erasure": Erasure,
    "release": Release,
}
STORED = [
    path
    for path in [*sorted(SCHEMA_1_0.glob("*.json")), *sorted(EVENTS.glob("*/*.json"))]
    if path.stem.split("-")[0] in MODELS
]
TOPICS = {
    Interaction: Topic.INTERACTIONS,
    Feedback: Topic.FEEDBACK,
    Erasure: Topic.ERASURES,
}


def model_of(path: Path) -> type[Event]:
    return MODELS[path.stem.split("-")[0]]


def schema_of(path: Path) -> str:
    return "1.0" if path.parent == SCHEMA_1_0 else path.parent.name


def name(path: Path) -> str:
    return f"{schema_of(path)}/{path.stem}"


@pytest.mark.parametrize("path", STORED, ids=name)
def test_a_stored_event_is_read_and_loses_nothing(path: Path) -> None:
    event = model_of(path).model_validate_json(path.read_bytes())
    assert event.schema_version == schema_of(path)
    again = type(event).model_validate_json(event.to_bytes())
    assert again == event
    said = json.loads(path.read_bytes())
    kept = json.loads(event.to_bytes())
    renamed = {
        "replay": "revoke",
        "restores": "revokes_after",
        "not_run_again": "behaviour_policies_unavailable",
    }
    for field, value in said.items():
        if field not in ("divergences", "verdict"):  # those have tests of their own
            assert kept[renamed.get(field, field)] == value


@pytest.mark.parametrize("path", [p for p in STORED if model_of(p) in TOPICS], ids=name)
def test_the_updater_accepts_it_from_a_topic(path: Path) -> None:
    topic = TOPICS[model_of(path)]
    record = Record(topic, "t", 0, 0, 1_772_323_200_000, b"k", path.read_bytes())
    parsed = parse(record, max_event_bytes=1_000_000)
    assert isinstance(parsed.event, model_of(path))
    assert parsed.reason is Reason.NONE


@pytest.mark.parametrize("path", STORED, ids=name)
def test_a_newer_minor_version_may_add_fields(path: Path) -> None:
    said: dict[str, Any] = json.loads(path.read_bytes())
    newer = said | {"schema_version": "1.99", "added_since": {"any": ["thing"]}}
    event = model_of(path).model_validate(newer)
    ours = model_of(path).model_validate(said)
    assert event.model_copy(update={"schema_version": ours.schema_version}) == ours


@pytest.mark.parametrize("path", STORED, ids=name)
def test_a_newer_major_version_is_refused(path: Path) -> None:
    newer = json.loads(path.read_bytes()) | {"schema_version": "2.0"}
    with pytest.raises(ValidationError, match=r"unsupported schema version 2\.0"):
        model_of(path).model_validate(newer)


def test_every_kind_of_event_is_stored_under_the_schema_of_today() -> None:
    kinds = {path.stem for path in (EVENTS / SCHEMA_VERSION).glob("*.json")}
    assert kinds >= {
        "interaction",
        *(f"feedback-{kind}" for kind in FeedbackKind),
        *(f"erasure-{whose}" for whose in ("user", "reply", "tenant")),
        *(f"release-{how}" for how in ("adapter", "base", "restored")),
    }


def test_an_erasure_that_asked_for_a_replay_asks_for_a_revocation() -> None:
    erasure = Erasure.model_validate_json((SCHEMA_1_0 / "erasure-reply.json").read_bytes())
    assert erasure.revoke


def test_a_release_that_restored_another_revokes_what_came_after() -> None:
    release = Release.model_validate_json((SCHEMA_1_0 / "release-restored.json").read_bytes())
    assert (release.version, release.revokes_after) == (5, 2)


@pytest.mark.parametrize("path", sorted(SCHEMA_1_0.glob("rejection*.json")), ids=name)
def test_the_evidence_of_a_rejection_is_read(path: Path) -> None:
    record = json.loads(path.read_bytes())
    divergences = [Divergence.model_validate(one) for one in record["divergences"]]
    assert {one.tokens_from for one in divergences} <= {"probes", "traffic"}
    if record["verdict"] is not None:
        Verdict.model_validate(record["verdict"])


def test_a_pin_is_read() -> None:
    pin = Pin.model_validate_json((SCHEMA_1_0 / "pin.json").read_bytes())
    assert pin.version == 2


def test_the_parity_of_an_artifact_is_read() -> None:
    assert read_parity(SCHEMA_1_0).sequences
