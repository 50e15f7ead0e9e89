"""What kafka-python logs: connections at DEBUG, the rest seldom, contents never."""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Iterator

import pytest

from moorline.stream.library_log import SAID_BY_OURSELVES, quiet_library_loggers

SECRET = "hunter2-hunter2"


class Lines(logging.Handler):
    """Caplog would attach itself to the library's own logger; this stands where a log file does."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


@pytest.fixture
def log() -> Iterator[Lines]:
    """Ours at INFO; nothing was said yet."""
    library, root, ours = (logging.getLogger(name) for name in ("kafka", None, "moorline"))
    levels, handlers, file = (root.level, ours.level), library.handlers[:], Lines()
    library.handlers[:] = []
    quiet_library_loggers()
    root.addHandler(file)
    ours.setLevel(logging.INFO)
    yield file
    root.removeHandler(file)
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    library.handlers[:] = handlers


def test_debug_of_the_library_never_comes_out(log: Lines) -> None:
    noisy = logging.getLogger("kafka.producer.kafka")
    logging.getLogger().setLevel(logging.DEBUG)
    logging.getLogger("moorline").setLevel(logging.DEBUG)
    noisy.setLevel(logging.DEBUG)
    try:
        noisy.debug("Sending value=%r", SECRET)
    finally:
        noisy.setLevel(logging.NOTSET)
    assert log.lines == []


def test_the_same_line_of_the_library_is_not_repeated(log: Lines) -> None:
    quiet_library_loggers()
    for number in range(3):
        logging.getLogger("kafka.producer.kafka").warning(f"the same again: {number}")  # noqa: G004
    assert log.lines == ["WARNING the same again: 0"]


def test_what_we_say_ourselves_comes_out_at_debug(log: Lines) -> None:
    for name, beginnings in SAID_BY_OURSELVES.items():
        for beginning in beginnings:
            logging.getLogger(name).error(beginning)
    assert log.lines == []
    logging.getLogger("moorline").setLevel(logging.DEBUG)
    logging.getLogger("kafka.net.manager").error("Connection failed: %s", "refused")
    assert log.lines == ["DEBUG Connection failed: refused"]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("kafka.net.sasl.plain", "Sending username and password in the clear"),
        ("kafka.net.connection", "x: Produce throttled by broker (900 ms)"),
        ("kafka.net.selector", "IO loop crashed (client_id=x)"),
        ("kafka.consumer.fetcher", "Not authorized to read from topic feedback.v1."),
        ("kafka.a_new_module", "whatever a later version says"),
    ],
)
def test_what_else_the_library_says_stays(log: Lines, name: str, line: str) -> None:
    logging.getLogger(name).warning(line)
    assert log.lines == [f"WARNING {line}"]


@pytest.mark.parametrize("name", SAID_BY_OURSELVES)
def test_the_library_still_says_it_so(name: str) -> None:
    source = inspect.getsource(importlib.import_module(name))
    assert "logging.getLogger(__name__)" in source
    assert all(beginning in source for beginning in SAID_BY_OURSELVES[name])
