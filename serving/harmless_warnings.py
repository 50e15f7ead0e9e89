"""Warnings of vLLM and torch that mean nothing here, kept out of an operator's terminal.

By name, never by level: what is not in these lists is printed, and so is the next version's. vLLM
starts two more processes, and reads ``vllm_logging.json`` in each; that is how they come to this.
Whoever sets vLLM's own variables for logs gets vLLM's own logs.
"""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path

CONFIG = Path(__file__).with_name("vllm_logging.json")

LOGGED = {
    # Moorline itself asks for eager mode on CPU, where compiling costs minutes.
    ("vllm.config.vllm", "Enforce eager set"),
    ("vllm.config.vllm", "Inductor compilation was disabled by user settings"),
    # Nothing that answers on CPU is written in Triton.
    ("vllm.platforms.cpu", "Triton is not installed"),
    ("torch._library.triton", "Triton not available"),
    # Said to every model; one without a state space has no such cache, and float32 loses nothing.
    ("vllm.platforms.cpu", "Reset SSM cache type to float32"),
    # A release is an adapter without a tokenizer of its own.
    (
        "vllm.v1.engine.input_processor",
        "vLLM has deprecated support for supporting different tokenizers",
    ),
}
"""(Logger, how the line begins)."""
WARNED = {
    # vLLM asks every name of a module whether it is a kernel, this one too.
    (FutureWarning, "`torch.distributed.reduce_op` is deprecated"),
}
"""(Category, how the text begins)."""
VLLM_LOG_VARIABLES = ("VLLM_LOGGING_CONFIG_PATH", "VLLM_LOGGING_LEVEL", "VLLM_CONFIGURE_LOGGING")


class WithoutHarmless(logging.Filter):
    """Lets through what is not in ``LOGGED``."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not any(
            record.name == logger and record.getMessage().startswith(beginning)
            for logger, beginning in LOGGED
        )


def install() -> WithoutHarmless:
    """Ignore ``WARNED`` in this process; returns the filter for its handlers."""
    for category, beginning in WARNED:
        warnings.filterwarnings("ignore", re.escape(beginning), category)
    return WithoutHarmless()
