"""The losses of corrections and preferences beside the objective; their formulas are in
``feedback_objectives.py``.

All terms of one optimiser step are on one scale: a token of corrected text counts like a rated
token with A = ``correction_weight``, and a preferred pair counts like one reply of the minibatch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from moorline.events import Interaction
from moorline.settings import LearningSettings
from updater.learning.behaviour import Behaviour
from updater.learning.chat_template import ChatTemplate, after_prefix
from updater.learning.feedback_objectives import (
    bounded_imitation,
    distillation_advantage,
    preference_loss,
    preference_margin,
)
from updater.learning.objectives import token_mean
from updater.learning.policy import Policy, micro_batches, sampled_logprobs
from updater.learning.sampling import processed_logprobs
from updater.values import CreditedExample, Preference, TokenSequence, as_sequence


@dataclass(frozen=True)
class CorrectedText:
    """What somebody wanted to be said."""

    sequence: TokenSequence
    log_live: Tensor
    """[tokens] under the live policy, nats."""
    weight: float


@dataclass(frozen=True)
class Pair:
    """A reply that was preferred over another."""

    chosen: Interaction
    rejected: Interaction
    weight: float


@dataclass
class ReplyLosses:
    """What follows for one reply from its corrections and preferences."""

    advantage: Tensor | None = None
    """[tokens of the reply] to add to the rating's advantage."""
    texts: list[CorrectedText] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)

    @property
    def has_signal(self) -> bool:
        distilled = self.advantage is not None and bool(self.advantage.any())
        return distilled or bool(self.texts) or bool(self.pairs)


class FeedbackLosses:
    """Prepares a batch's losses with the live policy; computes them under the one in training."""

    def __init__(
        self, policy: Policy, chat: ChatTemplate | None, settings: LearningSettings
    ) -> None:
        """``chat`` None: corrections cannot be put into tokens, and teach nothing."""
        self._policy = policy
        self._chat = chat
        self._settings = settings
        self.diagnostics: dict[str, float] = {}
        """Measurements of the last batch; empty where nobody corrected or preferred anything."""

    # --- before the first step: the policy is the live one ------------------------------------

    def prepare(self, examples: Sequence[CreditedExample]) -> dict[str, ReplyLosses]:
        """Prepare a batch's losses, by example id. Costs forward passes only for corrections."""
        reply_losses = {one.example.example_id: ReplyLosses() for one in examples}
        self.diagnostics = {}
        corrected = [one for one in examples if one.corrections]
        if corrected and self._chat is not None:
            self._prepare_corrections(corrected, reply_losses)
        pairs = 0
        if self._settings.preference_weight > 0.0:
            for one in examples:
                made = [_pair(one, preference) for preference in one.preferences]
                reply_losses[one.example.example_id].pairs.extend(made)
                pairs += len(made)
        if pairs:
            self.diagnostics["preferences"] = float(pairs)
        return reply_losses

    def _prepare_corrections(
        self, corrected: Sequence[CreditedExample], reply_losses: Mapping[str, ReplyLosses]
    ) -> None:
        assert self._chat is not None
        settings, chat = self._settings, self._chat
        hinted_replies: list[tuple[str, TokenSequence, TokenSequence, float]] = []
        texts: list[tuple[str, TokenSequence, float]] = []
        not_distilled = not_imitated = 0
        for one in corrected:
            reply = as_sequence(one.example.interaction)
            prefix = one.example.interaction.reply_prefix or ""
            for correction in one.corrections:
                name = one.example.example_id
                rest = after_prefix(correction.text, prefix)  # the prompt ends with the prefix
                prompt = chat.prompt_with_correction(reply.prompt_token_ids, prefix + rest, prefix)
                hinted = TokenSequence(prompt or (), reply.completion_token_ids)
                if settings.distillation_weight > 0.0:
                    if prompt is not None and self._fits(hinted):
                        hinted_replies.append((name, hinted, reply, correction.weight))
                    else:
                        not_distilled += 1
                text = TokenSequence(reply.prompt_token_ids, chat.reply(rest))
                if settings.correction_weight > 0.0:
                    if text.completion_token_ids and self._fits(text):
                        texts.append((name, text, correction.weight))
                    else:
                        not_imitated += 1
        self._distil(hinted_replies, reply_losses)
        self._imitate(texts, reply_losses)
        self.diagnostics |= {
            "corrections": float(sum(len(one.corrections) for one in corrected)),
            "corrections_not_distilled": float(not_distilled),
            "corrections_not_imitated": float(not_imitated),
        }

    def _distil(
        self,
        hinted_replies: Sequence[tuple[str, TokenSequence, TokenSequence, float]],
        reply_losses: Mapping[str, ReplyLosses],
    ) -> None:
        """Add the advantages that the same model, given the correction, sees in its own reply."""
        if not hinted_replies:
            return
        settings = self._settings
        with_hint = self._live_logprobs([hinted for _, hinted, _, _ in hinted_replies])
        without = self._live_logprobs([reply for _, _, reply, _ in hinted_replies])
        sizes = []
        for (name, _, _, weight), log_with_hint, log_without in zip(
            hinted_replies, with_hint, without, strict=True
        ):
            advantage = distillation_advantage(
                log_with_hint, log_without, settings.distillation_clip_nats
            )
            sizes.append(advantage.abs())
            advantage = settings.distillation_weight * weight * advantage
            before = reply_losses[name].advantage
            reply_losses[name].advantage = advantage if before is None else before + advantage
        self.diagnostics["distillation_advantage_size"] = float(torch.cat(sizes).mean())

    def _imitate(
        self,
        texts: Sequence[tuple[str, TokenSequence, float]],
        reply_losses: Mapping[str, ReplyLosses],
    ) -> None:
        """Add the corrected texts, with the live policy's log-probabilities of them."""
        if not texts:
            return
        live = self._live_logprobs([text for _, text, _ in texts])
        for (name, text, weight), log_live in zip(texts, live, strict=True):
            weight *= self._settings.correction_weight
            reply_losses[name].texts.append(CorrectedText(text, log_live, weight))
        self.diagnostics["corrected_tokens"] = float(sum(text.tokens for _, text, _ in texts))
        self.diagnostics["corrected_logprob_nats"] = float(torch.cat(live).mean())

    def _live_logprobs(self, sequences: Sequence[TokenSequence]) -> list[Tensor]:
        return sampled_logprobs(self._policy, sequences, self._settings.micro_batch_tokens)

    def _fits(self, sequence: TokenSequence) -> bool:
        tokens = len(sequence.prompt_token_ids) + sequence.tokens
        return tokens <= self._settings.max_example_tokens

    # --- in every step ------------------------------------------------------------------------

    def losses(
        self,
        reply_losses: Sequence[ReplyLosses],
        total_tokens: int,
        behaviours: Mapping[str, Behaviour],
    ) -> Iterator[Tensor]:
        """Yield a minibatch's losses, micro-batch by micro-batch.

        Args:
            total_tokens: completion tokens of the minibatch's replies.
        """
        yield from self._text_losses([t for one in reply_losses for t in one.texts], total_tokens)
        pairs = [pair for one in reply_losses for pair in one.pairs]
        yield from self._pair_losses(pairs, len(reply_losses), behaviours)

    def _text_losses(self, texts: Sequence[CorrectedText], total_tokens: int) -> Iterator[Tensor]:
        sequences = [text.sequence for text in texts]
        for group in micro_batches(sequences, self._settings.micro_batch_tokens):
            logits, tokens = self._policy.completion_logits([sequences[i] for i in group])
            chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)
            log_p = torch.split(chosen, [sequences[i].tokens for i in group])
            mask = pad_sequence([torch.ones_like(part, dtype=torch.bool) for part in log_p], True)
            weight = torch.tensor([[texts[i].weight] for i in group], device=mask.device)
            output = bounded_imitation(
                pad_sequence(list(log_p), True),
                pad_sequence([texts[i].log_live for i in group], True),
                weight.expand_as(mask),
                mask,
            )
            yield token_mean(output.loss, output.mask, total_tokens)

    def _pair_losses(
        self, pairs: Sequence[Pair], total_replies: int, behaviours: Mapping[str, Behaviour]
    ) -> Iterator[Tensor]:
        settings, margins = self._settings, []
        for pair in pairs:
            ratios = self._log_ratios((pair.chosen, pair.rejected), behaviours)
            loss = preference_loss(ratios[:1], ratios[1:], settings.preference_beta).sum()
            margin = preference_margin(ratios[:1], ratios[1:], settings.preference_beta)
            margins.append(float(margin.detach()))
            yield settings.preference_weight * pair.weight * loss / total_replies
        if margins:
            self.diagnostics.setdefault("preference_margin", sum(margins) / len(margins))

    def _log_ratios(
        self, replies: Sequence[Interaction], behaviours: Mapping[str, Behaviour]
    ) -> Tensor:  # [replies]
        """log p - log q of whole replies, under the settings that they were sampled with."""
        sequences = [as_sequence(reply) for reply in replies]
        logits, sampled = self._policy.completion_logits(sequences)
        sizes = [sequence.tokens for sequence in sequences]
        ratios = []
        for reply, rows, tokens in zip(
            replies, torch.split(logits, sizes), torch.split(sampled, sizes), strict=True
        ):
            behaviour = behaviours.get(reply.key)
            possible = behaviour.possible(rows, reply.sampling) if behaviour is not None else None
            log_p = processed_logprobs(rows, tokens, reply.sampling, possible)
            log_q = torch.tensor(reply.completion_logprobs, device=log_p.device)
            ratios.append((log_p - log_q).sum())
        return torch.stack(ratios)


def _pair(one: CreditedExample, preference: Preference) -> Pair:
    return Pair(one.example.interaction, preference.rejected, preference.weight)
