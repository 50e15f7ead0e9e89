"""The gate's probes: fixed prompts with replies, and fixed text, out of reach of any feedback."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from moorline.errors import MoorlineError
from updater.values import TokenSequence

_OWN_SET = "probes.jsonl"


class ProbesInvalid(MoorlineError):
    """A probe file cannot be used; the message names the line and what it must hold."""


@dataclass(frozen=True)
class ProbeSet:
    """Probes as token ids, in the order of the file."""

    chats: tuple[TokenSequence, ...]
    """A prompt under the model's chat template, and the reply."""
    texts: tuple[TokenSequence, ...]
    """Plain text: the first token is the prompt, the rest is predicted."""

    @property
    def sequences(self) -> list[TokenSequence]:
        """Chats, then texts."""
        return [*self.chats, *self.texts]


def load_probes(path: Path | None, model_dir: Path) -> ProbeSet:
    """Read probes (``None``: the set that comes with Moorline) for one model's tokenizer.

    Raises:
        ProbesInvalid: a line is not usable, or there are no chats or no texts.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    source = path if path is not None else files("updater.safety").joinpath(_OWN_SET)
    try:
        content = source.read_text(encoding="utf-8")
    except OSError as error:
        raise ProbesInvalid(f"cannot read probes ({error}): set gate.probes") from None
    chats: list[TokenSequence] = []
    texts: list[TokenSequence] = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        row = _row(line, number)
        if "text" in row:
            tokens = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
            texts.append(TokenSequence(tuple(tokens[:1]), tuple(tokens[1:])))
        else:
            chats.append(_chat(tokenizer, row["prompt"], row["reply"]))
    if not chats or not texts:
        raise ProbesInvalid("probes need at least one prompt with its reply and one text")
    return ProbeSet(tuple(chats), tuple(texts))


def _row(line: str, number: int) -> Mapping[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    if isinstance(row, dict):
        wanted = ("text",) if "text" in row else ("prompt", "reply")
        if all(isinstance(row.get(name), str) and len(row[name]) > 1 for name in wanted):
            return row
    raise ProbesInvalid(
        f'probe line {number}: expected {{"prompt": "...", "reply": "..."}} or {{"text": "..."}}'
    )


def _chat(tokenizer: Any, prompt: str, reply: str) -> TokenSequence:
    opening = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    before = tokenizer(opening, add_special_tokens=False)["input_ids"]
    after = tokenizer(reply, add_special_tokens=False)["input_ids"]
    return TokenSequence(tuple(before), (*after, tokenizer.eos_token_id))
