"""A correction of a reply that continued a given beginning: the beginning is not taught twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from moorline.events import Interaction
from moorline.settings import LearningSettings
from serving.request_fields import read_fields
from tests.updater.ledger.fixtures import interaction
from updater.learning.chat_template import HINT, ChatTemplate, after_prefix
from updater.learning.feedback_losses import FeedbackLosses
from updater.learning.policy import Policy
from updater.values import Correction, CreditedExample, Example

QUESTION = [{"role": "user", "content": "What is a glacier?"}]
BEGINNING = "A glacier is"


def last(content: Any, **more: Any) -> dict[str, Any]:
    """A chat that ends with a message of the assistant."""
    return {"messages": [*QUESTION, {"role": "assistant", "content": content}], **more}


CONTINUED = {"continue_final_message": True, "add_generation_prompt": False}


@pytest.mark.parametrize(
    ("body", "prefixes"),
    [
        (last(BEGINNING, **CONTINUED), (BEGINNING,)),
        (last(BEGINNING, continue_final_message="true"), (BEGINNING,)),
        (last([{"type": "text", "text": "A "}, {"type": "text", "text": "b"}], **CONTINUED),
         ("A b",)),
        (last(None, **CONTINUED), (None,)),
        (last(BEGINNING), ()),
        (last(BEGINNING, continue_final_message=False), ()),
        ({"messages": [last(BEGINNING)["messages"], QUESTION, []], **CONTINUED},
         (BEGINNING, "What is a glacier?", None)),
        ({"input": [{"role": "assistant", "status": "in_progress",
                     "content": [{"type": "output_text", "text": BEGINNING}]}]}, (BEGINNING,)),
        ({"input": [{"role": "assistant", "status": "completed", "content": BEGINNING}]}, ()),
        ({"input": "Hi"}, ()),
        ({"messages": "Hi", **CONTINUED}, ()),
        ({"messages": [1], **CONTINUED}, (None,)),
        ({"messages": [], **CONTINUED}, (None,)),
        ({"messages": [[], 1], **CONTINUED}, (None, None)),
    ],
)  # fmt: skip
def test_the_beginning_that_a_client_gives_is_read_on_every_route(
    body: dict[str, Any], prefixes: tuple[str | None, ...]
) -> None:
    assert read_fields(json.dumps(body).encode()).reply_prefixes == prefixes


@pytest.mark.parametrize(
    ("text", "prefix", "rest"),
    [
        ("A glacier is a river of ice.", "A glacier is", " a river of ice."),
        ("A glacier is a river of ice.", "A glacier is ", "a river of ice."),
        ("A glacier isn't water.", "A glacier is\n", "n't water."),
        (" a river of ice.", "A glacier is", " a river of ice."),
        ("A glacier is", "A glacier is", ""),
        ("Jose\u0301 is here", "Jos\xe9 is", " here"),
        ("Ice.", "", "Ice."),
        ("Ice.", "  ", "Ice."),
    ],
)
def test_a_correction_goes_on_where_the_beginning_ends(text: str, prefix: str, rest: str) -> None:
    assert after_prefix(text, prefix) == rest


@pytest.fixture(scope="module")
def chat(tiny_model_dir: Path) -> ChatTemplate:
    return ChatTemplate(tiny_model_dir)


@pytest.fixture(scope="module")
def continued(tiny_model_dir: Path) -> Interaction:
    """As the server records it: the prompt ends with the beginning."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    prompt = tokenizer.apply_chat_template(
        last(BEGINNING)["messages"], continue_final_message=True
    )["input_ids"]
    completion = tuple(tokenizer(" cold")["input_ids"])
    return interaction("a").model_copy(
        update={
            "prompt_token_ids": tuple(prompt),
            "reply_prefix": BEGINNING,
            "completion_token_ids": completion,
            "completion_logprobs": (-1.0,) * len(completion),
        }
    )


@pytest.mark.parametrize("text", ["A glacier is a river of ice.", " a river of ice."])
def test_the_beginning_is_taught_once_whether_or_not_the_correction_repeats_it(
    tiny_model_dir: Path, chat: ChatTemplate, continued: Interaction, text: str
) -> None:
    policy = Policy(tiny_model_dir, rank=4, alpha=8, seed=0)
    losses = FeedbackLosses(policy, chat, LearningSettings())
    one = CreditedExample(
        Example("a", continued, ()), None, 0.0, corrections=(Correction("fb", "ann", text, 1.0),)
    )
    (taught,) = losses.prepare([one])["a"].texts
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    whole = tokenizer.decode(
        (*taught.sequence.prompt_token_ids, *taught.sequence.completion_token_ids)
    )
    assert whole.count(BEGINNING) == 1
    assert whole.endswith("assistant\nA glacier is a river of ice.<|im_end|>")
    assert losses.diagnostics["corrections_not_distilled"] == 0.0


def test_a_hint_stands_before_the_beginning_and_shows_the_whole_reply(
    tiny_model_dir: Path, chat: ChatTemplate, continued: Interaction
) -> None:
    told = chat.prompt_with_correction(
        continued.prompt_token_ids, "A glacier is a river of ice.", BEGINNING
    )
    assert told is not None
    text = AutoTokenizer.from_pretrained(tiny_model_dir).decode(told)
    hint = HINT.format(correction="A glacier is a river of ice.")
    assert text.endswith(f"<|im_start|>user\n{hint}<|im_end|>\n<|im_start|>assistant\n{BEGINNING}")
