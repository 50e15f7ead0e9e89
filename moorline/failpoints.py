"""Named places where a test can make a process die, fail or hang.

``failpoint("ledger.before_commit")`` does nothing unless the environment variable
``MOORLINE_FAILPOINTS`` names it, which only tests do: ``name=kill``, ``name=raise`` or
``name=sleep:SECONDS``, comma-separated; ``name=kill@3`` strikes on the third pass only.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import Counter

logger = logging.getLogger("moorline.failpoints")

FAILPOINTS_VARIABLE = "MOORLINE_FAILPOINTS"

_passes: Counter[str] = Counter()


class FailpointError(RuntimeError):
    """Raised by an armed ``name=raise`` failpoint."""


def failpoint(name: str) -> None:
    """Strike here if a test has armed ``name``.

    Raises:
        FailpointError: when armed with ``raise``.
    """
    armed = os.environ.get(FAILPOINTS_VARIABLE)
    if not armed:
        return
    _passes[name] += 1
    for entry in armed.split(","):
        target, _, action = entry.strip().partition("=")
        action, _, wanted_pass = action.partition("@")
        if target != name or (wanted_pass and int(wanted_pass) != _passes[name]):
            continue
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif action == "raise":
            raise FailpointError(f"failpoint {name}")
        elif action.startswith("sleep:"):
            logger.warning(
                "sleeping at a failpoint, as a test asked",
                extra={"event": "failpoint_sleeping", "failpoint": name},
            )
            time.sleep(float(action.removeprefix("sleep:")))
