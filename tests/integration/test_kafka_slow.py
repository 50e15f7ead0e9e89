"""A broker that is slow, or gone behind something that is not: what waits goes to the spool and out
of it in order, and what is beyond the bound is counted. Apache Kafka behind a proxy.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon.broker import free_port
from moorline import metrics
from moorline.settings import StreamSettings
from moorline.stream import Publisher, Reader, StreamUnavailable, Topic
from tests.integration.test_kafka_publisher import (
    assert_exactly,
    numbers_by_partition,
    publish_numbers,
    read_all,
)
from tests.kafka_fixtures import wait_until
from tests.proxy import Proxy

pytest_plugins = ("tests.kafka_fixtures",)


@pytest.fixture(scope="module")
def slow_kafka(request: pytest.FixtureRequest) -> Iterator[Proxy]:
    """In front of a broker of its own, which tells its clients to come through it."""
    port = free_port("127.0.0.1")
    with Proxy(f"127.0.0.1:{port}") as proxy:
        advertised = f"advertised.listeners=PLAINTEXT://{proxy.address}"
        request.getfixturevalue("make_apache_kafka")("--port", str(port), "--set", advertised)
        yield proxy


@pytest.fixture
def proxy(slow_kafka: Proxy) -> Iterator[Proxy]:
    yield slow_kafka
    slow_kafka.pass_on()


def test_events_drain_in_order_while_every_answer_is_late(
    proxy: Proxy, topic_prefix: str, tmp_path: Path
) -> None:
    settings = StreamSettings(bootstrap=proxy.address, topic_prefix=topic_prefix)
    publisher = Publisher(settings, tmp_path / "spool")
    publisher.start()
    publish_numbers(publisher, range(200))
    assert publisher.flush(90)
    proxy.delay(0.8)  # there and back: longer than the publisher waits before it copies to disk
    publish_numbers(publisher, range(200, 800))
    wait_until(lambda: publisher.stats.spooled > 0)
    publish_numbers(publisher, range(800, 1000))
    assert publisher.flush(90), "the broker is slow, not away"
    proxy.pass_on()
    publisher.close()
    assert publisher.stats.dropped == 0
    assert publisher.stats.spooled == 0
    assert_exactly(read_all(settings, Topic.INTERACTIONS, 1000), 1000)


def test_what_a_trickling_link_leaves_no_room_for_is_counted_and_the_rest_arrives_in_order(
    proxy: Proxy, topic_prefix: str, tmp_path: Path
) -> None:
    settings = StreamSettings(
        bootstrap=proxy.address,
        topic_prefix=topic_prefix,
        queue_max_events=50,
        spool_max_bytes=100_000,
        connect_timeout_seconds=5,
    )
    counter = metrics.EVENTS_DROPPED.labels(Topic.INTERACTIONS.value)
    before = counter._value.get()
    publisher = Publisher(settings, tmp_path / "spool")
    publisher.start()
    publish_numbers(publisher, range(10))
    assert publisher.flush(90)
    proxy.delay(1.0, piece_bytes=64)
    taken = list(range(10))
    refused = 0
    for number in range(10, 10_000):
        if publish_numbers(publisher, range(number, number + 1), b"x" * 1000):
            taken.append(number)
        else:
            refused += 1
            time.sleep(0.2)
        if refused >= 10 and publisher.stats.spooled_bytes > 90_000:
            break
    stats = publisher.stats
    assert stats.dropped == counter._value.get() - before == refused
    assert stats.queued + stats.spooled == len(taken) - 10
    assert stats.spooled_bytes <= 100_000
    assert not stats.connected
    proxy.pass_on()
    assert publisher.flush(90)
    wait_until(lambda: publisher.stats.connected and not publisher.stats.last_error)
    publisher.close()
    found = numbers_by_partition(read_all(settings, Topic.INTERACTIONS, len(taken)))
    assert sorted(number for numbers in found.values() for number in numbers) == taken
    assert all(numbers == sorted(numbers) for numbers in found.values())


def test_who_accepts_and_hangs_up_is_not_stormed(
    proxy: Proxy, topic_prefix: str, tmp_path: Path
) -> None:
    settings = StreamSettings(bootstrap=proxy.address, topic_prefix=topic_prefix)
    publisher = Publisher(settings, tmp_path / "spool")
    publisher.start()
    reader = Reader(settings, [Topic.FEEDBACK])

    def read_for(seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with contextlib.suppress(StreamUnavailable):
                reader.poll(1, 0.5)

    publish_numbers(publisher, range(10))
    assert publisher.flush(90)
    read_for(1.0)
    proxy.hang_up()
    publish_numbers(publisher, range(10, 30))
    read_for(2.0)
    before = proxy.connections
    read_for(4.0)
    assert proxy.connections - before < 100, "it was hundreds a second, and most of a core"
    proxy.pass_on()
    assert publisher.flush(90)
    reader.close()
    publisher.close()
    assert_exactly(read_all(settings, Topic.INTERACTIONS, 30), 30)


def test_a_producer_that_waits_for_an_answer_does_not_spin(
    proxy: Proxy, topic_prefix: str, tmp_path: Path
) -> None:
    settings = StreamSettings(bootstrap=proxy.address, topic_prefix=topic_prefix)
    publisher = Publisher(settings, tmp_path / "spool")
    publisher.start()
    publish_numbers(publisher, range(10))
    assert publisher.flush(90)
    proxy.stall()
    proxy.cut()  # it comes again, is let in, and hears nothing
    publish_numbers(publisher, range(10, 20))
    cpu_seconds_before, seconds = time.process_time(), 4.0
    time.sleep(seconds)
    share_of_core = (time.process_time() - cpu_seconds_before) / seconds
    assert share_of_core < 0.25, "0.01 while it waits; it was 0.7 when it asked all the time"
    proxy.pass_on()
    assert publisher.flush(90)
    publisher.close()
    assert_exactly(read_all(settings, Topic.INTERACTIONS, 20), 20)
