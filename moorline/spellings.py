"""How clients spell one value: each spelling has one meaning, or is refused. Pure.

Both halves of what is polar are taken, or neither: whoever hears only applause learns from applause
alone. docs/feedback.md has the table.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AwareDatetime, BeforeValidator, Field, TypeAdapter, ValidationError

_NUMBER = r"[+-]?[0-9]{1,40}(\.[0-9]{1,40})?([eE][+-]?[0-9]{1,3})?"
_WORDS = {"true": True, "up": True, "false": False, "down": False}
_UNITS_PER_SECOND = ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3))
"""(from this on, units a second): nanoseconds, microseconds, milliseconds; seconds below them,
which are enough until the year 5138."""
_MOMENT = TypeAdapter(AwareDatetime)


def as_number(value: object) -> float:
    """A JSON number, or a string that holds one; ``true`` is no number."""
    if isinstance(value, str) and re.fullmatch(_NUMBER, value):
        return float(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            pass  # an integer above what a float can be
    raise ValueError("send a finite number")


def as_thumb(value: object) -> int:
    """1 for up, -1 for down."""
    said = _WORDS.get(value.lower(), value) if isinstance(value, str) else value
    number = float(said) if isinstance(said, bool) else as_number(said)
    if number not in (1.0, 0.0, -1.0):
        raise ValueError("a thumb is neither up nor down")
    return 1 if number == 1.0 else -1


def as_whole_number(value: object) -> int:
    """A JSON integer (``1`` or ``1.0``), or a string of digits."""
    if isinstance(value, str) and re.fullmatch("[0-9]{1,10}", value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise ValueError("send a whole number")


def as_unix_seconds(value: object) -> float:
    """Unix time in s, ms, µs or ns, told apart by its size; or ISO 8601 with its zone."""
    if isinstance(value, str) and not re.fullmatch(_NUMBER, value):
        try:
            return _MOMENT.validate_python(value).timestamp()
        except (ValidationError, OverflowError):
            raise ValueError(
                "send Unix seconds, or ISO 8601 with its zone, as 2026-05-04T09:30:00Z"
            ) from None
    number = as_number(value)
    return next((number / units for start, units in _UNITS_PER_SECOND if number >= start), number)


_NumberText = Annotated[str, Field(pattern=f"^{_NUMBER}$")]
_DigitsText = Annotated[str, Field(pattern="^[0-9]{1,10}$")]
_Choice = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Time = Annotated[float, Field(ge=0, allow_inf_nan=False)]

Number = Annotated[
    Annotated[float, Field(allow_inf_nan=False)],
    BeforeValidator(as_number, json_schema_input_type=float | _NumberText),
]
Choice = Annotated[
    _Choice, BeforeValidator(as_whole_number, json_schema_input_type=_Choice | _DigitsText)
]
UnixSeconds = Annotated[_Time, BeforeValidator(as_unix_seconds, json_schema_input_type=_Time | str)]
