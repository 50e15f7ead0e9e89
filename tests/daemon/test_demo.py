"""The demo's people, rule, display and report; the demo itself runs as `make demo`."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from daemon.demo.crowd import Tally, _version
from daemon.demo.display import Display
from daemon.demo.people import (
    HELD_OUT_TOPICS,
    TRAINING_TOPICS,
    Question,
    held_out_questions,
    is_good,
    training_questions,
)
from daemon.demo.report import Evaluation, write_report
from daemon.demo.run import main
from daemon.demo.settings import DEMO_SETTINGS, up_arguments
from moorline.settings import load_settings

QUESTION = Question("volcanoes", "What are volcanoes?")


@pytest.mark.parametrize(
    ("reply", "finish_reason", "good"),
    [
        ("A volcano is an opening in the crust.", "stop", True),
        ("Volcanoes are openings in the crust. They erupt!", "stop", True),
        ("Volcanoes are openings in the crust", "stop", False),
        ("Volcanoes are openings in the crust.", "length", False),
        ("Mountains are openings in the crust.", "stop", False),
        ("Volcanoes.", "stop", False),
        ("", "stop", False),
        ("- Volcanoes\n- are openings in the crust.", "stop", False),
    ],
)
def test_the_rule_is_what_it_says(reply: str, finish_reason: str, good: bool) -> None:
    assert is_good(QUESTION, reply, finish_reason) is good


@pytest.mark.parametrize(
    ("topic", "word"),
    [("wolves", "wolf"), ("butterflies", "butterfly"), ("glass", "glass"), ("bees", "bee")],
)
def test_a_topic_may_be_named_in_the_singular(topic: str, word: str) -> None:
    assert is_good(Question(topic, ""), f"One {word} is never quite alone.", "stop")


def test_held_out_topics_are_never_asked_in_training() -> None:
    assert not set(TRAINING_TOPICS) & set(HELD_OUT_TOPICS)
    asked = {question.topic for question in training_questions(0)}
    assert not asked & {question.topic for question in held_out_questions()}
    assert len(held_out_questions()) == len(HELD_OUT_TOPICS) == len(set(HELD_OUT_TOPICS))


def test_training_questions_are_the_same_for_a_seed_and_differ_between_seeds() -> None:
    assert training_questions(1) == training_questions(1)
    assert training_questions(1) != training_questions(2)


def test_the_demo_s_settings_are_settings() -> None:
    settings = load_settings(overrides=dict(DEMO_SETTINGS), environment={})
    assert settings.bound.anchor_kl_nats <= 0.45  # what the demo promises
    arguments = up_arguments(Path("m"), Path("s"), {"learning.seed": "3"})
    assert arguments[0] == "up"
    assert "learning.seed=3" in arguments


@pytest.mark.parametrize(
    ("model", "version"), [("assistant@v000042", 42), ("assistant", -1), ("a@v1", -1)]
)
def test_replies_are_attributed_by_their_model_field(model: str, version: int) -> None:
    assert _version(model) == version


def evaluation(version: int, reward: float) -> Evaluation:
    samples = (("What are sharks?", "Sharks are fish.\nThey swim.", reward > 0.5),)
    return Evaluation(version, 60.0 * version, reward, 40, samples)


def facts() -> dict[str, Any]:
    return {
        "rule": "short",
        "held_out_questions": 40,
        "reward_before": 0.1,
        "reward_after": 0.8,
        "releases": 1,
        "wall_seconds": 60.0,
        "requests": 10,
        "failed_requests": 0,
        "unattributed_replies": 0,
        "swap_pause_seconds": [0.7],
        "swap_at_seconds": [50.0],
        "swap_mode": "reload",
        "max_stream_gap_seconds": 1.0,
        "rejected": 0,
        "kl_anchor_nats": [0.1],
        "kl_anchor_limit_nats": 0.42,
        "release_table": [
            {
                "version": 1,
                "name": "assistant@v000001",
                "at_seconds": 45.0,
                "kl_live_nats": 0.1,
                "kl_anchor_nats": 0.1,
                "step_scale": 1.0,
                "checks_passed": 8,
            }
        ],
        "accounting": {"total": 10},
    }


def test_the_report_shows_the_change_in_numbers_words_and_a_picture(tmp_path: Path) -> None:
    as_json, as_text, picture = write_report(
        tmp_path / "out", facts(), [evaluation(0, 0.1), evaluation(1, 0.8)]
    )
    found = json.loads(as_json.read_text())
    assert [row["reward"] for row in found["evaluations"]] == [0.1, 0.8]
    text = as_text.read_text()
    assert "**0.10** to **0.80**" in text
    assert "- v0 👎 Sharks are fish. They swim." in text
    assert "- v1 👍 Sharks are fish. They swim." in text
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_display_shows_a_start_without_numbers_and_a_run_with_them() -> None:
    display = Display(DEMO_SETTINGS)
    console = Console(width=110, record=True, file=io.StringIO())
    console.print(display)
    status = {
        "server": {"policy_name": "assistant@v000001", "swap_mode": "reload", "swaps": []},
        "updater": {"phase": "training", "ready_examples": 3, "kl_anchor_nats": 0.1},
    }
    display.update(61.0, status, Tally(requests=5), [evaluation(0, 0.1), evaluation(1, 0.8)])
    console.print(display)
    shown = console.export_text()
    assert "not asked yet" in shown
    assert "0.10 -> 0.80" in shown
    assert "assistant@v000001" in shown
    assert "moorline demo 1:01" in shown


def test_help_says_how_to_use_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    assert "moorline demo --minutes 5" in capsys.readouterr().out
