"""What makes an update raise: a batch that always does would otherwise come back for ever.

A machine at fault (memory, disk, stream, ledger) must not cost anybody's feedback: it ends the
process instead, and the batch waits.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence

import torch

from daemon.artifacts import StoreError
from daemon.stream import StreamUnavailable
from updater.ledger import LedgerError
from updater.values import Example

OF_THE_MACHINE = (
    LedgerError,
    StoreError,
    StreamUnavailable,
    OSError,
    MemoryError,
    torch.OutOfMemoryError,
)


def culprits(
    examples: Sequence[Example], attempt: Callable[[Sequence[Example]], object]
) -> list[Example]:
    """Those that make ``attempt`` raise also alone; all where none does.

    Raises:
        OF_THE_MACHINE: as ``attempt`` did.
    """
    found = [one for one in examples if _raises(one, attempt)]
    return found or list(examples)


def _raises(example: Example, attempt: Callable[[Sequence[Example]], object]) -> bool:
    try:
        attempt([example])
    except OF_THE_MACHINE:
        raise
    except Exception:  # whatever it is: that is the question
        return True
    return False


def cause_of(error: BaseException) -> str:
    """The error's type and where it was raised. Not its words: they may be a user's."""
    frames = traceback.extract_tb(error.__traceback__)
    where = [f"{frame.name}:{frame.lineno}" for frame in frames[-3:]]
    return f"{type(error).__name__} in {' > '.join(where)}"
