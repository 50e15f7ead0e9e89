"""What a record says, worked out a second time and by other means than the product's.

``MEANINGS`` is the one table to change when feedback is to mean something else. What is ready to be
taught must be said by some record that was sent; what a plain record says must be ready.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Mapping
from fractions import Fraction
from math import inf
from typing import Any

from moorline.events import Feedback
from moorline.settings import SIGNALS
from updater.learning.advantages import reward

Saying = tuple[str, str, str, object]
"""(reply and choice, rater, kind, meaning)."""
Fields = Mapping[str, Any]


def number(value: object) -> float | None:
    """A number as JSON has it, or as text; true is 1."""
    if not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def thumb(fields: Fields) -> object:
    return {1.0: 1.0, -1.0: -1.0, 0.0: -1.0}.get(_or_nan(number(fields.get("value"))))


def score(fields: Fields) -> object:
    low, high = (
        _default(fields, name, at) for name, at in (("score_min", 0.0), ("score_max", 1.0))
    )
    value = number(fields.get("value"))
    if value is None or low is None or high is None or not -inf < low <= value <= high < inf:
        return None
    if low == high:
        return None
    share = (Fraction(value) - Fraction(low)) / (Fraction(high) - Fraction(low))
    return round(float(2 * share - 1), 6)


def preferred_over(fields: Fields) -> object:
    return _key(fields.get("over"), fields.get("over_choice"))


MEANINGS: dict[str, Callable[[Fields], object]] = {
    "thumbs": thumb,
    "score": score,
    "correction": lambda fields: _text(fields, "text"),
    "preference": preferred_over,
    "signal": lambda fields: _text(fields, "signal"),
}
"""Kind -> what feedback with these fields says; None: nothing."""


def sayings(value: bytes | None) -> set[Saying]:
    """What the value of a feedback record says; where a field is named twice, any of the two."""
    if not value:
        return set()
    try:
        text = value.decode(json.detect_encoding(value)).removeprefix("\ufeff")
        found = _readings(json.loads(text, object_pairs_hook=_Pairs))
    except (ValueError, RecursionError):
        return set()
    return {said for fields in found for said in _says(fields)}


def taught(feedback: Feedback) -> Saying:
    """The same of feedback as the product holds it, ready to be taught."""
    meaning: object = {
        "correction": feedback.text,
        "preference": feedback.over_key,
        "signal": feedback.signal,
    }.get(feedback.kind)
    if meaning is None:
        worth = reward(feedback, SIGNALS)
        meaning = None if worth is None else round(worth, 6)
    return (feedback.key, _normal(feedback.rater), str(feedback.kind), meaning)


class _Pairs(list[tuple[str, Any]]):
    """The members of an object, in order."""


def _readings(pairs: object) -> list[dict[str, Any]]:
    if not isinstance(pairs, _Pairs):
        return []
    return [dict(pairs), dict(reversed(pairs))]


def _says(fields: Fields) -> set[Saying]:
    kind = fields.get("kind")
    kind = "thumbs" if kind is None else kind
    rater = fields.get("rater")
    rater = "anonymous" if rater is None else rater
    ids = [fields[name] for name in ("interaction_id", "id") if name in fields]
    keys = [key for one in ids if (key := _key(one, fields.get("choice"))) is not None]
    if not isinstance(kind, str) or not isinstance(rater, str) or kind not in MEANINGS:
        return set()
    meaning = MEANINGS[kind](fields)
    return set() if meaning is None else {(key, _normal(rater), kind, meaning) for key in keys}


def _key(identity: object, choice: object) -> str | None:
    place = 0.0 if choice is None else number(choice)
    if not isinstance(identity, str) or place is None or place != place // 1:
        return None
    return f"{identity}/{place:.0f}"


def _text(fields: Fields, name: str) -> str | None:
    found = fields.get(name)
    return found if isinstance(found, str) else None


def _default(fields: Fields, name: str, otherwise: float) -> float | None:
    return number(fields[name]) if fields.get(name) is not None else otherwise


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)
