"""``python -m serving``: settings from the environment and ``MOORLINE_CONFIG``.

With ``--check-arguments`` it only says whether `serving.vllm_args` can be served.
"""

from __future__ import annotations

import asyncio
import logging
import sys

from moorline.errors import MoorlineError
from moorline.logs import setup_logging
from moorline.settings import load_settings
from serving.server import prepare_environment

logger = logging.getLogger("moorline.serving")


def _without_vllm_fields(record: logging.LogRecord) -> bool:
    """vLLM stamps every record of the process with its own process name."""
    vars(record).pop("vllm_process_name", None)
    return True


def main() -> int:
    """Exit code 0 after a clean stop, 1 with one line on stderr otherwise."""
    try:
        settings = load_settings()
        setup_logging(settings, "serving")
        for handler in logging.getLogger().handlers:
            handler.addFilter(_without_vllm_fields)
        prepare_environment()
        if sys.argv[1:] == ["--check-arguments"]:
            from serving.vllm.arguments import check_arguments

            check_arguments(settings.serving.vllm_args)
            return 0
        from serving.server import serve

        asyncio.run(serve(settings))
    except MoorlineError as error:
        print(f"moorline serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before anything was started
        logger.info("stopped while starting", extra={"event": "start_abandoned"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
