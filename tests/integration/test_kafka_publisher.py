"""The publisher through outages and restarts: what it keeps, and what it refuses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

import pytest

from daemon.broker import EmbeddedBroker, free_port
from moorline import metrics
from moorline.settings import StreamSettings
from moorline.stream import Publisher, Reader, Record, SpoolLocked, Topic
from tests.integration.streams import Start
from tests.kafka_fixtures import wait_until

pytest_plugins = ("tests.kafka_fixtures",)


def read_all(settings: StreamSettings, topic: Topic, count: int) -> list[Record]:
    """The first ``count`` records of a topic, and whatever else is there."""
    reader = Reader(settings, [topic])
    records: list[Record] = []
    try:
        wait_until(lambda: len(records.__iadd__(reader.poll(500, 0.5))) >= count)
        records += reader.poll(500, 0.5)
    finally:
        reader.close()
    return records


def numbers_by_partition(records: list[Record]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for record in records:
        assert record.value is not None
        found[record.partition].append(int(record.value.split()[0]))
    return found


def assert_exactly(records: list[Record], count: int) -> None:
    """Each of ``0..count-1`` once, in order inside its partition."""
    found = numbers_by_partition(records)
    assert sorted(number for numbers in found.values() for number in numbers) == list(range(count))
    assert all(numbers == sorted(numbers) for numbers in found.values())


def publish_numbers(publisher: Publisher, numbers: range, filler: bytes = b"") -> int:
    return sum(
        publisher.publish(Topic.INTERACTIONS, f"chatcmpl-{number}", b"%d " % number + filler)
        for number in numbers
    )


def test_a_broker_that_comes_late_gets_everything(topic_prefix: str, start: Start) -> None:
    port = free_port("127.0.0.1")
    settings = StreamSettings(
        bootstrap=f"127.0.0.1:{port}", topic_prefix=topic_prefix, connect_timeout_seconds=1
    )
    publisher = start(settings)
    assert publish_numbers(publisher, range(500)) == 500
    wait_until(lambda: publisher.stats.spooled == 500)
    wait_until(lambda: "does not answer" in publisher.stats.last_error)
    assert not publisher.stats.connected
    with EmbeddedBroker(port=port):
        publish_numbers(publisher, range(500, 600))
        assert publisher.flush(90)
        assert publisher.stats.last_error == ""
        assert_exactly(read_all(settings, Topic.INTERACTIONS, 600), 600)
        assert publisher.stats.spooled_bytes == 0


def test_a_broker_that_dies_and_returns_empty_gets_the_rest_in_order(
    own_tansu: EmbeddedBroker, topic_prefix: str, start: Start
) -> None:
    settings = StreamSettings(
        bootstrap=own_tansu.bootstrap, topic_prefix=topic_prefix, connect_timeout_seconds=2
    )
    publisher = start(settings)
    publish_numbers(publisher, range(100))
    assert publisher.flush(90)
    own_tansu.stop()
    publish_numbers(publisher, range(1000))
    wait_until(lambda: publisher.stats.spooled == 1000)
    own_tansu.start()
    assert publisher.flush(90)
    assert_exactly(read_all(settings, Topic.INTERACTIONS, 1000), 1000)
    assert publisher.stats.dropped == 0


def test_the_spool_survives_a_restart_of_the_server(
    topic_prefix: str, start: Start, tmp_path: Path
) -> None:
    port = free_port("127.0.0.1")
    settings = StreamSettings(
        bootstrap=f"127.0.0.1:{port}", topic_prefix=topic_prefix, connect_timeout_seconds=1
    )
    first = start(settings, tmp_path / "spool")
    publish_numbers(first, range(300))
    first.close(0.1)
    assert first.stats.dropped == 0
    second = start(settings, tmp_path / "spool")
    assert second.stats.spooled == 300
    publish_numbers(second, range(300, 400))
    with EmbeddedBroker(port=port):
        assert second.flush(90)
        assert_exactly(read_all(settings, Topic.INTERACTIONS, 400), 400)


def test_kill_nine_loses_no_event_that_was_said_to_be_safe(
    topic_prefix: str, start: Start, tmp_path: Path
) -> None:
    port = free_port("127.0.0.1")
    script = textwrap.dedent(
        f"""
        import pathlib, time
        from moorline.settings import StreamSettings
        from moorline.stream import Publisher, Topic
        settings = StreamSettings(bootstrap="127.0.0.1:{port}", topic_prefix="{topic_prefix}",
                                  connect_timeout_seconds=1)
        publisher = Publisher(settings, pathlib.Path({str(tmp_path / "spool")!r}))
        publisher.start()
        for number in range(10_000):
            safe = publisher.publish_durably(Topic.INTERACTIONS, f"k{{number}}", b"%d " % number)
            if safe.result(10):
                print(number, flush=True)
        """
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.getcwd()},
    )
    assert child.stdout is not None
    lines = iter(child.stdout.readline, b"")
    promised = [int(next(lines)) for _ in range(40)]
    child.send_signal(signal.SIGKILL)
    promised += [int(line) for line in lines if line.endswith(b"\n")]
    child.wait()
    child.stdout.close()
    settings = StreamSettings(bootstrap=f"127.0.0.1:{port}", topic_prefix=topic_prefix)
    with EmbeddedBroker(port=port):
        publisher = start(settings, tmp_path / "spool")
        assert publisher.flush(90)
        found = numbers_by_partition(read_all(settings, Topic.INTERACTIONS, len(promised)))
    arrived = [number for numbers in found.values() for number in numbers]
    assert set(promised) <= set(arrived)
    assert len(arrived) == len(set(arrived))


def test_what_fits_nowhere_is_refused_and_counted(
    topic_prefix: str, start: Start, tmp_path: Path
) -> None:
    settings = StreamSettings(
        bootstrap=f"127.0.0.1:{free_port('127.0.0.1')}",
        topic_prefix=topic_prefix,
        queue_max_events=50,
        spool_max_bytes=100_000,
        connect_timeout_seconds=0.5,
    )
    counter = metrics.EVENTS_DROPPED.labels(Topic.INTERACTIONS.value)
    before = counter._value.get()
    publisher = start(settings, tmp_path / "spool")
    results: list[bool] = []
    while results.count(False) < 10:  # disk and memory fill up, and nothing raises
        results.append(publisher.publish(Topic.INTERACTIONS, "k", b"x" * 1000))
        if not results[-1]:
            wait_until(lambda: publisher.stats.spooled + 50 >= results.count(True))
    taken, refused = results.count(True), results.count(False)
    stats = publisher.stats
    assert stats.dropped == refused
    assert counter._value.get() - before == refused
    assert stats.queued + stats.spooled == taken
    assert sum(p.stat().st_size for p in (tmp_path / "spool").glob("*.spool")) <= 100_000


def test_without_a_spool_the_queue_alone_bridges_an_outage(topic_prefix: str, start: Start) -> None:
    port = free_port("127.0.0.1")
    settings = StreamSettings(
        bootstrap=f"127.0.0.1:{port}",
        topic_prefix=topic_prefix,
        queue_max_events=100,
        spool_max_bytes=0,
        connect_timeout_seconds=1,
    )
    publisher = start(settings)
    assert publish_numbers(publisher, range(120)) == 100
    assert publisher.stats.dropped == 20
    with EmbeddedBroker(port=port):
        assert publisher.flush(90)
        assert_exactly(read_all(settings, Topic.INTERACTIONS, 100), 100)


def test_after_close_nothing_is_taken_and_nothing_raises(
    stream_settings: StreamSettings, start: Start
) -> None:
    publisher = start(stream_settings)
    publisher.close()
    publisher.close()
    assert not publisher.publish(Topic.FEEDBACK, "k", b"v")
    assert publisher.publish_durably(Topic.FEEDBACK, "k", b"v").result(1) is False
    assert publisher.stats.dropped == 2


def test_no_broker_configured_still_serves(start: Start) -> None:
    publisher = start(StreamSettings())
    assert publisher.publish(Topic.FEEDBACK, "k", b"v")
    wait_until(lambda: "MOORLINE_STREAM__BOOTSTRAP" in publisher.stats.last_error)
    wait_until(lambda: publisher.stats.spooled == 1)


def test_two_servers_do_not_share_a_spool(
    stream_settings: StreamSettings, start: Start, tmp_path: Path
) -> None:
    start(stream_settings, tmp_path / "spool")
    with pytest.raises(SpoolLocked):
        start(stream_settings, tmp_path / "spool")
