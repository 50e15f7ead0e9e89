"""The base of every error that Moorline raises on purpose.

What ends in ``Unavailable`` may pass: trying again helps. What ends in ``Invalid`` must be changed
by somebody: trying again does not help.
"""

from __future__ import annotations


class MoorlineError(Exception):
    """A failure that was foreseen.

    Its message is one line: what happened, what it means, the remedy.
    """
