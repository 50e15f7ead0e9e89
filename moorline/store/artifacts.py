"""Content-addressed store of release bytes, and the manifests and the pin that refer to them.

    <root>/artifacts/<digest>/<files>            named by the hash of what is in it; never changed
    <root>/releases/<alias>/v000042.json         one manifest a version, written after its bytes
    <root>/releases/<alias>/pin.json             the operator's rollback, while there is one
    <root>/releases/<alias>/pin.reserve          the room to write it when the disk is full

One process writes (the updater, under its ledger's lock; an operator only writes the pin), any
number read. Bytes are written beside, synced, renamed and the directory synced, so that whatever is
visible under its name is whole; every read still checks every hash.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moorline.durable import (
    OF_THE_DISK,
    TEMPORARY_PREFIX,
    make_directory,
    make_reserve,
    sync_directory,
    write_file,
)
from moorline.errors import MoorlineError
from moorline.events import ArtifactFile, Release, ReleaseKind, artifact_digest, policy_name
from moorline.failpoints import failpoint
from moorline.logs import describe
from moorline.store.files import difference, write_hashed

logger = logging.getLogger("moorline.artifacts")

_ABANDONED_SECONDS = 3600.0
_DIGEST = re.compile(r"[0-9a-f]{64}")
_MANIFEST = re.compile(r"v(\d{6,})\.json")


class StoreError(MoorlineError):
    """Something in the store is missing or wrong; the line says what to do."""


class StoreUnavailable(StoreError):
    """The disk refused (full, read-only, failing). Nothing half is visible; it may be repeated."""


class ArtifactMissing(StoreError):
    """The store has no artifact of this digest."""


class ArtifactCorrupt(StoreError):
    """The files are not the ones that were put."""


class ReleaseMissing(StoreError):
    """The store has no manifest of this version."""


class ManifestInvalid(StoreError):
    """A manifest is cut, changed, or not approved by a gate."""


class ReleaseConflict(StoreError):
    """Another release with this version is already recorded."""


class PinInvalid(StoreError):
    """There is a pin, but it cannot be read: keep what is served, train nothing."""


class Pin(BaseModel):
    """The operator's decision to serve one version until further notice."""

    model_config = ConfigDict(frozen=True)

    version: int = Field(ge=0)
    reason: str = ""
    pinned_at: float = Field(description="Unix seconds")


class ArtifactStore:
    """The store under one directory; any number of instances and processes may share it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._artifacts = root / "artifacts"
        self._releases = root / "releases"

    # --- bytes ---------------------------------------------------------------------------------

    def put(self, files: Mapping[str, bytes | Path]) -> tuple[str, tuple[ArtifactFile, ...]]:
        """Keep these files durably under their common hash; again is a no-op.

        Args:
            files: plain file name -> its bytes, or a file to copy.

        Returns:
            The digest, and what ``open`` needs to check every byte.

        Raises:
            ValueError: no files, or a name with a directory in it.
            StoreUnavailable: the disk refused; nothing became visible.
        """
        if not files:
            raise ValueError("an artifact needs at least one file")
        temporary = self._artifacts / f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"
        with disk_errors(self.root):
            make_directory(self._artifacts)
            temporary.mkdir()
            try:
                written = []
                for name in sorted(files):
                    failpoint("artifacts.before_file")
                    written.append(write_hashed(temporary, name, files[name]))
                sync_directory(temporary)
                digest = artifact_digest(tuple(written))
                failpoint("artifacts.before_rename")
                self._make_visible(temporary, digest, tuple(written))
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        failpoint("artifacts.after_put")
        return digest, tuple(written)

    def _make_visible(self, temporary: Path, digest: str, files: tuple[ArtifactFile, ...]) -> None:
        """Rename it to its digest, durably; where that fails, remove it again."""
        final = self._artifacts / digest
        try:
            temporary.rename(final)
        except OSError:
            if not final.exists():
                raise
            try:  # it is already there: keep it if it is sound, else put the good copy in its place
                self.open(digest, files)
                sync_directory(self._artifacts)  # whoever put it may have died before
                return
            except (ArtifactMissing, ArtifactCorrupt):
                logger.warning(
                    "a damaged artifact in the store was replaced by a good copy of the same bytes",
                    extra={"event": "artifact_replaced", "artifact": digest},
                )
                self._discard(final)
                temporary.rename(final)
        failpoint("artifacts.after_rename")
        try:
            sync_directory(self._artifacts)
        except OSError:
            final.rename(temporary)
            raise

    def check_room(self, size_bytes: int) -> None:
        """Raise ``StoreUnavailable`` if the disk has no room for what long work will write."""
        with disk_errors(self.root):
            make_directory(self._artifacts)
            free_bytes = shutil.disk_usage(self._artifacts).free
        if free_bytes < size_bytes:
            why = f"{free_bytes} bytes are left, the next artifact needs {size_bytes}"
            raise StoreUnavailable(f"the store {self.root} is full ({why}): make room")

    def open(self, digest: str, files: tuple[ArtifactFile, ...]) -> Path:
        """The directory of an artifact, after every byte of it was checked.

        Raises:
            ArtifactMissing: there is none.
            ArtifactCorrupt: a file is missing, changed, or was added.
        """
        if not _DIGEST.fullmatch(digest) or digest != artifact_digest(files):
            raise ArtifactCorrupt(
                f"artifact digest {digest[:12]} is not that of its list of files: "
                "the manifest was changed; restore it or roll back"
            )
        directory = self._artifacts / digest
        remedy = "restore it from a backup of the store, or roll back to another version"
        if not directory.is_dir():
            raise ArtifactMissing(f"artifact {digest[:12]} is not in {self._artifacts}: {remedy}")
        present = {entry.name for entry in os.scandir(directory)}
        listed = {file.name for file in files}
        if present != listed:
            odd = ", ".join(sorted(present ^ listed))
            raise ArtifactCorrupt(
                f"artifact {digest[:12]} has missing or extra files ({odd}): {remedy}"
            )
        for file in files:
            why = difference(directory / file.name, file)
            if why:
                raise ArtifactCorrupt(f"{file.name} of artifact {digest[:12]} {why}: {remedy}")
        return directory

    # --- releases ------------------------------------------------------------------------------

    def record_release(self, release: Release) -> None:
        """Make a release visible to servers, durably; its bytes must be here already. Repeatable.

        Raises:
            ArtifactMissing, ArtifactCorrupt: the bytes are not (all) here.
            ReleaseConflict: this version is taken by a different release.
            StoreUnavailable: the disk refused.
        """
        if release.kind is not ReleaseKind.BASE:
            self.open(release.artifact_digest or "", release.files)
        path = self._manifest_path(release.alias, release.version)
        if path.exists():
            with contextlib.suppress(ManifestInvalid):  # a broken one may be written anew
                if self.release(release.alias, release.version) != release:
                    raise ReleaseConflict(
                        f"{release.name} is already recorded with other contents in {path}: "
                        "is a second updater writing to this store? Stop it, move this one's "
                        "ledger.sqlite* away and start again: it adopts the store's line"
                    )
        # Also where it is there already: that it is seen does not say that it reached the disk.
        with disk_errors(self.root):
            make_directory(path.parent)
            make_reserve(self._reserve_path(release.alias))
            write_file(path, release.to_bytes(), "artifacts.release")

    def release(self, alias: str, version: int) -> Release:
        """One manifest.

        Raises:
            ReleaseMissing: never recorded.
            ManifestInvalid: cut, changed, of another version, or without a passing verdict.
        """
        path = self._manifest_path(alias, version)
        try:
            release = Release.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise ReleaseMissing(
                f"{policy_name(alias, version)} was never released: `moorline releases` lists "
                "what there is"
            ) from None
        except (OSError, ValidationError) as error:
            raise ManifestInvalid(
                f"manifest {path} cannot be used ({describe(error)}): restore it from a backup"
            ) from None
        if (release.alias, release.version) != (alias, version):
            raise ManifestInvalid(f"manifest {path} is of {release.name}: restore the right one")
        return release

    def releases(self, alias: str) -> list[Release]:
        """Every readable release, oldest first; the others are skipped with a warning."""
        found = (self._readable(alias, version) for version in self.versions(alias))
        return [release for release in found if release]

    def newest(self, alias: str) -> Release | None:
        """The highest readable version; None when nothing was released yet."""
        for version in reversed(self.versions(alias)):
            release = self._readable(alias, version)
            if release:
                return release
        return None

    def versions(self, alias: str) -> list[int]:
        """The recorded version numbers, ascending, readable or not."""
        try:
            names = os.listdir(self.alias_dir(alias))
        except FileNotFoundError:
            return []
        return sorted(int(match[1]) for match in map(_MANIFEST.fullmatch, names) if match)

    def _readable(self, alias: str, version: int) -> Release | None:
        try:
            return self.release(alias, version)
        except StoreError as error:
            logger.warning(
                "release skipped: its manifest cannot be used",
                extra={
                    "event": "release_skipped",
                    "alias": alias,
                    "version": version,
                    "error": str(error),
                },
            )
            return None

    # --- the operator's rollback ---------------------------------------------------------------

    def pin(self, alias: str, version: int, reason: str) -> Pin:
        """Serve ``version`` (0: the base model) and train nothing, until ``unpin``.

        Raises:
            ReleaseMissing, ManifestInvalid, ArtifactMissing, ArtifactCorrupt: this version could
                not be served; the pin is as it was.
            StoreUnavailable: the disk refused; a full one does not, once there was a release.
        """
        if version > 0:
            release = self.release(alias, version)
            if release.kind is not ReleaseKind.BASE:
                self.open(release.artifact_digest or "", release.files)
        pin = Pin(version=version, reason=reason, pinned_at=time.time())
        path, content = self._pin_path(alias), pin.model_dump_json().encode()
        with disk_errors(self.root):
            make_directory(path.parent)
            write_file(path, content, "artifacts.pin", self._reserve_path(alias))
        return pin

    def unpin(self, alias: str) -> bool:
        """Follow the newest release again; whether there was a pin.

        Raises:
            StoreUnavailable: the disk refused.
        """
        with disk_errors(self.root):
            try:
                self._pin_path(alias).unlink()
            except FileNotFoundError:
                return False
            failpoint("artifacts.after_unpin")
            sync_directory(self.alias_dir(alias))
        return True

    def pinned(self, alias: str) -> Pin | None:
        """The pin, if there is one.

        Raises:
            PinInvalid: there is one that nobody can read.
        """
        path = self._pin_path(alias)
        try:
            return Pin.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError):
            raise PinInvalid(
                f"{path} cannot be read: `moorline rollback --to N` or `moorline resume` again"
            ) from None

    # --- tidying -------------------------------------------------------------------------------

    def collect_garbage(self, alias: str, keep: set[str]) -> list[str]:
        """Remove the artifacts that nobody can ask for any more; for the one writer only.

        Kept: the digests in ``keep`` (what in-flight streams, untrained events and candidates refer
        to is the caller's knowledge), those of the pinned and the newest version and of any other
        alias. What no manifest names (a refused candidate) goes after an hour, unless there is a
        manifest that cannot be read and so might name it. Manifests stay: they are the lineage.

        Returns:
            The digests removed.
        """
        manifests = [
            (other, self._readable(other, version))
            for other in self._aliases()
            for version in self.versions(other)
        ]
        ours = {release.artifact_digest for name, release in manifests if release and name == alias}
        kept = keep | {
            release.artifact_digest for name, release in manifests if release and name != alias
        }
        newest, pin = self.newest(alias), self.pinned(alias)
        if newest:
            kept.add(newest.artifact_digest)
        if pin is not None and pin.version > 0:
            kept.add(self.release(alias, pin.version).artifact_digest)
        orphans_may_go = all(release for _, release in manifests)
        removed = []
        for entry in sorted(os.scandir(self._artifacts), key=lambda entry: entry.name):
            abandoned = time.time() - entry.stat().st_mtime > _ABANDONED_SECONDS
            if entry.name.startswith(TEMPORARY_PREFIX):
                if abandoned:
                    shutil.rmtree(entry.path, ignore_errors=True)
            elif entry.name not in kept and (entry.name in ours or (abandoned and orphans_may_go)):
                self._discard(Path(entry.path))
                failpoint("artifacts.garbage_removed")
                removed.append(entry.name)
        return removed

    def _discard(self, directory: Path) -> None:
        """Take an artifact out of sight in one step, then remove it."""
        hidden = self._artifacts / f"{TEMPORARY_PREFIX}gone-{secrets.token_hex(8)}"
        directory.rename(hidden)
        sync_directory(self._artifacts)
        shutil.rmtree(hidden, ignore_errors=True)

    # --- names ---------------------------------------------------------------------------------

    def _aliases(self) -> list[str]:
        if not self._releases.is_dir():
            return []
        return sorted(entry.name for entry in os.scandir(self._releases) if entry.is_dir())

    def alias_dir(self, alias: str) -> Path:
        if not alias or alias.startswith(".") or "/" in alias:
            raise ValueError(f"{alias!r} cannot name a model")
        return self._releases / alias

    def _manifest_path(self, alias: str, version: int) -> Path:
        return self.alias_dir(alias) / f"v{version:06d}.json"

    def _pin_path(self, alias: str) -> Path:
        return self.alias_dir(alias) / "pin.json"

    def _reserve_path(self, alias: str) -> Path:
        return self.alias_dir(alias) / "pin.reserve"


@contextlib.contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Turn an error of the disk into ``StoreUnavailable``, with the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        what = f"the store {root} cannot be written now ({error.strerror})"
        raise StoreUnavailable(f"{what}: check free space, permissions and the disk") from error
