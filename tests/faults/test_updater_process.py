"""The updater as a process on a real broker: signals, hangs, no broker, two at a time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import httpx
import pytest

from daemon.broker import EmbeddedBroker
from moorline.events import Release
from moorline.settings import StreamSettings
from moorline.stream import Topic, ensure_topics, topic_name
from moorline.stream.scan import Scanner
from tests.faults.updater_process import (
    BATCH,
    Conversations,
    UpdaterProcess,
    environment,
    free_port,
    outcome,
)
from tests.kafka_fixtures import wait_until
from updater.ledger import Ledger

pytest_plugins = ("tests.kafka_fixtures",)

ROOT = Path(__file__).parents[2]
Starter = Callable[..., UpdaterProcess]
# Where a signal finds the updater: reading, in a step, gating, deciding, announcing.
POINTS = (
    "ingest.before_ledger",
    "loop.after_training",
    "loop.after_artifact",
    "loop.after_gate",
    "loop.before_release",
    "loop.after_manifest",
)


@pytest.fixture(scope="module")
def conversations(tiny_model_dir: Path) -> Conversations:
    return Conversations(tiny_model_dir, len(POINTS))


@pytest.fixture
def stream(tansu: str, topic_prefix: str) -> StreamSettings:
    settings = StreamSettings(bootstrap=tansu, topic_prefix=topic_prefix, partitions=1)
    ensure_topics(settings)
    return settings


@pytest.fixture
def start(tiny_model_dir: Path, tmp_path: Path, stream: StreamSettings) -> Iterator[Starter]:
    """``start(failpoint, **settings)``: on ``tmp_path/state``; all are killed at the end."""
    made: list[UpdaterProcess] = []

    def make(
        failpoint: str = "",
        *,
        state: str = "state",
        on: StreamSettings = stream,
        service: Mapping[str, str] | None = None,
        deadly: Sequence[int] = (),
        **settings: str,
    ) -> UpdaterProcess:
        made.append(
            UpdaterProcess(
                tiny_model_dir, tmp_path / state, on, failpoint, service, deadly, **settings
            )
        )
        return made[-1]

    yield make
    for process in made:
        process.kill()


# --- row 23: SIGTERM -----------------------------------------------------------------------------


def test_a_signal_finds_it_anywhere_and_it_ends_cleanly_and_goes_on(
    start: Starter, stream: StreamSettings, conversations: Conversations, tmp_path: Path
) -> None:
    reference = start(state="reference")
    for batch, point in enumerate(POINTS):
        conversations.send(stream, batch)
        reference.wait_version(batch + 1)
        updater = start(f"{point}=sleep:2@1")
        updater.wait_for_log(f"failpoint={point}")
        asked_at = time.monotonic()
        assert updater.stop(seconds=30) == 0, updater.log_text()
        assert time.monotonic() - asked_at < 20, "the grace is 75 s"
        assert "Traceback" not in updater.log_text()
    last = start()
    last.wait_version(len(POINTS))
    assert last.stop() == 0
    assert reference.stop() == 0
    assert outcome(tmp_path / "state") == outcome(tmp_path / "reference")


def test_a_signal_while_it_starts_ends_it_at_once(start: Starter) -> None:
    for words in ("event=ledger_opened", "event=learning_resumed"):
        updater = start()
        updater.wait_for_log(words)
        assert updater.stop(seconds=30) == 0, updater.log_text()
    last = start()
    last.wait(lambda: last.why_not_ready() is None)
    assert last.stop() == 0


def test_a_signal_while_the_broker_hangs_in_an_announcement_does_not_wait_for_it(
    start: Starter,
    own_tansu: EmbeddedBroker,
    conversations: Conversations,
    topic_prefix: str,
    tmp_path: Path,
) -> None:
    settings = StreamSettings(
        bootstrap=own_tansu.bootstrap, topic_prefix=topic_prefix, partitions=1
    )
    ensure_topics(settings)
    conversations.send(settings, 0)
    updater = start("loop.after_manifest=sleep:2@1", on=settings)
    updater.wait_for_log("failpoint=loop.after_manifest")
    assert own_tansu.pid is not None
    os.kill(own_tansu.pid, signal.SIGSTOP)
    try:
        asked_at = time.monotonic()
        assert updater.stop(seconds=75) == 0, updater.log_text()
        assert time.monotonic() - asked_at < 60, "the grace is 75 s"
    finally:
        os.kill(own_tansu.pid, signal.SIGCONT)
    with Ledger.open_readonly(tmp_path / "state/ledger.sqlite") as reader:
        assert [release.version for release in reader.unpublished()] == [1]
    again = start(on=settings)
    again.wait_version(1)
    assert again.stop() == 0
    assert len(outcome(tmp_path / "state")["weights"]) == 1, "announced now"


# --- row 24: a step that hangs -------------------------------------------------------------------

SUPERVISOR = """
import json, sys
from dataclasses import replace
from pathlib import Path
from moorline.settings import load_settings
from daemon.supervise import RestartPolicy, Supervisor
from daemon.tree import plan

updater = plan(load_settings(None, {"serving.port": 0})).children[-1]
updater = replace(updater, hang_seconds=15.0)
# The first one hangs; the next has no failpoint.
once = 'test -e "$0" && unset MOORLINE_FAILPOINTS; touch "$0"; exec "$@"'
updater = replace(updater, argv=("sh", "-c", once, sys.argv[1], *updater.argv))

def say(notice):
    print(json.dumps([notice.kind, notice.text]), flush=True)

sys.exit(Supervisor([updater], Path(sys.argv[2]), notify=say,
                    restart=RestartPolicy(first_delay_seconds=0.1)).run())
"""


def test_a_step_that_hangs_shows_and_is_started_again_with_nothing_lost(
    start: Starter,
    stream: StreamSettings,
    conversations: Conversations,
    tiny_model_dir: Path,
    tmp_path: Path,
) -> None:
    reference = start(state="reference")
    conversations.send(stream, 0)
    reference.wait_version(1)
    assert reference.stop() == 0

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(3)
        service = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000"}
        hung = start("loop.after_training=sleep:600", service=service, UPDATER__STALL_SECONDS="2")
        hung.wait_for_log("failpoint=loop.after_training")
        assert hung.get("/healthz").status_code == 200
        heard = []
        with contextlib.suppress(TimeoutError):  # its watchdog is fed no more
            while True:
                heard.append(systemd.recv(100))
    assert heard.count(b"WATCHDOG=1") >= 2, "fed while it loads, reads and learns"
    hung.wait(lambda: hung.get("/healthz").status_code == 503)
    why = hung.get("/healthz").json()["why_not"]
    assert why.startswith("training without progress for ")
    assert "updater.stall_seconds = 2" in why
    page = hung.get("/metrics").text
    (age,) = [line for line in page.splitlines() if line.startswith("moorline_progress_age_s")]
    assert float(age.split()[-1]) > 2
    assert 'moorline_updater_phase{phase="training"} 1.0' in page
    hung.kill()

    variables = environment(
        tiny_model_dir, tmp_path / "state", stream, free_port(), UPDATER__STALL_SECONDS="4"
    )
    variables["MOORLINE_FAILPOINTS"] = "loop.after_training=sleep:600"
    supervisor = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, str(tmp_path / "once"), str(tmp_path / "logs")],
        env=os.environ | variables,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert supervisor.stdout is not None
        said = []
        for line in supervisor.stdout:
            said.append(json.loads(line))
            if said[-1][0] == "ready" and len(said) > 2:
                break
        assert [kind for kind, _ in said] == ["starting", "ready", "crashed", "starting", "ready"]
        assert said[2][1].startswith("no sign of life for 15 s")
        url = f"http://127.0.0.1:{variables['MOORLINE_UPDATER__PORT']}/status"
        wait_until(lambda: httpx.get(url).json().get("live_version") == 1)
        assert httpx.get(url).json()["recent_feedback"]["missing"] == 0
    finally:
        supervisor.terminate()
        supervisor.communicate(timeout=60)
    assert supervisor.returncode == 0
    assert outcome(tmp_path / "state") == outcome(tmp_path / "reference")


# --- an event that kills ------------------------------------------------------------------------


def test_an_example_that_kills_the_process_is_rejected_in_the_end_and_the_others_teach(
    start: Starter, stream: StreamSettings, conversations: Conversations, tmp_path: Path
) -> None:
    deadly = conversations.tokens[2]
    conversations.send(stream, 0)
    for _ in range(7):  # three times with four, once with two, three times alone
        updater = start(deadly=deadly)
        assert updater.end(seconds=90) == -signal.SIGKILL, updater.log_text()
    updater = start(deadly=deadly)
    updater.wait_for_log("reason=update_crashed")
    conversations.send(stream, 1)
    updater.wait_version(1)
    assert updater.stop() == 0
    found = outcome(tmp_path / "state")
    assert found["accounting"]["reasons"]["feedback.v1"]["rejected"] == {"update_crashed": 1}
    assert found["accounting"]["topics"]["feedback.v1"] == {
        "rejected": 1,
        "trained": BATCH,
        "pending": BATCH - 1,
    }
    explained = subprocess.run(
        [sys.executable, "-m", "daemon.cli", "explain", "chatcmpl-2", "--state-dir", "state"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    ).stdout
    assert "its candidate was refused (update crashed; assistant rejection 1)" in explained
    assert "the process crashed 3 times in an update of it alone" in explained


def test_whoever_is_killed_after_a_signal_has_not_died_of_its_batch(
    start: Starter, stream: StreamSettings, conversations: Conversations
) -> None:
    conversations.send(stream, 0)
    for asked in (False, True):
        updater = start("loop.after_training=sleep:2,loop.before_release=kill")
        updater.wait_for_log("failpoint=loop.after_training")
        if asked:
            updater.signal(signal.SIGTERM)
        assert updater.end() == -signal.SIGKILL
        again = start("ingest.polled=sleep:600")
        again.wait_for_log("failpoint=ingest.polled")
        assert ("the updater crashed in its last update" in again.log_text()) is not asked
        again.kill()


# --- row 8: no broker at the start ---------------------------------------------------------------


def test_without_a_broker_it_waits_not_ready_and_goes_on_when_one_comes(
    start: Starter, conversations: Conversations, topic_prefix: str
) -> None:
    broker = EmbeddedBroker(free_port())
    away = StreamSettings(bootstrap=broker.bootstrap, topic_prefix=topic_prefix, partitions=1)
    updater = start(on=away)
    updater.wait(lambda: updater.why_not_ready() == "stream_unavailable")
    seen = set()
    until = time.monotonic() + 12
    while time.monotonic() < until:
        seen.add((updater.why_not_ready(), updater.get("/healthz").status_code))
        time.sleep(0.2)
    assert seen == {("stream_unavailable", 200)}
    assert updater.log_text().count("event=updater_waits phase=stream_unavailable") == 1
    broker.start()
    try:
        updater.wait(lambda: updater.why_not_ready() is None)
        conversations.send(away, 0)
        updater.wait_version(1)
        assert updater.stop() == 0
    finally:
        broker.stop()


# --- row 14: two whole updaters ------------------------------------------------------------------


def test_a_second_updater_is_refused_and_the_first_goes_on(
    start: Starter, stream: StreamSettings, conversations: Conversations
) -> None:
    first = start()
    first.wait(lambda: first.why_not_ready() is None)
    second = start()
    assert second.end() == 1
    assert f"another updater (pid {first.pid}) is using" in second.log_text()
    assert "stop it, or give this one its own state_dir" in second.log_text()
    conversations.send(stream, 0)
    first.wait_version(1)
    assert first.stop() == 0


def test_an_updater_that_wakes_up_in_a_step_after_a_takeover_decides_nothing(
    start: Starter, stream: StreamSettings, conversations: Conversations, tmp_path: Path
) -> None:
    conversations.send(stream, 0)
    stale = start("loop.before_release=sleep:3@1")
    stale.wait_for_log("failpoint=loop.before_release")
    stale.signal(signal.SIGSTOP)
    (tmp_path / "state/ledger.sqlite.lock").unlink()  # as on a file system that loses locks
    newer = start()
    newer.wait_version(1)
    stale.signal(signal.SIGCONT)
    assert stale.end() == 1
    assert "another updater took over" in stale.log_text()
    conversations.send(stream, 1)
    newer.wait_version(2)
    assert newer.stop() == 0
    found = outcome(tmp_path / "state")
    assert found["accounting"]["topics"]["feedback.v1"] == {"trained": 2 * BATCH}
    assert len(found["weights"]) == 2
    with Scanner(stream, "test") as scanner:
        name = topic_name(stream, Topic.RELEASES)
        records = [one for some in scanner.read(name, 0, 0) for one in some]
    announced = [Release.model_validate_json(record.value or b"") for record in records]
    assert [(one.version, one.lease_epoch) for one in announced] == [(1, 2), (2, 2)]
