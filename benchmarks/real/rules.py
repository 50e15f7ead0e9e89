"""What is asked, and the three rules by which replies are rated. Pure.

The topics are the demo's; those held out are never trained on. The questions are chosen so that the
base policy follows each rule sometimes: often (brevity), or about once in thirty replies (the other
two), which is where clipping a ratio is said to hurt.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

from daemon.demo.people import HELD_OUT_TOPICS, TRAINING_TOPICS

Item = TypeVar("Item")

QUESTIONS = (
    "Give a one-line joke about {topic}.",
    "Quiz me on {topic}.",
    "Hi! I like {topic}.",
    "Say one short sentence about {topic}.",
)
BRIEF_WORDS = 12
_GREETING = re.compile(r"(hello|hi|hey)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Rule:
    """What people want; a reply follows it (thumb up) or not (thumb down)."""

    name: str
    about: str
    follows: Callable[[str, bool], bool]
    """(text, whether the policy ended the reply itself) -> thumb up."""


def _is_brief(text: str, ended: bool) -> bool:
    return ended and 0 < len(text.split()) <= BRIEF_WORDS


def _ends_with_question(text: str, ended: bool) -> bool:
    return ended and text.rstrip().endswith("?")


def _greets(text: str, ended: bool) -> bool:  # noqa: ARG001
    return _GREETING.match(text.lstrip()) is not None


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        rule.name: rule
        for rule in (
            Rule("brevity", f"ends by itself within {BRIEF_WORDS} words", _is_brief),
            Rule("question", "ends by itself with a question mark", _ends_with_question),
            Rule("greeting", "opens with Hello, Hi or Hey", _greets),
        )
    }
)


def training_questions(seed: int) -> list[str]:
    """Every question about every training topic once, in a seeded order."""
    asked = [q.format(topic=t) for t, q in itertools.product(TRAINING_TOPICS, QUESTIONS)]
    random.Random(seed).shuffle(asked)
    return asked


def held_out_questions(count: int) -> list[str]:
    """One question about each of the first ``count`` topics that training never sees."""
    return [
        QUESTIONS[index % len(QUESTIONS)].format(topic=topic)
        for index, topic in enumerate(HELD_OUT_TOPICS[:count])
    ]


def batch_at(items: Sequence[Item], number: int, size: int) -> list[Item]:
    """Batch ``number`` of ``size`` items, starting over at the end."""
    return [items[(number * size + place) % len(items)] for place in range(size)]
