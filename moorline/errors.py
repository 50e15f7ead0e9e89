"""The base of every error that Moorline raises on purpose.

What ends in ``Unavailable`` may pass: trying again helps. What ends in ``Invalid`` must be changed
by somebody: trying again does not help.
"""

from __future__ import annotations

import traceback


class MoorlineError(Exception):
    """A failure that was foreseen.

    Its message is one line: what happened, what it means, the remedy.
    """


def cause_of(error: BaseException) -> str:
    """The error's type and where it was raised. Not its words: they may be a user's."""
    frames = traceback.extract_tb(error.__traceback__)
    where = [f"{frame.name}:{frame.lineno}" for frame in frames[-3:]]
    return f"{type(error).__name__} in {' > '.join(where)}"
