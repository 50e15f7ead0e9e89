"""The `moorline` command. Each module holds the verbs of one purpose; ``main`` is the door."""

from daemon.cli.app import app, main

__all__ = ["app", "main"]
