"""Connections to Kafka: settings into client configuration, and failures into one clear line.

kafka-python retries a refused login until its time-out and then says only "unable to bootstrap";
the true cause is in its log. Here every client is made with a connection manager that remembers
why the last connection failed and stops at once when trying again cannot help.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from kafka import KafkaAdminClient, KafkaProducer
from kafka import errors as kafka_errors
from kafka.net.compat import KafkaNetClient
from kafka.net.manager import KafkaConnectionManager
from kafka.net.selector import NetworkSelector

from moorline.errors import MoorlineError
from moorline.settings import StreamSettings
from moorline.stream.library_log import quiet_library_loggers

logger = logging.getLogger("moorline.stream")

Client = TypeVar("Client")

RECONNECT_BACKOFF_MAX_MS = 1000
"""The library's default is 30 s; with this a send is acknowledged ~1 s after the broker is back."""
CONNECTING_POLL_MS = 100.0

_client_numbers = itertools.count(1)


class StreamUnavailable(MoorlineError):
    """Kafka cannot be used now. The message says where, why, and what to do; it is one line."""


class StreamInvalid(StreamUnavailable):
    """Kafka, or what is in it, must be changed by somebody: trying again alone will not help."""


# A login that failed, a mechanism that the broker lacks: the same answer would come every time.
_FINAL = (
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.UnsupportedSaslMechanismError,
    kafka_errors.IllegalSaslStateError,
)


class _WatchedManager(KafkaConnectionManager):  # type: ignore[misc]
    """Remembers why the last connection failed; gives up bootstrapping on a final cause."""

    def __init__(self, net: Any, **configs: Any) -> None:
        self.cause: BaseException | None = None
        super().__init__(net, **configs)
        # The library does not hand this setting down, and Kafka's default is to make a topic for
        # whoever asks about it: with one partition, uncompacted.
        self.cluster.config["allow_auto_create_topics"] = False

    def get_connection(self, node_id: Any, *args: Any, **options: Any) -> Any:
        if self.cause is not None and is_final(self.cause) and not self.bootstrapped:
            raise self.cause  # ends the library's bootstrap loop, which only expects NodeNotReady
        known = node_id in self._conns
        connection = super().get_connection(node_id, *args, **options)
        if not known:
            connection.init_future.add_errback(self._remember)
            connection.init_future.add_callback(self._forget)
        return connection

    async def _connect(
        self,
        node: Any,
        conn: Any,
        reset_backoff_on_connect: bool = True,
        timeout_at: float | None = None,
    ) -> None:
        """Back off also from a peer that accepts and hangs up, like a proxy without a broker.

        The library takes that for a success and comes again at once, hundreds of times a second.
        """
        before = self._backoff.get(node.node_id)
        await super()._connect(node, conn, reset_backoff_on_connect=False, timeout_at=timeout_at)
        if conn.connected:
            if reset_backoff_on_connect:
                self.reset_backoff(node.node_id)
        elif self._backoff.get(node.node_id) == before:
            self.update_backoff(node.node_id)

    async def _build_transport(self, node: Any, timeout_at: float | None = None) -> Any:
        transport = await super()._build_transport(node, timeout_at=timeout_at)
        _read_before_hangup(self._net, transport)
        return transport

    def _remember(self, error: BaseException) -> None:
        # Closing a half-open connection fails its future with an empty error: not a cause.
        if str(error) not in ("", "KafkaConnectionError"):
            self.cause = error

    def _forget(self, _: object) -> None:
        self.cause = None


def _read_before_hangup(net: Any, transport: Any) -> None:
    """Read a broker's last answer before acting on its hanging up.

    A broker says why it refuses a login and hangs up. When both arrive together, the library throws
    away the answer and sees only the end.
    """
    receive = transport._sock_recv

    def receive_all() -> tuple[bytes, BaseException | None]:
        data, error = receive()
        if data and error is not None:
            net.call_later(0.05, lambda: transport.abort(error))
            return data, None
        return data, error

    transport._sock_recv = receive_all


class _WatchedClient(KafkaNetClient):  # type: ignore[misc]
    """A network client over a ``_WatchedManager``."""

    def __init__(self, **configs: Any) -> None:
        # Else a busy machine makes it warn of every step that took 0.1 s.
        net = NetworkSelector(**configs, slow_task_threshold_secs=0)
        super().__init__(net=net, manager=_WatchedManager(net, **configs), **configs)

    def connection_delay(self, node_id: Any) -> float:
        """How long the producer waits before it asks for a node's state again, milliseconds.

        The library gives it seconds, which it takes for milliseconds, and nothing at all for a node
        that is being connected: it would ask thousands of times a second, also where a broker
        never answers. What happens on the wire wakes it anyway.
        """
        connection = self._manager._conns.get(node_id)
        connecting = connection is not None and not connection.connected
        delay_ms = 1000.0 * float(super().connection_delay(node_id))
        return max(delay_ms, CONNECTING_POLL_MS if connecting else 0.0)


@dataclass
class Connection(Generic[Client]):
    """A client of the library, and what its network layer saw."""

    client: Client
    _network: _WatchedClient

    @property
    def cause(self) -> BaseException | None:
        """Why the last attempt to connect failed; None after one that succeeded."""
        cause: BaseException | None = self._network._manager.cause
        return cause

    @property
    def alive(self) -> bool:
        """Whether the last attempt to connect succeeded."""
        return self.cause is None


def is_final(error: BaseException) -> bool:
    """Whether connecting again with the same settings must fail in the same way."""
    return isinstance(error, _FINAL) or "CERTIFICATE_VERIFY_FAILED" in str(error)


def connect(
    make: Callable[..., Client], settings: StreamSettings, purpose: str, **options: Any
) -> Connection[Client]:
    """Make a client and wait until it is connected, at most ``connect_timeout_seconds``.

    Args:
        make: ``KafkaProducer``, ``KafkaConsumer`` or ``KafkaAdminClient``.
        purpose: part of the client id, for the broker's logs.
        options: the library's names; they win over what the settings say.

    Raises:
        StreamUnavailable: no broker answered.
        StreamInvalid: a broker refused us, or the settings cannot be used.
    """
    quiet_library_loggers()
    configuration = client_configuration(settings) | options
    made: list[_WatchedClient] = []

    def network(**configs: Any) -> _WatchedClient:
        made.append(_WatchedClient(**configs))
        return made[-1]

    try:
        client = make(
            **configuration,
            client_id=f"moorline-{purpose}-{next(_client_numbers)}",
            kafka_client=network,
            bootstrap_timeout_ms=int(settings.connect_timeout_seconds * 1000),
        )
    except (kafka_errors.KafkaError, OSError, ValueError, RuntimeError) as error:
        cause = made[0]._manager.cause if made else None
        for abandoned in made:  # its I/O thread would run for ever: one more for every attempt
            abandoned._manager.close()
            abandoned._net.stop(timeout_ms=1000)
            abandoned._net.close()
        raise explain(settings, cause or error) from error
    return Connection(client, made[0])


def close_producer(producer: KafkaProducer) -> None:
    """Let go of a producer whose broker may be away; its ``close`` alone would wait or give up."""
    with contextlib.suppress(Exception):
        producer._sender.force_close()
        producer._sender.join(1.0)
        producer.close(timeout=0)


def client_configuration(settings: StreamSettings) -> dict[str, Any]:
    """What every kind of client is given.

    Raises:
        StreamInvalid: no broker is configured, or the security settings contradict each other.
    """
    if not settings.bootstrap:
        raise StreamInvalid(
            "no Kafka broker is configured: set MOORLINE_STREAM__BOOTSTRAP=host:port, "
            "or run `moorline up`, which starts one"
        )
    configuration: dict[str, Any] = {
        "bootstrap_servers": [part.strip() for part in settings.bootstrap.split(",")],
        "reconnect_backoff_max_ms": RECONNECT_BACKOFF_MAX_MS,
        "security_protocol": settings.security_protocol,
    }
    if settings.security_protocol.startswith("SASL"):
        if not (settings.sasl_mechanism and settings.sasl_username and settings.sasl_password):
            raise StreamInvalid(
                f"{settings.security_protocol} needs MOORLINE_STREAM__SASL_MECHANISM, "
                "__SASL_USERNAME and __SASL_PASSWORD: set all three"
            )
        configuration |= {
            "sasl_mechanism": settings.sasl_mechanism,
            "sasl_plain_username": settings.sasl_username,
            "sasl_plain_password": settings.sasl_password.get_secret_value(),
        }
    if settings.security_protocol.endswith("SSL"):
        for name in ("ssl_cafile", "ssl_certfile", "ssl_keyfile"):
            path = getattr(settings, name)
            if path is None:
                continue
            if not path.is_file():
                raise StreamInvalid(
                    f"{name} {path} is not a file: correct MOORLINE_STREAM__{name.upper()}"
                )
            configuration[name] = str(path)
        configuration["ssl_check_hostname"] = settings.ssl_check_hostname
    return configuration


@contextmanager
def admin_session(settings: StreamSettings) -> Iterator[KafkaAdminClient]:
    """An admin client for a few requests; the library's errors come out as one clear line.

    Raises:
        StreamUnavailable: no broker answered, or a request failed.
    """
    timeout_ms = int(settings.connect_timeout_seconds * 1000)
    connection = connect(KafkaAdminClient, settings, "admin", request_timeout_ms=timeout_ms)
    try:
        with explained(settings, connection):
            yield connection.client
    finally:
        connection.client.close()


@contextmanager
def explained(
    settings: StreamSettings, connection: Connection[Any] | None = None
) -> Iterator[None]:
    """Turn the library's errors into ``StreamUnavailable`` with the true cause."""
    try:
        yield
    except StreamUnavailable:
        raise
    except (kafka_errors.KafkaError, OSError) as error:
        vague = isinstance(
            error,
            kafka_errors.KafkaTimeoutError
            | kafka_errors.NodeNotReadyError
            | kafka_errors.KafkaConnectionError,
        )
        cause = connection.cause if connection is not None and vague else None
        raise explain(settings, cause or error) from error


def explain(settings: StreamSettings, error: BaseException) -> StreamUnavailable:
    """One line for ``error``: where, what happened, what to do. No secrets."""
    if isinstance(error, StreamUnavailable):
        return error
    where = f"Kafka at {settings.bootstrap}"
    user = settings.sasl_username or "ANONYMOUS"
    detail = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, kafka_errors.SaslAuthenticationFailedError):
        return StreamInvalid(
            f"{where} refused the login of user {user!r} by {settings.sasl_mechanism} ({detail}): "
            "check MOORLINE_STREAM__SASL_USERNAME and MOORLINE_STREAM__SASL_PASSWORD"
        )
    if isinstance(error, kafka_errors.UnsupportedSaslMechanismError):
        return StreamInvalid(
            f"{where} does not offer {settings.sasl_mechanism} ({detail}): "
            "correct MOORLINE_STREAM__SASL_MECHANISM"
        )
    if isinstance(error, kafka_errors.AuthorizationError):
        return StreamInvalid(_missing_permission(where, user, error, detail))
    if isinstance(error, ssl.SSLError) or "SSL" in detail or "CERTIFICATE" in detail:
        remedy = (
            "point MOORLINE_STREAM__SSL_CAFILE at the certificate that signed the broker's"
            if "CERTIFICATE_VERIFY_FAILED" in detail
            else "check MOORLINE_STREAM__SECURITY_PROTOCOL and the port"
        )
        kind = StreamInvalid if is_final(error) else StreamUnavailable
        return kind(f"{where}: no TLS connection ({detail}): {remedy}")
    if isinstance(error, kafka_errors.BrokerResponseError):
        return StreamUnavailable(f"{where} could not do what was asked ({detail}): it is retried")
    return StreamUnavailable(
        f"{where} does not answer ({detail}): start it, or set MOORLINE_STREAM__BOOTSTRAP (and "
        "MOORLINE_STREAM__SECURITY_PROTOCOL) to where it is"
    )


def _missing_permission(where: str, user: str, error: BaseException, detail: str) -> str:
    if isinstance(error, kafka_errors.ClusterAuthorizationFailedError):
        return (
            f"{where} does not allow user {user!r} this request on the cluster ({detail}): grant "
            f"it, as `kafka-acls.sh --add --allow-principal User:{user} --operation "
            "IdempotentWrite --operation Create --cluster`"
        )
    kind = "group" if isinstance(error, kafka_errors.GroupAuthorizationFailedError) else "topic"
    return (
        f"{where} does not allow user {user!r} to use a {kind} ({detail}): grant it, as "
        f"`kafka-acls.sh --add --allow-principal User:{user} --operation Read --operation Write "
        f"--operation Describe --{kind} NAME`"
    )
