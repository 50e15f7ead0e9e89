"""Simulated people: what they ask, and the visible rule by which they rate.

The rule: a good reply is *a complete sentence within 40 tokens that names the topic asked about*.
SmolLM2 rarely does that by itself (it likes to lecture), so there is something to learn, and anyone
can check a rating by reading the reply.
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass

MAX_REPLY_TOKENS = 40

TRAINING_TOPICS = (
    "volcanoes", "rainbows", "penguins", "bicycles", "coffee", "glaciers", "honey", "magnets",
    "opera", "chess", "tides", "spiders", "bread", "lightning", "compasses", "whales", "glass",
    "paper", "clouds", "deserts", "batteries", "mushrooms", "bridges", "silk", "pianos", "owls",
    "vaccines", "comets", "tea", "earthquakes", "libraries", "camels", "steel", "rivers", "bees",
    "telescopes", "cheese", "violins", "islands", "frogs", "submarines", "salt", "maps", "wolves",
    "chocolate", "windmills", "orchids", "fossils", "kites", "elephants", "satellites", "pepper",
    "castles", "turtles", "microscopes", "rubber", "forests", "dolphins", "candles", "snow",
)  # fmt: skip

HELD_OUT_TOPICS = (
    "sharks", "potatoes", "airplanes", "butterflies", "mirrors", "waterfalls", "trains", "olives",
    "guitars", "robots", "horses", "diamonds", "umbrellas", "caves", "tomatoes", "lighthouses",
    "parrots", "cotton", "clocks", "monsoons", "bananas", "rockets", "cameras", "swans",
    "eagles", "carrots", "crystals", "squirrels", "windows", "geysers", "ships", "lemons",
    "drums", "computers", "donkeys", "pearls", "balloons", "canyons", "onions", "tunnels",
)  # fmt: skip

QUESTIONS = (
    "What are {topic}?",
    "Tell me about {topic}.",
    "Briefly, what are {topic}?",
    "Name one fact about {topic}.",
    "Explain {topic} to me.",
)
_UNCOUNTABLE = {
    "coffee", "honey", "opera", "chess", "bread", "lightning", "glass", "paper", "silk", "tea",
    "steel", "cheese", "salt", "chocolate", "pepper", "rubber", "snow", "cotton",
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """What one simulated person asks."""

    topic: str
    text: str


def _ask(topic: str, template: str) -> Question:
    if topic in _UNCOUNTABLE:
        template = template.replace("hat are", "hat is")
    return Question(topic, template.format(topic=topic))


def training_questions(seed: int) -> list[Question]:
    """Every training question once, in a seeded order."""
    questions = [_ask(t, q) for t, q in itertools.product(TRAINING_TOPICS, QUESTIONS)]
    random.Random(seed).shuffle(questions)
    return questions


def held_out_questions() -> list[Question]:
    """Questions about topics that nobody asks or rates during the demo; a fixed list."""
    return [
        _ask(topic, QUESTIONS[index % len(QUESTIONS)])
        for index, topic in enumerate(HELD_OUT_TOPICS)
    ]


def _stem(topic: str) -> str:
    """The beginning that the singular and the plural of a topic share."""
    for plural, stem in (("ves", ""), ("ies", ""), ("oes", "o"), ("sses", "ss")):
        if topic.endswith(plural):
            return topic.removesuffix(plural) + stem
    return topic if topic.endswith("ss") else topic.removesuffix("s")


def is_good(question: Question, reply: str, finish_reason: str | None) -> bool:
    """Whether the reply is a whole sentence within the limit that names the topic.

    Args:
        finish_reason: ``stop`` when the model ended the reply itself; the request's ``max_tokens``
            is ``MAX_REPLY_TOKENS``, so a longer reply ends with ``length``.
    """
    text = reply.strip()
    ended = finish_reason == "stop" and re.search(r"[.!?][\"')]?$", text) is not None
    is_sentence = len(text.split()) >= 4 and "\n" not in text
    return ended and is_sentence and _stem(question.topic) in text.lower()
