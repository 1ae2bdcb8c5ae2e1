"""Rows of preferences: one beginning, the answer that was chosen, and the one that was rejected.

Three ways of writing one are read:

- ``prompt``, ``chosen``, ``rejected``, all text: a prompt and what follows it, or with the prompt before both;
- ``prompt`` as a list of messages, or as the text of one, and both answers as messages, or as the text of one. Answers
  that begin with the prompt's messages again are whole dialogues;
- ``chosen`` and ``rejected`` alone, whole dialogues: both as messages, or both as text in which turns are marked as in
  ``"\\n\\nHuman: ...\\n\\nAssistant: ..."``. What they have in common up to an answer is the beginning.

Of text, what follows the beginning counts, the person's turns in it apart; of messages, the assistant's turns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from offsite.text.rows import Messages, Row, messages_in

PAIR = "chosen/rejected"
PAIR_FIELDS = ("chosen", "rejected")

ASSISTANT_TURN, PERSONS_TURN = "\n\nAssistant:", "\n\nHuman:"

Segments = tuple[tuple[str, bool], ...]
Content = tuple[Segments, Messages]  # one of the two is empty

_ANSWERS = re.compile(rf"({re.escape(PERSONS_TURN)}.*?(?:{re.escape(ASSISTANT_TURN)}|\Z))", re.DOTALL)


class Answers(NamedTuple):
    """Two rows of one beginning: what each holds, and how many of their messages are the beginning."""

    beginning: tuple[object, ...]
    chosen: Content
    rejected: Content
    num_given: int = 0


def answers_in(row: Row, columns: Mapping[str, str], *, needs_prompt: bool = False) -> Answers:
    """Return both rows of a pair.

    Args:
        columns: where ``prompt``, ``chosen`` and ``rejected`` are.
        needs_prompt: a row without a prompt is refused, whatever its answers are.

    Raises:
        DataError: naming the row: when the two are alike, share no beginning, or one is the beginning of the other;
            when they first differ in another's turn than the assistant's; when a field is not of the form above.
    """
    has_prompt = needs_prompt or columns["prompt"] in row.values
    values = [row.values.get(columns[name]) for name in PAIR_FIELDS]
    lists = [isinstance(value, list) for value in values]
    if lists[0] != lists[1]:
        raise row.error("one answer is a list of messages and the other is not", hint="write both in the same way")
    if any(lists) or (has_prompt and isinstance(row.values.get(columns["prompt"]), list)):
        return _of_messages(row, columns, has_prompt=has_prompt)
    chosen, rejected = (row.string(columns[name]) for name in PAIR_FIELDS)
    _require_unlike(row, chosen, rejected)
    if has_prompt:
        prompt = row.string(columns["prompt"])
        if chosen.startswith(prompt) and rejected.startswith(prompt):  # whole texts
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
            if not chosen.strip() or not rejected.strip():
                raise row.error("an answer is the prompt and nothing more", hint="fill it in, or leave the row out")
        return Answers((prompt,), (((prompt, False), (chosen, True)), ()), (((prompt, False), (rejected, True)), ()))
    return _of_dialogues(row, chosen, rejected)


def _require_unlike(row: Row, chosen: object, rejected: object) -> None:
    if chosen == rejected:
        raise row.error("both answers are the same, so none is preferred", hint="leave the row out")


# --- text


def _of_dialogues(row: Row, chosen: str, rejected: str) -> Answers:
    alike = _num_alike(chosen, rejected)
    start = chosen.rfind(ASSISTANT_TURN, 0, alike)
    if start < 0:
        raise row.error(
            "the two dialogues share no beginning, expected text that is alike up to an answer ('Assistant:')",
            hint="give the shared beginning as 'prompt', or the dialogues as messages",
        )
    start += len(ASSISTANT_TURN)
    beginning = chosen[:start]
    sides = [_segments(row, beginning, side[start:]) for side in (chosen, rejected)]
    num = _num_alike(*sides)
    if num in map(len, sides):
        raise row.error("one dialogue is the beginning of the other", hint="give an answer on either side")
    if not (sides[0][num][1] and sides[1][num][1]):
        raise row.error(
            "the two dialogues first differ in a turn of the person's", hint="answers are compared, to the same turns"
        )
    return Answers((beginning,), (sides[0], ()), (sides[1], ()))


def _segments(row: Row, beginning: str, rest: str) -> Segments:
    """Return the beginning and what follows it, the person's turns apart from the answers."""
    first, *more = _ANSWERS.split(rest)
    if not first.strip():
        raise row.error("nothing stands behind the beginning that both share", hint="fill the answer in")
    found: list[tuple[str, bool]] = [(beginning, False), (first, True)]
    found += [(part, number % 2 == 1) for number, part in enumerate(more) if part]
    return tuple(found)


def _num_alike(one: Any, two: Any) -> int:
    """Return how many characters or messages two begin with alike."""
    num = 0
    for left, right in zip(one, two, strict=False):
        if left != right:
            break
        num += 1
    return num


# --- messages


def _of_messages(row: Row, columns: Mapping[str, str], *, has_prompt: bool) -> Answers:
    prompt = _prompt(row, columns["prompt"]) if has_prompt else ()
    chosen, rejected = (_side(row, columns[name], name, prompt) for name in PAIR_FIELDS)
    _require_unlike(row, chosen, rejected)
    num = _num_alike(chosen, rejected)
    if not num:
        raise row.error(
            "the two dialogues share no beginning, expected the same messages up to an answer",
            hint="give what was answered as 'prompt', or at the beginning of both",
        )
    if num in (len(chosen), len(rejected)):
        raise row.error("one dialogue is the beginning of the other", hint="give an answer on either side")
    if not chosen[num][0] == rejected[num][0] == "assistant":
        raise row.error(
            f"the two dialogues first differ in message {num + 1}, which is not the assistant's on both sides",
            hint="answers are compared, to the same messages",
        )
    return Answers(chosen[:num], ((), chosen), ((), rejected), num)


def _prompt(row: Row, column: str) -> Messages:
    """Return the prompt's messages; text is one message of a person's."""
    if isinstance(row.values.get(column), list):
        return messages_in(row, column, where=" of the prompt")
    return (("user", row.string(column)),)


def _side(row: Row, column: str, name: str, prompt: Messages) -> Messages:
    """Return a whole dialogue: the answer behind the prompt, unless it has it already."""
    if not isinstance(row.values.get(column), list):
        return (*prompt, ("assistant", row.string(column)))
    found = messages_in(row, column, where=f" of the {name} answer")
    if prompt and found[: len(prompt)] == prompt:
        return found
    if prompt and found[0][0] != "assistant":
        raise row.error(
            f"the {name} answer begins neither with the prompt's messages nor with the assistant's",
            hint="give the answer alone, or the whole dialogue word for word",
        )
    return (*prompt, *found)
