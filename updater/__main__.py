"""``python -m updater``: settings from the environment and ``MOORLINE_CONFIG``."""

from __future__ import annotations

import os
import signal
import sys

from moorline.errors import MoorlineError
from moorline.logs import setup_logging
from moorline.settings import load_settings
from updater.process import Updater


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
    except MoorlineError as error:
        print(f"moorline update: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
