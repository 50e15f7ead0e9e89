"""Whose reply it is, under every name and spelling that a client gives; forgetting finds each."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from moorline.events import Fate, Feedback, Interaction
from moorline.pseudonyms import Pseudonyms
from moorline.stream import Topic
from serving.context import RequestContext
from serving.request_fields import read_fields
from tests.field.test_privacy_wishes import PSEUDONYMS, ask
from tests.updater.ledger.fixtures import HORIZON, NOW, Log, interaction, rating, release
from tests.updater.ledger.test_inspection import moorline
from updater.ledger import BatchDecision, Ledger
from updater.ledger.inspection import LedgerInspector

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "José") for form in ("NFC", "NFD"))


def context_of(body: bytes, *headers: tuple[bytes, bytes]) -> RequestContext:
    context = ask(body, headers=headers).context
    assert context is not None
    assert context.not_recorded is None
    return context


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (b'{"user":"ana"}', ("ana",)),
        (b'{"safety_identifier":"ana"}', ("ana",)),
        (b'{"metadata":{"user_id":"ana"}}', ("ana",)),
        (b'{"user":"ana","safety_identifier":"s-1","metadata":{"user_id":"m-1"}}',
         ("ana", "s-1", "m-1")),
        (b'{"safety_identifier":"s-1","user":"ana"}', ("ana", "s-1")),
        (b'{"user":"ana","user":"ben"}', ("ana", "ben")),
        (b'{"user":"ana","safety_identifier":"ana"}', ("ana",)),
        (b'{"extra_body":{"user":"ana"}}', ("ana",)),
        (b'{"metadata":{"user_id":42}}', ("42",)),
        (b'{"user":"Zoe \\ud83d"}', ("Zoe \ud83d",)),
        (b'{"user":null,"safety_identifier":"","metadata":null}', ()),
        (b'{"metadata":"user_id"}', ()),
    ],
)  # fmt: skip
def test_every_name_of_the_person_is_kept(body: bytes, names: tuple[str, ...]) -> None:
    assert read_fields(body).users == names
    assert context_of(body).users == tuple(map(PSEUDONYMS.pseudonym_of, names))


def test_a_name_composed_and_decomposed_is_one_person_and_case_counts() -> None:
    assert PSEUDONYMS.pseudonym_of(COMPOSED) == PSEUDONYMS.pseudonym_of(DECOMPOSED)
    assert PSEUDONYMS.pseudonym_of("Ana@example.org") != PSEUDONYMS.pseudonym_of("ana@example.org")
    ratings = [Feedback(interaction_id="a", value=1, rater=name) for name in (COMPOSED, DECOMPOSED)]
    assert {one.rater for one in ratings} == {COMPOSED}


def test_no_name_is_kept_where_names_are_not_recorded() -> None:
    context = ask(b'{"user":"ana"}', pseudonyms=None).context
    assert context is not None
    assert context.users == ()


def test_labels_are_read_as_utf8_and_composed() -> None:
    context = context_of(
        b"{}",
        (b"x-moorline-tenant", DECOMPOSED.encode()),
        (b"x-moorline-task", COMPOSED.encode("latin-1")),
    )
    assert (context.tenant, context.task) == (COMPOSED, COMPOSED)


def test_the_handler_gets_an_id_of_ours_each_time_and_the_clients_is_kept() -> None:
    headers = ((b"x-request-id", b"mine"), (b"x-request-id", b"mine-too"), (b"accept", b"*/*"))
    first, second = ask(b"{}", headers=headers), ask(b'{"request_id":"b"}', headers=headers)
    for found in (first, second):
        assert found.context is not None
        ours = (b"x-request-id", found.context.request_id.encode())
        assert sorted(found.headers) == [(b"accept", b"*/*"), ours]
        assert found.context.client_request_id == "mine"
    assert sorted(first.headers) != sorted(second.headers)


@pytest.mark.parametrize(
    ("body", "kept"),
    [
        (b'{"request_id":"mine"}', "mine"),
        (b'{"request_id":"\\ud83d"}', "?"),
        (b'{"request_id":7}', None),
        (b"{}", None),
    ],
)
def test_an_id_of_the_client_in_the_body_is_kept_too(body: bytes, kept: str | None) -> None:
    assert context_of(body).client_request_id == kept


def pseudonyms(state: Path) -> Pseudonyms:
    return Pseudonyms.from_file(state / "pseudonym.key")


def fed(state: Path, *events: Interaction | Feedback) -> None:
    log = Log(partitions=1)
    with Ledger(state / "ledger.sqlite", horizon_seconds=HORIZON) as ledger:
        ledger.ingest([log.parsed(event) for event in events], now=NOW)
        ids = [example.example_id for example in ledger.ready_examples(10)]
        ledger.commit_release(release(ledger, ids), BatchDecision(ids))


def forget(state: Path, name: str) -> str:
    code, told = moorline("forget", "--user", name, "--yes", state=state)
    assert code == 0, told
    with LedgerInspector(state / "ledger.sqlite") as inspector:
        assert inspector.audit() == []
    return told


@pytest.mark.parametrize("name", ["ana", "s-1"])
def test_either_of_two_names_is_enough_to_be_forgotten(tmp_path: Path, name: str) -> None:
    of = pseudonyms(tmp_path).pseudonym_of
    both = interaction("r1", user=of("ana")).model_copy(update={"other_users": (of("s-1"),)})
    fed(tmp_path, both, rating("r1"), interaction("r2", user=of("ben")), rating("r2"))
    told = forget(tmp_path, name)
    assert "Erased: 1 replies, 1 ratings" in told
    assert "Have learned from them: assistant@v000001." in told


def test_a_name_that_is_not_the_first_is_not_everybody_of_the_first(tmp_path: Path) -> None:
    of = pseudonyms(tmp_path).pseudonym_of
    app = interaction("r1", user=of("app"))
    person = interaction("r2", user=of("app")).model_copy(update={"other_users": (of("ana"),)})
    fed(tmp_path, app, rating("r1"), person, rating("r2"))
    assert "Erased: 1 replies" in forget(tmp_path, "ana")
    assert "Erased: 1 replies" in forget(tmp_path, "app")


def test_who_was_forgotten_by_a_further_name_does_not_come_back(tmp_path: Path) -> None:
    of = pseudonyms(tmp_path).pseudonym_of
    log = Log(partitions=1)
    with Ledger(tmp_path / "ledger.sqlite", horizon_seconds=HORIZON) as ledger:
        ledger.ingest([log.parsed(interaction("r1", user=of("ben")))], now=NOW)
    forget(tmp_path, "s-1")
    late = interaction("r2", user=of("ana")).model_copy(update={"other_users": (of("s-1"),)})
    with Ledger(tmp_path / "ledger.sqlite", horizon_seconds=HORIZON) as ledger:
        ledger.ingest([log.parsed(late)], now=NOW)
        assert ledger.accounting().events[Topic.INTERACTIONS].get(Fate.ERASED)


def test_a_name_is_forgotten_however_it_is_composed(tmp_path: Path) -> None:
    """Also one that an earlier Moorline took as its bytes."""
    keyed = pseudonyms(tmp_path)
    old = keyed._hash(DECOMPOSED)
    assert old != keyed.pseudonym_of(DECOMPOSED)
    fed(
        tmp_path,
        *(
            interaction("r1", user=keyed.pseudonym_of(COMPOSED)),
            rating("r1", rater=DECOMPOSED, feedback_id="fb"),
        ),
        *(interaction("r2", user=old), rating("r2")),
    )
    assert "Erased: 2 replies, 2 ratings" in forget(tmp_path, DECOMPOSED)
