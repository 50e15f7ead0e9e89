"""The verbs that copy all state away, and bring it back."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from daemon.cli.common import CommandError, err, running_tree, say
from daemon.cli.options import with_settings
from moorline.events import policy_name
from moorline.settings import Settings

_SAY_SECONDS = 1.0


@with_settings()
def backup(
    settings: Settings,
    to: Annotated[
        Path, typer.Argument(metavar="DIR", help="The backup; must not exist, or be empty.")
    ],
) -> None:
    """Copy ledger, keys and store, at one version, while everything runs.

    The copy is checked before it gets its name, so a DIR that is there is whole. It holds what
    decrypts what people wrote: keep it as safe as the state directory, and no longer than an
    erasure may take to be final. Kafka's topics and the servers' spools are not in it.

    [bold]Examples[/]

      moorline backup /backups/moorline-2026-01-31
      moorline backup --state-dir /var/lib/moorline /mnt/nightly
    """
    from updater.backup import make_backup

    made = make_backup(settings, to, _Progress())
    say(
        f"Backup of [bold]{policy_name(made.alias, made.live_version)}[/] in {to}: "
        f"{_described(len(made.files), sum(file.size_bytes for file in made.files.values()))}, "
        "checked."
    )


@with_settings()
def restore(
    settings: Settings,
    source: Annotated[Path, typer.Argument(metavar="DIR", help="What `moorline backup` made.")],
) -> None:
    """Bring a backup back into an empty state directory.

    Every hash is checked first. A state directory that holds anything is refused: move it away,
    for what it holds may still be of use. Events since the backup are read again from Kafka.
    Releases that a store elsewhere has since then are not in a backup.

    [bold]Examples[/]

      moorline restore /backups/moorline-2026-01-31
      moorline restore /mnt/nightly --state-dir /var/lib/moorline
    """
    from updater.backup import restore_backup

    if tree := running_tree(settings.state_dir):
        raise CommandError(
            f"`moorline up` (pid {tree.pid}) runs on {settings.state_dir}: stop it first"
        )
    done = restore_backup(settings, source, _Progress())
    made = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(done.created_at))
    say(
        f"Restored [bold]{policy_name(done.alias, done.live_version)}[/], of {made}, into "
        f"{settings.state_dir}. Start the updater: it reads on where this ledger stood."
    )


def _described(files: int, size_bytes: int) -> str:
    return f"{files} files, {size_bytes / 2**20:.1f} MiB"


class _Progress:
    """Says on stderr how long work gets on: at a terminal only, and at most once a second."""

    def __init__(self) -> None:
        self._said_at = time.monotonic()

    def __call__(self, text: str) -> None:
        if err.is_terminal and time.monotonic() - self._said_at >= _SAY_SECONDS:
            self._said_at = time.monotonic()
            err.print(text, markup=False, soft_wrap=True)
