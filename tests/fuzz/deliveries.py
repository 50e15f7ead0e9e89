"""What a client or producer may send, at random: hypothesis strategies for records and requests."""

from __future__ import annotations

import codecs
import json
import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from hypothesis import strategies as st

from moorline.stream import Topic
from tests.field.raw_batches import CODECS, Raw
from tests.updater.ledger.fixtures import erasure, interaction

REPLIES = tuple(f"r{number}" for number in range(8))
"""Ids of replies that were served and recorded; what is said of others waits."""


class Ending(StrEnum):
    """How a delivery reaches the topic."""

    PLAIN = "plain"
    COMMITTED = "committed"
    """In a transaction, which is committed."""
    ABORTED = "aborted"
    """In a transaction, which is aborted: nobody's word."""


@dataclass(frozen=True)
class Delivery:
    """Records that go to one partition together."""

    topic: Topic
    records: tuple[Raw, ...]
    codec: str = "none"
    ending: Ending = Ending.PLAIN
    broken: dict[str, int] = field(default_factory=dict)
    """Options of ``raw_batches.batch`` that break its format."""


@dataclass(frozen=True)
class Request:
    """One POST to the feedback route."""

    body: bytes
    headers: tuple[tuple[bytes, bytes], ...] = ()
    chunks: int = 1


NUMBERS = st.one_of(
    st.integers(-2, 6),
    st.integers(-(2**70), 2**70),
    st.sampled_from([10**400, 2**63, -(2**63) - 1, 2**53 + 1]),
    st.floats(),
    st.sampled_from([0.0, -0.0, 1.0, 5e-324, 1.7e308]),
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["", " ", "\x00", "\ud83d", "José", "Jose\u0301", "1", "-1", "true", "null"]),
    st.sampled_from(["a" * 201, "😀" * 100, "thumbs", "score", "copied", "r0", "1e999", "٣"]),
)
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=8,
)
"""Every type that a field can be sent with."""


@st.composite
def said(draw: st.DrawFn) -> dict[str, Any]:
    """The fields of feedback of every kind, as the documentation has it."""
    reply, other = draw(st.permutations(REPLIES))[:2]
    fields: dict[str, Any] = draw(
        st.sampled_from(
            [
                {"value": 1},
                {"kind": "thumbs", "value": -1},
                {"kind": "score", "value": 4, "score_min": 1, "score_max": 5},
                {"kind": "correction", "text": "No, so."},
                {"kind": "preference", "over": other},
                {"kind": "signal", "signal": "copied"},
            ]
        )
    )
    rater = draw(st.sampled_from(["ann", "bob", "cy", "José", "Jose\u0301"]))
    identity = draw(st.sampled_from([{}, {"feedback_id": "fb-1"}, {"created_at": 1.79e9}]))
    return {"interaction_id": reply, "rater": rater, **fields, **identity}


@st.composite
def events(draw: st.DrawFn, topic: Topic) -> dict[str, Any]:
    """The fields of a valid event of this topic. Erasures name people who rate nothing else."""
    if topic is Topic.FEEDBACK:
        return draw(said())
    if topic is Topic.ERASURES:
        return erasure(draw(st.sampled_from(["eve", "dan"]))).model_dump(mode="json")
    reply = interaction(draw(st.sampled_from([*REPLIES, "other"])), user="eve")
    return reply.model_dump(mode="json")


@st.composite
def changed(draw: st.DrawFn, fields: dict[str, Any]) -> dict[str, Any]:
    """The same with some fields left out, null, of another type or another's."""
    made = dict(fields)
    for name in draw(st.lists(st.sampled_from([*fields, "id", "user", "xyz"]), max_size=3)):
        match draw(st.sampled_from(["drop", "null", "other", "swap"])):
            case "drop":
                made.pop(name, None)
            case "null":
                made[name] = None
            case "other":
                made[name] = draw(JSON)
            case "swap":
                made[name] = made.get(draw(st.sampled_from(list(fields))))
    return made


@st.composite
def encoded(draw: st.DrawFn, fields: Any) -> bytes:
    """JSON in one of the ways in which it is written, or nearly."""
    text = json.dumps(fields, ensure_ascii=draw(st.booleans()))
    match draw(st.integers(0, 11)):
        case 0:
            return codecs.BOM_UTF8 + text.encode(errors="surrogatepass")
        case 1:
            encoding = draw(st.sampled_from(["utf-16", "utf-16-le", "utf-32", "latin-1"]))
            return text.encode(encoding, errors="replace")
        case 2 if text.startswith("{") and len(text) > 2:
            name = draw(st.sampled_from(["value", "rater", "interaction_id", "kind"]))
            return f'{{"{name}": {json.dumps(draw(JSON))}, {text[1:]}'.encode(errors="replace")
        case 3:
            cut = draw(st.integers(0, len(text)))
            return text[:cut].encode(errors="surrogatepass")
        case 4:
            return text.encode(errors="surrogatepass") + draw(st.binary(max_size=4))
    return text.encode(errors="surrogatepass")


@st.composite
def values(draw: st.DrawFn, topic: Topic) -> bytes | None:
    """The value of a record."""
    match draw(st.integers(0, 18)):
        case 0:
            return None
        case 1:
            return draw(st.binary(max_size=60))
        case 2:
            return draw(encoded(draw(JSON)))
        case 3:
            deep = draw(st.sampled_from([10, 300, 50_000]))
            return draw(st.sampled_from([b"[", b'{"value":', b"[[1],"])) * deep
        case 4:
            return b'{"text":"' + b"x" * draw(st.sampled_from([100_001, 899_980, 950_000]))
        case 5 | 6 | 7 | 8 | 9 | 10:
            return draw(encoded(draw(events(topic))))
    return draw(encoded(draw(changed(draw(events(topic))))))


HEADER_NAMES = st.one_of(
    st.binary(max_size=8),
    st.sampled_from([b"trace", b"content-type", b"moorline_origin_topic", b"moorline_redrives"]),
)
TIMESTAMPS = st.one_of(
    st.sampled_from([-1, 0, 1, 2**63 - 1]),
    st.sampled_from([10**9, 10**12, 10**15, 10**18]).map(lambda unit: int(1.79 * unit)),
    st.integers(0, 2**63 - 1),
)


@st.composite
def deliveries(draw: st.DrawFn) -> Delivery:
    """A batch of records, on any of the topics that an updater reads."""
    topics = [Topic.FEEDBACK] * 6 + [Topic.INTERACTIONS] * 2 + [Topic.ERASURES]
    topic = draw(st.sampled_from(topics))
    ending = draw(st.sampled_from([Ending.PLAIN] * 8 + [Ending.COMMITTED, Ending.ABORTED]))
    keys = st.one_of(st.binary(max_size=12), st.sampled_from([b"r0", b"r1"]))
    if topic is Topic.ERASURES:  # a broker takes no record without a key where it compacts
        ending = Ending.PLAIN
    else:
        keys = st.one_of(st.none(), keys)
    header_values = st.binary(max_size=8)
    if ending is Ending.PLAIN:  # the library's producer, which transactions need, sends no null
        header_values = st.one_of(st.none(), header_values)
    records = st.builds(
        Raw,
        values(topic),
        keys,
        st.lists(st.tuples(HEADER_NAMES, header_values), max_size=3).map(tuple),
        TIMESTAMPS,
    )
    broken: dict[str, int] = {}
    if ending is Ending.PLAIN:
        broken = draw(st.sampled_from([{}] * 27 + [{"crc_error": 1}, {"magic": 3}, {"magic": -1}]))
    return Delivery(
        topic,
        tuple(draw(st.lists(records, min_size=1, max_size=4))),
        draw(st.sampled_from(list(CODECS))),
        ending,
        broken,
    )


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """A request with any body and any headers that HTTP can carry."""
    name = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=12).map(str.encode)
    known = st.sampled_from([b"content-type", b"content-length", b"x-request-id", b"expect"])
    value = st.one_of(
        st.binary(max_size=12),
        st.sampled_from([b"Application/JSON", b"", b"-1", b"9" * 20, "²".encode("latin-1")]),
    )
    one = st.tuples(st.one_of(name, known), value).filter(_is_let_through)
    headers = draw(st.lists(one, max_size=3))
    body = draw(values(Topic.FEEDBACK)) or b""
    return Request(body, tuple(headers), draw(st.integers(1, 3)))


def _is_let_through(header: tuple[bytes, bytes]) -> bool:
    """Whether an HTTP server hands it on: none does with a length that is no length."""
    return header[0] != b"content-length" or re.fullmatch(rb"[0-9]{1,20}", header[1]) is not None
