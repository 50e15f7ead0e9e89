"""Structured logs, one line an entry, that can hold neither a secret nor anybody's words.

Everywhere else: ``logger = logging.getLogger("moorline.<module>")``, a plain fixed sentence, and in
``extra={...}`` a machine key, ``event``, and what varies, under names of ``FIELDS`` alone. Whoever
logs a failure logs the recovery too. Values of settings that are secret are cut
out of every finished line. Fields that could carry a prompt or a reply are withheld by name, and of
a failed validation only the rule is logged, never the input.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from pydantic import BaseModel, SecretStr, ValidationError

from moorline.settings import Settings

WITHHELD_FIELDS = frozenset(
    {"prompt", "prompts", "reply", "replies", "completion", "content", "messages", "text", "input"}
)
"""Never shown, but for a number: that is a count."""
FIELDS = frozenset(
    {
        "event",
        *("error", "reason", "diagnostics", "outcome", "mode", "phase", "failpoint"),
        *("version", "parent_version", "artifact", "alias", "epoch", "fingerprint"),
        *("topic", "partition", "offset"),
        *("events", "examples", "replies", "count", "crashes"),
        *("limit", "measured", "check", "setting"),
        *("seconds", "bytes"),
        *("path", "url", "child", "pid", "request_id"),
    }
)
"""Every name that a field of a line may have. ``name`` and ``process`` are Python's own fields of a
record, and refused by ``logging``: a child process is ``child``."""
MASK = "***"
_SHORTEST_MASKED_SECRET = 4  # cutting out shorter ones would garble ordinary words

_PLAIN_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}
_BARE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._:/@+-,*")


def setup_logging(settings: Settings, process: str, stream: TextIO | None = None) -> None:
    """Send this process's logs to ``stream`` (stderr) as single lines.

    Args:
        process: which process logs (``serving``, ``updater``, ``up``); a field of every JSON line.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter(process, settings.log_format, secrets_of(settings)))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("moorline").setLevel(settings.log_level)
    # At DEBUG the Kafka client prints keys and values, and HTTP clients print addresses.
    for noisy in ("kafka", "httpx", "httpcore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.captureWarnings(True)


def secrets_of(settings: BaseModel) -> frozenset[str]:
    """Every secret value in the tree."""
    found: set[str] = set()
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            found |= secrets_of(value)
        elif isinstance(value, SecretStr):
            found.add(value.get_secret_value())
    return frozenset(found)


class LineFormatter(logging.Formatter):
    """``2026-01-31T12:00:00.000Z INFO serving.swap swapped version=42 seconds=0.7``, or JSON."""

    def __init__(
        self,
        process: str,
        form: Literal["text", "json"] = "text",
        secrets: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        self._process = process
        self._form = form
        long = [secret for secret in secrets if len(secret) >= _SHORTEST_MASKED_SECRET]
        # As it is, and as either form of line would escape it.
        spellings = {form for s in long for form in (s, _one_line(s), json.dumps(s)[1:-1])}
        self._secrets = sorted(spellings, key=len, reverse=True)

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        at = at.replace("+00:00", "Z")
        name = record.name.removeprefix("moorline.")
        fields = self._fields(record)
        if self._form == "json":
            entry = {"at": at, "level": record.levelname, "process": self._process}
            entry |= {"logger": name, "message": record.getMessage()} | fields
            line = json.dumps(entry, default=str)
        else:
            words = [at, record.levelname, name, record.getMessage()]
            words += [f"{key}={_quoted(value)}" for key, value in fields.items()]
            line = _one_line(" ".join(words))
        for secret in self._secrets:
            line = line.replace(secret, MASK)
        return line

    @staticmethod
    def _fields(record: logging.LogRecord) -> dict[str, Any]:
        fields: dict[str, Any] = {
            key: MASK if key in WITHHELD_FIELDS and not isinstance(value, int | float) else value
            for key, value in vars(record).items()
            if key not in _PLAIN_FIELDS
        }
        if record.exc_info and record.exc_info[1] is not None:
            fields["error"] = describe(record.exc_info[1])
            frames = traceback.extract_tb(record.exc_info[2])
            fields["trace"] = " > ".join(
                f"{frame.filename.rpartition('/')[2]}:{frame.lineno}:{frame.name}"
                for frame in frames
            )
        return fields


def describe(error: BaseException) -> str:
    """An exception as one line, without the input that a failed validation would quote."""
    if isinstance(error, ValidationError):
        places = (
            f"{'.'.join(map(str, entry['loc']))}: {entry['msg']}"
            for entry in error.errors(include_input=False, include_url=False, include_context=False)
        )
        return f"{error.title}: " + "; ".join(places)
    return f"{type(error).__name__}: {_one_line(str(error))}"


def _one_line(text: str) -> str:
    """Whatever could break a line or play with a terminal, escaped."""
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _quoted(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        plain = sorted(value) if isinstance(value, set | frozenset) else value
        return json.dumps(plain, default=str, separators=(",", ":"))
    text = str(value)
    return text if text and _BARE.issuperset(text) else json.dumps(text, ensure_ascii=False)
