"""Adapter flip: running replies end on the policy they began with, new ones get the new one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Served
from tests.serving.policies import (
    LONG_TOKENS,
    MESSAGES,
    Lineage,
    begin_streams,
    one_reply,
)
from tests.serving.server_process import wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CLOSE_NATS = 0.02


@pytest.fixture(scope="module")
def served(start_recorded: Callable[..., Served]) -> Served:
    return start_recorded("adapter", SERVING__SWAP_MODE="adapter")


@pytest.fixture(scope="module")
def lineage(
    served: Served, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Lineage:
    return Lineage(served.server, tiny_model_dir, tmp_path_factory.mktemp("lineage"))


async def test_streams_keep_their_adapter_to_the_end(served: Served, lineage: Lineage) -> None:
    server, client = served.server, served.server.openai_async()
    first = await asyncio.to_thread(lineage.release)
    await asyncio.to_thread(server.wait_version, first)
    prepared = await asyncio.to_thread(lineage.prepare)
    streams = await begin_streams(client, 4)
    second = lineage.announce(prepared)
    await asyncio.to_thread(server.wait_version, second)
    in_flight = sum(not stream.done() for stream in streams)
    newer = await asyncio.to_thread(one_reply, server)
    replies = await asyncio.gather(*streams)

    assert in_flight, "no stream was in flight during the swap: the test shows nothing"
    assert newer.model == f"assistant@v{second:06d}"
    assert [reply.finish_reason for reply in replies] == ["length"] * 4
    assert [reply.tokens for reply in replies] == [LONG_TOKENS] * 4
    assert {reply.model for reply in replies} == {f"assistant@v{first:06d}"}
    for reply_id, version in [(reply.reply_id, first) for reply in replies] + [(newer.id, second)]:
        (event,) = await asyncio.to_thread(served.tape.of, reply_id)
        assert [span.version for span in event.policy_spans] == [version]
        assert lineage.mean_difference_nats(event) < CLOSE_NATS
    await asyncio.to_thread(wait_for, lambda: f" version={first}\n" in removed(served) + "\n")


def removed(served: Served) -> str:
    """The log lines about adapters that left the engine."""
    lines = served.server.log.read_text(errors="replace").splitlines()
    return "\n".join(line for line in lines if "adapter_removed" in line)


def test_a_request_without_a_model_name_gets_the_live_policy(
    served: Served, lineage: Lineage
) -> None:
    version = lineage.release()
    served.server.wait_version(version)
    response = served.server.post("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 4})
    assert response.json()["model"] == f"assistant@v{version:06d}"
    assert response.headers["x-moorline-policy-version"] == str(version)


def test_the_alias_and_every_name_that_there_was_are_served(
    served: Served, lineage: Lineage
) -> None:
    listed = [card["id"] for card in served.server.get("/v1/models").json()["data"]]
    assert listed == ["assistant", served.server.status()["policy_name"]]
    served.server.wait_version(lineage.release())
    for name in [*listed, served.server.status()["policy_name"]]:
        body = {"messages": MESSAGES, "max_tokens": 4, "model": name}
        reply = served.server.post("/v1/chat/completions", body)
        assert reply.json()["model"] == served.server.status()["policy_name"]
    body = {"messages": MESSAGES, "max_tokens": 4, "model": "assistant@v000999"}
    assert served.server.post("/v1/chat/completions", body).status_code == 404


def test_more_releases_than_slots_are_served_one_after_the_other(
    served: Served, lineage: Lineage
) -> None:
    for _ in range(4):
        version = lineage.release()
        served.server.wait_version(version)
        (event,) = served.tape.of(one_reply(served.server).id)
        assert [span.version for span in event.policy_spans] == [version]
        assert lineage.mean_difference_nats(event) < CLOSE_NATS


def test_a_release_that_serves_something_else_is_never_flipped_to(
    served: Served, lineage: Lineage
) -> None:
    live = served.server.status()["policy_version"]
    other = lineage.adapter("other", seed=99)
    version = lineage.release(parity=lineage.parity_of(other, live))
    wait_for(lambda: str(version) in served.server.status()["refused_versions"])
    assert one_reply(served.server).model == f"assistant@v{live:06d}"


async def test_prompt_logprobs_beside_other_requests_do_not_hurt_the_engine(
    served: Served,
) -> None:
    client = served.server.openai_async()
    streams = await begin_streams(client, 3, 100)
    body = {"model": "assistant", "messages": MESSAGES, "max_tokens": 1, "prompt_logprobs": 0}
    scored = await asyncio.to_thread(served.server.post, "/v1/chat/completions", body)
    assert scored.status_code == 200
    assert [reply.tokens for reply in await asyncio.gather(*streams)] == [100] * 3


def test_pinning_the_base_model_and_back(served: Served, lineage: Lineage) -> None:
    live = served.server.status()["policy_version"]
    served.server.store.pin("assistant", 0, "test")
    served.server.wait_version(0)
    (event,) = served.tape.of(one_reply(served.server).id)
    assert [span.version for span in event.policy_spans] == [0]
    assert lineage.mean_difference_nats(event) < CLOSE_NATS
    served.server.store.unpin("assistant")
    served.server.wait_version(live)


def test_a_restored_version_serves_the_bytes_of_its_ancestor(
    served: Served, lineage: Lineage
) -> None:
    clean, revoked = lineage.release(), lineage.release()
    served.server.wait_version(revoked)
    restored = lineage.restore(clean)
    served.server.wait_version(restored)
    reply = one_reply(served.server)
    assert reply.model == f"assistant@v{restored:06d}"
    (event,) = served.tape.of(reply.id)
    assert [span.version for span in event.policy_spans] == [restored]
    assert lineage.mean_difference_nats(event) < CLOSE_NATS
    assert served.server.status()["swaps"][-1]["parity_nats"] < CLOSE_NATS
