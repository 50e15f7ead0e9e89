"""Weight reload: nobody is dropped, every token is attributed, a bad release is taken back."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.harmless_warnings import LOGGED, WARNED
from tests.conftest import Served
from tests.serving.policies import LONG_TOKENS, Lineage, begin_streams, one_reply
from tests.serving.server_process import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CLOSE_NATS = 0.02


@pytest.fixture(scope="module")
def lineage(
    reload_server: Served, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Lineage]:
    """Releases on the shared server, which is given back serving the base model."""
    server = reload_server.server
    yield Lineage(server, tiny_model_dir, tmp_path_factory.mktemp("lineage"))
    server.store.pin("assistant", 0, "the swap tests are over")
    server.wait_version(0)


def refused(served: Served, version: int) -> str:
    """Waits until this version is refused; why."""
    wait_for(lambda: str(version) in served.server.status()["refused_versions"], 60)
    return str(served.server.status()["refused_versions"][str(version)])


async def test_streams_go_on_across_a_reload_and_every_token_has_its_version(
    reload_server: Served, lineage: Lineage
) -> None:
    server, client = reload_server.server, reload_server.server.openai_async()
    before = server.status()["policy_version"]
    prepared = await asyncio.to_thread(lineage.prepare)
    streams = await begin_streams(client, 4)
    version = lineage.announce(prepared)
    replies = await asyncio.gather(*streams)
    await asyncio.to_thread(server.wait_version, version)

    assert [reply.finish_reason for reply in replies] == ["length"] * 4
    assert [reply.tokens for reply in replies] == [LONG_TOKENS] * 4
    mixed = 0
    for reply in replies:
        (event,) = await asyncio.to_thread(reload_server.tape.of, reply.reply_id)
        ends = [0, *(span.end for span in event.policy_spans)]
        assert [span.start for span in event.policy_spans] == ends[:-1]
        assert ends[-1] == LONG_TOKENS
        assert {span.version for span in event.policy_spans} <= {before, version}
        assert lineage.mean_difference_nats(event) < CLOSE_NATS
        mixed += len(event.policy_spans) == 2
    assert mixed, "no stream was in flight during the swap: the test shows nothing"


def test_after_a_swap_replies_say_and_are_the_new_version(
    reload_server: Served, lineage: Lineage
) -> None:
    server = reload_server.server
    version = lineage.release()
    server.wait_version(version)
    reply = one_reply(server)
    assert reply.model == f"assistant@v{version:06d}"
    (event,) = reload_server.tape.of(reply.id)
    assert [span.version for span in event.policy_spans] == [version]
    assert lineage.mean_difference_nats(event) < CLOSE_NATS
    last = server.status()["swaps"][-1]
    assert (last["version"], last["outcome"], last["mode"]) == (version, "swapped", "reload")
    assert 0 < last["pause_seconds"] < last["seconds"]
    assert last["parity_nats"] < CLOSE_NATS
    assert server.metric('moorline_policy_version{role="serving"}') == version


def test_a_pin_goes_back_to_any_version_and_unpinning_forward_again(
    reload_server: Served, lineage: Lineage
) -> None:
    server = reload_server.server
    newest = server.status()["policy_version"]
    for pinned in (newest - 1, 0):
        server.store.pin("assistant", pinned, "test")
        server.wait_version(pinned)
        reply = one_reply(server)
        (event,) = reload_server.tape.of(reply.id)
        assert lineage.mean_difference_nats(event) < CLOSE_NATS
        assert server.status()["pinned"] == pinned
        assert server.metric("moorline_pinned") == 1
    server.store.unpin("assistant")
    server.wait_version(newest)
    (event,) = reload_server.tape.of(one_reply(server).id)
    assert lineage.mean_difference_nats(event) < CLOSE_NATS


def test_a_release_that_serves_something_else_is_taken_back(
    reload_server: Served, lineage: Lineage
) -> None:
    server = reload_server.server
    live = server.status()["policy_version"]
    other = lineage.adapter("other", seed=99)
    version = lineage.release(parity=lineage.parity_of(other, live))
    assert refused(reload_server, version) == "parity_failed"
    assert server.status()["policy_version"] == live
    (event,) = reload_server.tape.of(one_reply(server).id)
    assert [span.version for span in event.policy_spans] == [live]
    assert lineage.mean_difference_nats(event) < CLOSE_NATS
    assert server.get("/readyz").status_code == 200


def test_a_release_whose_load_changes_nothing_is_caught_however_small_its_step(
    reload_server: Served, lineage: Lineage
) -> None:
    server = reload_server.server
    live = server.status()["policy_version"]
    live_adapter = lineage.adapters[live]
    assert live_adapter is not None
    nearby = lineage.adapter("nearby", seed=live, size=0.0501)  # the live one, scaled by 1.002
    version = lineage.release(adapter_dir=live_adapter, parity=lineage.parity_of(nearby, live))
    assert refused(reload_server, version) == "parity_failed"
    assert "still the one before" in server.status()["swaps"][-1]["detail"]


def test_a_corrupt_release_changes_nothing(reload_server: Served, lineage: Lineage) -> None:
    server = reload_server.server
    live = server.status()["policy_version"]
    server.store.pin("assistant", live, "while the next one is damaged")
    wait_for(lambda: server.status()["pinned"] == live)
    version = lineage.release()
    release = server.store.release("assistant", version)
    assert release.artifact_digest is not None
    weights = server.store.open(release.artifact_digest, release.files)
    with (weights / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x00")
    server.store.unpin("assistant")
    assert refused(reload_server, version) == "corrupt"
    assert server.status()["policy_version"] == live
    assert one_reply(server).model == f"assistant@v{live:06d}"


def test_a_store_that_hangs_holds_up_no_reply(reload_server: Served, lineage: Lineage) -> None:
    server = reload_server.server
    live = server.status()["policy_version"]
    prepared = lineage.prepare()
    pin = server.store.root / "releases" / "assistant" / "pin.json"
    os.mkfifo(pin)  # whoever opens it waits for a writer, as on a volume that does not answer
    version = lineage.announce(prepared)
    wait_for(lambda: "store_not_answering" in server.log.read_text(errors="replace"))
    assert server.status()["store_wait_seconds"] > 5
    assert server.metric("moorline_store_wait_seconds") > 5
    for _ in range(3):
        (event,) = reload_server.tape.of(one_reply(server).id)
        assert [span.version for span in event.policy_spans] == [live]
    assert server.get("/readyz").status_code == 200
    writer = os.open(pin, os.O_WRONLY | os.O_NONBLOCK)  # fails if nobody waits
    pin.unlink()
    os.close(writer)
    server.wait_version(version)
    assert server.status()["store_wait_seconds"] < 5
    assert "store_answers_again" in server.log.read_text(errors="replace")


def test_a_stopped_server_catches_up_with_what_it_missed(
    reload_server: Served, lineage: Lineage
) -> None:
    server = reload_server.server
    live = server.status()["policy_version"]
    prepared = [lineage.prepare() for _ in range(2)]
    server.pause()
    missed = [lineage.announce(release) for release in prepared]
    server.resume()
    wait_for(lambda: server.metric("moorline_store_newest_version") == missed[-1])
    server.wait_version(missed[-1])
    assert server.metric('moorline_policy_version{role="serving"}') == missed[-1]
    (event,) = reload_server.tape.of(one_reply(server).id)
    assert lineage.mean_difference_nats(event) < CLOSE_NATS
    assert live not in missed


def test_a_start_prints_nothing_of_vllms_that_means_nothing(reload_server: Served) -> None:
    printed = reload_server.server.log.read_text(errors="replace")
    assert [line for _, line in LOGGED | WARNED if line in printed] == []
