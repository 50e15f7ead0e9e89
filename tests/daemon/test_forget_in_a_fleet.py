"""`moorline forget --user` with several servers: found under every key, or refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from moorline.events import Fate, Interaction
from moorline.pseudonyms import Pseudonyms
from moorline.store import ArtifactStore
from moorline.store.pseudonym_keys import RecordedKeys
from moorline.stream import Topic
from tests.updater.ledger.fixtures import HORIZON, NOW, Log, interaction, rating
from tests.updater.ledger.test_inspection import moorline
from updater.ledger import Ledger
from updater.ledger.inspection import LedgerInspector
from updater.pseudonym_keys import PseudonymKeys


@dataclass(frozen=True)
class Server:
    """A server with a state directory of its own."""

    state: Path

    @property
    def path(self) -> Path:
        return self.state / "pseudonym.key"

    @property
    def key(self) -> Pseudonyms:
        return Pseudonyms.from_file(self.path)

    def reply(self, name: str, user: str, *, names_its_key: bool = True) -> Interaction:
        fingerprint = self.key.fingerprint if names_its_key else None
        return interaction(name, user=self.key.pseudonym_of(user), pseudonym_key=fingerprint)


@dataclass(frozen=True)
class Fleet:
    """Two servers that differ, and an updater on a third machine."""

    first: Server
    second: Server
    updater: Path

    def record(self, *replies: Interaction) -> None:
        log = Log(partitions=1)
        events = [event for reply in replies for event in (reply, rating(reply.interaction_id))]
        with Ledger(self.updater / "ledger.sqlite", horizon_seconds=HORIZON) as ledger:
            ledger.ingest([log.parsed(event) for event in events], now=NOW)
            store = ArtifactStore(self.updater / "store")
            PseudonymKeys(ledger, store, "assistant").export()

    def share_the_store(self, server: Server) -> None:
        (server.state / "store").symlink_to(self.updater / "store")

    def erased(self) -> int:
        with LedgerInspector(self.updater / "ledger.sqlite") as inspector:
            assert inspector.audit() == []
            return inspector.accounting().fates[Topic.INTERACTIONS].get(Fate.ERASED, 0)


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(Server(tmp_path / "a"), Server(tmp_path / "b"), tmp_path / "updater")


@pytest.fixture
def recorded(fleet: Fleet) -> Fleet:
    """ana is recorded by both servers."""
    fleet.record(fleet.first.reply("r1", "ana"), fleet.second.reply("r2", "ana"))
    return fleet


def forget(state: Path, *arguments: str | Path, user: str = "ana") -> tuple[int, str]:
    words = ("forget", "--user", user, "--yes", *map(str, arguments))
    code, told = moorline(*words, state=state)
    return code, " ".join(told.split())


def test_a_person_is_found_on_every_server_and_the_keys_are_said(recorded: Fleet) -> None:
    first, second = recorded.first, recorded.second
    code, told = forget(recorded.updater, "--key", first.path, "--key", second.path)
    assert code == 0, told
    assert "Erased: 2 replies, 2 ratings" in told
    for server in (first, second):
        assert f"Looked under pseudonym key {server.key.fingerprint}" in told
    assert recorded.erased() == 2


@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_without_a_key_that_was_used_it_is_refused_and_nothing_is_erased(
    recorded: Fleet, dry_run: tuple[str, ...]
) -> None:
    first, second = recorded.first, recorded.second
    code, told = forget(recorded.updater, *dry_run)
    assert code == 1
    assert first.key.fingerprint in told
    assert second.key.fingerprint in told
    code, told = forget(recorded.updater, "--key", first.path, *dry_run)
    assert code == 1
    assert "nothing was erased" in told
    assert second.key.fingerprint in told
    assert first.key.fingerprint not in told
    assert "0 replies" not in told
    assert recorded.erased() == 0


def test_a_name_that_nobody_has_needs_every_key_too(recorded: Fleet) -> None:
    keys = ("--key", recorded.first.path, "--key", recorded.second.path)
    assert forget(recorded.updater, "--key", recorded.first.path, user="zoe")[0] == 1
    code, told = forget(recorded.updater, *keys, user="zoe")
    assert code == 0, told
    assert "Erased: 0 replies" in told


def test_a_key_that_is_lost_for_good_is_gone_on_without_and_said(recorded: Fleet) -> None:
    lost = recorded.second.key.fingerprint
    keys = ("--key", recorded.first.path)
    assert forget(recorded.updater, *keys, "--lost-key", "0123456789abcdef")[0] == 1
    code, told = forget(recorded.updater, *keys, "--lost-key", lost)
    assert code == 0, told
    assert f"Not looked under the lost pseudonym key {lost}" in told
    assert "Erased: 1 replies" in told


def test_keys_of_a_server_with_a_changed_one_are_found_by_themselves(fleet: Fleet) -> None:
    """The declared key and the one that the state directory had before."""
    declared = fleet.updater / "new.key"
    fleet.updater.mkdir()
    declared.write_bytes(b"k" * 40 + b"\r\n")
    new = Pseudonyms.read(declared)
    after = interaction("r2", user=new.pseudonym_of("ana"), pseudonym_key=new.fingerprint)
    here = Server(fleet.updater)
    fleet.record(here.reply("r1", "ana"), after)
    setting = ("--set", f"serving.pseudonym_key_file={declared}")
    code, told = forget(fleet.updater)
    assert code == 1
    assert new.fingerprint in told
    code, told = forget(fleet.updater, *setting, "--key", declared)
    assert code == 0, told
    assert told.count(f"Looked under pseudonym key {new.fingerprint}") == 1
    assert "Erased: 2 replies" in told


def test_on_a_servers_machine_the_stores_list_says_which_keys_are_needed(recorded: Fleet) -> None:
    recorded.share_the_store(recorded.first)
    code, told = forget(recorded.first.state)
    assert code == 1
    assert recorded.second.key.fingerprint in told
    code, told = forget(recorded.first.state, "--key", recorded.second.path, "--dry-run")
    assert code == 0, told
    for server in (recorded.first, recorded.second):
        assert f"Looked under pseudonym key {server.key.fingerprint}" in told
    code, told = forget(recorded.first.state, "--key", recorded.second.path, "--json")
    assert code == 1
    assert "neither a ledger" in told
    assert "nor a broker to tell" in told


def test_where_nobody_can_say_which_keys_there_are_it_is_refused(recorded: Fleet) -> None:
    code, told = forget(recorded.first.state, "--key", recorded.second.path)
    assert code == 1
    assert "nothing was erased" in told
    assert "nobody can say under which keys" in told


@pytest.mark.parametrize("content", [b"", b"\r\n"])
def test_a_file_that_is_no_key_is_refused(recorded: Fleet, content: bytes) -> None:
    path = recorded.updater / "empty.key"
    path.write_bytes(content)
    code, told = forget(recorded.updater, "--key", path)
    assert code == 1
    assert "holds no pseudonym key" in told
    path.unlink()
    code, told = forget(recorded.updater, "--key", path)
    assert code == 1
    assert "cannot be read" in told
    assert recorded.erased() == 0


def test_replies_that_do_not_name_their_key_need_one_and_it_is_said(fleet: Fleet) -> None:
    fleet.record(
        fleet.first.reply("r1", "ana", names_its_key=False),
        fleet.first.reply("r2", "ana"),
    )
    code, told = forget(fleet.updater)
    assert code == 1
    assert f"({', '.join(['unnamed', fleet.first.key.fingerprint])})" in told
    code, told = forget(fleet.updater, "--key", fleet.first.path)
    assert code == 0, told
    assert "Some replies do not name their key" in told
    assert "Erased: 2 replies" in told


def test_old_replies_alone_are_not_said_to_be_none_without_a_key(fleet: Fleet) -> None:
    fleet.record(fleet.first.reply("r1", "ana", names_its_key=False))
    code, told = forget(fleet.updater)
    assert code == 1
    assert "unnamed" in told
    code, told = forget(fleet.updater, "--lost-key", "unnamed")
    assert code == 0, told
    assert "Not looked under the lost pseudonym key unnamed" in told


def test_one_server_that_never_heard_of_keys_just_works(tmp_path: Path) -> None:
    alone = Server(tmp_path)
    Fleet(alone, alone, tmp_path).record(alone.reply("r1", "ana"), alone.reply("r2", "ben"))
    code, told = forget(tmp_path)
    assert code == 0, told
    assert "Erased: 1 replies, 1 ratings" in told


def test_where_nobody_is_recorded_under_a_pseudonym_raters_are_found_without_a_key(
    fleet: Fleet,
) -> None:
    fleet.record(interaction("r1"))
    code, told = forget(fleet.updater, user="ann")
    assert code == 0, told
    assert "Nobody is recorded under a pseudonym" in told
    assert "Erased: 0 replies, 1 ratings" in told


def test_a_tenant_and_a_reply_need_no_key(recorded: Fleet) -> None:
    (recorded.updater / "pseudonym.key").touch()  # no key, and nobody reads it
    for words in (("--interaction", "r1"), ("--tenant", "default")):
        code, told = moorline("forget", *words, "--yes", state=recorded.updater)
        assert code == 0, told
        assert "Looked under" not in told
    assert recorded.erased() == 2


def test_for_programs(recorded: Fleet) -> None:
    first, lost = recorded.first.key.fingerprint, recorded.second.key.fingerprint
    code, told = forget(
        recorded.updater, "--key", recorded.first.path, "--lost-key", lost, "--json"
    )
    assert code == 0
    found = json.loads(told)
    assert (found["pseudonym_keys"], found["lost_pseudonym_keys"]) == ([first], [lost])
    assert found["result"]["interactions"] == 1


def test_more_names_than_one_request_holds_are_refused_and_not_cut(recorded: Fleet) -> None:
    users = [word for number in range(6) for word in ("--user", f"name-{number}")]
    keys = ("--key", recorded.first.path, "--key", recorded.second.path)
    code, told = forget(recorded.updater, *keys, *users)
    assert code == 1
    assert "give fewer --user at once" in told


def test_the_list_in_the_store_is_of_its_model_alone(recorded: Fleet) -> None:
    copy = RecordedKeys(ArtifactStore(recorded.updater / "store"))
    listed = {recorded.first.key.fingerprint, recorded.second.key.fingerprint}
    assert set(copy.read("assistant") or ()) == listed
    assert copy.read("another") is None
