"""Corrections and preferences move the policy where people pointed, and cost what they must."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from moorline.events import Interaction
from moorline.settings import LearningSettings
from tests.updater.learning.fixtures import credited, recorded, some_sequences
from updater.learning.chat_template import ChatTemplate
from updater.learning.policy import Policy, sampled_logprobs
from updater.learning.trainer import NothingToLearn, Trainer
from updater.values import (
    Batch,
    Correction,
    CreditedExample,
    Example,
    Preference,
    TokenSequence,
    as_sequence,
)

SETTINGS = LearningSettings(
    lora_rank=4, lora_alpha=8, learning_rate=5e-3, anchor_weight=0.0, micro_batch_tokens=256
)
TEXT = "Salt is sodium chloride."


@pytest.fixture
def policy(tiny_model_dir: Path) -> Policy:
    return Policy(tiny_model_dir, rank=4, alpha=8, seed=0)


@pytest.fixture(scope="module")
def chat(tiny_model_dir: Path) -> ChatTemplate:
    return ChatTemplate(tiny_model_dir)


@pytest.fixture
def chat_reply(policy: Policy, chat: ChatTemplate) -> Interaction:
    """A reply to a question that ends as a chat prompt does."""
    prompt = chat._ids("<|im_start|>user\nWhat is salt?<|im_end|>\n<|im_start|>assistant\n")
    return recorded(policy, TokenSequence(prompt, chat.reply("I like it.")), "chatcmpl-chat")


def other_reply(policy: Policy, prompt: tuple[int, ...], name: str) -> Interaction:
    sequence = TokenSequence(prompt, some_sequences(1, seed=5)[0].completion_token_ids)
    return recorded(policy, sequence, name)


def corrected(reply: Interaction, text: str = TEXT, weight: float = 1.0) -> CreditedExample:
    lesson = Correction("fb-1", "ann", text, weight)
    return CreditedExample(Example("corrected", reply, ()), None, 0.0, corrections=(lesson,))


def preferred(reply: Interaction, over: Interaction, weight: float = 1.0) -> CreditedExample:
    lesson = Preference("fb-2", "ann", over, weight)
    example = Example("preferred", reply, (), {over.key: over})
    return CreditedExample(example, None, 0.0, preferences=(lesson,))


def total(policy: Policy, sequence: TokenSequence) -> float:
    return float(sampled_logprobs(policy, [sequence], 512)[0].sum())


def test_a_corrected_text_becomes_likelier(
    policy: Policy, chat: ChatTemplate, chat_reply: Interaction
) -> None:
    trainer = Trainer(policy, SETTINGS, chat=chat)
    wanted = TokenSequence(chat_reply.prompt_token_ids, chat.reply(TEXT))
    before = total(policy, wanted)
    found = trainer.propose(Batch((corrected(chat_reply),), 0)).diagnostics
    assert total(policy, wanted) > before
    assert found["corrections"] == 1.0
    assert found["corrections_not_distilled"] == found["corrections_not_imitated"] == 0.0
    assert found["corrected_tokens"] == wanted.tokens
    assert found["corrected_logprob_nats"] == pytest.approx(before / wanted.tokens, rel=1e-4)


def test_the_told_models_advantage_is_the_difference_of_two_passes(
    policy: Policy, chat: ChatTemplate, chat_reply: Interaction
) -> None:
    settings = SETTINGS.model_copy(update={"correction_weight": 0.0, "distillation_weight": 0.5})
    trainer = Trainer(policy, settings, chat=chat)
    reply_losses = trainer._feedback_losses.prepare([corrected(chat_reply, weight=0.5)])
    hinted_replies = chat.prompt_with_correction(chat_reply.prompt_token_ids, TEXT)
    assert hinted_replies is not None
    reply = as_sequence(chat_reply)
    hinted = TokenSequence(hinted_replies, reply.completion_token_ids)
    with_hint, without = sampled_logprobs(policy, [hinted, reply], 1)
    wanted = 0.25 * (with_hint - without).clamp(-2.0, 2.0)
    advantage = reply_losses["corrected"].advantage
    assert advantage is not None
    assert torch.allclose(advantage, wanted, atol=1e-4)
    assert float(advantage.abs().max()) > 1e-3
    assert reply_losses["corrected"].texts == []


def test_distillation_alone_moves_each_token_as_the_told_model_would(
    policy: Policy, chat: ChatTemplate, chat_reply: Interaction
) -> None:
    settings = SETTINGS.model_copy(update={"correction_weight": 0.0, "learning_rate": 1e-3})
    trainer = Trainer(policy, settings, chat=chat)
    advantage = trainer._feedback_losses.prepare([corrected(chat_reply)])["corrected"].advantage
    assert advantage is not None
    (before,) = sampled_logprobs(policy, [as_sequence(chat_reply)], 512)
    trainer.propose(Batch((corrected(chat_reply),), 0))
    (after,) = sampled_logprobs(policy, [as_sequence(chat_reply)], 512)
    assert float((advantage * (after - before)).sum()) > 0.0


def test_a_plain_completion_is_corrected_by_its_text_alone(
    policy: Policy, chat: ChatTemplate
) -> None:
    plain = recorded(policy, some_sequences(1)[0], "chatcmpl-plain")
    found = Trainer(policy, SETTINGS, chat=chat).propose(Batch((corrected(plain),), 0)).diagnostics
    assert found["corrections_not_distilled"] == 1.0
    assert found["corrected_tokens"] == len(chat.reply(TEXT))
    assert "distillation_advantage_size" not in found


def test_what_does_not_fit_is_counted_and_alone_makes_no_update(
    policy: Policy, chat: ChatTemplate, chat_reply: Interaction
) -> None:
    trainer = Trainer(policy, SETTINGS.model_copy(update={"max_example_tokens": 64}), chat=chat)
    too_long = corrected(chat_reply, "word " * 100)
    before = policy.state()
    with pytest.raises(NothingToLearn):
        trainer.propose(Batch((too_long,), 0))
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state().items())
    thumb = credited(chat_reply, 1.0)
    found = trainer.propose(Batch((too_long, thumb), 0)).diagnostics
    assert found["corrections_not_imitated"] == found["corrections_not_distilled"] == 1.0


def test_weights_of_zero_switch_lessons_off(
    policy: Policy, chat: ChatTemplate, chat_reply: Interaction
) -> None:
    off = {"correction_weight": 0.0, "distillation_weight": 0.0, "preference_weight": 0.0}
    trainer = Trainer(policy, SETTINGS.model_copy(update=off), chat=chat)
    other = other_reply(policy, chat_reply.prompt_token_ids, "chatcmpl-other")
    with pytest.raises(NothingToLearn):
        trainer.propose(Batch((corrected(chat_reply), preferred(chat_reply, other)), 0))


def test_a_preferred_reply_gains_on_the_other(policy: Policy, chat_reply: Interaction) -> None:
    trainer = Trainer(policy, SETTINGS)
    other = other_reply(policy, chat_reply.prompt_token_ids, "chatcmpl-other")

    def gap() -> float:
        return total(policy, as_sequence(chat_reply)) - total(policy, as_sequence(other))

    before = gap()
    found = trainer.propose(Batch((preferred(chat_reply, other),), 0)).diagnostics
    assert gap() > before
    assert found["preferences"] == 1.0
    assert found["preference_margin"] == pytest.approx(0.0, abs=1e-3)  # both are the policy's own


def test_the_gradient_of_a_preference_is_beta_times_the_difference_of_likelihoods(
    policy: Policy, chat_reply: Interaction
) -> None:
    """At p = q the sigmoid is 1/2: the gradient is -beta/2 (grad log p(y) - grad log p(z)) / n."""
    other = other_reply(policy, chat_reply.prompt_token_ids, "chatcmpl-other")
    trainer = Trainer(policy, SETTINGS)
    one = preferred(chat_reply, other, weight=0.5)
    reply_losses = trainer._feedback_losses.prepare([one])
    parameters = [parameter for _, parameter in policy.parameters]
    (loss,) = trainer._feedback_losses.losses([reply_losses["preferred"]], 10, {})
    ours = torch.autograd.grad(loss, parameters)

    def likelihood(interaction: Interaction) -> torch.Tensor:
        logits, tokens = policy.completion_logits([as_sequence(interaction)])
        return logits.log_softmax(-1).gather(-1, tokens[:, None]).sum()

    gap = -0.5 * SETTINGS.preference_beta / 2 * (likelihood(chat_reply) - likelihood(other))
    theirs = torch.autograd.grad(gap, parameters)
    assert loss.item() == pytest.approx(0.5 * math.log(2), rel=1e-3)
    for mine, wanted in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, wanted, rtol=1e-2, atol=1e-5)


def test_a_corrected_token_counts_like_a_rated_one(
    policy: Policy, chat: ChatTemplate, chat_reply: Interaction
) -> None:
    """A correction that says what was said teaches what a thumb up of advantage 1 teaches."""
    settings = SETTINGS.model_copy(update={"distillation_weight": 0.0})
    trainer = Trainer(policy, settings, chat=chat)
    same = corrected(chat_reply, "I like it.")
    assert chat.reply("I like it.") == chat_reply.completion_token_ids
    by_text = trainer.propose(Batch((same,), 0)).diagnostics["gradient_norm"]
    trainer.restore()
    by_thumb = trainer.propose(Batch((credited(chat_reply, 1.0),), 0)).diagnostics["gradient_norm"]
    assert by_text == pytest.approx(by_thumb, rel=1e-3)


def test_lessons_and_ratings_share_one_step_and_micro_batches_add_up(
    policy: Policy, chat: ChatTemplate, chat_reply: Interaction, tiny_model_dir: Path
) -> None:
    other = other_reply(policy, chat_reply.prompt_token_ids, "chatcmpl-other")
    thumbs = [
        credited(recorded(policy, sequence, f"chatcmpl-{index}"), (-1.0) ** index)
        for index, sequence in enumerate(some_sequences(4))
    ]
    batch = Batch((*thumbs, corrected(chat_reply), preferred(chat_reply, other)), 0)
    norms = []
    for tokens in (64, 10_000):
        own = Policy(tiny_model_dir, rank=4, alpha=8, seed=0)
        settings = SETTINGS.model_copy(update={"micro_batch_tokens": tokens})
        found = Trainer(own, settings, chat=chat).propose(batch).diagnostics
        norms.append(found["gradient_norm"])
        assert {
            "corrections",
            "preferences",
            "distillation_advantage_size",
            "ess_share",
        } <= found.keys()
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
