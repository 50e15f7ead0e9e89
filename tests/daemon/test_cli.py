"""The command as a user meets it: real process, real exit codes, one line for every mistake."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import jsonschema
import pytest

from daemon import cli
from daemon.cli import common, status_page
from daemon.cli import text as texts
from daemon.cli.common import RunFile, running_tree
from moorline.events import (
    Check,
    Decision,
    Divergence,
    Feedback,
    FeedbackKind,
    Release,
    ReleaseKind,
    Verdict,
    json_schemas,
)
from moorline.http import StatusServer
from moorline.store import ArtifactStore

VERBS = (
    "up",
    "serve",
    "update",
    "status",
    "releases",
    "rollback",
    "resume",
    "feedback",
    "config",
    "doctor",
    "schemas",
    "audit",
    "explain",
    "lineage",
    "redrive",
    "forget",
    "demo",
)

SERVER_STATUS = {
    "alias": "assistant",
    "policy_version": 2,
    "policy_name": "assistant@v000002",
    "swap_mode": "reload",
    "ready": True,
    "why_not_ready": None,
    "swaps": [
        {
            "version": 2,
            "mode": "reload",
            "seconds": 0.71,
            "pause_seconds": 0.4,
            "at": 1e9,
            "parity_nats": 0.0123,
            "outcome": "swapped",
        }
    ],
    "publisher": {
        "queued": 0,
        "spooled": 3,
        "spooled_bytes": 999,
        "dropped": 0,
        "delivered": 17,
        "connected": False,
        "last_error": "nobody at 127.0.0.1:1",
    },
    "pinned": None,
    "refused_versions": {"1": "parity_failed"},
    "requests_in_flight": 2,
}

UPDATER_STATUS = {
    "alias": "assistant",
    "live_version": 2,
    "pinned": False,
    "phase": "waiting for feedback",
    "ready_examples": 7,
    "recent_feedback": {"found": 9, "missing": 3},
    "updates": {"released": 2, "rejected": 1},
    "last_update": {"outcome": "released", "version": 2, "at": 1e9},
    "kl_live_nats": 0.0312,
    "kl_anchor_nats": 0.101,
    "anchor_budget_left_nats": 0.399,
    "lag_events": {"interactions.v1": 4, "feedback.v1": 0},
    "lag_seconds": {"interactions.v1": 12.3, "feedback.v1": 0.0},
    "accounting": {
        "topics": {
            "interactions.v1": {"trained": 48, "pending": 9},
            "feedback.v1": {"trained": 48, "duplicate": 3, "dead_lettered": 1},
        },
        "reasons": {"feedback.v1": {"dead_lettered": {"malformed_json": 1}}},
        "consumed": {"interactions.v1": 57, "feedback.v1": 52},
        "missed": {"interactions.v1": 0},
        "total": 109,
        "balanced": True,
    },
}


def moorline(
    *arguments: str, state: Path, code: int = 0, output: str = "", **environment: str
) -> str:
    """Run the command in this process (starting one takes a second); stdout, or stderr if it fails.

    `test_real_process_...` shows that the door is the same.
    """
    clean = {name: text for name, text in os.environ.items() if not name.startswith("MOORLINE_")}
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(
            os.environ, clean | {"MOORLINE_STATE_DIR": str(state), "COLUMNS": "120"}, clear=True
        ),
        mock.patch.dict(os.environ, environment),
        mock.patch.object(sys, "argv", ["moorline", *arguments]),
        mock.patch.object(common.out, "_width", 120),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    assert (ended.value.code or 0) == code, stdout.getvalue() + stderr.getvalue()
    return stdout.getvalue() if code == 0 or output == "stdout" else stderr.getvalue()


def refusal(*arguments: str, state: Path, **environment: str) -> str:
    """The one line on stderr of a command that must exit with 1."""
    text = moorline(*arguments, state=state, code=1, **environment)
    assert text.startswith("moorline: ")
    assert text.count("\n") == 1, text
    return text


def record(store: ArtifactStore, version: int) -> Release:
    digest, files = store.put({"adapter_model.safetensors": b"x" * 1000 * version})
    release = Release(
        alias="assistant",
        version=version,
        parent=version - 1,
        kind=ReleaseKind.ADAPTER,
        artifact_digest=digest,
        files=files,
        base_model_digest="0" * 64,
        created_at=time.time(),
        examples=24,
        step_scale=0.5,
        divergences=tuple(
            Divergence(
                measured_from=reference,
                tokens_from="traffic",
                mean_kl_nats=0.03125,
                max_prompt_kl_nats=0.1,
                tokens=100,
            )
            for reference in ("live", "anchor")
        ),
        verdict=Verdict(
            decision=Decision.PASS,
            artifact_digest=digest,
            checks=(Check(name="canary_kl", measured=0.01, limit=0.05, passed=True),),
            seconds=0.1,
        ),
    )
    store.record_release(release)
    return release


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def store(state: Path) -> ArtifactStore:
    store = ArtifactStore(state / "store")
    for version in (1, 2):
        record(store, version)
    return store


class Server:
    """Speaks the server's side of the contract that the command relies on."""

    def __init__(self, store: ArtifactStore) -> None:
        posted = self.posted = []  # type: list[dict[str, object]]
        keys = self.keys = []  # type: list[str | None]

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                keys.append(self.headers.get("Authorization"))
                pin = store.pinned("assistant")
                version = pin.version if pin else 2
                self._answer(200, SERVER_STATUS | {"policy_version": version})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                posted.append(body)
                if body["interaction_id"] == "full":
                    self._answer(503, {"error": {"message": "cannot be kept now: retry"}})
                else:
                    greedy = {"not_trainable": "greedy_sampling"}
                    known = greedy if body["interaction_id"] == "greedy" else {}
                    self._answer(202, {"feedback_id": body["feedback_id"]} | known)

            def _answer(self, code: int, body: object) -> None:
                raw = json.dumps(body).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

            def log_message(self, format: str, *args: object) -> None:
                del format, args

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = str(self.http.server_address[1])
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server(store: ArtifactStore) -> Iterator[Server]:
    running = Server(store)
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture
def updater() -> Iterator[StatusServer]:
    running = StatusServer("127.0.0.1", 0, status=lambda: UPDATER_STATUS)
    running.start()
    yield running
    running.close()


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return str(listener.getsockname()[1])


# --- help and mistakes -----------------------------------------------------------------------


def test_real_process_ends_with_one_line_and_an_exit_code(state: Path) -> None:
    clean = {name: text for name, text in os.environ.items() if not name.startswith("MOORLINE_")}
    done = subprocess.run(
        [sys.executable, "-m", "daemon.cli", "rollback", "--to", "7", "--state-dir", str(state)],
        env=clean,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("moorline: assistant@v000007 was never released")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_has_an_example(verb: str, state: Path) -> None:
    text = moorline(verb, "--help", state=state)
    assert "Example" in text
    assert f"moorline {verb}" in text
    assert not state.exists(), "looking at the help changed something"


def test_help_names_every_verb(state: Path) -> None:
    text = moorline("--help", state=state)
    assert all(verb in text for verb in VERBS)


def test_wrong_usage_exits_2(state: Path) -> None:
    for arguments in (
        ["no-such-verb"],
        ["up", "--no-such-option"],
        ["config", "--set", "no-equals-sign"],
        ["feedback", "chatcmpl-1"],
        ["feedback", "chatcmpl-1", "--thumbs", "sideways"],
        ["feedback", "chatcmpl-1", "--thumbs", "up", "--score", "1"],
        ["feedback", "chatcmpl-1", "--score", "1"],
        ["feedback", "chatcmpl-1", "--correction", "so", "--signal", "copied"],
        ["rollback", "--to", "-1"],
    ):
        moorline(*arguments, state=state, code=2)


def test_bad_setting_is_one_line(state: Path) -> None:
    text = refusal("config", state=state, MOORLINE_SERVING__PROT="1")
    assert "did you mean MOORLINE_SERVING__PORT?" in text
    assert "serving.port must be" in refusal("up", "--port", "-7", state=state)


def test_up_without_a_model_is_one_line(state: Path, tmp_path: Path) -> None:
    assert "--model DIR" in refusal("up", state=state)
    assert "config.json" in refusal("up", "--model", str(tmp_path), state=state)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pickled" in refusal("up", "--model", str(tmp_path), state=state)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Passes the checks before a start; nothing here loads it."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    return path


def test_up_on_a_busy_port_is_one_line(state: Path, model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        arguments = ["--model", str(model), "--port", port, "--bootstrap", "127.0.0.1:1"]
        text = refusal("up", *arguments, state=state)
    assert f"port {port} on 127.0.0.1 is busy" in text
    assert "serving.port" in text


def test_up_with_a_broker_that_does_not_answer_is_one_line(state: Path, model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead = listener.getsockname()[1]
    arguments = ["--model", str(model), "--port", "0", "--set", "updater.port=0"]
    text = refusal("up", *arguments, "--bootstrap", f"127.0.0.1:{dead}", state=state)
    assert f"127.0.0.1:{dead}" in text


def test_up_on_a_state_directory_that_cannot_be_written_is_one_line(
    tmp_path: Path, model: Path
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    arguments = ["--model", str(model), "--bootstrap", "127.0.0.1:1"]
    text = refusal("up", *arguments, state=blocked / "state")
    assert "--state-dir" in text


def test_second_up_on_a_state_directory_is_one_line(state: Path, model: Path) -> None:
    state.mkdir()
    with (state / "up.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        arguments = ["--model", str(model), "--bootstrap", "127.0.0.1:1", "--port", "0"]
        text = refusal("up", *arguments, state=state)
    assert "another `moorline up` (pid unknown) runs on" in text


def test_update_without_a_broker_is_one_line(state: Path, model: Path) -> None:
    assert "--bootstrap" in refusal("update", "--model", str(model), state=state)


@pytest.mark.parametrize(("verb", "module"), [("serve", "serving"), ("update", "updater")])
def test_a_service_becomes_the_process_that_speaks_to_systemd(
    verb: str, module: str, state: Path, model: Path
) -> None:
    arguments = ["--model", str(model), "--bootstrap", "127.0.0.1:1", "--set", "alias=other"]
    with mock.patch.object(os, "execve") as become:
        moorline(verb, *arguments, state=state, NOTIFY_SOCKET="@systemd", WATCHDOG_USEC="1000")
    (program, argv, environment), _ = become.call_args
    assert (program, *argv) == (sys.executable, sys.executable, "-m", module)
    assert environment["NOTIFY_SOCKET"] == "@systemd"
    assert environment["WATCHDOG_USEC"] == "1000"
    assert environment["MOORLINE_ALIAS"] == "other"


# --- status and releases -----------------------------------------------------------------------


def test_status_shows_both_processes(state: Path, server: Server, updater: StatusServer) -> None:
    ports = {
        "MOORLINE_SERVING__PORT": server.port,
        "MOORLINE_UPDATER__PORT": str(updater.port),
        "MOORLINE_SERVING__API_KEY": "the-key",
    }
    text = moorline("status", state=state, **ports)
    for expected in (
        "assistant@v000002",
        "ready",
        "reload",
        "3 on disk",
        "0.0312 nats/token",
        "0.3990 nats/token left",
        "7 examples",
        "3 of 12 in the last hour name no reply",
        "2 released, 1 rejected",
        "interactions.v1 4",
        "dead lettered",
        "malformed_json 1",
        "parity_failed",
    ):
        assert expected in text
    assert "the-key" not in text
    assert server.keys == ["Bearer the-key"]
    seen = json.loads(moorline("status", "--json", state=state, **ports))
    assert seen["server"] == SERVER_STATUS
    assert seen["updater"] == UPDATER_STATUS
    assert seen["store"]["newest"] == "assistant@v000002"


def test_status_works_with_one_process_and_fails_with_none(
    state: Path, updater: StatusServer
) -> None:
    nobody = {"MOORLINE_SERVING__PORT": free_port(), "MOORLINE_UPDATER__PORT": free_port()}
    text = moorline("status", state=state, **nobody | {"MOORLINE_UPDATER__PORT": str(updater.port)})
    assert "not reachable" in text
    assert "0.0312" in text
    assert "interactions.v1 4 events, 12 s" in text
    assert "moorline up" in refusal("status", state=state, **nobody)


def test_status_tolerates_whatever_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    from rich import print as show

    for server, updater in (({}, {}), ({"swaps": [{}]}, {"accounting": {}, "last_update": None})):
        show(
            status_page.page(
                store={},
                server=server,
                server_url="",
                server_problem="",
                updater=updater,
                updater_url="",
                updater_problem="",
                stream="",
            )
        )
    assert "None" not in capsys.readouterr().out


def test_releases_lists_what_the_store_has(state: Path, store: ArtifactStore) -> None:
    os.truncate(store.root / "releases" / "assistant" / "v000001.json", 5)
    nobody = {"MOORLINE_SERVING__PORT": free_port()}
    text = moorline("releases", state=state, **nobody)
    assert "v000002" in text
    assert "0.0312" in text
    assert "1/1" in text
    assert "2.0 kB" in text
    assert "unreadable" in text
    found = json.loads(moorline("releases", "--json", state=state, **nobody))
    assert [release["version"] for release in found] == [2]
    empty = moorline("releases", "--set", "alias=other", state=state, **nobody)
    assert "base model is served" in empty


def test_releases_shows_what_was_revoked(state: Path, store: ArtifactStore) -> None:
    back = {"version": 3, "parent": 1, "revokes_after": 1}
    store.record_release(store.release("assistant", 1).model_copy(update=back))
    nobody = {"MOORLINE_SERVING__PORT": free_port()}
    lines = moorline("releases", state=state, **nobody).splitlines()
    assert ["v000002" in line for line in lines if "revoked" in line] == [True]
    found = json.loads(moorline("releases", "--json", state=state, **nobody))
    assert [one["version"] for one in found if one["revoked"]] == [2]


# --- rollback and resume -----------------------------------------------------------------------


def test_rollback_and_resume_need_neither_server_nor_kafka(
    state: Path, store: ArtifactStore
) -> None:
    nobody = {"MOORLINE_SERVING__PORT": free_port()}
    text = moorline("rollback", "--reason", "terse", state=state, **nobody)
    assert "assistant@v000001" in text
    pin = store.pinned("assistant")
    assert pin is not None
    assert (pin.version, pin.reason) == (1, "terse")
    assert "assistant@v000000" in moorline("rollback", state=state, **nobody)
    assert "nothing before the base model" in refusal("rollback", state=state, **nobody)
    assert "assistant@v000002" in moorline("resume", state=state, **nobody)
    assert store.pinned("assistant") is None
    assert "Nothing was pinned" in moorline("resume", state=state, **nobody)


def test_rollback_waits_until_the_server_serves_it(state: Path, server: Server) -> None:
    text = moorline("rollback", "--to", "1", state=state, MOORLINE_SERVING__PORT=server.port)
    assert "Served now" in text


def test_rollback_to_what_cannot_be_served_is_refused(state: Path, store: ArtifactStore) -> None:
    assert "never released" in refusal("rollback", "--to", "9", state=state)
    digest = store.release("assistant", 1).artifact_digest or ""
    (store.root / "artifacts" / digest / "adapter_model.safetensors").write_bytes(b"?")
    assert "roll back to another" in refusal("rollback", "--to", "1", state=state)
    assert store.pinned("assistant") is None


def test_rollback_to_what_was_revoked_is_refused(state: Path, store: ArtifactStore) -> None:
    clean = store.release("assistant", 1)
    back = {"version": 3, "parent": 1, "revokes_after": 1}
    store.record_release(clean.model_copy(update=back))
    assert "revoked for an erasure" in refusal("rollback", "--to", "2", state=state)
    assert store.pinned("assistant") is None
    moorline("rollback", "--to", "1", state=state)


# --- feedback ----------------------------------------------------------------------------------


def test_feedback_goes_through_the_server(state: Path, server: Server) -> None:
    port = {"MOORLINE_SERVING__PORT": server.port}
    moorline("feedback", "chatcmpl-1", "--thumbs", "down", state=state, **port)
    arguments = ["--score", "4", "--range", "1", "5", "--choice", "1", "--rater", "ana"]
    moorline("feedback", "chatcmpl-2", *arguments, state=state, **port)
    thumbs, score = (Feedback.model_validate(body) for body in server.posted)
    assert (thumbs.interaction_id, thumbs.value) == ("chatcmpl-1", -1)
    assert (score.value, score.score_min, score.score_max) == (4, 1, 5)
    assert (score.choice, score.rater) == (1, "ana")


def test_every_kind_of_feedback_can_be_given(state: Path, server: Server) -> None:
    port = {"MOORLINE_SERVING__PORT": server.port}
    moorline("feedback", "chatcmpl-1", "--correction", "Say it so.", state=state, **port)
    arguments = ["--choice", "1", "--over", "chatcmpl-1", "--over-choice", "2"]
    moorline("feedback", "chatcmpl-1", *arguments, state=state, **port)
    text = moorline("feedback", "chatcmpl-1", "--signal", "copied", state=state, **port)
    assert "teaches nothing" not in text
    correction, preference, signal = (Feedback.model_validate(body) for body in server.posted)
    assert (correction.kind, correction.text) == (FeedbackKind.CORRECTION, "Say it so.")
    assert (preference.key, preference.over_key) == ("chatcmpl-1/1", "chatcmpl-1/2")
    assert (signal.kind, signal.signal) == (FeedbackKind.SIGNAL, "copied")
    text = moorline("feedback", "chatcmpl-1", "--signal", "sneezed", state=state, **port)
    assert "abandoned, copied" in text
    text = refusal("feedback", "chatcmpl-1", "--over", "chatcmpl-1", state=state, **port)
    assert "another reply than itself" in text
    assert "needs text" in refusal("feedback", "a", "--correction", " ", state=state, **port)


def test_feedback_that_is_not_kept_is_one_line(state: Path, server: Server) -> None:
    port = {"MOORLINE_SERVING__PORT": server.port}
    text = refusal("feedback", "full", "--thumbs", "up", state=state, **port)
    assert "cannot be kept now: retry" in text
    text = refusal("feedback", "a b", "--thumbs", "up", state=state, **port)
    assert "interaction_id" in text
    text = refusal("feedback", "c", "--score", "7", "--range", "1", "5", state=state, **port)
    assert "inside" in text


def test_feedback_on_a_reply_that_cannot_teach_says_so(state: Path, server: Server) -> None:
    port = {"MOORLINE_SERVING__PORT": server.port}
    text = moorline("feedback", "greedy", "--thumbs", "up", state=state, **port)
    assert "teaches nothing: the reply cannot be learned from (greedy_sampling)" in text


def test_feedback_to_kafka_without_a_broker_is_one_line(state: Path) -> None:
    arguments = ["feedback", "chatcmpl-1", "--thumbs", "up", "--kafka"]
    assert "stream.bootstrap" in refusal(*arguments, state=state)
    nobody = {
        "MOORLINE_STREAM__BOOTSTRAP": f"127.0.0.1:{free_port()}",
        "MOORLINE_STREAM__CONNECT_TIMEOUT_SECONDS": "1",
    }
    assert "127.0.0.1" in refusal(*arguments, state=state, **nobody)


# --- config, schemas, doctor -------------------------------------------------------------------


def test_config_says_who_set_what_and_no_secret(state: Path) -> None:
    secret = {"MOORLINE_SERVING__API_KEY": "hunter2-hunter2"}
    text = moorline("config", "--set", "alias=mine", state=state, **secret)
    assert "hunter2" not in text
    assert "command line" in text
    assert "MOORLINE_SERVING__API_KEY" in text
    found = json.loads(moorline("config", "--json", "--changed", state=state, **secret))
    assert set(found) == {"state_dir", "serving.api_key"}


def test_schemas_are_the_published_ones(state: Path, tmp_path: Path) -> None:
    assert json.loads(moorline("schemas", state=state)) == json_schemas()
    one = json.loads(moorline("schemas", "feedback.v1", state=state))
    jsonschema.Draft202012Validator.check_schema(one)
    moorline("schemas", "--out", str(tmp_path / "schemas"), state=state)
    assert len(list((tmp_path / "schemas").glob("*.schema.json"))) == len(json_schemas())
    assert "feedback.v1" in refusal("schemas", "nonsense", state=state)


def test_doctor_names_what_would_stop_a_start(state: Path, model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        busy = str(listener.getsockname()[1])
        environment = {
            "MOORLINE_SERVING__PORT": busy,
            "MOORLINE_UPDATER__PORT": "0",
            "MOORLINE_STREAM__BOOTSTRAP": f"127.0.0.1:{free_port()}",
            "MOORLINE_STREAM__CONNECT_TIMEOUT_SECONDS": "1",
            "MOORLINE_MODEL__PATH": str(model),
        }
        report = moorline("doctor", "--json", state=state, code=1, output="stdout", **environment)
    found = {line["check"]: line for line in json.loads(report)}
    assert found["serving port"]["health"] == "FAIL"
    assert busy in found["serving port"]["detail"]
    assert found["broker"]["health"] == "FAIL"
    assert found["updater port"]["health"] == found["model"]["health"] == "OK"
    assert all(line["remedy"] for line in found.values() if line["health"] == "FAIL")
    assert not state.exists(), "looking changed something"


def test_run_file_of_a_dead_tree_is_not_believed(tmp_path: Path) -> None:
    fields = {"server": "http://a:1", "updater": "http://a:2", "bootstrap": "a:3"}
    RunFile(pid=os.getpid(), embedded_broker=True, started_at=0.0, **fields).write(tmp_path)
    assert running_tree(tmp_path) is not None
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    RunFile(pid=ended.pid, embedded_broker=True, started_at=0.0, **fields).write(tmp_path)
    assert running_tree(tmp_path) is None


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s ago"), (59, "59 s ago"), (90, "2 min ago"), (90_000, "1 d ago")]
)
def test_ages_are_readable(seconds: float, text: str) -> None:
    assert texts.ago(1e9, now=1e9 + seconds) == text
