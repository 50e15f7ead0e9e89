"""What a request's headers and body say beside its prompt: privacy, person, purpose. Pure.

Nothing here may change the reply, so nothing here refuses a request. A wish not to be recorded that
is unclear is taken for one, and a body that cannot be read at all is not recorded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

NO_STORE_HEADER = "x-moorline-no-store"
MAX_LABEL_CHARACTERS = 200

_BOOLEAN = TypeAdapter(bool)
"""Reads true and false as vLLM does: also "yes", "off", 1, "0", in any case."""
_INTEGER = TypeAdapter(int)
_NO_STORE = NO_STORE_HEADER.replace("-", "")
_UNFINISHED = ("in_progress", "incomplete")
_USER_FIELDS = ("user", "safety_identifier")


class BodyUnreadable(ValueError):
    """A body of which it is not known what it wishes, or whose it is; never quotes it."""


@dataclass(frozen=True)
class RequestFields:
    """What a body says of the request."""

    opted_out: bool = False
    users: tuple[str, ...] = ()
    """Every name that it gives the person, the one to record first."""
    streamed: bool = False
    only_scores_prompt: bool = False
    """`echo` without any token to be generated: vLLM generates one and hides it."""
    reply_prefixes: tuple[str | None, ...] = ()
    """The beginning of a reply that it gives, for each conversation of a batch."""
    request_id: str | None = None


class _Object(list[tuple[str, Any]]):
    """A JSON object as its pairs, so that a name that is there twice is seen."""

    def all(self, *names: str) -> Iterator[Any]:
        """The values of these names; of each in order."""
        return (value for wanted in names for name, value in self if name == wanted)

    def last(self, name: str) -> Any:
        """The value that counts for vLLM; None where there is none."""
        return next((value for found, value in reversed(self) if found == name), None)


def read_fields(body: bytes) -> RequestFields:
    """Read a request body.

    Raises:
        BodyUnreadable: it is no JSON object, or it gives the person something that is no name.
    """
    try:
        fields = json.loads(body, object_pairs_hook=_Object)
    except (ValueError, RecursionError):
        raise BodyUnreadable("the body is not JSON") from None
    if not isinstance(fields, _Object):
        raise BodyUnreadable("the body is not a JSON object")
    nested = _Object(
        pair for inner in fields.all("extra_body") if isinstance(inner, _Object) for pair in inner
    )  # clients send it so by mistake: vLLM does not heed it, we do
    request_id = fields.last("request_id")
    return RequestFields(
        opted_out=_opts_out([*fields, *nested]),
        users=tuple(dict.fromkeys([*_users(fields), *_users(nested)])),
        streamed=_is_true(fields.last("stream")),
        only_scores_prompt=_is_true(fields.last("echo")) and _is_zero(fields.last("max_tokens")),
        reply_prefixes=_reply_prefixes(fields),
        request_id=_writable(request_id) if isinstance(request_id, str) else None,
    )


def headers_opt_out(headers: Iterable[tuple[str, str]]) -> bool:
    """Whether a header asks not to be recorded: any value but a clear no, in any of them."""
    wishes = (value for name, value in headers if _plain(name) == _NO_STORE)
    return any(not _is_false(part.strip()) for value in wishes for part in value.split(","))


def header_text(value: str) -> str:
    """A header's text: UTF-8 where its bytes are, else Latin-1, which is how they are decoded."""
    try:
        return value.encode("latin-1").decode()
    except UnicodeError:
        return value


def _opts_out(pairs: Sequence[tuple[str, Any]]) -> bool:
    for name, value in pairs:
        match _plain(name):
            case "store" if not (value is None or _is_true(value)):
                return True
            case "nostore" | "xmoorlinenostore" if not (value is None or _is_false(value)):
                return True
    return False


def _plain(name: str) -> str:
    return name.casefold().replace("-", "").replace("_", "")


def _users(fields: _Object) -> Iterator[str]:
    """Names of the person, under each field that vLLM's routes know for it."""
    values = list(fields.all(*_USER_FIELDS))
    for metadata in fields.all("metadata"):
        if isinstance(metadata, _Object):
            values += metadata.all("user_id")
    for value in values:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if value is not None and not isinstance(value, str):
            raise BodyUnreadable("a user is given that is no name")
        if value and value.strip():
            yield value


def _reply_prefixes(fields: _Object) -> tuple[str | None, ...]:
    """The last message of each conversation, where it is the beginning of the reply."""
    if isinstance(turns := fields.last("input"), list):  # /v1/responses says it by a status
        last = turns[-1] if turns else None
        unfinished = isinstance(last, _Object) and last.last("status") in _UNFINISHED
        return (_text_of_reply(last),) if unfinished else ()
    messages = fields.last("messages")
    if not _is_true(fields.last("continue_final_message")) or not isinstance(messages, list):
        return ()
    batch = messages and isinstance(messages[0], list) and not isinstance(messages[0], _Object)
    conversations = messages if batch else [messages]
    return tuple(
        _text_of_reply(one[-1]) if isinstance(one, list) and one else None for one in conversations
    )


def _text_of_reply(message: Any) -> str | None:
    """The text of a message, whichever role it has; None where it has none."""
    if not isinstance(message, _Object):
        return None
    content = message.last("content")
    if isinstance(content, list) and not isinstance(content, _Object):
        parts = [part.last("text") for part in content if isinstance(part, _Object)]
        content = "".join(part for part in parts if isinstance(part, str))
    return _writable(content) if isinstance(content, str) and content else None


def _writable(text: str) -> str:
    """Without halves of surrogate pairs, which JSON can spell and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _is_true(value: Any) -> bool:
    return _boolean(value) is True


def _is_false(value: Any) -> bool:
    return _boolean(value) is False


def _boolean(value: Any) -> bool | None:
    """As vLLM reads it; None: it is neither."""
    try:
        return _BOOLEAN.validate_python(value)
    except (ValidationError, UnicodeError):
        return None


def _is_zero(value: Any) -> bool:
    try:
        return _INTEGER.validate_python(value) == 0
    except (ValidationError, UnicodeError):
        return False
