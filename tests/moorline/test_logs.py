"""Logs: one line an entry, fields kept, no secret and nobody's words in them."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from moorline.logs import LineFormatter, describe, setup_logging
from moorline.settings import load_settings

SECRET = "hunter2-hunter2"


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def lines(
    form: Literal["text", "json"], log_level: str = "INFO"
) -> tuple[io.StringIO, logging.Logger]:
    stream = io.StringIO()
    environment = {
        "MOORLINE_STREAM__SASL_PASSWORD": SECRET,
        "MOORLINE_LOG_FORMAT": form,
        "MOORLINE_LOG_LEVEL": log_level,
    }
    setup_logging(load_settings(environment=environment), "updater", stream)
    return stream, logging.getLogger("moorline.test")


def test_text_line_has_level_module_message_and_fields() -> None:
    stream, logger = lines("text")
    logger.info("swapped", extra={"version": 42, "seconds": 0.712345678, "mode": "re load"})
    words = stream.getvalue().split(" ", 1)[1]
    assert words == 'INFO test swapped version=42 seconds=0.712346 mode="re load"\n'


def test_json_line_is_json() -> None:
    stream, logger = lines("json")
    logger.warning("gap", extra={"topic": "feedback.v1", "offsets": (1, 2)})
    entry = json.loads(stream.getvalue())
    assert entry["message"] == "gap"
    assert entry["process"] == "updater"
    assert entry["level"] == "WARNING"
    assert entry["offsets"] == [1, 2]


@pytest.mark.parametrize("form", ["text", "json"])
def test_secret_is_cut_out_wherever_it_is(form: Literal["text", "json"]) -> None:
    stream, logger = lines(form)
    logger.info(f"password {SECRET}", extra={"url": f"https://me:{SECRET}@host"})  # noqa: G004
    try:
        raise RuntimeError(f"refused {SECRET}")
    except RuntimeError:
        logger.exception("failed")
    assert SECRET not in stream.getvalue()
    assert stream.getvalue().count("***") == 3


@pytest.mark.parametrize("form", ["text", "json"])
def test_words_of_users_are_withheld_by_name(form: Literal["text", "json"]) -> None:
    stream, logger = lines(form)
    logger.info("served", extra={"prompt": "my secret life", "prompt_tokens": 3})
    assert "secret life" not in stream.getvalue()
    assert "3" in stream.getvalue()


def test_a_count_under_a_withheld_name_is_shown() -> None:
    stream, logger = lines("text")
    logger.info("replies set aside", extra={"event": "replies_set_aside", "replies": 3})
    assert stream.getvalue().endswith("event=replies_set_aside replies=3\n")


def test_failed_validation_does_not_quote_its_input() -> None:
    class Model(BaseModel):
        number: int

    with pytest.raises(ValidationError) as caught:
        Model.model_validate({"number": "my secret life"})
    assert "secret" not in describe(caught.value)
    assert "number" in describe(caught.value)


@given(st.text(), st.text())
def test_every_entry_is_one_line(message: str, value: str) -> None:
    record = logging.makeLogRecord(
        {"name": "moorline.x", "msg": "%s", "args": (message,), "field": value}
    )
    for form in ("text", "json"):
        line = LineFormatter("updater", form).format(record)
        assert len(line.splitlines()) == 1


def test_exception_is_on_its_line_with_its_place() -> None:
    stream, logger = lines("text")
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        logger.exception("failed")
    assert stream.getvalue().count("\n") == 1
    assert "test_logs.py:" in stream.getvalue()


def test_kafka_never_speaks_below_info() -> None:
    lines("text", "DEBUG")
    assert logging.getLogger("kafka.client").getEffectiveLevel() >= logging.INFO
