"""Which processes one machine runs, with which settings, in which order."""

from __future__ import annotations

import contextlib
import socket
import sys
from dataclasses import dataclass

from daemon.supervise import Child
from moorline.http import PortUnavailable, base_url, port_problem
from moorline.settings import Settings, child_environment

_STOP_MARGIN_SECONDS = 15.0
_YIELDING = {"OMP_WAIT_POLICY": "PASSIVE"}
"""The updater's idle threads sleep instead of spinning: the server wants those cores."""
_UPDATE_TO_END_SECONDS = 60.0
"""For the update that is under way; one that takes longer is made again by the next start."""


@dataclass(frozen=True)
class Tree:
    """The children in starting order, and where they will listen."""

    children: tuple[Child, ...]
    server: str
    updater: str
    bootstrap: str
    embedded_broker: bool


def plan(settings: Settings) -> Tree:
    """Plan the embedded broker (unless one is configured), the server and the updater.

    Ports that are set to 0 become ports that are free now.

    Raises:
        PortUnavailable: a configured port is taken.
    """
    serving_port = claim_port(settings.serving.host, settings.serving.port, "serving.port")
    updater_port = claim_port(settings.updater.host, settings.updater.port, "updater.port")
    server = base_url(settings.serving.host, serving_port, https=settings.serving.speaks_https)
    updater = base_url(settings.updater.host, updater_port)
    extra = {
        "MOORLINE_SERVING__PORT": str(serving_port),
        "MOORLINE_UPDATER__PORT": str(updater_port),
    }
    children: list[Child] = []
    bootstrap = settings.stream.bootstrap
    embedded = bootstrap is None
    if bootstrap is None:
        broker_port = claim_port("127.0.0.1", 0, "stream.bootstrap")
        bootstrap = f"127.0.0.1:{broker_port}"
        children.append(_broker(settings, broker_port))
        # Its topics are gone after a restart, and the updater must not refuse new ones then.
        extra["MOORLINE_STREAM__BOOTSTRAP"] = bootstrap
        extra["MOORLINE_STREAM__ACCEPT_NEW_TOPICS"] = "true"
    environment = child_environment(settings, **extra)
    children.append(
        Child(
            name="server",
            argv=(sys.executable, "-m", "serving"),
            environment=environment,
            ready_url=f"{server}/readyz",
            alive_url=f"{server}/healthz",
            grace_seconds=settings.serving.drain_seconds + _STOP_MARGIN_SECONDS,
        )
    )
    children.append(
        Child(
            name="updater",
            argv=(sys.executable, "-m", "updater"),
            environment=environment | _YIELDING,
            ready_url=f"{updater}/readyz",
            alive_url=f"{updater}/healthz",
            grace_seconds=_UPDATE_TO_END_SECONDS + _STOP_MARGIN_SECONDS,
            may_wait=True,  # for a broker, for room on a disk
            essential=False,
        )
    )
    return Tree(tuple(children), server, updater, bootstrap, embedded)


def _broker(settings: Settings, port: int) -> Child:
    return Child(
        name="broker",
        argv=(sys.executable, "-m", "daemon.broker", "--port", str(port)),
        environment=child_environment(settings),
        ready_url=f"tcp://127.0.0.1:{port}",
        grace_seconds=5.0,
        # The server replies without it, and keeps events in its spool until it is back.
        essential=False,
    )


def claim_port(host: str, port: int, setting: str) -> int:
    """``port`` itself if it can be listened on; any free one for 0.

    Raises:
        PortUnavailable: with the setting to change.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            raise PortUnavailable(port_problem(host, port, error, setting)) from None
        return int(probe.getsockname()[1])
