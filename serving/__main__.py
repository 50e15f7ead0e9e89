"""``python -m serving``: settings from the environment and ``MOORLINE_CONFIG``."""

from __future__ import annotations

import asyncio
import logging
import sys

from daemon.base_model import UnsafeModelError
from daemon.logs import setup_logging
from daemon.settings import SettingsError, load_settings
from serving.server import ServerError, prepare_environment

logger = logging.getLogger("moorline.serving")


def main() -> int:
    """Exit code 0 after a clean stop, 1 with one line on stderr otherwise."""
    try:
        settings = load_settings()
        setup_logging(settings, "serving")
        prepare_environment()
        from serving.server import serve

        asyncio.run(serve(settings))
    except (SettingsError, ServerError, UnsafeModelError) as error:
        print(f"moorline serve: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":  # the engine's process imports this file again
    sys.exit(main())
