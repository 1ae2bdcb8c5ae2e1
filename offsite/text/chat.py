"""Conversations as a chat template writes them, and where in them the assistant's turns stand.

A template is a program that somebody else wrote: it may refuse the beginning of a conversation, open a thought when it
asks for an answer, drop earlier thoughts, strip white space. So nothing is taken for granted that it did not show. A
turn is found by marks: characters that stand nowhere else are put around it, and they count only if the template
otherwise writes the very same text. What the loss counts on is

- what the template itself marks as generated, if it does;
- else the turn, from where its asking for an answer ends, to where the turn ends as the last one does, each if the
  conversation up to there is written as the beginning of the whole;
- else the turn's own text, and behind it what also stands behind the last turn of a conversation: its closing tokens.

A turn of which the template shows a part, for it drops thoughts, counts as far as it is shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from offsite.errors import DataError
from offsite.text.calls import quietly
from offsite.text.records import Record

Spans = tuple[tuple[int, int], ...]  # half-open ranges of characters that count in the loss
Messages = list[dict[str, str]]

ASSISTANT = "assistant"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_HALF_TOKEN = re.compile(r"[<\[][^>\]]*$")  # "<|" of "<|end|>" and "<|user|>" closes nothing
_MOST_BY_CHANCE = 64
_FIRST_MARK, _LAST_MARK = 0xF0000, 0x10FFFD  # private use, of which no text means anything


@dataclass(frozen=True)
class _Place:
    """Where a turn's text stands in what the template wrote."""

    start: int
    end: int


def rendered_chat(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[str, Spans]:
    """Return the conversation as the template writes it, and the spans of it that the assistant is to learn.

    Raises:
        DataError: when there is no template, it refuses or fails, or a turn's text cannot be found in what it writes;
            with file and row, and nothing of what they hold.
    """
    _require_template(record, tokenizer)
    return _Conversation(record, tokenizer).found()


def asked_chat(record: Record, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the messages that a question gives as the template writes them when it asks for an answer.

    Raises:
        DataError: as `rendered_chat`.
    """
    _require_template(record, tokenizer)
    return _Conversation(record, tokenizer).asked()


def written_chat(record: Record, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the whole conversation as the template writes it, whether or not its turns can be told apart.

    Raises:
        DataError: as `rendered_chat`, but for turns.
    """
    _require_template(record, tokenizer)
    return _Conversation(record, tokenizer).whole()


def answers_only(record: Record, spans: Spans) -> Spans:
    """Return the spans behind the messages that were given: those of the answers that a pair compares.

    Raises:
        DataError: when the assistant's turns do not have a span each, so that nobody can tell which is whose.
    """
    given = sum(role == ASSISTANT for role, _ in record.messages[: record.num_given])
    if not given:
        return spans
    if len(spans) != sum(role == ASSISTANT for role, _ in record.messages):
        raise DataError(
            f"{record.place}: the chat template marks not one stretch for each of the assistant's turns",
            hint="give rows of prompt, chosen and rejected as text",
        )
    return spans[given:]


def _require_template(record: Record, tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise DataError(
            f"{record.place}: holds messages, but the model's tokenizer has no chat template",
            hint="give rows of prompt and completion",
        )


class _Conversation:
    def __init__(self, record: Record, tokenizer: PreTrainedTokenizerBase) -> None:
        self._record, self._tokenizer = record, tokenizer
        self._messages: Messages = [{"role": role, "content": content} for role, content in record.messages]

    def found(self) -> tuple[str, Spans]:
        whole = self._written(self._messages)
        if _GENERATION.search(self._template()):
            return whole, self._marked_by_template(whole)
        places = self._places(self._messages, whole)
        spans: list[tuple[int, int]] = []
        for number, message in enumerate(self._messages):
            if message["role"] == ASSISTANT:
                spans.append(self._span(number, whole, places.get(number), spans[-1][1] if spans else 0))
        return whole, tuple(spans)

    def whole(self) -> str:
        return self._written(self._messages)

    def asked(self) -> str:
        return self._written(self._messages[: self._record.num_given], ask=True)

    def _span(self, number: int, whole: str, place: _Place | None, least: int) -> tuple[int, int]:
        """Return where turn `number` stands in the whole, not before `least`."""
        asked, ended = self._beginning(number, ask=True), self._beginning(number + 1, ask=False)
        start = self._asked_until(number, whole, asked, least)
        end = len(ended) if ended is not None and whole.startswith(ended) else None
        if place is not None:
            start = place.start if start is None or start >= place.end else start
            end = place.end + self._num_closing(number, whole, place, ended) if end is None or end < place.end else end
        if start is None or end is None or not least <= start < end:
            raise self._lost(number, ended)
        return start, end

    def _asked_until(self, number: int, whole: str, asked: str | None, least: int) -> int | None:
        """Return where asking for turn `number` ends in the whole; None where it is not asked for in these words.

        What is asked with must show what was said last: a template that goes by pairs writes nothing of half a pair.
        """
        if asked is None or len(asked) < least or not whole.startswith(asked):
            return None
        last = self._messages[number - 1]
        is_shown = last["role"] == ASSISTANT or last["content"].strip() in asked[least:]
        return len(asked) if is_shown else None

    def _lost(self, number: int, ended: str | None) -> DataError:
        """Return the error for a turn that cannot be found, with the reason as far as it is known."""
        hint = "give rows of prompt and completion"
        reason = f"the chat template does not write the text of turn {number + 1} as it stands"
        if ended is not None and self._places(self._messages[: number + 1], ended).get(number) is not None:
            reason = f"the chat template renders turn {number + 1} differently when others follow"
            hint = f"give one answer per row, or {hint.removeprefix('give ')}"
        return DataError(f"{self._record.place}: {reason}", hint=hint)

    def _num_closing(self, number: int, whole: str, place: _Place, ended: str | None) -> int:
        """Return how many characters behind the turn close it: those that also follow the last turn of a conversation.

        That is this one up to there, or else, for templates that refuse it, a question and this answer.
        """
        messages = self._messages[: number + 1]
        if ended is None:
            messages = [{"role": "user", "content": "?"}, self._messages[number]]
            ended = self._tried(messages, ask=False)
        last = None if ended is None else self._places(messages, ended).get(len(messages) - 1)
        if ended is None or last is None:
            raise DataError(
                f"{self._record.place}: the chat template does not show where turn {number + 1} ends",
                hint="give one answer per row, or rows of prompt and completion",
            )
        own, others = ended[last.end :], whole[place.end :]
        num = _num_alike(own, others)
        return num if num == len(own) else len(_HALF_TOKEN.sub("", own[:num]))

    def _beginning(self, num_messages: int, *, ask: bool) -> str | None:
        """Return what the template writes of the first messages, None where it refuses a conversation that ends so."""
        return self._tried(self._messages[:num_messages], ask=ask)

    # --- where turns stand

    def _marked_by_template(self, whole: str) -> Spans:
        """Return what the template itself marks as generated."""
        from transformers.utils.chat_template_utils import render_jinja_template

        def spans() -> tuple[str, list[tuple[int, int]]]:
            variables: dict[str, Any] = dict(self._tokenizer.special_tokens_map)
            rendered: Any = render_jinja_template(
                conversations=[self._messages],
                chat_template=self._template(),
                return_assistant_tokens_mask=True,
                **variables,
            )
            (text,), (places,) = rendered
            return text, [(start, end) for start, end in places if start < end]

        written, found = quietly(spans, self._refusal)
        if written != whole or not found:
            raise DataError(
                f"{self._record.place}: the chat template marks nothing of the conversation as generated",
                hint="give rows of prompt and completion",
            )
        return tuple(sorted(found))

    def _places(self, messages: Messages, text: str) -> dict[int, _Place]:
        """Return by number where the assistant's turns stand in `text`, which is what is written of `messages`.

        All are marked at once, around the whole turn and then inside of its white space, which the template may strip;
        what is not found so is looked for turn by turn.
        """
        numbers = [number for number, message in enumerate(messages) if message["role"] == ASSISTANT]
        found: dict[int, _Place] = {}
        for tight in (False, True):
            edges = {number: _edges(messages[number]["content"], tight=tight) for number in numbers}
            shown = self._marked(messages, text, edges)
            if shown is not None:
                found = {number: _Place(*sorted(at.values())) for number, at in shown.items() if len(at) == 2}
                break
        alone = {number: self._place(messages, text, number) for number in numbers if number not in found}
        return found | {number: place for number, place in alone.items() if place is not None}

    def _place(self, messages: Messages, text: str, number: int) -> _Place | None:
        """Return where one turn stands, or as much as is shown; a template may look at how a turn begins or ends."""
        content = messages[number]["content"]
        for tight in (False, True):
            first, last = _edges(content, tight=tight)
            for offsets in ((first, last), (last,), (first,)):
                at = (self._marked(messages, text, {number: offsets}) or {}).get(number, {})
                if len(at) == 2:
                    return _Place(at[first], at[last])
                if last in at:
                    return self._shown(messages, text, number, last, at[last], step=-1)
                if first in at:
                    return self._shown(messages, text, number, first, at[first], step=1)
        return None

    def _shown(self, messages: Messages, text: str, number: int, offset: int, at: int, *, step: int) -> _Place | None:
        """Return how much of a turn is shown from its character `offset`, which stands `at`, forwards or backwards.

        It is what is alike, less what is so by chance: what can be marked without changing what is written.
        """
        content = messages[number]["content"]
        own, beside = (content[offset:], text[at:]) if step > 0 else (content[:offset][::-1], text[:at][::-1])
        num = _num_alike(own, beside)
        for length in range(num, max(0, num - _MOST_BY_CHANCE), -1):
            ends = sorted((at, at + step * length))
            if length == len(own.rstrip()) or length == len(own):
                return _Place(*ends)
            both = self._marked(messages, text, {number: sorted((offset, offset + step * length))}) or {}
            if len(both.get(number, {})) == 2:
                return _Place(*ends)
        return None

    def _marked(
        self, messages: Messages, text: str, offsets: Mapping[int, Sequence[int]]
    ) -> dict[int, dict[int, int]] | None:
        """Return where marks in the turns stand, by turn and offset; None when the template writes other text for them.

        Args:
            offsets: by number of a turn, before which of its characters it is marked.
        """
        free = _marks(messages)
        changed, marks = list(messages), dict[str, tuple[int, int]]()
        for number, places in offsets.items():
            content, parts, before = messages[number]["content"], [], 0
            for offset in places:
                mark = next(free, "")
                marks[mark] = (number, offset)
                parts += [content[before:offset], mark]
                before = offset
            changed[number] = {"role": ASSISTANT, "content": "".join([*parts, content[before:]])}
        written = None if "" in marks else self._tried(changed, ask=False)
        if written is None:
            return None
        plain, seen = list[str](), dict[str, list[int]]()
        for letter in written:
            if letter in marks:
                seen.setdefault(letter, []).append(len(plain))
            else:
                plain.append(letter)
        if "".join(plain) != text:
            return None
        found: dict[int, dict[int, int]] = {number: {} for number in offsets}
        for mark, places_seen in seen.items():
            number, offset = marks[mark]
            if len(places_seen) == 1:
                found[number][offset] = places_seen[0]
        return found

    # --- what the template writes

    def _template(self) -> str:
        return str(self._tokenizer.get_chat_template())

    def _refusal(self, kind: str) -> DataError:
        """Return the error for a template that raised `kind`, whose message may quote the conversation."""
        if kind == jinja2.TemplateError.__name__:  # what a template raises of itself
            hint = "most templates want user and assistant in turn, the user first, and some no system message"
            return DataError(f"{self._record.place}: the chat template refuses the conversation", hint=hint)
        return DataError(
            f"{self._record.place}: the chat template fails on the conversation ({kind})",
            hint="give rows of prompt and completion, or ask for a model whose chat template works",
        )

    def _written(self, messages: Messages, *, ask: bool = False) -> str:
        def write() -> Any:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)

        return str(quietly(write, self._refusal))

    def _tried(self, messages: Messages, *, ask: bool) -> str | None:
        """Return what the template writes, None where it raises anything."""
        if not messages:
            return None
        try:
            return self._written(messages, ask=ask)
        except DataError:
            return None


def _marks(messages: Messages) -> Iterator[str]:
    """Yield characters that stand in none of the messages."""
    taken = set("".join(message["content"] + message["role"] for message in messages))
    return (mark for mark in map(chr, range(_FIRST_MARK, _LAST_MARK)) if mark not in taken)


def _edges(content: str, *, tight: bool) -> tuple[int, int]:
    """Return where a text begins and ends, without the white space around it if `tight`."""
    return (len(content) - len(content.lstrip()), len(content.rstrip())) if tight else (0, len(content))


def _num_alike(one: str, two: str) -> int:
    """Return how many characters two texts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False)))
