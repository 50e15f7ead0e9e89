"""Backups: ledger, keys and store at one version, taken while everything runs.

    <backup>/ledger.sqlite, ledger.sqlite.keys     as of one moment
    <backup>/pseudonym.key                         where it lies in the state directory
    <backup>/store/                                what that ledger can ask for
    <backup>/backup.json                           what is in it, with every file's hash

A backup is made beside its name and renamed when all of it is durable and checked. A restored
state gets its keys last, without which an updater refuses the ledger: half of it is never taken for
whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from moorline.durable import TEMPORARY_PREFIX, make_directory, sync_directory, write_file
from moorline.errors import MoorlineError
from moorline.events import ArtifactFile, Release, ReleaseKind
from moorline.failpoints import failpoint
from moorline.logs import describe
from moorline.settings import Settings
from moorline.store import ArtifactMissing, ArtifactStore
from moorline.store.files import difference, write_hashed
from updater.ledger import Ledger, LedgerReader
from updater.ledger.copies import copy_ledger, keys_path
from updater.ledger.database import lock_for_writing
from updater.retention import versions_to_keep

CONTENTS = "backup.json"
LEDGER = "ledger.sqlite"
PSEUDONYM_KEY = "pseudonym.key"
STORE = "store"
_MAY_BE_THERE = ("logs", "lost+found", "ledger.sqlite.lock")
_TRIES = 3

Say = Callable[[str], None]


class BackupError(MoorlineError):
    """A backup cannot be made or used; the message says why and what to do."""


class Contents(BaseModel):
    """``backup.json``: what a backup holds. Written last."""

    model_config = ConfigDict(frozen=True)

    format: int = 1
    alias: str
    live_version: int
    created_at: float
    """Unix seconds."""
    files: dict[str, ArtifactFile]
    """Path inside the backup -> what is in it (its own name is the last part of the path)."""


def make_backup(settings: Settings, target: Path, say: Say) -> Contents:
    """Copy ledger, keys and store to the new directory ``target``; all of it or nothing.

    Raises:
        BackupError: ``target`` is there already, a disk refused, or the copy is not sound.
        LedgerError, StoreError: what is to be copied is missing or damaged.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise BackupError(f"{target} is there already: name a directory that is not")
    target = target.absolute()
    with _disk_errors(target):
        make_directory(target.parent)
        for attempt in range(_TRIES):
            fresh = target.with_name(f"{TEMPORARY_PREFIX}{target.name}-{secrets.token_hex(4)}")
            fresh.mkdir(mode=0o700)
            try:
                contents = _fill(settings, fresh, say)
                failpoint("backup.before_rename")
                fresh.rename(target)
                sync_directory(target.parent)
                return contents
            except ArtifactMissing:
                # Removed as too old between the ledger's copy and its own.
                if attempt + 1 == _TRIES:
                    raise
                say("A release was removed meanwhile: beginning anew.")
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    raise AssertionError("unreachable")


def _fill(settings: Settings, fresh: Path, say: Say) -> Contents:
    copy_ledger(settings.ledger_path, fresh / LEDGER, _percent("ledger", say))
    if settings.pseudonym_key_path.exists():
        write_hashed(fresh, PSEUDONYM_KEY, settings.pseudonym_key_path)
        (fresh / PSEUDONYM_KEY).chmod(0o600)
    say("Checking the ledger's copy.")
    with Ledger.open_readonly(fresh / LEDGER) as ledger:
        if differences := ledger.audit():
            raise BackupError(
                f"the ledger does not agree with itself ({differences[0]}): run `moorline audit`; "
                "nothing was written"
            )
        live_version = ledger.live_version()
        _copy_store(settings, ledger, fresh / STORE, say)
    contents = Contents(
        alias=settings.alias,
        live_version=live_version,
        created_at=time.time(),
        files=dict(_hashed(fresh)),
    )
    failpoint("backup.before_contents")
    write_file(fresh / CONTENTS, contents.model_dump_json(indent=1).encode(), "backup.contents")
    return contents


def _copy_store(settings: Settings, ledger: LedgerReader, root: Path, say: Say) -> None:
    """Copy every manifest that the ledger knows, and the bytes that anybody can ask for."""
    original, copy = ArtifactStore(settings.store_dir), ArtifactStore(root)
    make_directory(root)
    newest = ledger.newest_version()
    wanted = versions_to_keep(ledger, settings.learning.keep_releases)
    pin = original.pinned(settings.alias)
    if pin is not None and 0 < pin.version <= newest:
        wanted.add(pin.version)
    needed = {ledger.live_version(), ledger.anchor().version} | ({pin.version} if pin else set())
    releases = ledger.releases(newest or 1)
    for number, release in enumerate(releases, start=1):
        if release.version in wanted:
            say(f"Copying {release.name} ({number} of {len(releases)}).")
            _copy_artifact(original, copy, release, needed=release.version in needed)
    alias_dir = copy.alias_dir(settings.alias)
    make_directory(alias_dir)
    for release in releases:
        write_file(
            alias_dir / f"v{release.version:06d}.json", release.to_bytes(), "backup.manifest"
        )
    for name in ("pin.json", "anchor.json"):
        with contextlib.suppress(FileNotFoundError):
            content = (original.alias_dir(settings.alias) / name).read_bytes()
            write_file(alias_dir / name, content, "backup.request")


def _copy_artifact(
    original: ArtifactStore, copy: ArtifactStore, release: Release, *, needed: bool
) -> None:
    if release.kind is ReleaseKind.BASE or release.artifact_digest is None:
        return
    try:
        directory = original.open(release.artifact_digest, release.files)
    except ArtifactMissing:
        if needed:
            raise
        return  # no longer kept; its manifest is, as in the store
    copy.put({file.name: directory / file.name for file in release.files})
    copy.open(release.artifact_digest, release.files)


def read_backup(source: Path) -> Contents:
    """What a backup holds, after every byte of it was checked.

    Raises:
        BackupError: it is no backup, or not whole.
    """
    try:
        contents = Contents.model_validate_json((source / CONTENTS).read_bytes())
    except FileNotFoundError:
        raise BackupError(
            f"{source} is no backup: it has no {CONTENTS}, which `moorline backup` writes last"
        ) from None
    except (OSError, ValidationError) as error:
        raise BackupError(
            f"{source / CONTENTS} cannot be read ({describe(error)}): use another backup"
        ) from None
    if contents.format != 1:
        raise BackupError(
            f"{source} has backup format {contents.format}: restore it with the newer Moorline "
            "that made it"
        )
    for name, file in contents.files.items():
        path = source / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BackupError(f"{source} names {name}, outside of itself: use another backup")
        why = "is missing" if not path.exists() else difference(path, file)
        if why:
            raise BackupError(f"{path} {why}: this backup is damaged, use another one")
    return contents


def restore_backup(settings: Settings, source: Path, say: Say) -> Contents:
    """Make an empty state directory what it was when the backup was made.

    Raises:
        BackupError: the directory is not empty, the backup is damaged, or a disk refused.
        LedgerLocked: an updater runs there.
    """
    state_dir = settings.state_dir.absolute()
    say("Checking the backup.")
    contents = read_backup(source)
    if contents.alias != settings.alias:
        raise BackupError(
            f"{source} is of {contents.alias!r}, not {settings.alias!r}: set alias, or take the "
            "right backup"
        )
    with _disk_errors(state_dir):
        make_directory(state_dir.parent)
        if not state_dir.exists():
            state_dir.mkdir(mode=0o700)
            sync_directory(state_dir.parent)
        _refuse_unless_empty(settings)
        with contextlib.closing(lock_for_writing(_lock_path(settings))):
            _refuse_unless_empty(settings)
            fresh = state_dir / f"{TEMPORARY_PREFIX}restore-{secrets.token_hex(4)}"
            fresh.mkdir(mode=0o700)
            try:
                for number, name in enumerate(contents.files, start=1):
                    say(f"Copying {name} ({number} of {len(contents.files)}).")
                    _copy_file(source / name, fresh / name, contents.files[name])
                    if "/" not in name:  # the store's are for servers too, these are secret
                        (fresh / name).chmod(0o600)
                _put_in_place(settings, fresh)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)
    return contents


def _copy_file(source: Path, target: Path, expected: ArtifactFile) -> None:
    make_directory(target.parent)
    written = write_hashed(target.parent, target.name, source)
    if written != expected:
        raise BackupError(f"{source} changed while it was read: use another backup")


def _put_in_place(settings: Settings, fresh: Path) -> None:
    """Rename part by part; keys last, for without them an updater refuses the ledger."""
    for part, target in (
        (fresh / PSEUDONYM_KEY, settings.pseudonym_key_path),
        (fresh / LEDGER, settings.ledger_path),
        (fresh / STORE, settings.store_dir),
        (keys_path(fresh / LEDGER), keys_path(settings.ledger_path)),
    ):
        if part.exists():
            if part.is_dir():
                for directory, _, _ in os.walk(part):
                    sync_directory(Path(directory))
            make_directory(target.parent)
            part.rename(target)
            sync_directory(target.parent)
            failpoint("restore.part")


def _lock_path(settings: Settings) -> Path:
    return settings.ledger_path.with_name(f"{settings.ledger_path.name}.lock")


def _refuse_unless_empty(settings: Settings) -> None:
    for entry in sorted(settings.state_dir.iterdir()):
        if entry.name.startswith(f"{TEMPORARY_PREFIX}restore-"):
            shutil.rmtree(entry)  # a restore was cut off before it put anything in place
        elif entry.name not in _MAY_BE_THERE and not (entry.is_dir() and not any(entry.iterdir())):
            raise BackupError(
                f"{settings.state_dir} is not empty ({entry.name}): stop whatever runs there and "
                "move it away, or give another --state-dir; nothing was changed"
            )


def _hashed(root: Path) -> Iterator[tuple[str, ArtifactFile]]:
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.name.endswith(("-wal", "-shm")):
            with path.open("rb") as opened:
                digest = hashlib.file_digest(opened, "sha256").hexdigest()
            file = ArtifactFile(name=path.name, sha256=digest, size_bytes=path.stat().st_size)
            yield str(path.relative_to(root)), file


def _percent(what: str, say: Say) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        say(f"Copying the {what}: {100 * done // max(total, 1)} %.")

    return progress


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BackupError(
            f"{path} cannot be written ({error.strerror}): check free space and permissions; "
            "nothing half passes as whole, so run it again"
        ) from error
