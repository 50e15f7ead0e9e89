"""The pseudonym keys that an erasure looks under: all that servers have used, or it is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from daemon.cli.common import CommandError
from moorline.pseudonyms import Pseudonyms
from moorline.settings import Settings
from moorline.store import ArtifactStore
from moorline.store.pseudonym_keys import RecordedKeys

UNNAMED = "unnamed"
"""In place of the fingerprint, for replies that do not name their key."""


@dataclass(frozen=True)
class KeysAtHand:
    """The keys that are here, and what is recorded under others."""

    found: dict[str, tuple[Pseudonyms, Path]]
    """Fingerprint -> the key, and the first file that holds it."""
    lost: tuple[str, ...]
    """Fingerprints of the keys that people are recorded under and that are lost for good."""
    some_unnamed: bool
    """Whether there are replies that do not name their key."""

    def pseudonyms_of(self, user: str) -> Iterator[str]:
        """What servers with these keys made of the name."""
        for key, _ in self.found.values():
            yield from key.pseudonyms_of(user)

    def lines(self) -> Iterator[str]:
        """Under which keys is looked, in sentences."""
        if not self.found and not self.lost and not self.some_unnamed:
            yield "Nobody is recorded under a pseudonym: only raters have names."
            return
        for fingerprint, (_, path) in self.found.items():
            yield f"Looked under pseudonym key {fingerprint} ({path})."
        for fingerprint in self.lost:
            yield (
                f"Not looked under the lost pseudonym key {fingerprint}: nobody can say who is "
                "recorded under it."
            )
        if self.some_unnamed:
            yield (
                "Some replies do not name their key (an earlier Moorline recorded them): they are "
                "found if it is one of these. If servers had others then, give each by --key FILE."
            )


def keys_at_hand(
    settings: Settings, further: Sequence[Path], declared_lost: Sequence[str]
) -> KeysAtHand:
    """The keys of this machine and the further ones, if people are recorded under no other.

    Args:
        declared_lost: fingerprints (or ``UNNAMED``) to go on without.

    Raises:
        CommandError: a key is missing, or nobody knows which are needed.
        PseudonymKeyInvalid: a file cannot be read, or is no key.
    """
    declared = settings.serving.pseudonym_key_file
    paths = [declared] if declared is not None else []
    paths += [settings.pseudonym_key_path] if settings.pseudonym_key_path.exists() else []
    found: dict[str, tuple[Pseudonyms, Path]] = {}
    for path in (*paths, *further):
        key = Pseudonyms.read(path)
        found.setdefault(key.fingerprint, (key, path))
    recorded = [fingerprint or UNNAMED for fingerprint in _recorded(settings)]
    missing = [one for one in recorded if one not in found]
    if found and UNNAMED in missing:
        missing.remove(UNNAMED)
    if unknown := [one for one in missing if one not in declared_lost]:
        raise CommandError(
            f"nothing was erased: people are recorded under pseudonym keys that are not here "
            f"({', '.join(unknown)}), so nobody can say who they are: give each with --key FILE "
            "(serving.pseudonym_key_file, or pseudonym.key in a server's state directory); if one "
            f"is lost for good, go on without it by --lost-key {unknown[0]}"
        )
    lost = tuple(one for one in missing if one in declared_lost)
    return KeysAtHand(found, lost, UNNAMED in recorded)


def _recorded(settings: Settings) -> tuple[str, ...]:
    """The keys that people are recorded under, as the ledger knows them, or the store's copy."""
    from updater.ledger import Ledger, LedgerError

    if settings.ledger_path.exists():
        try:
            with Ledger.open_readonly(settings.ledger_path) as ledger:
                return tuple(sorted(ledger.pseudonym_keys()))
        except LedgerError as error:
            raise CommandError(str(error)) from None
    copy = RecordedKeys(ArtifactStore(settings.store_dir)).read(settings.alias)
    if copy is None:
        raise CommandError(
            f"nothing was erased: there is neither a ledger at {settings.ledger_path} nor its list "
            f"of pseudonym keys in {settings.store_dir}, so nobody can say under which keys people "
            "are recorded: give the --state-dir of the updater, or of a server with its store"
        )
    return copy
