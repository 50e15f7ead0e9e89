"""The typed values that the updater's modules hand to one another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from moorline.events import ArtifactFile, Divergence, Feedback, Interaction, Reason


@dataclass(frozen=True)
class Example:
    """A reply and the ratings of it that no release has learned from yet."""

    example_id: str
    interaction: Interaction
    feedback: tuple[Feedback, ...]
    """Each rater's latest rating of each aspect (``Feedback.aspect``)."""
    rejected: Mapping[str, Interaction] = field(default_factory=dict)
    """By interaction key: the replies that its preferences name as ``over``."""


@dataclass(frozen=True)
class Correction:
    """The text that somebody wanted instead of this reply."""

    feedback_id: str
    rater: str
    text: str
    weight: float
    """In (0, 1]: caps on raters and tenants are in it."""


@dataclass(frozen=True)
class Preference:
    """Somebody preferred this reply over another one to the same prompt."""

    feedback_id: str
    rater: str
    rejected: Interaction
    weight: float
    """In (0, 1]: caps on raters and tenants are in it."""


@dataclass(frozen=True)
class CreditedExample:
    """An example with what it teaches."""

    example: Example
    reward: float | None
    """In [-1, 1]: the mean of its ratings; None: nobody rated it."""
    advantage: float
    """Reward minus baseline, normalised over the batch; the same for all its tokens. 0.0 where
    nobody rated it: then it teaches only by its corrections and preferences."""
    corrections: tuple[Correction, ...] = ()
    preferences: tuple[Preference, ...] = ()

    @property
    def has_signal(self) -> bool:
        """Whether there is anything to learn from it."""
        return self.advantage != 0.0 or bool(self.corrections) or bool(self.preferences)


@dataclass(frozen=True)
class Batch:
    """What one update learns from."""

    examples: tuple[CreditedExample, ...]
    live_version: int
    set_aside: Mapping[str, Reason] = field(default_factory=dict)
    """By id: examples that were handed out with it and teach nothing, and why."""
    credit: Mapping[str, float] = field(default_factory=dict)
    """How the credit came about, by name (``CreditStats``)."""
    behaviour_policies_unavailable: Mapping[int, str] = field(default_factory=dict)
    """By version: behaviour policies of which only the recorded logprobs were there, and why."""

    @property
    def handed_out(self) -> tuple[str, ...]:
        """The ids of all examples whose end is decided with this batch."""
        return (*self.example_ids, *self.set_aside)

    @property
    def example_ids(self) -> tuple[str, ...]:
        return tuple(credited.example.example_id for credited in self.examples)

    @property
    def has_signal(self) -> bool:
        """Whether there is an advantage other than zero, a correction or a preference."""
        return any(credited.has_signal for credited in self.examples)


def uncredited(examples: Iterable[Example], live_version: int) -> Batch:
    """A batch of examples without credit, to be rejected as they are."""
    return Batch(tuple(CreditedExample(one, None, 0.0) for one in examples), live_version)


@dataclass(frozen=True)
class TokenSequence:
    """A prompt and a reply, as token ids: what divergences are measured on."""

    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """How many tokens the completion has."""
        return len(self.completion_token_ids)


def as_sequence(interaction: Interaction) -> TokenSequence:
    """The token ids of a reply."""
    return TokenSequence(interaction.prompt_token_ids, interaction.completion_token_ids)


@dataclass(frozen=True)
class Candidate:
    """A policy that might become the next release, inside its bound, on disk under its hash."""

    parent: int
    artifact_digest: str
    files: tuple[ArtifactFile, ...]
    step_scale: float
    divergences: tuple[Divergence, ...]
    diagnostics: Mapping[str, float] = field(default_factory=dict)
