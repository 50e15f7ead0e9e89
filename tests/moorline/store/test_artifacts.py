"""The store: what goes in comes out, damage is refused, kill -9 leaves the old state or the new."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moorline.events import ArtifactFile, Check, Decision, Release, ReleaseKind, Verdict
from moorline.failpoints import FAILPOINTS_VARIABLE
from moorline.store import (
    ArtifactCorrupt,
    ArtifactMissing,
    ArtifactStore,
    ManifestInvalid,
    PinInvalid,
    ReleaseConflict,
    ReleaseMissing,
)

ALIAS = "assistant"
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
contents = st.dictionaries(names, st.binary(max_size=200), min_size=1, max_size=4)


def make_release(
    digest: str, files: tuple[ArtifactFile, ...], version: int, alias: str = ALIAS
) -> Release:
    check = Check(name="canary_kl", measured=0.01, limit=0.05, passed=True)
    return Release(
        alias=alias,
        version=version,
        parent=version - 1,
        kind=ReleaseKind.ADAPTER,
        artifact_digest=digest,
        files=files,
        base_model_digest="0" * 64,
        created_at=1e9 + version,
        verdict=Verdict(
            decision=Decision.PASS, artifact_digest=digest, checks=(check,), seconds=0.1
        ),
    )


def release(
    store: ArtifactStore, version: int, content: bytes = b"", alias: str = ALIAS
) -> Release:
    digest, files = store.put({"a.safetensors": content or b"weights %d" % version})
    made = make_release(digest, files, version, alias)
    store.record_release(made)
    return made


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def visible(store: ArtifactStore) -> list[str]:
    return sorted(path.name for path in (store.root / "artifacts").iterdir() if path.name[0] != ".")


# --- bytes ---------------------------------------------------------------------------------------


@given(contents)
@settings(deadline=None)
def test_what_is_put_is_opened(files: dict[str, bytes]) -> None:
    with TemporaryDirectory() as root:
        store = ArtifactStore(Path(root))
        digest, listed = store.put(files)
        directory = store.open(digest, listed)
        assert {path.name: path.read_bytes() for path in directory.iterdir()} == files
        assert store.put(files) == (digest, listed)
        assert visible(store) == [digest]


@given(contents, st.data())
@settings(deadline=None)
def test_any_flipped_bit_is_refused(files: dict[str, bytes], data: st.DataObject) -> None:
    with TemporaryDirectory() as root:
        store = ArtifactStore(Path(root))
        digest, listed = store.put(files)
        name = data.draw(st.sampled_from(sorted(files)))
        path = store.root / "artifacts" / digest / name
        content = bytearray(path.read_bytes())
        if content:
            bit = data.draw(st.integers(0, len(content) * 8 - 1))
            content[bit // 8] ^= 1 << bit % 8
        else:
            content.append(0)
        path.write_bytes(content)
        with pytest.raises(ArtifactCorrupt, match="roll back"):
            store.open(digest, listed)
        # Putting the good bytes again heals it.
        assert store.put(files) == (digest, listed)
        store.open(digest, listed)


@pytest.mark.parametrize(
    "damage",
    [
        lambda directory: (directory / "b").unlink(),
        lambda directory: (directory / "extra.bin").write_bytes(b"x"),
        lambda directory: os.truncate(directory / "b", 1),
        lambda directory: ((directory / "b").unlink(), (directory / "b").mkdir()),
        lambda directory: ((directory / "b").unlink(), (directory / "b").symlink_to("a")),
    ],
    ids=["missing", "added", "cut", "directory", "symlink"],
)
def test_any_other_damage_is_refused(
    store: ArtifactStore, damage: Callable[[Path], object]
) -> None:
    digest, files = store.put({"a": b"same", "b": b"same"})
    damage(store.root / "artifacts" / digest)
    with pytest.raises(ArtifactCorrupt):
        store.open(digest, files)


def test_list_of_files_that_is_not_of_the_digest_is_refused(store: ArtifactStore) -> None:
    digest, files = store.put({"a": b"one"})
    _, others = store.put({"a": b"two"})
    with pytest.raises(ArtifactCorrupt, match="manifest was changed"):
        store.open(digest, others)
    with pytest.raises(ArtifactCorrupt):
        store.open("../../etc", files)


def test_missing_artifact_says_so(store: ArtifactStore) -> None:
    digest, files = store.put({"a": b"one"})
    shutil.rmtree(store.root / "artifacts" / digest)
    with pytest.raises(ArtifactMissing, match="roll back"):
        store.open(digest, files)


def test_files_are_copied_from_disk_too(store: ArtifactStore, tmp_path: Path) -> None:
    source = tmp_path / "big"
    source.write_bytes(os.urandom(3 * 2**20 + 17))
    assert store.put({"a": source}) == store.put({"a": source.read_bytes()})


@pytest.mark.parametrize("name", ["../a", "a/b", ".hidden", ""])
def test_name_that_leaves_the_artifact_is_refused(store: ArtifactStore, name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        store.put({name: b"x"})
    assert list((store.root / "artifacts").iterdir()) == []


def test_failed_put_leaves_nothing(store: ArtifactStore, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        store.put({"a": b"x", "b": tmp_path / "nowhere"})
    with pytest.raises(ValueError, match="at least one"):
        store.put({})
    assert list((store.root / "artifacts").iterdir()) == []


# --- releases ------------------------------------------------------------------------------------


def test_releases_are_listed_oldest_first(store: ArtifactStore) -> None:
    assert store.newest(ALIAS) is None
    made = [release(store, version) for version in (3, 1, 2)]
    assert store.releases(ALIAS) == sorted(made, key=lambda one: one.version)
    newest = store.newest(ALIAS)
    assert newest is not None
    assert newest.version == 3
    assert store.releases("another") == []


def test_recording_again_is_a_no_op_and_recording_another_is_refused(store: ArtifactStore) -> None:
    made = release(store, 1)
    store.record_release(made)
    digest, files = store.put({"a": b"other"})
    with pytest.raises(ReleaseConflict, match="second updater"):
        store.record_release(make_release(digest, files, 1))
    assert store.release(ALIAS, 1) == made


def test_release_is_not_recorded_without_its_bytes(store: ArtifactStore) -> None:
    digest, files = store.put({"a": b"x"})
    shutil.rmtree(store.root / "artifacts" / digest)
    with pytest.raises(ArtifactMissing):
        store.record_release(make_release(digest, files, 1))
    assert store.versions(ALIAS) == []


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_cut_manifest_is_refused_and_the_one_before_is_used(
    store: ArtifactStore, share: float
) -> None:
    first, second = release(store, 1), release(store, 2)
    path = store.root / "releases" / ALIAS / "v000002.json"
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(ManifestInvalid, match=r"v000002\.json"):
        store.release(ALIAS, 2)
    assert store.newest(ALIAS) == first
    assert store.releases(ALIAS) == [first]
    assert store.versions(ALIAS) == [1, 2]
    store.record_release(second)  # the ledger still has it, and may write it anew
    assert store.newest(ALIAS) == second


@pytest.mark.parametrize(
    ("field", "value"),
    [("version", 7), ("alias", "other"), ("verdict", None), ("artifact_digest", "0" * 64)],
)
def test_changed_manifest_is_refused(store: ArtifactStore, field: str, value: object) -> None:
    release(store, 1)
    path = store.root / "releases" / ALIAS / "v000001.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ManifestInvalid):
        store.release(ALIAS, 1)
    assert store.newest(ALIAS) is None


@pytest.mark.parametrize("alias", ["..", ".", "", "a/b", ".hidden"])
def test_alias_cannot_leave_the_store(store: ArtifactStore, alias: str) -> None:
    with pytest.raises(ValueError, match="cannot name a model"):
        store.newest(alias)


# --- the pin -------------------------------------------------------------------------------------


def test_pin_holds_until_unpinned(store: ArtifactStore) -> None:
    release(store, 1)
    release(store, 2)
    assert store.pinned(ALIAS) is None
    store.pin(ALIAS, 1, "terse answers")
    pin = ArtifactStore(store.root).pinned(ALIAS)
    assert pin is not None
    assert (pin.version, pin.reason) == (1, "terse answers")
    store.pin(ALIAS, 0, "")
    assert store.unpin(ALIAS)
    assert store.pinned(ALIAS) is None
    assert not store.unpin(ALIAS)


def test_base_model_can_be_pinned_in_an_empty_store(store: ArtifactStore) -> None:
    store.pin(ALIAS, 0, "")
    assert store.pinned(ALIAS) is not None


def test_version_that_could_not_be_served_is_not_pinned(store: ArtifactStore) -> None:
    first, second = release(store, 1), release(store, 2)
    store.pin(ALIAS, 1, "")
    (store.root / "artifacts" / (second.artifact_digest or "") / "a.safetensors").write_bytes(b"x")
    for version, error in ((2, ArtifactCorrupt), (3, ReleaseMissing)):
        with pytest.raises(error):
            store.pin(ALIAS, version, "")
    pin = store.pinned(ALIAS)
    assert pin is not None
    assert pin.version == first.version


def test_unreadable_pin_is_not_taken_for_none(store: ArtifactStore) -> None:
    store.pin(ALIAS, 0, "")
    (store.root / "releases" / ALIAS / "pin.json").write_text("{")
    with pytest.raises(PinInvalid, match="moorline"):
        store.pinned(ALIAS)
    assert store.unpin(ALIAS)


# --- tidying -------------------------------------------------------------------------------------


def test_garbage_collection_keeps_whatever_may_be_asked_for(store: ArtifactStore) -> None:
    made = {version: release(store, version) for version in range(1, 6)}
    other = release(store, 1, b"another model's", alias="other")
    candidate, _ = store.put({"a": b"not recorded yet"})
    store.pin(ALIAS, 2, "")
    removed = store.collect_garbage(ALIAS, {made[3].artifact_digest or ""})
    assert removed == sorted(made[version].artifact_digest or "" for version in (1, 4))
    for kept in (made[2], made[3], made[5], other):
        store.open(kept.artifact_digest or "", kept.files)
    assert candidate in visible(store)
    assert len(store.releases(ALIAS)) == 5


def test_forgotten_candidates_and_half_writes_go_after_an_hour(store: ArtifactStore) -> None:
    release(store, 1)
    candidate, _ = store.put({"a": b"refused"})
    half = store.root / "artifacts" / ".tmp-1-dead"
    half.mkdir()
    for path in (half, store.root / "artifacts" / candidate):
        os.utime(path, (time.time() - 7200,) * 2)
    unreadable = store.root / "releases" / ALIAS / "v000002.json"
    unreadable.write_text("{")
    assert store.collect_garbage(ALIAS, set()) == []  # that manifest might mean the candidate
    unreadable.unlink()
    assert store.collect_garbage(ALIAS, {candidate}) == []
    assert store.collect_garbage(ALIAS, set()) == [candidate]
    assert not half.exists()


# --- kill -9 -------------------------------------------------------------------------------------

VICTIM = """
import sys
from pathlib import Path
from moorline.store import ArtifactStore
from moorline.events import Release
store = ArtifactStore(Path(sys.argv[1]))
match sys.argv[2]:
    case "release":
        store.put({"a.safetensors": b"weights 2", })
        store.record_release(Release.model_validate_json(sys.argv[3]))
    case "pin":
        store.pin("assistant", 1, "new")
    case "unpin":
        store.unpin("assistant")
    case "garbage":
        store.collect_garbage("assistant", set())
"""


def kill_at(failpoint: str, store: ArtifactStore, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", VICTIM, str(store.root), *arguments],
        env=os.environ | {FAILPOINTS_VARIABLE: f"{failpoint}=kill"},
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, "the failpoint was never reached"


@pytest.mark.parametrize(
    ("failpoint", "recorded"),
    [
        ("artifacts.before_file", False),
        ("artifacts.before_rename", False),
        ("artifacts.after_rename", False),
        ("artifacts.after_put", False),
        ("artifacts.release.before_rename", False),
        ("artifacts.release.after_rename", True),
    ],
)
def test_kill_9_while_releasing_leaves_the_old_state_or_the_new(
    store: ArtifactStore, tmp_path: Path, failpoint: str, recorded: bool
) -> None:
    first = release(store, 1)
    digest, files = ArtifactStore(tmp_path / "other").put({"a.safetensors": b"weights 2"})
    second = make_release(digest, files, 2)
    kill_at(failpoint, store, "release", second.model_dump_json())
    expected = second if recorded else first
    assert store.newest(ALIAS) == expected
    store.open(expected.artifact_digest or "", expected.files)
    for name in visible(store):  # nothing half is visible under a digest
        listed = next(one.files for one in (first, second) if one.artifact_digest == name)
        store.open(name, listed)
    # The next start does the same again, and nothing stands in its way.
    assert release(store, 2, b"weights 2").version == 2
    assert store.newest(ALIAS) == second


@pytest.mark.parametrize(
    ("failpoint", "verb", "pinned"),
    [
        ("artifacts.pin.before_rename", "pin", 0),
        ("artifacts.pin.after_rename", "pin", 1),
        ("artifacts.after_unpin", "unpin", None),
    ],
)
def test_kill_9_while_pinning_leaves_one_pin_or_the_other(
    store: ArtifactStore, failpoint: str, verb: str, pinned: int | None
) -> None:
    release(store, 1)
    store.pin(ALIAS, 0, "old")
    kill_at(failpoint, store, verb)
    pin = store.pinned(ALIAS)
    assert (pin.version if pin else None) == pinned


def test_kill_9_while_collecting_garbage_leaves_only_whole_artifacts(store: ArtifactStore) -> None:
    made = [release(store, version) for version in (1, 2, 3)]
    kill_at("artifacts.garbage_removed", store, "garbage")
    left = visible(store)
    assert len(left) == 2
    for one in made:
        if one.artifact_digest in left:
            store.open(one.artifact_digest, one.files)
    assert len(store.collect_garbage(ALIAS, set())) == 1
