"""Connecting: what cannot work is said at once, in one line, with the remedy and no secret."""

from __future__ import annotations

import socket
import threading
from datetime import datetime
from pathlib import Path

import pytest
from kafka import errors as kafka_errors

from moorline.settings import StreamSettings
from moorline.stream import StreamInvalid, StreamUnavailable, Topic, dlq_name, ensure_topics
from moorline.stream import topic_name as name_of
from moorline.stream.client import client_configuration, explain
from moorline.stream.topics import TopicState, check_partitions, cloud_event_headers

SECRET = "canary-password-4711"


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def secure_settings(**changes: object) -> StreamSettings:
    return StreamSettings.model_validate(
        {
            "bootstrap": "broker.example:9093",
            "security_protocol": "SASL_SSL",
            "sasl_mechanism": "SCRAM-SHA-512",
            "sasl_username": "moor",
            "sasl_password": SECRET,
        }
        | changes
    )


def test_no_broker_configured_says_how_to_get_one() -> None:
    with pytest.raises(StreamInvalid, match=r"MOORLINE_STREAM__BOOTSTRAP.*moorline up"):
        ensure_topics(StreamSettings())


def test_nothing_listening_says_where_and_why() -> None:
    port = closed_port()
    settings = StreamSettings(bootstrap=f"127.0.0.1:{port}", connect_timeout_seconds=0.3)
    with pytest.raises(StreamUnavailable) as raised:
        ensure_topics(settings)
    message = str(raised.value)
    assert f"127.0.0.1:{port}" in message
    assert "ECONNREFUSED" in message
    assert "MOORLINE_STREAM__BOOTSTRAP" in message
    assert "\n" not in message


def test_failed_attempts_leave_no_thread_behind() -> None:
    settings = StreamSettings(bootstrap=f"127.0.0.1:{closed_port()}", connect_timeout_seconds=0.1)
    before = threading.active_count()
    for _ in range(5):
        with pytest.raises(StreamUnavailable):
            ensure_topics(settings)
    assert threading.active_count() <= before


def test_security_settings_reach_the_client(tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    ca.write_text("")
    configuration = client_configuration(secure_settings(ssl_cafile=ca, ssl_check_hostname=False))
    assert configuration["security_protocol"] == "SASL_SSL"
    assert configuration["sasl_mechanism"] == "SCRAM-SHA-512"
    assert configuration["sasl_plain_username"] == "moor"
    assert configuration["sasl_plain_password"] == SECRET
    assert configuration["ssl_cafile"] == str(ca)
    assert configuration["ssl_check_hostname"] is False


def test_several_brokers_may_be_named() -> None:
    configuration = client_configuration(StreamSettings(bootstrap="a:1, b:2"))
    assert configuration["bootstrap_servers"] == ["a:1", "b:2"]


@pytest.mark.parametrize("missing", ["sasl_mechanism", "sasl_username", "sasl_password"])
def test_half_a_login_is_refused(missing: str) -> None:
    with pytest.raises(StreamInvalid, match="SASL_MECHANISM"):
        client_configuration(secure_settings(**{missing: None}))


def test_a_missing_certificate_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(StreamInvalid, match="MOORLINE_STREAM__SSL_CAFILE"):
        client_configuration(secure_settings(ssl_cafile=tmp_path / "none.pem"))


@pytest.mark.parametrize(
    "error",
    [
        kafka_errors.SaslAuthenticationFailedError("invalid credentials"),
        kafka_errors.UnsupportedSaslMechanismError("no such mechanism"),
        kafka_errors.TopicAuthorizationFailedError("interactions.v1"),
        kafka_errors.GroupAuthorizationFailedError("moorline-updater"),
        kafka_errors.ClusterAuthorizationFailedError(),
        kafka_errors.KafkaConnectionError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed"),
        kafka_errors.KafkaTimeoutError("Unable to bootstrap"),
        OSError("many\nlines"),
    ],
)
def test_every_explanation_is_one_line_without_the_password(error: Exception) -> None:
    message = str(explain(secure_settings(), error))
    assert "broker.example:9093" in message
    assert SECRET not in message
    assert "\n" not in message


def test_different_partition_counts_are_refused_with_the_command() -> None:
    settings = StreamSettings(bootstrap="b:1")
    states = {
        Topic.INTERACTIONS: TopicState(Topic.INTERACTIONS, "1", 8),
        Topic.FEEDBACK: TopicState(Topic.FEEDBACK, "2", 3),
    }
    expected = r"kafka-topics.sh --bootstrap-server b:1 --alter --topic feedback.v1 --partitions 8"
    with pytest.raises(StreamInvalid, match=expected):
        check_partitions(settings, states)


def test_names_take_the_prefix() -> None:
    settings = StreamSettings(topic_prefix="team-a.")
    assert name_of(settings, Topic.FEEDBACK) == "team-a.feedback.v1"
    assert dlq_name(settings, Topic.FEEDBACK) == "team-a.feedback.v1.dlq"


def test_headers_are_cloud_events() -> None:
    headers = dict(cloud_event_headers(Topic.FEEDBACK, "id-1", "here", 1_700_000_000_123))
    assert headers["ce_specversion"] == b"1.0"
    assert headers["ce_type"] == b"moorline.feedback.v1"
    assert headers["ce_source"] == b"here"
    assert headers["ce_id"] == b"id-1"
    assert headers["content-type"] == b"application/json"
    moment = datetime.fromisoformat(headers["ce_time"].decode())
    assert moment.timestamp() == pytest.approx(1_700_000_000.123)
