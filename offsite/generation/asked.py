"""What a model is asked: a text to go on from, or messages in its chat template, as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite.errors import ConfigError, DataError
from offsite.text.calls import encoded, quietly
from offsite.text.prompts import prompt_ids
from offsite.text.records import read_files
from offsite.text.rows import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Asked:
    """One prompt: text, or messages. `place` names it in errors, which never repeat it."""

    place: str
    text: str = field(default="", repr=False)
    messages: Messages = field(default=(), repr=False)

    def told(self) -> dict[str, object]:
        """Return the prompt as JSON takes it."""
        if not self.messages:
            return {"prompt": self.text}
        return {"messages": [{"role": role, "content": content} for role, content in self.messages]}


def in_words(prompts: Sequence[str], *, chat: bool) -> list[Asked]:
    """Return prompts as they were typed; under `chat` each is what a user says."""
    return [_asked(f"prompt {number}", text, chat) for number, text in enumerate(prompts, 1)]


def in_files(paths: Sequence[Path], fields: dict[str, str], *, chat: bool) -> list[Asked]:
    """Return the prompts of files, rows of ``prompt`` or of ``messages``; an answer that a row has is not read.

    Raises:
        DataError, ConfigError: as `offsite.text.records.read_files`.
    """
    found = []
    for record in read_files(paths, fields=fields, questions=True):
        if record.messages:
            found.append(Asked(record.place, messages=record.messages[: record.num_given]))
        else:
            found.append(_asked(record.place, record.segments[0][0], chat))
    return found


def ids_of(asked: Asked, tokenizer: PreTrainedTokenizerBase, *, is_read: bool = False) -> list[int]:
    """Return the prompt's tokens, at least one: text closed by nothing, messages with the template's call for more.

    Args:
        is_read: by an encoder, which reads text as its tokenizer closes it.

    Raises:
        ConfigError: when there are messages, and the tokenizer has no chat template.
        DataError: when the template refuses the messages, or the tokenizer a text; nothing of it is told.
    """
    if not asked.messages:
        ids = encoded(tokenizer, asked.text, what=asked.place) if is_read else prompt_ids(tokenizer, asked.text)
        if not ids:
            raise DataError(f"{asked.place}: no token is left of it")
        return ids
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{asked.place}: the model has no chat template for messages",
            hint="give text to go on from, without --chat",
        )
    chat = [{"role": role, "content": content} for role, content in asked.messages]

    def render() -> Any:
        # as offsite serve does it: tokens that close a turn are plain text where a message holds them
        return tokenizer.apply_chat_template(chat, add_generation_prompt=True, sanitize_control_tokens=True)

    def refusal(_: str) -> DataError:  # what was raised may quote the messages
        return DataError(f"{asked.place}: the chat template refuses these messages")

    return list(quietly(render, refusal, compiled=True)["input_ids"])


def _asked(place: str, text: str, chat: bool) -> Asked:
    return Asked(place, messages=(("user", text),)) if chat else Asked(place, text)
