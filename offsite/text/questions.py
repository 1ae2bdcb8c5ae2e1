"""Rows of prompts that a model answers itself: a prompt, and the right answer where a row has one.

Two ways of writing one are read: ``prompt``, as text or as a list of messages, with or without ``completion``; or
    ``messages``, of which the last is the answer where it is the assistant's. A ``completion`` that is null or empty is
    none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from offsite.text.rows import Messages, Row, messages_in

QUESTIONS: dict[str, tuple[str, ...]] = {"prompt": ("prompt",), "messages": ("messages",)}
ANSWER_FIELD = "completion"

_ASSISTANT = "assistant"


class Question(NamedTuple):
    """What a row holds, one of the two empty; of its messages the first `num_given` are the prompt."""

    segments: tuple[tuple[str, bool], ...]
    messages: Messages
    num_given: int

    @property
    def prompt(self) -> tuple[object, ...]:
        """What rows that ask the same have in common."""
        return self.segments[:1] or self.messages[: self.num_given]


def question_in(row: Row, columns: Mapping[str, str], shape: str) -> Question:
    """Return a row's prompt and answer.

    Args:
        columns: where ``prompt``, ``completion`` and ``messages`` are.
        shape: which of `QUESTIONS` the row has.

    Raises:
        DataError: naming the row: when it holds no prompt, or the prompt's last message is an answer already.
    """
    if shape == "messages":
        messages = messages_in(row, columns["messages"])
        num_given = len(messages) - (messages[-1][0] == _ASSISTANT)
        if not num_given:
            raise row.error("an answer and nothing before it, expected a prompt", hint="put what is asked before it")
        return Question((), messages, num_given)
    column = columns[ANSWER_FIELD]
    answer = None if row.values.get(column) in (None, "") else row.string(column)
    if isinstance(row.values.get(columns["prompt"]), list):
        given = messages_in(row, columns["prompt"], where=" of the prompt")
        if given[-1][0] == _ASSISTANT:
            raise row.error("the prompt's last message is the assistant's", hint=f"give the answer as '{ANSWER_FIELD}'")
        return Question((), given if answer is None else (*given, (_ASSISTANT, answer)), len(given))
    prompt = (row.string(columns["prompt"]), False)
    return Question((prompt,) if answer is None else (prompt, (answer, True)), (), 0)
