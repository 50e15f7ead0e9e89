"""What vLLM and torch say that means nothing here is kept out; anything else passes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from serving.harmless_warnings import CONFIG, LOGGED, VLLM_LOG_VARIABLES, WARNED
from serving.server import prepare_environment

IN_A_PROCESS_OF_VLLMS = """
import json, logging, sys, warnings
from vllm.config.logging import LoggingConfig
from vllm.logger import configure_logging
configure_logging(LoggingConfig())
for name, level, line in json.loads(sys.argv[1]):
    logging.getLogger(name).log(level, line)
text = sys.argv[2]
for warning in FutureWarning(text), FutureWarning("x"), UserWarning(text):
    warnings.warn(warning, stacklevel=1)
"""


@pytest.fixture(scope="module")
def said() -> str:
    """What a process of vLLM's prints, of all that is harmless and of what is like it."""
    lines = [(name, 30, f"{beginning}, and so on") for name, beginning in sorted(LOGGED)]
    lines += [
        ("vllm.platforms.cpu", 30, "a real warning of vLLM"),
        ("vllm.config.model", 30, "Enforce eager set, says another module"),
        ("vllm.config.vllm", 40, "an error of vLLM"),
        ("vllm.config.vllm", 20, "only for information"),
        ("torch._library.triton", 30, "a real warning of torch"),
    ]
    ((_, warned),) = WARNED
    clean = {name: value for name, value in os.environ.items() if "VLLM_" not in name}
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS_OF_VLLMS, json.dumps(lines), warned],
        env=clean | {"VLLM_LOGGING_CONFIG_PATH": str(CONFIG)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return done.stderr


def test_what_is_harmless_is_not_printed(said: str) -> None:
    assert "and so on" not in said
    assert said.count("torch.distributed.reduce_op") == 1, "of another category alone"


def test_anything_else_is_printed(said: str) -> None:
    for line in (
        "a real warning of vLLM",
        "Enforce eager set, says another module",
        "an error of vLLM",
        "a real warning of torch",
        "FutureWarning: x",
        "UserWarning: `torch.distributed.reduce_op`",
    ):
        assert said.count(line) == 1, said
    assert "only for information" not in said


@pytest.mark.parametrize(("logger", "beginning"), sorted(LOGGED))
def test_the_libraries_still_say_it_so(logger: str, beginning: str) -> None:
    found = importlib.util.find_spec(logger)
    assert found is not None
    source = Path(str(found.origin)).read_text(encoding="utf-8")
    said = source.replace('"\n', "").replace("\n", "")
    assert beginning.replace(" ", "") in said.replace('"', "").replace(" ", "")


@pytest.mark.parametrize("variable", VLLM_LOG_VARIABLES)
def test_whoever_sets_vllms_own_logs_gets_them(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {variable: "theirs"}
    monkeypatch.setattr(os, "environ", environment)
    prepare_environment()
    assert environment[variable] == "theirs"
    assert environment.get("VLLM_LOGGING_CONFIG_PATH", "theirs") == "theirs"
    environment.clear()
    prepare_environment()
    assert environment["VLLM_LOGGING_CONFIG_PATH"] == str(CONFIG)
