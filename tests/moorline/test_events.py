"""The wire contract: what is written is read back, what is wrong is refused, schemas agree."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from moorline.events import (
    ArtifactFile,
    Check,
    Decision,
    Divergence,
    Erasure,
    Event,
    Fate,
    Feedback,
    FeedbackKind,
    Interaction,
    LogprobConvention,
    PolicySpan,
    Reason,
    Release,
    ReleaseKind,
    SamplingSettings,
    Verdict,
    artifact_digest,
    json_schemas,
    policy_name,
    user_digest,
)

identifiers = st.from_regex(r"[A-Za-z0-9._:@+-]{1,40}", fullmatch=True)
short_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)
unix_seconds = st.floats(0, 4e9, allow_nan=False)
finite = st.floats(allow_nan=False, allow_infinity=False)
hashes = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
counts = st.integers(0, 2**40)


@st.composite
def interactions(draw: st.DrawFn) -> Interaction:
    length = draw(st.integers(0, 8))
    tokens = st.lists(st.integers(0, 200_000), min_size=length, max_size=length)
    logprobs = st.lists(st.none() | st.floats(-50, 0), min_size=length, max_size=length)
    return Interaction(
        interaction_id=draw(identifiers),
        choice=draw(st.integers(0, 9)),
        alias=draw(identifiers),
        tenant=draw(short_texts),
        task=draw(short_texts),
        user=draw(st.none() | short_texts),
        created_at=draw(unix_seconds),
        latency_seconds=draw(st.floats(0, 1e4)),
        prompt_token_ids=tuple(draw(st.lists(st.integers(0, 200_000), max_size=8))),
        completion_token_ids=tuple(draw(tokens)),
        completion_logprobs=tuple(draw(logprobs)),
        logprob_convention=draw(st.sampled_from(LogprobConvention)),
        sampling=SamplingSettings(
            temperature=draw(st.floats(0, 2)),
            top_p=draw(st.floats(0.01, 1)),
            top_k=draw(st.integers(-1, 100)),
            altered_by=tuple(draw(st.lists(st.sampled_from(["logit_bias", "min_tokens"])))),
        ),
        policy_spans=(PolicySpan(version=draw(counts), start=0, end=length),),
        finish_reason=draw(st.sampled_from(["stop", "length", "abort"])),
        streamed=draw(st.booleans()),
    )


@st.composite
def ratings(draw: st.DrawFn) -> Feedback:
    common: dict[str, Any] = {
        "interaction_id": draw(identifiers),
        "choice": draw(st.integers(0, 9)),
        "rater": draw(short_texts.filter(bool)),
        "created_at": draw(unix_seconds),
    }
    kind = draw(st.sampled_from(FeedbackKind))
    match kind:
        case FeedbackKind.THUMBS:
            common["value"] = draw(st.sampled_from([1, -1]))
        case FeedbackKind.SCORE:
            low, value, high = sorted(draw(st.lists(finite, min_size=3, max_size=3)))
            common |= {"score_min": low, "score_max": high, "value": value}
            if low == high:
                common |= {"score_min": 0.0, "score_max": 1.0, "value": 0.5}
        case FeedbackKind.CORRECTION:
            common["text"] = draw(short_texts.filter(str.strip))
        case FeedbackKind.PREFERENCE:
            common["over"] = draw(identifiers.filter(lambda over: over != common["interaction_id"]))
            common["over_choice"] = draw(st.integers(0, 9))
        case FeedbackKind.SIGNAL:
            common["signal"] = draw(short_texts.filter(bool))
    return Feedback(kind=kind, **common)


@st.composite
def releases(draw: st.DrawFn) -> Release:
    files = tuple(
        ArtifactFile(name=name, sha256=draw(hashes), size_bytes=draw(counts))
        for name in draw(
            st.lists(st.sampled_from(["a.safetensors", "b.json", "c.json"]), unique=True)
        )
    )
    digest = artifact_digest(files)
    check = Check(name="canary_kl", measured=draw(st.none() | finite), limit=0.05, passed=True)
    verdict = Verdict(
        decision=Decision.PASS, artifact_digest=digest, checks=(check,), seconds=draw(unix_seconds)
    )
    divergence = Divergence(
        reference=draw(st.sampled_from(["live", "anchor"])),
        tokens_from=draw(st.sampled_from(["traffic", "probes"])),
        mean_kl_nats=draw(finite),
        max_prompt_kl_nats=draw(finite),
        tokens=draw(counts),
    )
    return Release(
        alias=draw(identifiers),
        version=draw(counts),
        parent=draw(st.none() | counts),
        kind=ReleaseKind.ADAPTER,
        artifact_digest=digest,
        files=files,
        base_model_digest=draw(hashes),
        created_at=draw(unix_seconds),
        offsets={"interactions.v1": draw(st.dictionaries(st.integers(0, 15), counts))},
        divergences=(divergence,),
        verdict=verdict,
        diagnostics=draw(st.dictionaries(short_texts, finite)),
    )


@st.composite
def erasures(draw: st.DrawFn) -> Erasure:
    if draw(st.booleans()):
        return Erasure(interaction_id=draw(identifiers), revoke=draw(st.booleans()))
    users = draw(st.lists(hashes, max_size=3))
    tenant = draw(short_texts if not users else st.none() | short_texts)
    return Erasure(users=tuple(users), tenant=tenant, erased_at=draw(unix_seconds))


events = interactions() | ratings() | releases() | erasures()
SCHEMA_OF = {
    Interaction: "interactions.v1",
    Feedback: "feedback.v1",
    Release: "releases.v1",
    Erasure: "erasures.v1",
}


def thumbs(**fields: Any) -> dict[str, Any]:
    return {"interaction_id": "chatcmpl-1", "value": 1} | fields


@given(events)
def test_what_is_written_is_read_back(event: Event) -> None:
    assert type(event).model_validate_json(event.to_bytes()) == event


@given(events)
def test_what_is_written_agrees_with_the_published_schema(event: Event) -> None:
    schema = json_schemas()[SCHEMA_OF[type(event)]]
    jsonschema.validate(json.loads(event.to_bytes()), schema)


@given(events, st.sampled_from(["1.1", "1.99"]))
def test_newer_minor_version_with_unknown_fields_is_read(event: Event, version: str) -> None:
    fields = json.loads(event.to_bytes()) | {"schema_version": version, "from_the_future": 1}
    read = type(event).model_validate(fields)
    assert read.model_dump(exclude={"schema_version"}) == event.model_dump(
        exclude={"schema_version"}
    )


@pytest.mark.parametrize("version", ["2.0", "0.9", "1", "x"])
def test_other_major_version_is_refused(version: str) -> None:
    with pytest.raises(ValidationError):
        Feedback.model_validate(thumbs(schema_version=version))


@given(st.binary(max_size=60))
def test_noise_is_refused_and_never_crashes(noise: bytes) -> None:
    for model in SCHEMA_OF:
        with pytest.raises(ValidationError):
            model.model_validate_json(noise)


@pytest.mark.parametrize(
    "fields",
    [
        {"value": 0.5},
        {"value": float("nan")},
        {"value": float("inf")},
        {"kind": "score", "value": 1},
        {"kind": "score", "value": 5, "score_max": 5},
        {"kind": "score", "value": 2, "score_min": 0, "score_max": 1},
        {"kind": "score", "value": 0.5, "score_min": 1, "score_max": 1},
        {"kind": "score", "value": 0.5, "score_min": 1, "score_max": 0},
        {"kind": "score", "value": float("nan"), "score_min": 0, "score_max": 1},
        {"kind": "correction"},
        {"kind": "correction", "text": ""},
        {"kind": "correction", "text": " \n\t "},
        {"kind": "correction", "text": "x" * 100_001},
        {"kind": "preference"},
        {"kind": "preference", "over": "chatcmpl-1"},
        {"kind": "preference", "over": "chatcmpl-1", "over_choice": 3, "choice": 3},
        {"kind": "preference", "over": "chatcmpl-2", "over_choice": -1},
        {"kind": "signal"},
        {"kind": "applause"},
        {"interaction_id": ""},
        {"interaction_id": "a b"},
        {"interaction_id": "x" * 201},
        {"interaction_id": "new\nline"},
        {"choice": -1},
        {"rater": ""},
        {"created_at": -1},
    ],
)
def test_feedback_that_means_nothing_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Feedback.model_validate(thumbs(**fields))


def test_each_kind_speaks_of_an_aspect_of_its_own() -> None:
    said = [
        thumbs(),
        thumbs(kind="correction", text="so"),
        thumbs(kind="preference", over="chatcmpl-2"),
        thumbs(kind="preference", over="chatcmpl-2", over_choice=1),
        thumbs(kind="preference", over="chatcmpl-1", over_choice=1),
        thumbs(kind="signal", signal="copied"),
        thumbs(kind="signal", signal="edited"),
    ]
    assert len({Feedback.model_validate(fields).aspect for fields in said}) == len(said)
    score = Feedback.model_validate(
        thumbs(kind="score", score_min=0, score_max=1, over="chatcmpl-2")
    )
    assert score.aspect == Feedback.model_validate(thumbs()).aspect
    assert score.over_key is None


def test_feedback_without_an_id_gets_its_own() -> None:
    first, second = (Feedback.model_validate(thumbs()) for _ in range(2))
    assert first.feedback_id != second.feedback_id


@pytest.mark.parametrize(
    "fields",
    [
        {"policy_spans": ()},
        {"created_at": float("nan")},
        {"latency_seconds": -1.0},
        {"choice": -1},
        {"alias": "a/b"},
        {"sampling": {"temperature": -0.1}},
        {"sampling": {"temperature": float("inf")}},
        {"sampling": {"top_p": 0.0}},
        {"sampling": {"top_p": 1.1}},
    ],
)
def test_interaction_that_cannot_be_is_refused(fields: dict[str, Any]) -> None:
    good = {
        "interaction_id": "chatcmpl-1",
        "alias": "assistant",
        "created_at": 1.0,
        "latency_seconds": 0.1,
        "prompt_token_ids": [1],
        "completion_token_ids": [2],
        "completion_logprobs": [-0.1],
        "logprob_convention": "processed",
        "sampling": {},
        "policy_spans": [{"version": 0, "start": 0, "end": 1}],
        "finish_reason": "stop",
    }
    Interaction.model_validate(good)
    with pytest.raises(ValidationError):
        Interaction.model_validate(good | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"interaction_id": "chatcmpl-1", "tenant": "acme"},
        {"interaction_id": "chatcmpl-1", "users": [user_digest("ana")]},
        {"users": ["ana"]},
        {"tenant": "acme", "erased_at": -1},
    ],
)
def test_an_erasure_names_one_subject_and_no_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Erasure.model_validate(fields)


def test_an_erasure_is_keyed_by_its_subject() -> None:
    ana, ben = user_digest("ana"), user_digest("ben")
    assert Erasure(users=(ana, ben)).key == Erasure(users=(ben, ana), revoke=True).key
    subjects = [
        Erasure(users=(ana,)),
        Erasure(users=(ana,), tenant="acme"),
        Erasure(tenant="acme"),
        Erasure(interaction_id="acme"),
    ]
    assert len({one.key for one in subjects}) == len(subjects)


@given(releases())
def test_release_without_a_passing_verdict_on_its_bytes_does_not_exist(release: Release) -> None:
    fields = release.model_dump(mode="json")
    other = "0" * 64
    for damage in (
        {"verdict": None},
        {"verdict": fields["verdict"] | {"decision": "block"}},
        {"verdict": fields["verdict"] | {"decision": "hold"}},
        {"verdict": fields["verdict"] | {"artifact_digest": other}},
        {"artifact_digest": other},
        {"artifact_digest": None},
        {"files": [*fields["files"], {"name": "x", "sha256": other, "size_bytes": 1}]},
    ):
        with pytest.raises(ValidationError):
            Release.model_validate(fields | damage)


def test_base_release_needs_no_files_and_no_verdict() -> None:
    base = Release(
        alias="assistant",
        version=0,
        parent=None,
        kind=ReleaseKind.BASE,
        artifact_digest=None,
        files=(),
        base_model_digest="0" * 64,
        created_at=0.0,
    )
    assert base.name == "assistant@v000000"


@given(st.permutations(["a", "b", "c"]))
def test_artifact_digest_does_not_depend_on_the_order(names: list[str]) -> None:
    def files(order: list[str]) -> tuple[ArtifactFile, ...]:
        return tuple(ArtifactFile(name=name, sha256="0" * 64, size_bytes=1) for name in order)

    assert artifact_digest(files(names)) == artifact_digest(files(sorted(names)))


@pytest.mark.parametrize("name", ["", ".hidden", "../up", "a/b", "a\nb", "a b"])
def test_artifact_file_name_cannot_leave_its_directory(name: str) -> None:
    with pytest.raises(ValidationError):
        ArtifactFile(name=name, sha256="0" * 64, size_bytes=0)


def test_policy_names_sort_as_versions_do() -> None:
    names = [policy_name("assistant", version) for version in (0, 9, 10, 41, 999_999)]
    assert names == sorted(names)


def test_vocabulary_has_no_word_twice() -> None:
    for words in (Fate, Reason):
        assert len({str(word) for word in words}) == len(words.__members__)
