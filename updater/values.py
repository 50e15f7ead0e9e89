"""The typed values that the updater's modules hand to one another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from daemon.events import Divergence, Feedback, Interaction


@dataclass(frozen=True)
class Example:
    """A reply and the ratings of it that no release has learned from yet."""

    example_id: str
    interaction: Interaction
    feedback: tuple[Feedback, ...]
    """At most one per rater: the last."""


@dataclass(frozen=True)
class CreditedExample:
    """An example with what it teaches."""

    example: Example
    reward: float
    """In [-1, 1]: the mean of its ratings."""
    advantage: float
    """Reward minus baseline, normalised over the batch; the same for all its tokens."""


@dataclass(frozen=True)
class Batch:
    """What one update learns from."""

    examples: tuple[CreditedExample, ...]
    live_version: int

    @property
    def example_ids(self) -> tuple[str, ...]:
        return tuple(credited.example.example_id for credited in self.examples)

    @property
    def has_signal(self) -> bool:
        """Whether any advantage differs from zero."""
        return any(credited.advantage != 0.0 for credited in self.examples)


@dataclass(frozen=True)
class TokenSequence:
    """A prompt and a reply, as token ids: what divergences are measured on."""

    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """A policy that might become the next release, inside its bound, on disk under its hash."""

    parent: int
    artifact_digest: str
    artifact_dir: Path
    step_scale: float
    divergences: tuple[Divergence, ...]
    diagnostics: Mapping[str, float] = field(default_factory=dict)
