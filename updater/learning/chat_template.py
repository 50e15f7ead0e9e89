"""A correction in token space, by the chat template of the base model.

A template ends a prompt with what asks for a reply (``<|im_start|>assistant``). A user's turn that
carries the correction is put before that end, into the very tokens of the logged prompt. Where a
template cannot do this (turns must alternate) or the prompt does not end so (plain completions),
there is no hint, and the correction teaches by its text alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from moorline.events import composed

HINT = "A better reply to this would have been:\n{correction}\nReply again."
_QUESTION, _REPLY = "question", "reply"


class ChatTemplate:
    """The turns of one model's chats, as token ids."""

    def __init__(self, model_dir: Path) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
        self._templated = self._tokenizer.chat_template is not None
        self._control = _any_of(str(t) for t in self._tokenizer.added_tokens_decoder.values())
        self._reply_opening = self._find_reply_opening()
        self._reply_ending = self._find_reply_ending()

    def prompt_with_correction(
        self, prompt_token_ids: tuple[int, ...], correction: str, reply_prefix: str = ""
    ) -> tuple[int, ...] | None:
        """The prompt with the correction as a last turn of the user; None where there is no way.

        Args:
            correction: what the whole reply should have been.
            reply_prefix: the beginning of the reply with which the prompt ends.
        """
        opening = self._reply_opening
        if opening and reply_prefix:
            opening += self._ids(reply_prefix)
        plain = self._plain(correction)
        if not plain or not opening or prompt_token_ids[-len(opening) :] != opening:
            return None
        before = self._render(("user", _QUESTION))
        hint = HINT.format(correction=plain)
        after = self._render(("user", _QUESTION), ("user", hint))
        if before is None or after is None or not after.startswith(before):
            return None
        turn = self._ids(after.removeprefix(before))
        return (*prompt_token_ids[: -len(opening)], *turn, *opening)

    def reply(self, text: str) -> tuple[int, ...]:
        """A whole reply: the text and the token that ends a turn; empty where no text is left."""
        plain = self._plain(text)
        return (*self._ids(plain), *self._reply_ending) if plain else ()

    def _find_reply_opening(self) -> tuple[int, ...]:
        """What a template adds to a prompt to ask for a reply; empty: it has none."""
        before = self._render(("user", _QUESTION))
        after = self._render(("user", _QUESTION), ask=True)
        if before is None or after is None or not after.startswith(before):
            return ()
        return self._ids(after.removeprefix(before))

    def _find_reply_ending(self) -> tuple[int, ...]:
        """The first of the tokenizer's added tokens after a reply; its end of text otherwise."""
        asked = self._render(("user", _QUESTION), ask=True)
        answered = self._render(("user", _QUESTION), ("assistant", _REPLY))
        if asked is not None and answered is not None and answered.startswith(asked + _REPLY):
            for token in self._ids(answered.removeprefix(asked + _REPLY)):
                if token in self._tokenizer.added_tokens_decoder:
                    return (token,)
        end = self._tokenizer.eos_token_id
        return () if end is None else (end,)

    def _render(self, *turns: tuple[str, str], ask: bool = False) -> str | None:
        """A chat as text; None: the template refuses it."""
        if not self._templated:
            return None
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            text: str = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=ask
            )
        except TemplateError:
            return None
        return text

    def _plain(self, text: str) -> str:
        """The text without what the tokenizer would take for control tokens; "" for a blank one.

        Twice: around one that was taken out another may close up, which a blank keeps open.
        """
        text = self._control.sub(" ", self._control.sub("", text))
        return text if text.strip() else ""

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def after_prefix(text: str, reply_prefix: str) -> str:
    """A correction without the given beginning of the reply, where it repeats it."""
    text, reply_prefix = composed(text), composed(reply_prefix)
    for prefix in (reply_prefix, reply_prefix.rstrip(), reply_prefix.strip()):
        if prefix and text.startswith(prefix):
            return text.removeprefix(prefix)
    return text


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches each of them, the longest first; runs of blanks are no control tokens."""
    names = sorted({token for token in tokens if token.strip()}, key=lambda t: (-len(t), t))
    return re.compile("|".join(map(re.escape, names)) or r"(?!)")
