"""The key that this server makes pseudonyms with: the same as the other servers'."""

from __future__ import annotations

import asyncio
import contextlib
import logging

from moorline.pseudonyms import PseudonymKeyInvalid, Pseudonyms
from moorline.settings import Settings
from moorline.store import ArtifactStore
from moorline.store.pseudonym_keys import RecordedKeys
from serving.store_reader import StoreReader

logger = logging.getLogger("moorline.serving")


async def server_pseudonyms(settings: Settings) -> Pseudonyms | None:
    """Pseudonyms by the declared key, else by that of the state directory; None: not recorded.

    A key is made only where no server has recorded anybody yet: a second one would give the same
    people other pseudonyms, by which an erasure with the first does not find them.

    Raises:
        PseudonymKeyInvalid: the key is missing, cannot be read, or is none.
    """
    if not settings.serving.record_user_field:
        return None
    path = settings.serving.pseudonym_key_file
    if path is not None:
        pseudonyms = Pseudonyms.read(path)
    else:
        path = settings.pseudonym_key_path
        if not path.exists() and (recorded := await _recorded_keys(settings)):
            raise PseudonymKeyInvalid(
                f"{path} is missing, and people are recorded under the key of another server or of "
                f"an earlier start ({', '.join(recorded)}): copy its pseudonym.key there, or give "
                "all servers one key by serving.pseudonym_key_file"
            )
        pseudonyms = Pseudonyms.from_file(path)
    logger.info(
        "users are recorded as pseudonyms by this key",
        extra={
            "event": "pseudonym_key",
            "fingerprint": pseudonyms.fingerprint,
            "path": str(path),
        },
    )
    return pseudonyms


async def _recorded_keys(settings: Settings) -> tuple[str, ...]:
    """The fingerprints in the store; none where it does not answer in time."""
    keys = RecordedKeys(ArtifactStore(settings.store_dir))
    with contextlib.suppress(TimeoutError):
        found = await asyncio.wait_for(
            StoreReader().read(keys.read, settings.alias), settings.serving.store_wait_seconds
        )
        return tuple(filter(None, found or ()))
    return ()
