"""Makes a state directory of ledger format 4, and what the program that made it says of it.

Run from a checkout of commit 6ca69fb:

    cd CHECKOUT && OMP_NUM_THREADS=1 PYTHONPATH=. .venv/bin/python FIXTURE/make_state.py

It writes state/, events/, settings.toml and expected.json beside itself. Keys and artifact bytes
differ from run to run of it (random keys, durations in verdicts); everything else is the same.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
import time
from dataclasses import asdict
from pathlib import Path

T0 = 1772323200.0  # 2026-03-01T00:00:00Z
DAY = 86400.0
CLOCK = [T0]
time.time = lambda: CLOCK[0]  # before anything of Moorline is imported

os.environ["HF_HUB_OFFLINE"] = "1"
HERE = Path(__file__).resolve().parent
WORK = HERE / ".work-make"
shutil.rmtree(WORK, ignore_errors=True)
WORK.mkdir(parents=True)
os.chdir(WORK)  # settings name model and state by relative paths

import torch  # noqa: E402

torch.set_num_threads(1)

import updater.assembly  # noqa: E402
from daemon.artifacts import ArtifactStore  # noqa: E402
from daemon.base_model import model_digest  # noqa: E402
from daemon.events import (  # noqa: E402
    Erasure,
    Feedback,
    Interaction,
    LogprobConvention,
    PolicySpan,
    SamplingSettings,
    user_digest,
)
from daemon.failpoints import FAILPOINTS_VARIABLE, FailpointError  # noqa: E402
from daemon.pseudonyms import Pseudonyms  # noqa: E402
from daemon.settings import load_settings  # noqa: E402
from daemon.stream import Gap, GapCause, Record, Topic  # noqa: E402
from daemon.stream.dead_letters import origin_headers  # noqa: E402
from daemon.stream.outgoing import OutgoingEvent  # noqa: E402
from daemon.stream.redrive import Journal, Letter  # noqa: E402
from daemon.stream.spool import Spool  # noqa: E402
from daemon.stream.topics import cloud_event_headers, dlq_name  # noqa: E402
from tests.tiny_model import make_tiny_model  # noqa: E402
from tests.updater.policy_fixtures import recorded, some_sequences  # noqa: E402
from updater.ledger import Ledger  # noqa: E402
from updater.ledger.books import Books  # noqa: E402
from updater.ledger.accounting import audit, read_accounting  # noqa: E402
from updater.ledger.examples import read_traffic  # noqa: E402

SETTINGS_TOML = """\
# What state/ was made with. Paths are relative: to the directory that holds state/ and model/,
# where model/ is what tests/tiny_model.py makes.
alias = "assistant"
state_dir = "state"

[model]
path = "model"

[stream]
max_event_bytes = 4096

[learning]
batch_examples = 4
min_batch_examples = 4
lora_rank = 2
lora_alpha = 4
learning_rate = 2e-3
max_example_tokens = 64
horizon_seconds = 604800.0

[updater]
poll_seconds = 0.01

[bound]
live_kl_nats = 0.5
anchor_kl_nats = 5.0

[gate]
live_kl_mean_nats = 1.0
live_kl_max_prompt_nats = 5.0
anchor_kl_mean_nats = 5.0
anchor_kl_max_prompt_nats = 20.0
perplexity_rise_share = 1.0
perplexity_rise_share_from_anchor = 1.0
"""
(WORK / "settings.toml").write_text(SETTINGS_TOML)
MODEL = Path("model")
assert make_tiny_model(MODEL) is not None
DIGEST = model_digest(MODEL)


def at(day: float) -> float:
    """Moves the clock to this day after T0, and says when that is."""
    CLOCK[0] = T0 + day * DAY
    return CLOCK[0]


class Tape:
    """The stream: two partitions of what is joined, one of erasures."""

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._gaps: list[Gap] = []
        self.ids = {
            Topic.INTERACTIONS: "topic-interactions-1",
            Topic.FEEDBACK: "topic-feedback-1",
            Topic.ERASURES: "topic-erasures-1",
        }
        self.ends: dict[tuple[Topic, int], int] = {}
        self._numbers = 0

    def add(self, topic: Topic, key: str, value: bytes | None, partition: int | None = None) -> None:
        if partition is None:
            partition = 0 if topic is Topic.ERASURES else sum(key.encode()) % 2
        offset = self.ends.get((topic, partition), 0)
        self.ends[topic, partition] = offset + 1
        self._numbers += 1
        ms = int(CLOCK[0] * 1000)
        headers = cloud_event_headers(topic, f"{self._numbers:032x}", "moorline", ms)
        record = Record(
            topic, self.ids[topic], partition, offset, ms, key.encode(), value, headers
        )
        self._records.append(record)

    def lose(self, topic: Topic, partition: int, number: int) -> None:
        """Retention removes so many records before anybody read them."""
        expected = self.ends.get((topic, partition), 0)
        self.ends[topic, partition] = expected + number
        self._gaps.append(Gap(topic, partition, expected, expected + number, GapCause.RETENTION))

    def remake(self, topic: Topic) -> None:
        """The topic is deleted and made again, and the operator accepts it."""
        self.ids[topic] = self.ids[topic].replace("-1", "-2")
        for partition in range(2):
            expected = self.ends.pop((topic, partition), 0)
            self._gaps.append(Gap(topic, partition, expected, 0, GapCause.TOPIC_RECREATED))

    def poll(self, max_records: int, timeout_seconds: float) -> list[Record]:
        taken, self._records = self._records[:max_records], self._records[max_records:]
        return taken

    def gaps(self) -> list[Gap]:
        found, self._gaps = self._gaps, []
        return found

    def lag(self) -> dict[tuple[Topic, int], int]:
        return dict.fromkeys(self.ends, 0)

    def commit(self, positions: object) -> None:
        pass


class Letters:
    """The dead-letter topic."""

    def __init__(self) -> None:
        self.sent: list[tuple[Record, list[tuple[str, bytes]]]] = []

    def send(self, record: Record, reason: object, stage: str) -> None:
        headers = record.headers + origin_headers(load("").stream, record, reason, stage)
        self.sent.append((record, list(headers)))


def load(_: str, **overrides: object):
    return load_settings(Path("settings.toml"), overrides=overrides, environment={})


TAPE, LETTERS = Tape(), Letters()
EVENTS: dict[str, bytes] = {}
RealTrainer = updater.assembly.Trainer


class Poisoned(RealTrainer):
    """Some replies raise in an update."""

    poison: frozenset[str] = frozenset()

    def propose(self, batch, seen=None, **options):
        proposal = super().propose(batch, seen, **options)
        if {one.example.interaction.interaction_id for one in batch.examples} & self.poison:
            raise ValueError("a defect")
        return proposal


class Session:
    """One life of the updater."""

    def __init__(self, **overrides: object) -> None:
        self.settings = load("", **overrides)
        learning = self.settings.learning
        self.ledger = Ledger(
            self.settings.ledger_path,
            horizon_seconds=learning.horizon_seconds,
            suspect_after_deaths=self.settings.updater.suspect_after_deaths,
        )
        self.store = ArtifactStore(self.settings.store_dir)
        self.published: list[object] = []
        self.loop, _ = updater.assembly.assemble(
            self.settings,
            ledger=self.ledger,
            store=self.store,
            reader=TAPE,
            dead_letters=LETTERS,
            publish=self.published.append,
        )
        self.policy = self.loop._policy
        self.loop.resume()

    def cycle(self, times: int = 1) -> None:
        for _ in range(times):
            self.loop._ingest._looked_at = float("-inf")  # the clock is ours: look each time
            self.loop.cycle()
        assert self.ledger.audit() == [], self.ledger.audit()

    def close(self) -> None:
        self.ledger.close()


SEED = [100]
PSEUDONYMS = Pseudonyms.from_file(load("").pseudonym_key_path)


def reply(
    session: Session,
    name: str,
    *,
    sequence: object = None,
    user: str | None = None,
    send: bool = True,
    **changes: object,
) -> Interaction:
    """A reply of the live policy, now."""
    SEED[0] += 1
    sequence = sequence or some_sequences(1, SEED[0])[0]
    version = session.ledger.live_version()
    made = recorded(session.policy, sequence, name, SamplingSettings(), version)
    made = made.model_copy(
        update={
            "created_at": CLOCK[0],
            "user": None if user is None else PSEUDONYMS.of(user),
            **changes,
        }
    )
    made = Interaction.model_validate_json(made.to_bytes())
    if send:
        TAPE.add(Topic.INTERACTIONS, name, made.to_bytes())
    return made


def say(name: str, rater: str = "ann", feedback_id: str = "", send: bool = True, **fields: object):
    """A word on a reply, now."""
    about = {"interaction_id": name, "rater": rater, "created_at": CLOCK[0]}
    if "kind" not in fields:
        fields.setdefault("value", 1)
    about["feedback_id"] = feedback_id or f"fb-{name.removeprefix('chatcmpl-')}-{rater}"
    said = Feedback.model_validate(about | fields)
    if send:
        TAPE.add(Topic.FEEDBACK, name, said.to_bytes())
    return said


def forget(name: str, **about: object) -> Erasure:
    asked = Erasure(erasure_id=name, erased_at=CLOCK[0], **about)
    TAPE.add(Topic.ERASURES, asked.key, asked.to_bytes())
    return asked


def make() -> None:
    s = Session()
    # Day 0: what is pruned by the end, events keep their fates.
    at(0)
    reply(s, "chatcmpl-ancient-0")
    reply(s, "chatcmpl-ancient-1", user="dora")
    say("chatcmpl-ghost-0", "ann")
    s.cycle()
    # Day 4.8: rated much later. Day 5: what expires.
    at(4.8)
    reply(s, "chatcmpl-c-3", user="dora")
    at(5)
    reply(s, "chatcmpl-old-0", user="dora")
    reply(s, "chatcmpl-old-1")
    say("chatcmpl-ghost-1", "bert")
    s.cycle()
    # Day 6: the feedback topic is made again; retention passes unread replies.
    at(6)
    TAPE.remake(Topic.FEEDBACK)
    TAPE.lose(Topic.INTERACTIONS, 1, 3)
    reply(s, "chatcmpl-after-gap-0")  # expires too (day 13)
    say("chatcmpl-after-gap-none", "ann", kind="signal", signal="copied")
    s.cycle()

    # Day 7.5: the last to expire; its key is doomed at the end, and not destroyed.
    at(7.5)
    reply(s, "chatcmpl-last-0")
    s.cycle()

    # Day 10: traffic that nobody rates, and what cannot be learned from.
    at(10)
    for index in range(4):
        reply(s, f"chatcmpl-traffic-{index}", user=f"reader-{index % 2}")
    odd = {
        "greedy": {"sampling": SamplingSettings(temperature=0.0)},
        "altered": {"sampling": SamplingSettings(altered_by=("logit_bias",))},
        "raw": {
            "sampling": SamplingSettings(temperature=0.7),
            "logprob_convention": LogprobConvention.RAW,
        },
        "aborted": {"finish_reason": "abort"},
        "no-prompt": {"prompt_token_ids": ()},
        "long": {"prompt_token_ids": tuple(range(5, 75))},
        "other-alias": {"alias": "somebody-else"},
        "no-logprobs": {"completion_logprobs": ()},
        "from-the-future": {"policy_spans": (PolicySpan(version=99, start=0, end=3),)},
    }
    for name, changes in odd.items():
        made = reply(s, f"chatcmpl-odd-{name}", **changes)
    say("chatcmpl-odd-greedy", "ann")
    say("chatcmpl-odd-raw", "ann", value=-1)
    TAPE.add(Topic.FEEDBACK, "k", b"not json")
    TAPE.add(Topic.FEEDBACK, "k", b'{"schema_version": "2.0", "interaction_id": "x"}')
    TAPE.add(Topic.FEEDBACK, "k", b'{"interaction_id": "x", "kind": "thumbs", "value": 7}')
    TAPE.add(Topic.FEEDBACK, "k", None)
    TAPE.add(Topic.INTERACTIONS, "k", b"\xff" * 5000)
    TAPE.add(Topic.INTERACTIONS, "k", b'{"interaction_id": "x"}')
    s.cycle()

    # Day 10.1: four lukewarm scores teach nothing.
    at(10.1)
    for index in range(4):
        reply(s, f"chatcmpl-n-{index}")
        say(f"chatcmpl-n-{index}", f"rater-{index}", kind="score", value=0.5)
    s.cycle()
    assert len(s.ledger.no_updates()) == 1

    # Day 10.2: every kind of feedback, release 1.
    at(10.2)
    (winner,) = some_sequences(1, 1)
    names = [f"chatcmpl-a-{index}" for index in range(4)]
    EVENTS["interaction.json"] = reply(s, names[0], sequence=winner, user="emil").to_bytes()
    for name in names[1:]:
        reply(s, name, user="emil", tenant="acme")
    loser = type(winner)(winner.prompt_token_ids, winner.completion_token_ids[::-1])
    reply(s, "chatcmpl-a-lost", sequence=loser, user="emil")
    said = {
        "preference": say(
            names[0], "ann", kind="preference", over="chatcmpl-a-lost", send=False
        ),
        "correction": say(
            names[1], "bert", kind="correction", text="A glacier is a river of ice.", send=False
        ),
        "signal": say(names[2], "carl", kind="signal", signal="regenerated", send=False),
        "score": say(
            names[3], "dan", kind="score", value=4.5, score_min=1.0, score_max=5.0, send=False
        ),
        "outranked": say(
            names[3], "carl", "fb-a-3-outranked", kind="signal", signal="copied", send=False
        ),
        "unknown": say(
            names[3], "carl", "fb-a-3-unknown", kind="signal", signal="sneezed", send=False
        ),
        "differ": say(
            names[1], "ann", "fb-a-1-differ", kind="preference", over="chatcmpl-a-lost", send=False
        ),
    }
    for name, one in said.items():
        if name in ("preference", "correction", "signal", "score"):
            EVENTS[f"feedback-{name}.json"] = one.to_bytes()
        TAPE.add(Topic.FEEDBACK, one.interaction_id, one.to_bytes())
    s.cycle()
    assert s.ledger.newest_version() == 1, s.loop.phase

    # Day 10.5: thumbs; repeated, superseded and nameless ones. Release 2.
    at(10.5)
    for index in range(4):
        made = reply(s, f"chatcmpl-b-{index}", user=f"reader-{index % 2}", tenant="acme")
    TAPE.add(Topic.INTERACTIONS, made.interaction_id, made.to_bytes())  # again
    say("chatcmpl-b-0", "ann", "fb-b-0-first", value=1)
    at(10.51)
    thumbs = say("chatcmpl-b-0", "ann", "fb-b-0-second", value=-1)
    EVENTS["feedback-thumbs.json"] = thumbs.to_bytes()
    TAPE.add(Topic.FEEDBACK, "chatcmpl-b-0", thumbs.to_bytes())  # again
    say("chatcmpl-b-1", "bert", value=1)
    say("chatcmpl-b-2", "carl", value=-1)
    TAPE.add(
        Topic.FEEDBACK, "chatcmpl-b-3", b'{"interaction_id":"chatcmpl-b-3","value":1,"rater":"dan"}'
    )
    s.cycle()
    assert s.ledger.newest_version() == 2
    say("chatcmpl-b-1", "bert", "fb-b-1-too-late", value=-1)  # already trained
    s.cycle()

    # Day 11: release 3, which is withdrawn below.
    at(11)
    reply(s, "chatcmpl-c-0", user="mallory")
    reply(s, "chatcmpl-c-1", user="reader-1")
    reply(s, "chatcmpl-c-2", tenant="acme")
    say("chatcmpl-c-0", "mallory", value=1)
    say("chatcmpl-c-1", "ann", value=-1)
    say("chatcmpl-c-1", "bert", value=-1)  # agrees; ann and bert also differ, on f-0
    say("chatcmpl-c-2", "bert", value=1)
    say("chatcmpl-c-3", "dora", value=-1)
    s.cycle()
    assert s.ledger.newest_version() == 3
    s.close()

    # Day 11.2: a gate that lets nothing through. Day 11.3: a bound that does not.
    for day, batch, narrow, reason in (
        (11.2, "d", {"gate.live_kl_max_prompt_nats": 1e-9}, "gate_blocked"),
        (11.3, "e", {"bound.live_kl_nats": 1e-12}, "divergence_bound"),
    ):
        at(day)
        s = Session(**narrow)
        for index in range(4):
            reply(s, f"chatcmpl-{batch}-{index}", user="reader-0")
            say(f"chatcmpl-{batch}-{index}", f"rater-{index}", value=1 if index % 2 else -1)
        s.cycle()
        assert s.ledger.rejections()[-1]["reason"] == reason, s.ledger.rejections()
        s.close()

    # Day 11.4: two replies raise; release 4 is made of the two others, beside a reply that is too
    # far and one that disagrees with its policy.
    at(11.4)
    updater.assembly.Trainer = Poisoned
    Poisoned.poison = frozenset({"chatcmpl-f-2", "chatcmpl-f-3"})
    s = Session()
    for index in range(4):
        reply(s, f"chatcmpl-f-{index}", user="reader-0")
        say(f"chatcmpl-f-{index}", f"rater-{index}", value=1 if index % 2 else -1)
    say("chatcmpl-f-0", "ann", value=1)
    s.cycle()
    assert s.ledger.rejections()[-1]["reason"] == "update_failed"
    (far, odd_one) = some_sequences(2, 7)
    spans = {
        "policy_spans": (PolicySpan(version=0, start=0, end=len(far.completion_token_ids)),),
        "completion_logprobs": (-0.01,) * len(far.completion_token_ids),
    }
    reply(s, "chatcmpl-g-far", sequence=far, **spans)
    spans = {
        "policy_spans": (PolicySpan(version=0, start=0, end=len(odd_one.completion_token_ids)),),
        "completion_logprobs": (-0.5,) * len(odd_one.completion_token_ids),
        "sampling": SamplingSettings(temperature=0.8, top_p=0.9),
    }
    reply(s, "chatcmpl-g-mismatch", sequence=odd_one, **spans)
    say("chatcmpl-g-far", "ann", value=1)
    say("chatcmpl-g-mismatch", "ann", value=1)
    s.cycle()
    assert s.ledger.newest_version() == 4
    s.close()
    updater.assembly.Trainer = RealTrainer

    # Day 12: one reply is to be forgotten and unlearned: back to release 2 (as 5), then release 6.
    at(12)
    s = Session()
    EVENTS["erasure-reply.json"] = forget(
        "er-reply", interaction_id="chatcmpl-c-0", replay=True
    ).to_bytes()
    s.cycle(2)
    print("after replay:", [r.version for r in s.published], s.ledger.withdrawn_versions())
    assert s.ledger.newest_version() == 6 and s.ledger.withdrawn_versions() == {3, 4}
    say("chatcmpl-c-0", "ann", value=1)  # on an erased reply
    s.cycle()

    # Day 13: late words; a person and a tenant are forgotten; an older event at the door.
    at(13)
    say("chatcmpl-old-0", "ann", value=1)
    held_back = reply(s, "chatcmpl-cora-late", user="cora", send=False)
    reply(s, "chatcmpl-cora-0", user="cora")
    reply(s, "chatcmpl-u-0", user="udo", tenant="umbrella")
    say("chatcmpl-cora-0", "ann", value=1)
    say("chatcmpl-traffic-0", "cora", value=-1)
    s.cycle()
    at(13.1)
    EVENTS["erasure-user.json"] = forget(
        "er-user", users=(user_digest(PSEUDONYMS.of("cora")), user_digest("cora"))
    ).to_bytes()
    EVENTS["erasure-tenant.json"] = forget("er-tenant", tenant="umbrella").to_bytes()
    TAPE.add(Topic.INTERACTIONS, held_back.interaction_id, held_back.to_bytes())
    s.cycle()

    # Day 13.5: a reply that kills the process, alone too.
    at(13.5)
    for index in range(2):
        reply(s, f"chatcmpl-k-{index}", user="reader-1")
        say(f"chatcmpl-k-{index}", f"rater-{index}", value=1 if index else -1)
    s.cycle()
    s.close()
    for _ in range(3):
        with Ledger(load("").ledger_path, horizon_seconds=7 * DAY) as ledger:
            (example,) = ledger.examples_of(["chatcmpl-k-0/0"])
            ledger.attempts.begin([example.example_id], alone=True)
    s = Session()
    s.cycle()
    assert s.ledger.rejections()[-1]["reason"] == "update_killed"

    # Day 14: what waits at the end.
    at(14)
    reply(s, "chatcmpl-r-0", user="emil", tenant="acme")
    made = reply(s, "chatcmpl-r-1")
    mirrored = made.completion_token_ids[::-1]
    reply(
        s, "chatcmpl-r-lost", sequence=type(winner)(made.prompt_token_ids, mirrored), user="emil"
    )
    say("chatcmpl-r-1", "ann", kind="preference", over="chatcmpl-r-lost")
    for index in range(3):
        reply(s, f"chatcmpl-w-{index}", user="reader-0")
    say("chatcmpl-r-0", "ann", value=1)
    say("chatcmpl-r-0", "bert", value=-1)
    say("chatcmpl-r-0", "carl", kind="signal", signal="copied")
    say("chatcmpl-r-1", "dan", kind="correction", text="Snow that has become ice.")
    say("chatcmpl-not-read-0", "ann", value=1)
    say("chatcmpl-w-0", "ann", kind="preference", over="chatcmpl-not-read-1")
    s.cycle()
    assert s.ledger.count_ready() == 3, s.ledger.count_ready()

    at(14.5)
    EVENTS["release-base.json"] = s.loop._manifests.restored(0).to_bytes()  # never committed
    s.store.pin("assistant", 2, "the newest answers in verse")
    EVENTS["pin.json"] = (s.settings.store_dir / "releases/assistant/pin.json").read_bytes()
    s.store.unpin("assistant")
    spool = Spool(s.settings.spool_dir, s.settings.stream.spool_max_bytes)
    for index in range(3):
        made = reply(s, f"chatcmpl-spooled-{index}", user="emil", send=False)
        said = say(f"chatcmpl-spooled-{index}", "ann", send=False)
        for topic, event in ((Topic.INTERACTIONS, made), (Topic.FEEDBACK, said)):
            out = OutgoingEvent(
                topic, made.interaction_id, event.to_bytes(),
                f"{len(TAPE.ends) + 1000 + index:032x}", int(CLOCK[0] * 1000),
            )
            assert spool.append(out.to_bytes())
    spool.release(spool.next())  # the first one was delivered
    spool.close()
    # Two put back of the dead letters.
    record, headers = LETTERS.sent[0]
    journal = Journal(s.settings.state_dir / "redriven.json")
    for offset in (0, 1, 4):
        journal.note(
            [
                Letter(
                    record.topic, dlq_name(s.settings.stream, record.topic), "topic-dlq-1", 0,
                    offset, record.timestamp_ms, record.key, record.value, (), {},
                )
            ]
        )
    s.close()

    # Deaths: twice, r-0 both times; and the process was killed in an update of k-1 in the end,
    # after it had expired a reply and before it destroyed its key.
    at(15)
    for keys, alone in (
        (["chatcmpl-r-0/0", "chatcmpl-r-1/0"], False),
        (["chatcmpl-r-0/0"], True),
        (["chatcmpl-k-1/0"], False),
    ):
        with Ledger(load("").ledger_path, horizon_seconds=7 * DAY) as ledger:
            ledger.attempts.begin([one.example_id for one in ledger.examples_of(keys)], alone=alone)
            if keys == ["chatcmpl-k-1/0"]:
                os.environ[FAILPOINTS_VARIABLE] = "ledger.expire.committed=raise"
                try:
                    ledger.expire()
                except FailpointError:
                    del os.environ[FAILPOINTS_VARIABLE]


def checkpoint(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


def key_numbers(path: Path) -> list[int]:
    connection = sqlite3.connect(path.with_name(f"{path.name}.keys"))
    try:
        return [number for (number,) in connection.execute("SELECT id FROM keys ORDER BY id")]
    finally:
        connection.close()


def expected() -> dict[str, object]:
    """What this commit says of a copy."""
    copy = WORK / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree("state", copy)
    path = copy / "ledger.sqlite"
    found: dict[str, object] = {
        "commit": "6ca69fb",
        "ledger_format": 4,
        "now": T0 + 15 * DAY,
        "now_utc": "2026-03-16T00:00:00Z",
        "base_model_digest": DIGEST,
    }
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)

    def rows(sql: str) -> list[dict[str, object]]:
        cursor = connection.execute(sql)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor]

    tables = [
        name
        for (name,) in connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
            " ORDER BY name"
        )
    ]
    found["rows"] = {
        name: connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in tables
    }
    found["doomed_keys"] = [key for (key,) in connection.execute("SELECT key FROM doomed_keys")]
    found["keys"] = key_numbers(path)
    found["accounting"] = read_accounting(connection).as_dict()
    found["audit"] = audit(connection)
    found["events"] = rows(
        "SELECT p.topic, p.topic_id, p.partition, e.offset, e.fate, e.reason, e.decided_by"
        " FROM events e JOIN positions p ON p.id = e.position ORDER BY p.id, e.offset"
    )
    found["interactions"] = {
        row.pop("key"): row
        for row in rows(
            "SELECT i.key, i.state, i.untrainable, i.event_time, i.arrived_at, i.retained,"
            " i.open_ratings, i.open_preferences, e.fate, e.reason, e.decided_by FROM interactions i"
            " LEFT JOIN events e ON e.position = i.position AND e.offset = i.offset ORDER BY i.key"
        )
    }
    found["feedback"] = {
        row.pop("feedback_id"): row
        for row in rows(
            "SELECT f.feedback_id, i.key, o.key AS over, f.rater, f.aspect, f.state, f.head,"
            " f.event_time, f.arrived_at, e.fate, e.reason, e.decided_by FROM feedback f"
            " JOIN interactions i ON i.id = f.interaction LEFT JOIN interactions o ON o.id = f.over"
            " JOIN events e ON e.position = f.position AND e.offset = f.offset ORDER BY f.id"
        )
    }
    found["positions"] = rows(
        "SELECT topic, topic_id, partition, next_offset, consumed, arrived_at FROM positions"
        " ORDER BY id"
    )
    found["gaps"] = rows(
        "SELECT topic, partition, expected_offset, resumed_offset, cause, at FROM gaps ORDER BY id"
    )
    found["decisions"] = rows("SELECT * FROM decisions ORDER BY example_id")
    found["attempts"] = rows(
        "SELECT i.key, a.under_way, a.deaths, a.alone FROM attempts a"
        " JOIN interactions i ON i.id = a.interaction ORDER BY i.key"
    )
    found["taught"] = rows("SELECT * FROM taught ORDER BY version, user, tenant")
    found["tombstones"] = [
        {**row, "at": "infinity" if row["at"] == float("inf") else row["at"]}
        for row in rows("SELECT * FROM tombstones ORDER BY scope")
    ]
    found["erasures"] = rows("SELECT * FROM erasures ORDER BY id")
    found["rejections"] = rows("SELECT id, reason, parent, examples, at FROM rejections ORDER BY id")
    found["no_updates"] = rows("SELECT id, examples, at FROM no_updates ORDER BY id")
    connection.close()

    with Books(path) as books:
        found["lease_epoch"] = books.lease_epoch()
        found["offsets"] = {
            f"{topic}/{partition}": list(place)
            for (topic, partition), place in sorted(books.offsets().items())
        }
        found["live_version"] = books.live_version()
        found["newest_version"] = books.newest_version()
        found["withdrawn_versions"] = sorted(books.withdrawn_versions())
        found["unpublished"] = [release.version for release in books.unpublished()]
        found["policy_versions_referenced"] = sorted(books.policy_versions_referenced())
        found["baselines"] = json.loads(books.baselines().to_json())
        store = ArtifactStore(copy / "store")
        found["releases"] = [
            {
                "version": r.version,
                "parent": r.parent,
                "restores": r.restores,
                "kind": str(r.kind),
                "artifact_digest": r.artifact_digest,
                "examples": r.examples,
                "examples_digest": r.examples_digest,
                "lineage": [list(pair) for pair in books.lineage(r.version)],
                "bytes_kept": (copy / "store/artifacts" / str(r.artifact_digest)).is_dir(),
                "same_in_store": store.release("assistant", r.version) == r,
            }
            for r in books.releases()
        ]
        found["stories"] = {
            key: [
                {
                    "kind": one.kind, "place": str(one.place), "fate": one.fate,
                    "reason": one.reason, "name": one.name, "state": one.state,
                    "outcome": None if one.outcome is None else one.outcome.name,
                    "example_id": one.example_id,
                    "repeats": [str(place) for place in one.repeats],
                    "joined": [
                        [j.name, None if j.fate is None else j.fate, j.reason] for j in one.joined
                    ],
                }
                for one in books.stories(key)
            ]
            for key in (*found["interactions"], *found["feedback"])
        }
        found["stories_asdict"] = {
            key: [asdict(one) for one in books.stories(key)]
            for key in ("chatcmpl-b-0/0", "fb-b-0-first", "chatcmpl-d-0/0", "fb-a-0-ann", "fb-c-0-mallory")
        }
        places = {
            "/".join(str(row[name]) for name in ("topic", "partition", "offset"))
            for row in found["events"]
        }
        found["kinds_by_place"] = {  # of each incarnation of the topic, oldest first
            place: [[one.kind, one.fate, one.reason, one.name] for one in books.stories(place)]
            for place in sorted(places)
        }
    with Ledger(path, horizon_seconds=7 * DAY, suspect_after_deaths=3) as ledger:
        after: dict[str, object] = {"lease_epoch": ledger.epoch, "keys": key_numbers(path)}
        assert not ledger._database.rows("SELECT * FROM doomed_keys")
        after["attempts"] = [
            list(row)
            for row in ledger._database.rows(
                "SELECT i.key, a.under_way, a.deaths, a.alone FROM attempts a"
                " JOIN interactions i ON i.id = a.interaction ORDER BY i.key"
            )
        ]
        found["after_opening_to_write"] = after
        found["ready_examples"] = [
            {
                "example_id": one.example_id,
                "key": one.interaction.key,
                "feedback": [f.feedback_id for f in one.feedback],
                "policy_version": one.interaction.policy_version,
            }
            for one in ledger.ready_examples(24)
        ]
        shunned = ledger.attempts.shunned()
        traffic = ledger._readable(lambda c, b: read_traffic(c, b, 24, 64, shunned))
        keys = dict(ledger._database.rows("SELECT id, key FROM interactions"))
        found["held_out_traffic"] = [keys[identity] for identity in traffic]
        found["held_out_traffic_tokens"] = [
            [list(one.prompt_token_ids), list(one.completion_token_ids)]
            for one in traffic.values()
        ]
        found["expire_at_now"] = asdict(ledger.expire(now=T0 + 15 * DAY))
        assert ledger.accounting().as_dict() == found["accounting"]
        assert ledger.audit() == []
        found["expire_at_now_plus_8_days"] = asdict(ledger.expire(now=T0 + 23 * DAY))
        assert ledger.audit() == []
        found["accounting_at_now_plus_8_days"] = ledger.accounting().as_dict()
    shutil.rmtree(copy)
    return found


def events() -> None:
    target = HERE / "events"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    for name, content in EVENTS.items():
        (target / name).write_bytes(content)
    store = Path("state/store")
    newest = ArtifactStore(store).release("assistant", 6)
    shutil.copy(store / "releases/assistant/v000006.json", target / "release-adapter.json")
    shutil.copy(store / "releases/assistant/v000005.json", target / "release-restored.json")
    shutil.copy(
        store / "artifacts" / newest.artifact_digest / "parity.json", target / "parity.json"
    )
    (segment,) = Path("state/spool").glob("*.spool")
    shutil.copy(segment, target / segment.name)
    shutil.copy("state/redriven.json", target / "redriven.json")
    connection = sqlite3.connect("state/ledger.sqlite")
    for number, reason, record in connection.execute("SELECT id, reason, record FROM rejections"):
        name = "rejection.json" if reason == "gate_blocked" else f"rejection-{reason}.json"
        (target / name).write_text(record)
    (record,) = connection.execute("SELECT record FROM no_updates").fetchone()
    (target / "no-update.json").write_text(record)
    connection.close()
    (target / "dead-letter-headers.json").write_text(
        json.dumps(
            [
                {
                    "topic": f"{record.topic}.dlq",
                    "key": None if record.key is None else record.key.decode(),
                    "value_hex": None if record.value is None else record.value[:200].hex(),
                    "value_bytes": None if record.value is None else len(record.value),
                    "headers": [[name, value.decode()] for name, value in headers],
                }
                for record, headers in LETTERS.sent
            ],
            indent=1,
        )
    )


def main() -> None:
    make()
    for name in ("ledger.sqlite", "ledger.sqlite.keys"):
        checkpoint(Path("state") / name)
    for path in [*Path("state").rglob("*lock"), *Path("state").rglob("*.log")]:
        path.unlink()
    print(sorted(str(p) for p in Path("state").rglob("*") if p.is_file()))
    said = expected()
    events()
    shutil.rmtree(HERE / "state", ignore_errors=True)
    shutil.copytree("state", HERE / "state")
    (HERE / "settings.toml").write_text(SETTINGS_TOML)
    text = json.dumps(
        said, indent=1, allow_nan=False, default=lambda model: model.model_dump(mode="json")
    )
    (HERE / "expected.json").write_text(text + "\n")
    print(json.dumps(said["rows"], indent=1))
    print(json.dumps(said["accounting"]["reasons"], indent=1))
    os.chdir(HERE)
    shutil.rmtree(WORK)


if __name__ == "__main__":
    sys.exit(main())
