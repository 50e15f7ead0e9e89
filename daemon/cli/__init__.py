"""The `moorline` command. ``app.py`` lists the verbs and the module of each."""

from daemon.cli.app import app, main

__all__ = ["app", "main"]
