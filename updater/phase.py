"""What the updater is doing at a moment: shown by ``moorline status``, asked by ``/readyz``."""

from __future__ import annotations

from enum import StrEnum


class Phase(StrEnum):
    """One word for what the loop is doing."""

    STARTING = "starting"
    WAITING = "waiting"
    """For enough feedback."""
    TRAINING = "training"
    MEASURING = "measuring"
    GATING = "gating"
    PINNED = "pinned"
    """An operator has pinned a version: events are taken in, nothing is trained."""
    STREAM_UNAVAILABLE = "stream_unavailable"
    DISK_UNAVAILABLE = "disk_unavailable"
    """The disk is full or broken; nothing is lost, intake waits."""


UNAVAILABLE = (Phase.STREAM_UNAVAILABLE, Phase.DISK_UNAVAILABLE)
"""Not ready: something outside must come back first."""
