"""Opens a copy of state/ and compares what it says with expected.json; ``--learn``: goes on too.

    cd CHECKOUT && PYTHONPATH=. .venv/bin/python FIXTURE/check_state.py [--learn]

Written for the code of 6ca69fb; of a later version, the names that it imports may have moved.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
SAID = json.loads((HERE / "expected.json").read_text())
NOW = SAID["now"]
time.time = lambda: NOW  # only for --learn: `Loop.cycle` asks the clock
os.environ["HF_HUB_OFFLINE"] = "1"

from daemon.artifacts import ArtifactStore  # noqa: E402
from daemon.stream.outgoing import OutgoingEvent  # noqa: E402
from daemon.stream.spool import Spool  # noqa: E402
from updater.ledger import Ledger  # noqa: E402
from updater.ledger.books import Books  # noqa: E402


def plain(value: object) -> object:
    text = json.dumps(value, default=lambda model: model.model_dump(mode="json"))
    return json.loads(text)


def keys_of(state: Path) -> list[int]:
    connection = sqlite3.connect(state / "ledger.sqlite.keys")
    try:
        return [number for (number,) in connection.execute("SELECT id FROM keys ORDER BY id")]
    finally:
        connection.close()


def check(state: Path) -> None:
    assert keys_of(state) == SAID["keys"]
    with Books(state / "ledger.sqlite") as books:
        assert books.audit() == SAID["audit"] == []
        assert plain(books.accounting().as_dict()) == SAID["accounting"]
        assert json.loads(books.baselines().to_json()) == SAID["baselines"]
        assert books.live_version() == SAID["live_version"]
        assert sorted(books.withdrawn_versions()) == SAID["withdrawn_versions"]
        offsets = {f"{t}/{p}": list(place) for (t, p), place in books.offsets().items()}
        assert offsets == SAID["offsets"]
        for key, stories in SAID["stories"].items():
            found = [[str(one.place), one.fate, one.reason, one.state] for one in books.stories(key)]
            assert plain(found) == [[s["place"], s["fate"], s["reason"], s["state"]] for s in stories]
        for key, stories in SAID["stories_asdict"].items():
            assert plain([asdict(one) for one in books.stories(key)]) == stories
        for place, kinds in SAID["kinds_by_place"].items():
            found = [[one.kind, one.fate, one.reason, one.name] for one in books.stories(place)]
            assert plain(found) == kinds
        store = ArtifactStore(state / "store")
        releases = books.releases()
        for release, said in zip(releases, SAID["releases"], strict=True):
            assert (release.version, release.artifact_digest, release.restores) == (
                said["version"], said["artifact_digest"], said["restores"],
            )
            assert store.release("assistant", release.version) == release
            if said["bytes_kept"]:
                store.open(release.artifact_digest, release.files)
    with Ledger(state / "ledger.sqlite", horizon_seconds=7 * 86400.0) as ledger:
        after = SAID["after_opening_to_write"]
        assert ledger.epoch == after["lease_epoch"]
        assert keys_of(state) == after["keys"] != SAID["keys"], "doomed keys go at the start"
        deaths = ledger._database.rows(
            "SELECT i.key, a.under_way, a.deaths, a.alone FROM attempts a"
            " JOIN interactions i ON i.id = a.interaction ORDER BY i.key"
        )
        assert plain(deaths) == after["attempts"]
        ledger.expire(now=NOW)
        assert plain(ledger.accounting().as_dict()) == SAID["accounting"]
        ready = [[one.example_id, one.interaction.key] for one in ledger.ready_examples(24)]
        assert ready == [[one["example_id"], one["key"]] for one in SAID["ready_examples"]]
        traffic = ledger.held_out_traffic(24, max_tokens=64)
        tokens = [[list(t.prompt_token_ids), list(t.completion_token_ids)] for t in traffic]
        assert tokens == SAID["held_out_traffic_tokens"]
        ledger.expire(now=NOW + 8 * 86400.0)
        assert ledger.audit() == []
        assert plain(ledger.accounting().as_dict()) == SAID["accounting_at_now_plus_8_days"]
    spool = Spool(state / "spool", 2**20)
    events = []
    while (frame := spool.next()) is not None:
        events.append(OutgoingEvent.from_bytes(frame.payload))
    assert [str(one.topic) for one in events] == [
        "feedback.v1", *["interactions.v1", "feedback.v1"] * 2,
    ]
    spool.close()


def learn(root: Path) -> None:
    """The updater goes on: one more word, and release 7 follows from 6."""
    from daemon.base_model import model_digest
    from daemon.events import Feedback
    from daemon.settings import load_settings
    from daemon.stream import Record, Topic
    from tests.tiny_model import make_tiny_model
    from updater.assembly import assemble

    os.chdir(root)
    assert make_tiny_model(Path("model")) is not None
    assert model_digest(Path("model")) == SAID["base_model_digest"], "other random numbers here"
    settings = load_settings(HERE / "settings.toml", environment={})

    class Tape:
        records: list[Record] = []

        def poll(self, max_records, timeout_seconds):
            taken, self.records = self.records, []
            return taken

        def gaps(self):
            return []

        def lag(self):
            return {}

        def commit(self, positions):
            pass

    tape, published = Tape(), []
    ledger = Ledger(settings.ledger_path, horizon_seconds=settings.learning.horizon_seconds)
    store = ArtifactStore(settings.store_dir)
    loop, _ = assemble(
        settings, ledger=ledger, store=store, reader=tape, dead_letters=None,
        publish=published.append,
    )
    loop.resume()
    said = Feedback(
        feedback_id="fb-next", interaction_id="chatcmpl-traffic-1", value=-1, created_at=NOW
    )
    topic_id, offset = SAID["offsets"]["feedback.v1/0"]
    tape.records = [
        Record(Topic.FEEDBACK, topic_id, 0, offset, int(NOW * 1000), None, said.to_bytes())
    ]
    loop.cycle()
    (release,) = published
    assert (release.version, release.parent, release.examples) == (7, 6, 4), release
    assert ledger.audit() == []
    ledger.close()
    print("release 7 of 6 made, digest", release.artifact_digest)


def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        shutil.copytree(HERE / "state", Path(directory) / "state")
        check(Path(directory) / "state")
    print("as expected")
    if "--learn" in sys.argv:
        with tempfile.TemporaryDirectory() as directory:
            shutil.copytree(HERE / "state", Path(directory) / "state")
            learn(Path(directory))
            os.chdir(HERE)


if __name__ == "__main__":
    sys.exit(main())
