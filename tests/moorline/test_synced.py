"""Every new or removed name is synced with its directory, and every file before it is named."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from moorline.durable import make_directory, write_file
from moorline.store import ArtifactStore, StoreUnavailable
from moorline.stream.spool import Spool
from tests.moorline.store.test_artifacts import ALIAS, release


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Grows by what was synced, under its name at that moment; the disk syncs all the same."""
    found: list[Path] = []
    for name in ("fsync", "fdatasync"):
        sync = getattr(os, name)

        def noted(handle: int, sync=sync) -> None:  # type: ignore[no-untyped-def]
            found.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
            sync(handle)

        monkeypatch.setattr(os, name, noted)
    return found


def test_each_directory_that_is_made_is_synced_in_the_one_above(
    tmp_path: Path, synced: list[Path]
) -> None:
    make_directory(tmp_path / "a" / "b" / "c")
    assert synced == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    synced.clear()
    make_directory(tmp_path / "a" / "b")
    assert synced == []


def test_a_file_is_synced_before_it_has_its_name_and_the_name_after(
    tmp_path: Path, synced: list[Path]
) -> None:
    write_file(tmp_path / "a.json", b"{}", "test")
    beside, directory = synced
    assert beside.name.startswith(".tmp-a.json-")
    assert directory == tmp_path


def test_the_first_artifact_makes_a_store_that_a_power_cut_leaves(
    tmp_path: Path, synced: list[Path]
) -> None:
    store = ArtifactStore(tmp_path / "state" / "store")
    store.put({"a": b"1", "b": b"2"})
    artifacts = store.root / "artifacts"
    assert synced[:3] == [tmp_path, tmp_path / "state", store.root]
    first, second, folder, names = synced[3:]
    assert [first.name, second.name] == ["a", "b"]
    assert folder == first.parent == second.parent
    assert folder.parent == names == artifacts
    synced.clear()
    store.put({"a": b"1", "b": b"2"})
    assert synced[-1] == artifacts, "whoever put it may have died before this sync"


def test_a_release_a_pin_and_its_end_are_each_synced(tmp_path: Path, synced: list[Path]) -> None:
    store = ArtifactStore(tmp_path / "store")
    release(store, 1)
    names = store.root / "releases" / ALIAS
    assert synced[-1] == names
    assert (names / "pin.reserve").stat().st_size > 0
    for verb in (lambda: store.pin(ALIAS, 1, "why"), lambda: store.unpin(ALIAS)):
        synced.clear()
        verb()
        assert synced[-1:] == [names]
    synced.clear()
    assert not store.unpin(ALIAS)
    assert synced == []


def test_an_artifact_is_out_of_sight_durably_before_it_is_removed(
    tmp_path: Path, synced: list[Path]
) -> None:
    store = ArtifactStore(tmp_path / "store")
    first = release(store, 1)
    release(store, 2)
    synced.clear()
    assert store.collect_garbage(ALIAS, set()) == [first.artifact_digest]
    assert synced == [store.root / "artifacts"]


def test_a_segment_is_synced_before_the_next_is_begun_and_that_in_its_directory(
    tmp_path: Path, synced: list[Path]
) -> None:
    directory = tmp_path / "spool"
    spool = Spool(directory, 8 * 100)  # a segment of the queue is 100 bytes
    assert spool.append(b"x" * 100) is not None
    first = directory / "000000000001.spool"
    assert synced == [directory]
    assert spool.append(b"y") is not None
    assert synced == [directory, first, directory]
    spool.sync()
    assert synced[-1] == directory / "000000000002.spool"
    assert spool.append(b"z") is not None
    synced.clear()
    spool.close()
    assert synced == [directory / "000000000002.spool"]


def test_the_room_that_is_needed_is_the_room_that_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ArtifactStore(tmp_path / "store")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    store.check_room(1000)
    with pytest.raises(StoreUnavailable, match="1000 bytes are left, the next artifact needs 1001"):
        store.check_room(1001)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_garbage_is_neither_kept_nor_pinned_nor_the_newest(tmp_path: Path, version: int) -> None:
    store = ArtifactStore(tmp_path / "store")
    made = [release(store, number) for number in (1, 2, 3, 4)]
    store.pin(ALIAS, version, "")
    kept = {made[2].artifact_digest or ""}
    removed = set(store.collect_garbage(ALIAS, kept))
    pinned = {} if version == 0 else {made[version - 1].artifact_digest}
    assert removed == {one.artifact_digest for one in made[:2]} - set(pinned)


@pytest.mark.parametrize(("age_seconds", "goes"), [(3500.0, False), (3700.0, True)])
def test_what_no_manifest_names_goes_after_an_hour(
    tmp_path: Path, age_seconds: float, goes: bool
) -> None:
    store = ArtifactStore(tmp_path / "store")
    release(store, 1)
    digest, _ = store.put({"refused": b"candidate"})
    then = time.time() - age_seconds
    os.utime(store.root / "artifacts" / digest, (then, then))
    assert store.collect_garbage(ALIAS, set()) == ([digest] if goes else [])
