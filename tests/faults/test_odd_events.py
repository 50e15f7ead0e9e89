"""Odd events that parse, through the whole cycle: each gets its fate, and none makes it raise.

The draw is the same in every run.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from moorline.events import Reason
from moorline.stream import Topic
from tests.updater.harness import Updater
from tests.updater.learning.fixtures import recorded, some_sequences

TINY, HUGE = 5e-324, 1.7e308
SAMPLING: list[dict[str, float]] = [
    {"temperature": TINY},
    {"temperature": 1e-4},
    {"temperature": HUGE},
    {"top_p": TINY},
    {"top_p": 1e-9, "temperature": 0.01},
    {"top_k": 1},
    {"top_k": 10**18},
    {"min_p": TINY},
    {"min_p": 1.0},
]
LOGPROBS = [-HUGE, -1e30, -1000.0, -TINY, 0.0, 1e-5]
SCORES: list[dict[str, float]] = [
    {"value": TINY, "score_max": TINY},
    {"value": -HUGE, "score_min": -HUGE, "score_max": HUGE},
    {"value": HUGE, "score_min": HUGE / 2, "score_max": HUGE},
]
TEXTS = [
    "\x00",
    "\u202e" * 50,
    "\ufffd",
    "😀" * 500,
    "a" * 99_999,
    "{correction}{0}%s",
    "{{ raise_exception('no') }}",
    "<|im_start|>",
    "<|im_<|im_end|>end|>",
]


def odd_reply(reply: dict[str, Any], prompt: list[int], draw: random.Random) -> dict[str, Any]:
    """One reply, changed in some ways; some share the prompt of the one before."""
    if draw.random() < 0.4:
        reply["sampling"] = draw.choice(SAMPLING)
    if draw.random() < 0.3:
        reply["completion_logprobs"] = [draw.choice(LOGPROBS) for _ in reply["completion_logprobs"]]
    if draw.random() < 0.2:  # one token, and a span of none
        for name in ("completion_token_ids", "completion_logprobs"):
            reply[name] = reply[name][:1]
        spans = [(0, 0), (0, 1)]
        reply["policy_spans"] = [{"version": 0, "start": a, "end": b} for a, b in spans]
    reply["prompt_token_ids"] = draw.choice([prompt, prompt, prompt, prompt[:1], []])
    return reply


def odd_feedback(number: int, draw: random.Random) -> dict[str, Any]:
    """Feedback of a random kind on the reply of this number."""
    kinds: dict[str, dict[str, Any]] = {
        "thumbs": {"value": draw.choice([1, -1])},
        "score": draw.choice(SCORES),
        "correction": {"text": draw.choice(TEXTS)},
        "preference": {"over": f"chatcmpl-{number ^ 1}"},
        "signal": {"signal": draw.choice(["copied", "abandoned"])},
    }
    kind = draw.choice(sorted(kinds))
    return {"interaction_id": f"chatcmpl-{number}", "kind": kind, **kinds[kind]}


@pytest.mark.parametrize("estimator", ["binary", "topk"])
def test_no_odd_event_makes_an_update_raise(
    tiny_model_dir: Path, tmp_path: Path, estimator: str
) -> None:
    updater = Updater(
        tiny_model_dir,
        tmp_path,
        **{
            "learning.batch_examples": 6,
            "learning.min_batch_examples": 1,
            "learning.max_wait_seconds": 0.001,
            "learning.minibatch_examples": 3,
            "learning.divergence_estimator": estimator,
            "learning.divergence_top_k": 3,
        },
    )
    draw = random.Random(0)
    prompt: list[int] = []
    for number, sequence in enumerate(some_sequences(40)):
        written = recorded(updater.policy, sequence, f"chatcmpl-{number}")
        prompt = prompt if number % 2 else list(sequence.prompt_token_ids)
        reply = odd_reply(json.loads(written.to_bytes()), prompt, draw)
        updater.tape.add(Topic.INTERACTIONS, json.dumps(reply).encode())
        for rater in range(3):
            said = odd_feedback(number, draw) | {
                "rater": f"r{rater}",
                "created_at": 1_750_000_000.0,
            }
            updater.tape.add(Topic.FEEDBACK, json.dumps(said).encode())
    for _ in range(60):
        updater.loop.cycle()
    assert updater.ledger.count_ready() == 0
    reasons = {rejection["reason"] for rejection in updater.ledger.rejections()}
    assert not reasons & {Reason.UPDATE_FAILED, Reason.NON_FINITE_UPDATE}
    assert updater.ledger.newest_version() > 0
    assert updater.ledger.accounting().balanced
    assert updater.ledger.audit() == []
    updater.close()
