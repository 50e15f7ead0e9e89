"""Values as words for a person: ages, sizes, times, and what clients chose, made harmless."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.markup import escape as escape_markup

from moorline.events import Divergence, Fate, Reason

MISSING = "-"


def number(value: Any, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else MISSING


def size(count_bytes: float) -> str:
    """A size such as 512 B or 19.5 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count_bytes < 1000 or unit == "GB":
            break
        count_bytes /= 1000
    return f"{count_bytes:.0f} {unit}" if unit == "B" else f"{count_bytes:.1f} {unit}"


def ago(unix_seconds: Any, now: float | None = None) -> str:
    """An age in the largest unit that fits."""
    if not isinstance(unix_seconds, int | float):
        return MISSING
    seconds = max(0.0, (time.time() if now is None else now) - unix_seconds)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"


def harmless(text: str) -> str:
    """What clients chose, such as names of raters, with nothing in it that moves a terminal."""
    return escape_markup(
        "".join(
            letter if letter.isprintable() else letter.encode("unicode_escape").decode()
            for letter in text
        )
    )


def in_words(value: Fate | Reason) -> str:
    return value.replace("_", " ")


def utc(unix_seconds: float) -> str:
    return f"{datetime.fromtimestamp(unix_seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"


def divergences_in_words(divergences: Sequence[Divergence]) -> list[str]:
    return [
        f"KL from {one.measured_from} {number(one.mean_kl_nats, 4)} nats/token"
        for one in divergences
        if one.tokens_from == "traffic"
    ]
