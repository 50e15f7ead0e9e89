"""What a disk says of `fsync` counts: the order of syncs, and syncs that fail. Under strace."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from moorline.events import Release
from moorline.store import ArtifactStore
from moorline.stream.spool import Spool
from tests.moorline.store.test_artifacts import ALIAS, release
from tests.updater.ledger.fixtures import Log, interaction, rating
from updater.ledger import Ledger

ROOT = Path(__file__).parents[2]
STORE, LEDGER = "fsync", "fdatasync"
"""The calls that each syncs by; SQLite was built for the second one, here and in Debian."""


@functools.cache
def why_not_traced() -> str | None:
    if shutil.which("strace") is None:
        return "strace is not installed (Debian: apt-get install strace)"
    tried = subprocess.run(["strace", "-qq", "-e", "trace=fsync", "true"], capture_output=True)
    return None if tried.returncode == 0 else "strace may not trace here (ptrace is not allowed)"


@dataclass(frozen=True)
class Call:
    """One sync or rename."""

    name: str
    path: str
    """The path; a rename's new one."""
    failed: bool
    source: str = ""
    """A rename's old path."""


def traced(
    script: str, *arguments: object, inject: str = ""
) -> tuple[list[Call], subprocess.CompletedProcess[str]]:
    """Run a script of ours; its syncs and renames in order."""
    why = why_not_traced()
    if why is not None:
        pytest.skip(why)
    log = Path(str(arguments[0])).with_name("strace.log")
    command = ["strace", "-f", "--seccomp-bpf", "-y", "-qq", "-e", "signal=none", "-o", str(log)]
    command += ["-e", "trace=fsync,fdatasync,rename,renameat,renameat2"]
    command += ["-e", f"inject={inject}"] if inject else []
    done = subprocess.run(
        [*command, sys.executable, "-c", script, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    calls = []
    for line in log.read_text().splitlines():
        synced = re.search(r"(fsync|fdatasync)\(\d+<(.+?)>\)\s+= (-?\d+)", line)
        renamed = re.search(r"rename\w*\(.*?\"(.+?)\".*\"(.+)\".*\)\s+= (-?\d+)", line)
        if synced:
            calls.append(Call(synced[1], synced[2], synced[3] != "0"))
        elif renamed:
            calls.append(Call("rename", renamed[2], renamed[3] != "0", renamed[1]))
    return calls, done


def visible_from(calls: list[Call], path: Path) -> int:
    """The place of the rename that gave ``path`` its name; all that it names was synced before.

    A sync that failed counts for ever: a second one of the same file says yes, and means nothing.
    """
    place = max(
        place
        for place, call in enumerate(calls)
        if call.name == "rename" and call.path == str(path) and not call.failed
    )
    source = calls[place].source
    contents = [f"{source}/{one.name}" for one in path.iterdir()] if path.is_dir() else []
    for part in (source, *contents):
        syncs = [call for call in calls[:place] if call.name == STORE and call.path == part]
        assert syncs, f"{part} became visible as {path} without a sync"
        assert not any(call.failed for call in syncs), f"{part} became visible as {path}"
    return place


def durable_from(calls: list[Call], path: Path) -> int:
    """The place of the sync after which no power cut takes ``path`` away, name or bytes."""
    visible = visible_from(calls, path)
    directory = str(path.parent)
    place, sync = next(
        (place, call)
        for place, call in enumerate(calls)
        if place > visible and call.name == STORE and call.path == directory
    )
    assert not sync.failed
    return place


def commits(calls: list[Call]) -> list[int]:
    """The places of the ledger's commits."""
    return [
        place
        for place, call in enumerate(calls)
        if call.name == LEDGER and call.path.endswith("/ledger.sqlite-wal") and not call.failed
    ]


# --- order ---------------------------------------------------------------------------------------

CYCLE = """
import sys
from pathlib import Path
from tests.updater.harness import Updater

updater = Updater(Path(sys.argv[2]), Path(sys.argv[1]))
updater.interact(4)
updater.loop.cycle()
assert [release.version for release in updater.published] == [1]
updater.store.pin("assistant", 0, "a test")
updater.close()
"""


def test_bytes_are_on_the_disk_before_a_row_names_them_and_the_row_before_the_manifest(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    calls, done = traced(CYCLE, tmp_path / "state", tiny_model_dir)
    assert done.returncode == 0, done.stderr
    store = tmp_path / "state/store"
    (artifact,) = (store / "artifacts").iterdir()
    manifest, pin = (store / "releases" / ALIAS / name for name in ("v000001.json", "pin.json"))
    begun = next(place for place, call in enumerate(calls) if "/artifacts/.tmp-" in call.path)
    durable, shown = durable_from(calls, artifact), visible_from(calls, manifest)
    assert not any(begun < commit < durable for commit in commits(calls)), "no row names it yet"
    assert any(durable < commit < shown for commit in commits(calls)), "its row comes before"
    announced = min(commit for commit in commits(calls) if commit > shown)
    assert durable_from(calls, manifest) < announced, "else a restart would not show it again"
    assert durable_from(calls, pin)


# --- a sync that fails ---------------------------------------------------------------------------

PUT = """
import sys
from pathlib import Path
from moorline.store import ArtifactStore, StoreUnavailable

store = ArtifactStore(Path(sys.argv[1]))
for _ in range(3):
    try:
        store.put({"a.bin": b"first", "b.bin": b"second"})
        print("done", flush=True)
        break
    except StoreUnavailable as error:
        print(error, flush=True)
        print(sum(1 for _ in (store.root / "artifacts").iterdir()), flush=True)
"""


def count_syncs(calls: list[Call]) -> int:
    return sum(call.name == STORE for call in calls)


def test_an_artifact_that_could_not_be_synced_is_abandoned_and_written_anew(
    tmp_path: Path,
) -> None:
    def put(inject: str = "") -> tuple[ArtifactStore, list[Call], list[str]]:
        store = ArtifactStore(Path(tempfile.mkdtemp(dir=tmp_path)) / "store")
        release(store, 1)
        calls, done = traced(PUT, store.root, inject=inject)
        return store, calls, done.stdout.splitlines()

    _, sound, _ = put()
    assert count_syncs(sound) > 0
    for failing in range(1, count_syncs(sound) + 1):
        store, calls, (refused, left, last) = put(f"{STORE}:error=EIO:when={failing}")
        assert "Input/output error" in refused
        assert left == "1", "of the failed try nothing is to be seen, not under another name either"
        assert last == "done"
        (content,) = store.root.glob("artifacts/*/a.bin")
        assert durable_from(calls, content.parent)


def test_a_disk_that_syncs_nothing_makes_no_artifact(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    release(store, 1)
    calls, done = traced(PUT, store.root, inject=f"{STORE}:error=EIO")
    assert done.stdout.splitlines()[1::2] == ["1", "1", "1"]
    assert not any(re.search(r"/artifacts/[0-9a-f]{64}$", call.path) for call in calls)


RECORD = """
import sys
from pathlib import Path
from moorline.store import ArtifactStore, StoreError
from moorline.events import Release

store = ArtifactStore(Path(sys.argv[1]))
release = Release.model_validate_json(sys.argv[3])
verbs = {
    "record": lambda: store.record_release(release),
    "pin": lambda: store.pin(release.alias, 1, "a test"),
}
for _ in range(2):
    try:
        verbs[sys.argv[2]]()
        print("done")
        break
    except StoreError as error:
        print(error)
"""


@pytest.mark.parametrize(("verb", "name"), [("record", "v000002.json"), ("pin", "pin.json")])
def test_a_manifest_or_pin_that_could_not_be_synced_is_refused_and_written_anew(
    tmp_path: Path, verb: str, name: str
) -> None:
    def write(inject: str = "") -> tuple[ArtifactStore, Release, list[Call], list[str]]:
        store = ArtifactStore(Path(tempfile.mkdtemp(dir=tmp_path)) / "store")
        second = release(store, 1).model_copy(update={"version": 2, "parent": 1})
        calls, done = traced(RECORD, store.root, verb, second.model_dump_json(), inject=inject)
        return store, second, calls, done.stdout.splitlines()

    _, _, sound, _ = write()
    assert count_syncs(sound) > 0
    for failing in range(1, count_syncs(sound) + 1):
        store, second, calls, (refused, last) = write(f"{STORE}:error=EIO:when={failing}")
        assert "Input/output error" in refused
        assert last == "done"
        assert durable_from(calls, store.root / "releases" / ALIAS / name)
        if verb == "record":
            assert store.release(ALIAS, 2) == second
        else:
            assert store.pinned(ALIAS) is not None


INGEST = """
import json, os, sys
from pathlib import Path
from tests.faults.test_syncs import batches
from updater.ledger import Ledger, LedgerUnavailable

ledger = Ledger(Path(sys.argv[1]))
for batch in batches():
    for _ in range(3):
        before = ledger.accounting().as_dict(), str(ledger.offsets())
        try:
            ledger.ingest(batch)
            break
        except LedgerUnavailable as error:
            assert (ledger.accounting().as_dict(), str(ledger.offsets())) == before
            print(error, flush=True)
            if "die" in sys.argv:
                os._exit(9)
"""


def batches() -> list[list[Any]]:
    """Four batches of a log."""
    log = Log()
    return [
        [log.parsed(interaction(name)), log.parsed(rating(name)), log.parsed(b"unreadable")]
        for name in "abcd"
    ]


def recount(path: Path) -> tuple[dict[str, Any], Any]:
    with Ledger.open_readonly(path) as reader:
        assert reader.audit() == []
        return reader.accounting().as_dict(), reader.offsets()


@pytest.mark.parametrize("file", ["ledger.sqlite-wal", "ledger.sqlite.keys-wal"])
@pytest.mark.parametrize("fate", ["live", "die"])
def test_a_transaction_that_could_not_be_synced_is_made_again(
    tmp_path: Path, fate: str, file: str
) -> None:
    plain, path = tmp_path / "plain/ledger.sqlite", tmp_path / "state/ledger.sqlite"
    for one in (plain, path):
        Ledger(one).close()
    sound, _ = traced(INGEST, plain, "live")
    syncs = [number for number, call in enumerate(sound, 1) if call.path.endswith(f"/{file}")]
    # A late batch's: SQLite ignores the sync of the directory when it begins a log.
    inject = f"{LEDGER}:error=EIO:when={syncs[-3]}"
    calls, done = traced(INGEST, path, fate, inject=inject)
    assert [call.path for call in calls if call.failed] == [str(path.with_name(file))]
    refusals = done.stdout.splitlines()
    assert done.returncode == (9 if fate == "die" else 0), done.stderr
    assert len(refusals) == 1
    assert "disk I/O error" in refusals[0]
    assert "check free space" in refusals[0]
    if fate == "die":  # on a disk that may hold the frames after all: before or after, not between
        recount(path)
        with Ledger(path) as ledger:
            for batch in batches():
                ledger.ingest(batch)
    reference = tmp_path / "reference.sqlite"
    with Ledger(reference) as ledger:
        for batch in batches():
            ledger.ingest(batch)
    assert recount(path) == recount(reference)


LOOP = """
import json, sys
from pathlib import Path
import torch
from tests.updater.harness import Updater
from moorline import metrics

torch.set_num_threads(1)
updater = Updater(Path(sys.argv[2]), Path(sys.argv[1]))
updater.interact(4)
phases, fates = [], []
while not updater.published:
    updater.loop.cycle()
    phases.append(updater.loop.phase)
    fates.append(updater.fates())
print(json.dumps({
    "phases": phases,
    "fates": fates,
    "digest": updater.published[0].artifact_digest,
    "refusals": metrics.DISK_REFUSALS.labels(where="store")._value.get(),
}))
updater.close()
"""


def test_an_update_whose_bytes_cannot_be_synced_waits_and_is_made_again(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    plain = subprocess.run(
        [sys.executable, "-c", LOOP, str(tmp_path / "plain/state"), str(tiny_model_dir)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    _, done = traced(LOOP, tmp_path / "state", tiny_model_dir, inject="fsync:error=EIO:when=6..12")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    *waiting, last = report["fates"]
    assert waiting
    assert all(one == {"pending": 4} for one in waiting)
    assert set(report["phases"][:-1]) == {"disk_unavailable"}
    assert last == {"trained": 4}
    assert report["refusals"] == len(waiting)
    assert report["digest"] == json.loads(plain.stdout)["digest"]
    assert done.stderr.count("it will retry: disk_unavailable") == 1


SPOOL = """
import json, sys, time
from pathlib import Path
from moorline.settings import StreamSettings
from moorline.stream import Topic
from moorline.stream.publisher import Publisher

settings = StreamSettings(bootstrap="127.0.0.1:1", spool_max_bytes=int(sys.argv[2]))
publisher = Publisher(settings, Path(sys.argv[1]))
publisher.start()

def safe(number):
    waiting = [publisher.publish_durably(Topic.FEEDBACK, "k", b"x" * 900) for _ in range(number)]
    time.sleep(2.5)
    return [one.done() and one.result() for one in waiting]

print(json.dumps([safe(int(sys.argv[3])), safe(1)]))
publisher.close(0.1)
"""


@pytest.mark.parametrize(("spool_bytes", "events"), [(2**20, 1), (8 * 4096, 20)])
def test_an_event_that_could_not_be_synced_is_in_the_spool_and_never_said_to_be_safe(
    tmp_path: Path, spool_bytes: int, events: int
) -> None:
    """The second case: the sync that fails is that of a segment that is full."""
    directory = tmp_path / "spool"
    calls, done = traced(SPOOL, directory, spool_bytes, events, inject="fdatasync:error=EIO:when=1")
    first, then = json.loads(done.stdout)
    failed = [call.path for call in calls if call.failed]
    assert len(failed) == 1
    assert [call.path for call in calls if call.name == "fdatasync"].count(failed[0]) == 1, (
        "a second sync of what failed says yes, and means nothing"
    )
    in_failed_segment = min(events, 5)
    assert first[:in_failed_segment] == [False] * in_failed_segment
    assert then == [True]
    spool = Spool(directory, spool_bytes)
    assert spool.count == events + 1
    spool.close()
