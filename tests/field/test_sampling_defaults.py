"""F15: a model whose own defaults spoil every reply is named at the start, and by `doctor`."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from vllm.config import ModelConfig

from daemon.cli.doctor import Finding, Health, examine
from moorline.base_model import generation_defaults
from moorline.settings import Settings
from moorline.trainability import defaults_in_vain
from serving.server import _warn_of_defaults


@pytest.mark.parametrize(
    ("defaults", "in_vain"),
    [
        ({}, {}),
        ({"repetition_penalty": 1.0, "temperature": 0.7, "top_p": 0.8, "top_k": 20}, {}),
        ({"repetition_penalty": 1.05, "temperature": 0.7}, {"repetition_penalty": 1.05}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"presence_penalty": 1.5, "frequency_penalty": 0}, {"presence_penalty": 1.5}),
        ({"repetition_penalty": None, "temperature": "hot", "presence_penalty": True}, {}),
    ],
)
def test_what_spoils_a_reply_is_named_and_what_does_not_is_not(
    defaults: dict[str, Any], in_vain: dict[str, float]
) -> None:
    assert defaults_in_vain(defaults) == in_vain


@pytest.mark.parametrize("content", [b"", b"[1]", b"\xff", b"{"])
def test_a_file_that_says_nothing_has_no_defaults(content: bytes, tmp_path: Path) -> None:
    assert generation_defaults(tmp_path) == {}
    (tmp_path / "generation_config.json").write_bytes(content)
    assert generation_defaults(tmp_path) == {}


@pytest.fixture
def model_dir(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A model with a repetition penalty of its own."""
    copy = tmp_path / "model"
    copy.mkdir()
    for file in tiny_model_dir.iterdir():
        (copy / file.name).symlink_to(file)
    (copy / "generation_config.json").unlink(missing_ok=True)
    (copy / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.05}))
    return copy


def finding(model_dir: Path, state_dir: Path, *vllm_args: str) -> Finding:
    settings = Settings(
        state_dir=state_dir,
        model={"path": model_dir},  # type: ignore[arg-type]
        serving={"port": 0, "vllm_args": vllm_args},  # type: ignore[arg-type]
        updater={"port": 0},  # type: ignore[arg-type]
    )
    (found,) = [one for one in examine(settings) if one.check == "sampling defaults"]
    return found


def test_doctor_names_it_until_it_is_left_out(model_dir: Path, tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    found = finding(model_dir, state_dir)
    assert found.health is Health.WARN
    assert "repetition_penalty 1.05" in found.detail
    assert "--generation-config" in found.remedy
    assert finding(model_dir, state_dir, "--generation-config", "vllm").health is Health.OK
    assert finding(model_dir, state_dir, "--generation_config=vllm").health is Health.OK


@pytest.mark.parametrize(("source", "warned"), [("auto", True), ("vllm", False)])
def test_the_start_says_what_vllm_will_really_sample_with(
    model_dir: Path, source: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "moorline.serving")
    config = ModelConfig(str(model_dir), generation_config=source, dtype="float32")
    _warn_of_defaults(config.get_diff_sampling_param())
    said = [one.getMessage() for one in caplog.records if one.name.startswith("moorline")]
    assert ["repetition_penalty 1.05" in line for line in said] == [True] * warned
