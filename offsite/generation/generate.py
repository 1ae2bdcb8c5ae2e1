"""Text from a causal language model or an encoder-decoder, one token at a time.

Nothing here knows of HTTP. `generate` yields one `Piece` per token; the pieces' texts, joined, are the
answer, so that a streamed answer and a whole one cannot differ. Text is handed out only when it is final:
no half characters, and nothing that may turn out to be the start of a stop string.

Shape letters: B batch (always 1 here), T tokens.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor

from offsite.errors import ConfigError, DataError
from offsite.generation.sampling import Constraint, Likely, Sampler, Settings
from offsite.modelling.context import context_of
from offsite.modelling.steps import Steps
from offsite.seq2seq.models import is_seq2seq
from offsite.text.calls import quietly

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Finish = Literal["stop", "length"]

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are not yet a character
_PROMPT_TAIL = 8  # tokens of prompt that decide how the first tokens of the answer are spaced
_FALLBACK_CONTEXT = 2048  # models with relative positions declare no context


@dataclass(frozen=True)
class Piece:
    """One generated token and the text that became final with it; the last piece alone has a `finish`.

    Where it was asked for, `likely` holds the token itself and then the likeliest of all; none of a token that ended
    the answer.
    """

    token: int
    text: str
    finish: Finish | None = None
    likely: tuple[Likely, ...] = ()


class Detokenizer:
    """Turns tokens into text as they come, never into part of a character.

    Whole words keep the space that their tokenizer writes before them, because a few tokens that came before are
    decoded along. Tokens that stand for one byte each are not: a decoder spoils a whole run of them when it begins or
    ends in the middle of a character, so they are put together here. Bytes that are no character read as U+FFFD.

    Args:
        prompt_ids: what the text goes on from; without it the text begins anew.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer, self._bytes = tokenizer, _byte_tokens(tokenizer)
        self._silent = _special_ids(tokenizer)
        tail = [token for token in prompt_ids if token not in self._silent][-_PROMPT_TAIL:]
        if not self._bytes and self._decode(tail).endswith(_UNFINISHED):
            tail = []
        self._ids, self._num_told = tail, len(tail)
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Return the text that is complete with `token`, possibly none."""
        if token in self._silent:
            return ""
        if token in self._bytes:
            return self._tell(final=True) + self._push_byte(token)
        text = self._characters.decode(b"", final=True)
        self._characters.reset()
        self._ids.append(token)
        return text + self._tell(final=False)

    def flush(self) -> str:
        """Return what was held back; bytes that never became a character read as U+FFFD."""
        return self._tell(final=True) + self._characters.decode(b"", final=True)

    def _push_byte(self, token: int) -> str:
        begins, byte = not self._ids, self._bytes[token]
        self._ids, self._num_told = [token], 1  # all that a next word's space depends on is that something stands here
        if begins and byte == b" ":
            return self._decode([token])  # some decoders strip a text's first space
        return self._characters.decode(byte)

    def _tell(self, *, final: bool) -> str:
        if self._num_told == len(self._ids):
            return ""
        told, text = self._decode(self._ids[: self._num_told]), self._decode(self._ids)
        if not final and text.endswith(_UNFINISHED):
            return ""
        if len(text) > len(told):  # what is told now is the context of what comes next; older tokens no longer matter
            del self._ids[: self._num_told]
            self._num_told = len(self._ids)
        return text[len(told) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _byte_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, bytes]:
    """Return the tokens such as ``<0x0A>`` that the tokenizer decodes to one byte, with their bytes."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = cast("list[int | None]", tokenizer.convert_tokens_to_ids(names))
    known = {
        token: bytes([byte])
        for byte, token in enumerate(tokens)
        if token is not None and tokenizer.convert_ids_to_tokens(token) == names[byte]
    }
    letter = next((token for token, byte in known.items() if byte == b"A"), None)
    return known if letter is not None and tokenizer.decode([letter]) == "A" else {}


def _special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that no text shows."""
    added = {token for token, kind in tokenizer.added_tokens_decoder.items() if kind.special}
    return frozenset(added | set(tokenizer.all_special_ids))


class StopMatcher:
    """Finds the first stop string in text that arrives in pieces, and holds back what may begin one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop, self._held = tuple(stop), ""

    def push(self, text: str) -> tuple[str, bool]:
        """Return the text that is safe to hand out, and whether a stop string ended it."""
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def flush(self) -> str:
        """Return what was held back, now that no stop string can follow."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            tail = text[len(text) - size :]
            if any(stop.startswith(tail) for stop in self._stop):
                return size
        return 0


class Answer:
    """Text that grows by drawn tokens, and ends where a token, a stop string or the limit ends it.

    Args:
        tokenizer: the model's own.
        prompt_ids: what was read before.
        settings: how many tokens at most, and the strings that end the text before them.
        end_ids: tokens that end the answer and are not part of its text; see `end_tokens`.
        continues: whether the text goes on from the prompt's (a leading space is kept) or begins anew.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Sequence[int],
        settings: Settings,
        *,
        end_ids: frozenset[int],
        continues: bool = True,
    ) -> None:
        self._detokenizer = Detokenizer(tokenizer, prompt_ids if continues else ())
        self._matcher = StopMatcher(settings.stop)
        self._limit_tokens, self._end_ids, self._num_tokens = settings.limit_tokens, end_ids, 0
        self._tokenizer, self._num_shown = tokenizer, 0

    def push(self, token: int, likely: Sequence[Likely] = ()) -> Piece:
        """Return the piece that the token makes; nothing may follow one with a `finish`.

        Args:
            likely: as `Sampler.likely` has it of this token.
        """
        piece = self._push(token)
        if not likely or token in self._end_ids:
            return piece
        shown = tuple(replace(one, text=self._shown(one.token), offset=self._num_shown) for one in likely)
        self._num_shown += len(shown[0].text)
        return replace(piece, likely=shown)

    def _shown(self, token: int) -> str:
        return str(self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _push(self, token: int) -> Piece:
        self._num_tokens += 1
        ended = token in self._end_ids
        last = ended or self._num_tokens >= self._limit_tokens
        text = "" if ended else self._detokenizer.push(token)
        if last:
            text += self._detokenizer.flush()
        text, stopped = self._matcher.push(text)
        if stopped:
            return Piece(token, text, "stop")
        if last:
            return Piece(token, text + self._matcher.flush(), "stop" if ended else "length")
        return Piece(token, text)


def next_tokens(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    settings: Settings,
    *,
    cached: bool = True,
    sampler: Sampler | None = None,
) -> Iterator[int]:
    """Yield tokens without end, each drawn from the model's scores after all before it.

    Args:
        model: a causal language model, or a PEFT model around one.
        prompt_ids: at least one token.
        settings: how a token is drawn.
        cached: see `offsite.modelling.steps.Steps`.
        sampler: what draws them; by default one that is made of the settings.

    Raises:
        RunFailed: the model's scores hold NaN.
    """
    ids_BT = torch.tensor([list(prompt_ids)], dtype=torch.long, device=embedding_table(model).device)
    sampler, steps = sampler or Sampler(settings, prompt_ids), Steps(model, ids_BT, cached=cached)
    while True:
        token = sampler.pick(steps.logits()[0])
        yield token
        steps.add(ids_BT.new_tensor([token]))


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    settings: Settings,
    *,
    end_ids: frozenset[int],
    continues: bool = True,
    cached: bool = True,
    grammar: Constraint | None = None,
) -> Iterator[Piece]:
    """Yield an answer's pieces, one per generated token, the last with its `finish`.

    Args:
        model: see `next_tokens`.
        tokenizer: the model's own.
        prompt_ids: at least one token; with the answer's, no more than the model's context.
        settings: how tokens are drawn, how many at most, and the strings that end the text before them.
        end_ids: tokens that end the answer and are not part of its text; see `end_tokens`.
        continues: whether the text goes on from the prompt's (a leading space is kept) or begins anew.
        cached: see `offsite.modelling.steps.Steps`.
        grammar: what the answer is held to.

    Raises:
        RunFailed: the model's scores hold NaN.
    """
    answer = Answer(tokenizer, prompt_ids, settings, end_ids=end_ids, continues=continues)
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    said = () if is_seq2seq(plain) else prompt_ids  # what penalties count beside the answer: its decoder's text alone
    sampler = Sampler(settings, said, grammar)
    for token in next_tokens(model, prompt_ids, settings, cached=cached, sampler=sampler):
        piece = answer.push(token, sampler.likely)
        yield piece
        if piece.finish is not None:
            return


def embedding_table(model: PreTrainedModel) -> Tensor:
    """Return the input embeddings, (vocabulary, hidden): they tell the device of tokens and how many there are."""
    return cast(Tensor, model.get_input_embeddings().weight)


def context_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: int = 0) -> int:
    """Return how many tokens prompt and answer may have together.

    Args:
        asked: so many; 0 for what the model was made for.

    Raises:
        ConfigError: when more are asked for than the model can read.
    """
    declared = context_of(model)
    if asked and declared is not None and asked > declared:
        raise ConfigError(f"--context {asked}: the model reads at most {declared} tokens")
    if asked or declared is not None:
        return asked or declared or 0
    stated = tokenizer.model_max_length
    return int(stated) if 0 < stated < 2**31 else _FALLBACK_CONTEXT


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that end any answer: the model's own and the tokenizer's."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    found = declared if isinstance(declared, list) else [declared]
    return frozenset(token for token in (*found, tokenizer.eos_token_id) if token is not None)


def end_of_turn_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the token with which the chat template closes an assistant's turn, if it is a special one.

    A model tuned on chats has learnt to write it, and nothing about what to write after it.
    """
    answer = "0answer0"
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        shown = str(quietly(lambda: tokenizer.apply_chat_template(chat, tokenize=False), DataError))
    except DataError:
        return frozenset()
    after = tokenizer(shown.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids)
    return frozenset([token for token in after if token in special][:1])
