"""The wire contract: every event that crosses a process boundary, versioned and typed.

The models here parse what arrives, write what leaves, and generate the JSON Schema that other
teams code against (``json_schemas``). Unknown fields are ignored, so that a newer minor version
of a producer can be read; an unknown major version is refused.
"""

from __future__ import annotations

import hashlib
import time
import unicodedata
import uuid
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    field_validator,
    model_validator,
)

from moorline.spellings import Choice, Number, UnixSeconds, as_thumb

SCHEMA_VERSION = "1.2"
"""1.2 added optional fields, lets feedback be taken back (``Feedback.retracted``) and needs a score
to say its range. 1.1 renamed fields and reasons; a 1.0 event is read under the old names
(``RENAMED_REASONS``)."""
GREEDY_BELOW = 1e-5
"""Temperature; vLLM's own limit: a lower one takes the argmax."""

FiniteFloat = Annotated[float, Field(allow_inf_nan=False)]
Identifier = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9._:@+-]+$")]


def composed(name: str) -> str:
    """A name in Unicode's NFC, in which names are compared. Case counts: Ana is not ana."""
    return unicodedata.normalize("NFC", name)


Name = Annotated[str, AfterValidator(composed)]
"""What a person or a tenant is called."""


class Fate(StrEnum):
    """Where an acknowledged event ends. Every event has exactly one at any time."""

    PENDING = "pending"
    """Waiting: for its partner, for a batch, or for the candidate it is in."""
    TRAINED = "trained"
    """Influenced the weights of one release (and no other)."""
    REJECTED = "rejected"
    """Was in a candidate that the bound or the gate refused."""
    EXPIRED = "expired"
    """Its partner never came inside the horizon."""
    LATE = "late"
    """Arrived after its interaction was forgotten."""
    DUPLICATE = "duplicate"
    """Said nothing new: the same event again, or a rating that a later one replaced."""
    DEAD_LETTERED = "dead_lettered"
    """Could not be read; the original bytes are on the dead-letter topic."""
    ERASED = "erased"
    """Its subject was erased: the person whose reply it is, or who rated it."""
    RETRACTED = "retracted"
    """Its rater took it back before anything was learned from it; or it is what took it back."""
    NOT_TRAINABLE = "not_trainable"
    """Read and understood, but no honest gradient follows from it (see ``Reason``)."""


class Reason(StrEnum):
    """Why an event has its fate. The value is the log key, the metric label and the DLQ header."""

    NONE = "none"
    """The fate says it all."""
    MALFORMED_JSON = "malformed_json"
    """The value is not JSON, names a field twice, or holds half a character."""
    SCHEMA_MISMATCH = "schema_mismatch"
    """A field is missing, has the wrong type or a value that is not allowed."""
    UNSUPPORTED_SCHEMA_VERSION = "unsupported_schema_version"
    """Its major schema version is not the one this Moorline reads."""
    EMPTY_VALUE = "empty_value"
    """The record has no value, and its key does not say which rating is taken back."""
    TOO_LARGE = "too_large"
    """More bytes than ``stream.max_event_bytes``."""
    CORRUPT_RECORD = "corrupt_record"
    """The record, or the batch that it came in, does not follow Kafka's format: a wrong checksum,
    an unknown format or codec."""
    UNEXPECTED = "unexpected"
    """Taking it in raised an error that no check foresaw; the dead letter's ``moorline_error``
    names it."""
    REPEATED_EVENT = "repeated_event"
    """The same feedback id or interaction was read before."""
    SUPERSEDED_RATING = "superseded_rating"
    """The same rater spoke of the same aspect of the reply again later, or under the same feedback
    id; the last word counts."""
    RATING_RETRACTED = "rating_retracted"
    """Its rater took this rating back before anything was learned from it."""
    RETRACTION = "retraction"
    """It takes a rating back, and has nothing in it to learn from."""
    ALREADY_TRAINED = "already_trained"
    """The same rater's earlier word on this aspect of the reply, or under this feedback id, is
    already in the weights."""
    NO_FEEDBACK = "no_feedback"
    """Nobody said anything of this interaction inside the horizon."""
    NO_INTERACTION = "no_interaction"
    """No interaction with this id (or that of ``over``) was seen inside the horizon."""
    GREEDY_SAMPLING = "greedy_sampling"
    """Temperature 0 (or under 1e-5, which is the same to vLLM): the behaviour policy is a point
    mass, so no ratio exists."""
    ALTERED_SAMPLING = "altered_sampling"
    """Penalties, logit bias, structured output or bad words changed the distribution."""
    CUSTOM_LOGITS_PROCESSOR = "custom_logits_processor"
    """A logits processor that vLLM does not ship may have changed the distribution."""
    SPECULATIVE_DECODING = "speculative_decoding"
    """Tokens were drafted by another model; their recorded logprobs are not what they were drawn
    with."""
    MULTIMODAL_PROMPT = "multimodal_prompt"
    """The prompt held an image, audio, video or embeddings, which the updater does not see."""
    RAW_LOGPROBS = "raw_logprobs"
    """The client asked for plain logprobs, taken before temperature and truncation."""
    NO_LOGPROBS = "no_logprobs"
    """A sampled token has no recorded logprob, so it has no ratio."""
    INVALID_LOGPROBS = "invalid_logprobs"
    """A logprob is above zero, or not finite in float32."""
    TOKEN_OUT_OF_VOCABULARY = "token_out_of_vocabulary"
    """A token id that the updater's model does not have."""
    EMPTY_PROMPT = "empty_prompt"
    """No token to start from: the distribution of the first reply token is not defined."""
    EMPTY_COMPLETION = "empty_completion"
    """The reply has no token to learn from."""
    LENGTH_MISMATCH = "length_mismatch"
    """Tokens, logprobs and policy spans do not cover one another."""
    TOO_LONG = "too_long"
    """Prompt and completion exceed what the updater trains on."""
    ABORTED = "aborted"
    """The reply was cut by the client or by a fault; what a rating means is unknown."""
    UNKNOWN_SIGNAL = "unknown_signal"
    """A signal that ``learning.signals`` gives no reward."""
    OVERRIDDEN_SIGNAL = "overridden_signal"
    """Somebody rated the same reply explicitly; what a signal only hints at does not count."""
    PROMPTS_DIFFER = "prompts_differ"
    """The two replies of a preference answer different prompts."""
    OFF_POLICY = "off_policy"
    """The policy has moved too far from the one that wrote it: no useful weight is left."""
    UNKNOWN_POLICY = "unknown_policy"
    """The alias or the policy version is not one of ours."""
    MISMATCH = "mismatch"
    """Recorded logprobs disagree with the policy that is said to have made them."""
    NO_ADVANTAGE = "no_advantage"
    """Every advantage in the batch was zero: nothing to learn, so nothing was changed."""
    DIVERGENCE_BOUND = "divergence_bound"
    """No useful share of the update was inside the divergence bound."""
    GATE_BLOCKED = "gate_blocked"
    """The gate refused the candidate, or could not judge it."""
    NON_FINITE_UPDATE = "non_finite_update"
    """The update gave a loss, a gradient or a weight that is NaN or infinite."""
    MAY_HAVE_TAUGHT = "may_have_taught"
    """It was there before a release that this ledger adopted from the store, and may be in the
    weights already."""
    RELEASE_REVOKED = "release_revoked"
    """It was in a release that was revoked for an erasure, and is no longer kept to learn from
    again."""
    UPDATE_FAILED = "update_failed"
    """An update with it raised an error, though the policy could be computed: a bug, or bad data
    that no check knows. The log and the rejection say where."""
    UPDATE_CRASHED = "update_crashed"
    """The updater's process died of it again and again, also alone, while others survived: no
    memory for it, a crash in native code, or a step without end. Nobody's later word on the reply
    is learned from."""


RENAMED_REASONS = {
    "too_far": Reason.OFF_POLICY,
    "outranked_signal": Reason.OVERRIDDEN_SIGNAL,
    "release_withdrawn": Reason.RELEASE_REVOKED,
    "update_killed": Reason.UPDATE_CRASHED,
}
"""The reasons of schema 1.0 that have another name since."""


class Event(BaseModel):
    """What all events share."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", ser_json_inf_nan="strings", populate_by_name=True
    )

    schema_version: str = Field(default=SCHEMA_VERSION, pattern=r"^\d+\.\d+$")

    @field_validator("schema_version")
    @classmethod
    def _major_is_ours(cls, value: str) -> str:
        if value.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
            raise ValueError(
                f"unsupported schema version {value}: this Moorline reads {SCHEMA_VERSION}"
            )
        return value

    def to_bytes(self) -> bytes:
        """JSON, UTF-8, as it travels on a topic."""
        return self.model_dump_json().encode()


class LogprobConvention(StrEnum):
    """Which distribution a recorded logprob is from."""

    PROCESSED = "processed"
    """After temperature and truncation, renormalised: what the token was sampled from."""
    RAW = "raw"
    """Before them; equals ``PROCESSED`` only at temperature 1 without truncation."""


class SamplingSettings(BaseModel):
    """How a reply was sampled, as far as it shaped the behaviour policy."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    temperature: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=-1, description="0 or -1: no limit")
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    altered_by: tuple[str, ...] = Field(
        default=(),
        description="Names of everything else that changed the distribution: penalties, "
        "logit_bias, bad_words, structured_outputs, min_tokens, ...",
    )

    @property
    def truncated(self) -> bool:
        """Whether some tokens had probability zero by truncation."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0


class PolicySpan(BaseModel):
    """Completion tokens ``[start, end)`` came from policy ``version``."""

    model_config = ConfigDict(frozen=True)

    version: int = Field(ge=0)
    start: int = Field(ge=0)
    end: int = Field(ge=0)


class Interaction(Event):
    """One served reply (one choice of one request), as the policy acted."""

    interaction_id: Identifier = Field(description="The `id` of the reply, as the client saw it")
    choice: int = Field(default=0, ge=0)
    alias: Identifier
    client_request_id: str | None = Field(
        default=None,
        max_length=200,
        description="The client's own id (`X-Request-Id`, `request_id`); several replies may "
        "share one",
    )
    tenant: Name = Field(default="default", max_length=200)
    task: str = Field(
        default="default", max_length=200, description="Kind of request, in the client's words"
    )
    user: Name | None = Field(default=None, max_length=200, description="A pseudonym")
    other_users: tuple[Annotated[Name, Field(min_length=1, max_length=200)], ...] = Field(
        default=(),
        max_length=8,
        description="Pseudonyms of further names that the request gave the same person: they can "
        "be forgotten by each",
    )
    pseudonym_key: Identifier | None = Field(
        default=None, description="Fingerprint of the key that these pseudonyms were made with"
    )
    created_at: FiniteFloat = Field(ge=0, description="Unix seconds at which the reply ended")
    latency_seconds: FiniteFloat = Field(ge=0)
    prompt_token_ids: tuple[int, ...]
    prompt_parts: tuple[Annotated[str, Field(max_length=100)], ...] = Field(
        default=(),
        max_length=16,
        description="What the prompt held beside its tokens: image, audio, video, embeds, ...",
    )
    reply_prefix: str | None = Field(
        default=None,
        description="The beginning of the reply, where the client gave one to be continued; the "
        "prompt ends with it",
    )
    completion_token_ids: tuple[int, ...]
    completion_logprobs: tuple[float | None, ...] = Field(
        description="One per completion token, nats; None where vLLM gave none"
    )
    logprob_convention: LogprobConvention
    sampling: SamplingSettings
    policy_spans: tuple[PolicySpan, ...] = Field(min_length=1)
    finish_reason: str = Field(description="stop, length, abort, ...")
    streamed: bool = False

    @property
    def users(self) -> tuple[str, ...]:
        """Every name of the person whose reply it is."""
        return self.other_users if self.user is None else (self.user, *self.other_users)

    @property
    def policy_version(self) -> int:
        """The version that produced the first token."""
        return self.policy_spans[0].version

    @property
    def key(self) -> str:
        """What feedback joins on: id and choice."""
        return interaction_key(self.interaction_id, self.choice)


def interaction_key(interaction_id: str, choice: int) -> str:
    """The join key of one choice of one reply."""
    return f"{interaction_id}/{choice}"


class FeedbackKind(StrEnum):
    THUMBS = "thumbs"
    """+1 or -1."""
    SCORE = "score"
    """A number in a stated range."""
    CORRECTION = "correction"
    """The text they wanted."""
    PREFERENCE = "preference"
    """This reply over another one to the same prompt."""
    SIGNAL = "signal"
    """A named implicit signal: copied, regenerated, abandoned, ..."""


ANONYMOUS = "anonymous"
"""The rater where none is named: nobody in particular."""


def _describe_feedback(schema: dict[str, Any]) -> None:
    """What the fields alone do not say: ``id`` is taken for ``interaction_id``, null for absent."""
    del schema["required"]
    schema["anyOf"] = [{"required": ["interaction_id"]}, {"required": ["id"]}]
    fields = schema["properties"]
    fields["id"] = fields["interaction_id"] | {"description": "The same as `interaction_id`"}
    kinds = [{"type": kind} for kind in ("number", "string", "boolean", "null")]
    fields["value"] = {"anyOf": kinds, "description": fields["value"]["description"]}
    for name in fields.keys() - {"id", "interaction_id", "schema_version"}:
        notes = [key for key in ("title", "description", "default") if key in fields[name]]
        rest = {key: said for key, said in fields[name].items() if key not in notes}
        choices = rest.get("anyOf", [rest])
        if {"type": "null"} not in choices:
            choices = [*choices, {"type": "null"}]
        fields[name] = {"anyOf": choices} | {key: fields[name][key] for key in notes}


class Feedback(Event):
    """What somebody said of one reply, now or days later; or that they take it back.

    A field that is null is as one that is absent, but for ``value``: a thumb or score of null takes
    the rating back. docs/feedback.md has every spelling.
    """

    model_config = ConfigDict(json_schema_extra=_describe_feedback)

    feedback_id: Identifier = Field(
        default_factory=lambda: f"fb-{uuid.uuid4().hex}",
        description="Sent again by the same rater with other content, it replaces what it said",
    )
    interaction_id: Identifier
    choice: Choice = 0
    kind: FeedbackKind = FeedbackKind.THUMBS
    value: Number | None = Field(
        default=None,
        description="thumbs: 1 or true up, 0, -1 or false down; score: inside [score_min, "
        "score_max]; null takes the rating back",
    )
    score_min: Number | None = Field(default=None, description="score: the worst; needed")
    score_max: Number | None = Field(default=None, description="score: the best; needed")
    text: str | None = Field(default=None, max_length=100_000, description="correction: the text")
    over: Identifier | None = Field(default=None, description="preference: the id that lost")
    over_choice: Choice = Field(default=0, description="preference: which choice of it")
    signal: str | None = Field(default=None, max_length=100, description="signal: its name")
    rater: Name = Field(default=ANONYMOUS, min_length=1, max_length=200)
    created_at: UnixSeconds = Field(
        default_factory=time.time,
        description="Unix seconds (or ms, us, ns), or ISO 8601 with its zone",
    )
    retracted: bool = Field(
        default=False, strict=True, description="Takes the rating back: it no longer counts"
    )

    @property
    def key(self) -> str:
        return interaction_key(self.interaction_id, self.choice)

    @property
    def over_key(self) -> str | None:
        """preference: the join key of the reply that lost; else None."""
        if self.kind is not FeedbackKind.PREFERENCE or self.over is None:
            return None
        return interaction_key(self.over, self.over_choice)

    @property
    def aspect(self) -> str:
        """What it rates. A rater's later rating of an aspect of a reply replaces the earlier one:
        thumbs and scores are one aspect, each lost reply and each signal is one of its own."""
        match self.kind:
            case FeedbackKind.CORRECTION:
                return "correction"
            case FeedbackKind.PREFERENCE:
                return f"preference over {self.over_key}"
            case FeedbackKind.SIGNAL:
                return f"signal {self.signal}"
        return "rating"

    @model_validator(mode="before")
    @classmethod
    def _read_spellings(cls, data: Any) -> Any:
        """One form of what may be said in several: see docs/feedback.md."""
        if not isinstance(data, dict):
            return data
        said = {
            name: value
            for name, value in data.items()
            if value is not None or name == "schema_version"
        }
        if "id" in said:
            said.setdefault("interaction_id", said["id"])
        kind = said.get("kind", FeedbackKind.THUMBS)
        if kind not in list(FeedbackKind):
            return said  # refused, as a field
        if kind in (FeedbackKind.THUMBS, FeedbackKind.SCORE) and data.get("value", ...) is None:
            said["retracted"] = True
        if said.get("retracted") is True:
            return {name: said[name] for name in said.keys() - _CONTENT}
        if "value" in said and kind != FeedbackKind.SCORE:
            said["value"] = _thumb_of(kind, said["value"])
        return said

    @model_validator(mode="after")
    def _kind_has_what_it_needs(self) -> Self:
        match self.kind:
            case FeedbackKind.PREFERENCE:
                if not self.over:
                    raise ValueError("preference needs over, the id that it was preferred over")
                if self.over_key == self.key:
                    raise ValueError("preference needs another reply than itself in over")
            case FeedbackKind.SIGNAL if not self.signal:
                raise ValueError("signal needs its name")
            case _ if self.retracted:
                pass
            case FeedbackKind.THUMBS if self.value is None:
                raise ValueError(_THUMBS_NEEDS)
            case FeedbackKind.SCORE:
                self._check_score()
            case FeedbackKind.CORRECTION if not (self.text and self.text.strip()):
                raise ValueError("correction needs text")
        return self

    def _check_score(self) -> None:
        if self.score_min is None or self.score_max is None:
            raise ValueError(
                "score needs its range: send score_min and score_max, such as 1 and 5 for stars"
            )
        if not self.score_min < self.score_max:
            raise ValueError("score needs score_min < score_max")
        if self.value is None or not self.score_min <= self.value <= self.score_max:
            raise ValueError("score needs a value inside [score_min, score_max]")


_CONTENT = frozenset({"value", "score_min", "score_max", "text"})
"""Fields of what feedback says, beside what it is about: a retraction has none of them."""
_THUMBS_NEEDS = (
    "thumbs needs value 1 (or true) for up, -1 (or 0, false) for down, or null to take it back"
)


def _thumb_of(kind: object, value: object) -> int | None:
    """The value of a kind other than score: what is no thumb, or denies its kind, is refused."""
    needs = f"{kind} takes no such value: leave it out"
    if kind == FeedbackKind.THUMBS:
        needs = _THUMBS_NEEDS
    try:
        thumb = as_thumb(value)
    except ValueError:
        raise ValueError(needs) from None
    if kind == FeedbackKind.THUMBS:
        return thumb
    if thumb < 0 and kind != FeedbackKind.CORRECTION:
        raise ValueError(
            f"a {kind} says what happened: leave value out, or take it back with retracted"
        )
    return None


MAX_ERASED_NAMES = 16
"""In one erasure, with what each key made of them."""


class Erasure(Event):
    """A person asks to be forgotten, or somebody for them: what they are in, up to a moment.

    One of: a reply; a user, of one tenant or of all; a tenant. Users are named by a digest, because
    the record of an erasure must not itself keep the name.
    """

    erasure_id: Identifier = Field(default_factory=lambda: f"er-{uuid.uuid4().hex}")
    interaction_id: Identifier | None = Field(default=None, description="One reply, all choices")
    tenant: Name | None = Field(default=None, max_length=200)
    users: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = Field(
        default=(),
        max_length=MAX_ERASED_NAMES,
        description="sha256 of each name that the person has as `user` or as `rater`",
    )
    revoke: bool = Field(
        default=False,
        validation_alias=AliasChoices("revoke", "replay"),  # schema 1.0
        description="Also revoke the releases that learned from them, and learn the rest anew",
    )
    erased_at: FiniteFloat = Field(
        default_factory=time.time, ge=0, description="Unix seconds; what comes later is not erased"
    )

    @property
    def scopes(self) -> tuple[str, ...]:
        """What is erased; an event whose own scopes (``scopes_of``) hold one of these."""
        if self.interaction_id is not None:
            return (f"interaction/{self.interaction_id}",)
        if not self.users:
            return (f"tenant/{self.tenant}",)
        of_tenant = "" if self.tenant is None else f"/{self.tenant}"
        return tuple(f"user/{digest}{of_tenant}" for digest in self.users)

    @property
    def key(self) -> str:
        """The topic's key: of one subject only the newest erasure need be kept."""
        return " ".join(sorted(self.scopes))

    @model_validator(mode="after")
    def _names_one_subject(self) -> Self:
        about = (self.interaction_id is not None, self.tenant is not None or bool(self.users))
        if sum(about) != 1:
            raise ValueError("an erasure names a reply, or users and a tenant, or one of these")
        return self


def user_digest(name: str) -> str:
    """The sha256 of a person's name: 64 hexadecimal digits."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


class ReleaseKind(StrEnum):
    ADAPTER = "adapter"
    """A LoRA adapter over the base model; servers flip to it or merge it."""
    BASE = "base"
    """The base model itself, version 0: no files."""


class ArtifactFile(BaseModel):
    """One file of an artifact."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="No directories")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size_bytes: int = Field(ge=0)


class Divergence(BaseModel):
    """How far a candidate is from the live policy or the anchor, over the full vocabulary."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    measured_from: Literal["live", "anchor"] = Field(
        validation_alias=AliasChoices("measured_from", "reference")
    )
    tokens_from: Literal["traffic", "probes"]
    mean_kl_nats: float = Field(description="Mean over tokens of KL(measured_from || candidate)")
    max_prompt_kl_nats: float = Field(description="Largest per-sequence mean")
    tokens: int

    @field_validator("tokens_from", mode="before")
    @classmethod
    def _schema_1_0_said_canaries(cls, value: object) -> object:
        return "probes" if value == "canaries" else value


class Check(BaseModel):
    """One line of the gate's evidence."""

    model_config = ConfigDict(frozen=True)

    name: str
    measured: float | None
    limit: float | None
    passed: bool
    detail: str = ""


class Decision(StrEnum):
    PASS = "pass"
    BLOCK = "block"
    HOLD = "hold"
    """Not enough evidence; treated as a block (the gate fails closed)."""


class Verdict(BaseModel):
    """What the gate said of exactly these bytes."""

    model_config = ConfigDict(frozen=True)

    decision: Decision
    artifact_digest: str
    checks: tuple[Check, ...]
    seconds: float


class Release(Event):
    """The manifest of one policy version: what is served, and everything that justifies it."""

    alias: Identifier
    version: int = Field(ge=0)
    parent: int | None
    kind: ReleaseKind
    revokes_after: int | None = Field(
        default=None,
        validation_alias=AliasChoices("revokes_after", "restores"),  # schema 1.0
        description="These are the bytes of that earlier version: the releases between, which had "
        "learned from somebody who was erased, are revoked",
    )
    artifact_digest: str | None = Field(description="None only for the base model")
    files: tuple[ArtifactFile, ...]
    base_model_digest: str
    created_at: FiniteFloat
    offsets: dict[str, dict[int, int]] = Field(
        default_factory=dict, description="topic -> partition -> next offset, at this release"
    )
    examples: int = 0
    examples_digest: str = ""
    step_scale: float = Field(default=1.0, description="Share of the update inside the bound")
    divergences: tuple[Divergence, ...] = ()
    anchor: int = Field(
        default=0, ge=0, description="The version that its distances from the anchor start at"
    )
    verdict: Verdict | None = None
    diagnostics: dict[str, float] = Field(default_factory=dict)
    behaviour_policies_unavailable: dict[int, str] = Field(
        default_factory=dict,
        validation_alias=AliasChoices("behaviour_policies_unavailable", "not_run_again"),
        description="Behaviour policies of its replies, by version, whose adapter was gone or "
        "damaged: what it learned from them rests on the recorded logprobs alone",
    )
    lease_epoch: int = 0
    settings_digest: str = ""
    software: dict[str, str] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        return policy_name(self.alias, self.version)

    @model_validator(mode="after")
    def _verdict_is_on_these_bytes(self) -> Self:
        if self.kind is ReleaseKind.BASE:
            return self
        if self.artifact_digest != artifact_digest(self.files):
            raise ValueError("the artifact digest is not that of the listed files")
        if self.verdict is None or self.verdict.artifact_digest != self.artifact_digest:
            raise ValueError("no gate verdict on exactly these bytes")
        if self.verdict.decision is not Decision.PASS:
            raise ValueError(f"the gate's verdict is {self.verdict.decision}, not pass")
        return self


def policy_name(alias: str, version: int) -> str:
    """``assistant@v000042``, as the reply's `model` field says it."""
    return f"{alias}@v{version:06d}"


def artifact_digest(files: tuple[ArtifactFile, ...]) -> str:
    """sha256 over the sorted names, sizes and hashes of an artifact's files."""
    lines = sorted(f"{file.sha256} {file.size_bytes} {file.name}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def json_schemas() -> dict[str, dict[str, Any]]:
    """JSON Schema of every event, by the topic that carries it."""
    return {
        "interactions.v1": TypeAdapter(Interaction).json_schema(),
        "feedback.v1": TypeAdapter(Feedback).json_schema(),
        "releases.v1": TypeAdapter(Release).json_schema(),
        "erasures.v1": TypeAdapter(Erasure).json_schema(),
    }
