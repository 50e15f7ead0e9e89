"""``python -m updater``: settings from the environment and ``MOORLINE_CONFIG``."""

from __future__ import annotations

import os
import signal
import sys

from moorline.base_model import UnsafeModel
from moorline.http import PortUnavailable
from moorline.logs import setup_logging
from moorline.settings import SettingsError, load_settings
from moorline.store import StoreError
from moorline.stream import StreamRefused
from updater.learning.policy import ReleaseUnfit
from updater.learning.trainer import UnknownObjective
from updater.ledger import LedgerError
from updater.process import Updater
from updater.safety import CanaryError


def main() -> int:
    """Exit code 0 after a clean stop, 1 with one line on stderr otherwise."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # Until the loop listens itself there is nothing to finish and nothing to hurt.
        signal.signal(number, lambda *_: os._exit(0))
    try:
        settings = load_settings()
        setup_logging(settings, "updater")
        os.nice(settings.updater.niceness)
        Updater(settings).run()
    except (
        SettingsError,
        StoreError,
        UnsafeModel,
        PortUnavailable,
        StreamRefused,
        CanaryError,
        LedgerError,
        UnknownObjective,
        ReleaseUnfit,
    ) as error:
        print(f"moorline update: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
