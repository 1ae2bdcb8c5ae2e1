"""Text from a causal language model, one token at a time.

Nothing here knows of HTTP. `generate` yields one `Piece` per token; the pieces' texts, joined, are the
answer, so that a streamed answer and a whole one cannot differ. Text is handed out only when it is final:
no half characters, and nothing that may turn out to be the start of a stop string.

Shape letters: B batch (always 1 here), T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from offsite.errors import ConfigError, RunFailed
from offsite.modelling.context import context_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Finish = Literal["stop", "length"]

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are not yet a character
_PROMPT_TAIL = 8  # tokens of prompt that decide how the first tokens of the answer are spaced
_FALLBACK_CONTEXT = 2048  # models with relative positions declare no context


@dataclass(frozen=True)
class Settings:
    """How one answer is drawn. `temperature` 0 takes the likeliest token every time."""

    limit_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """One generated token and the text that became final with it; the last piece alone has a `finish`."""

    token: int
    text: str
    finish: Finish | None = None


class Detokenizer:
    """Turns tokens into text as they come, never into part of a character.

    Whole words keep the space that their tokenizer writes before them, because a few tokens that came
    before are decoded along.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        tail = list(prompt_ids[-_PROMPT_TAIL:])
        if self._decode(tail).endswith(_UNFINISHED):
            tail = []
        self._ids, self._num_told = tail, len(tail)

    def push(self, token: int) -> str:
        """Return the text that is complete with `token`, possibly none."""
        self._ids.append(token)
        return self._tell(final=False)

    def flush(self) -> str:
        """Return what was held back; bytes that never became a character read as U+FFFD."""
        return self._tell(final=True)

    def _tell(self, *, final: bool) -> str:
        told, text = self._decode(self._ids[: self._num_told]), self._decode(self._ids)
        if not final and text.endswith(_UNFINISHED):
            return ""
        if len(text) > len(told):  # what is told now is the context of what comes next; older tokens no longer matter
            del self._ids[: self._num_told]
            self._num_told = len(self._ids)
        return text[len(told) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


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


class Sampler:
    """Draws the next token. The same seed and the same logits give the same tokens, whatever the device."""

    def __init__(self, settings: Settings) -> None:
        self._temperature, self._top_p = settings.temperature, settings.top_p
        self._random = torch.Generator(device="cpu")
        if settings.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(settings.seed)

    def pick(self, logits_V: Tensor) -> int:
        """Return the number of the next token.

        Args:
            logits_V: scores before softmax, any float dtype and device.

        Raises:
            RunFailed: a score is NaN.
        """
        logits_V = logits_V.float().cpu()
        if bool(logits_V.isnan().any()):
            raise RunFailed("the model's scores for the next token are not numbers (NaN)")
        if self._temperature == 0:
            return int(logits_V.argmax())
        scaled_V = (logits_V - logits_V.max()) / self._temperature  # at most 0, so no temperature can overflow
        return self._draw(torch.softmax(scaled_V, dim=-1))

    def _draw(self, shares_V: Tensor) -> int:
        if self._top_p < 1:
            sorted_V, order_V = shares_V.sort(descending=True, stable=True)
            before_V = sorted_V.cumsum(0) - sorted_V
            sorted_V[1:][before_V[1:] >= self._top_p] = 0  # the likeliest is never cut
            return int(order_V[torch.multinomial(sorted_V, 1, generator=self._random)])
        return int(torch.multinomial(shares_V, 1, generator=self._random))


def next_tokens(model: PreTrainedModel, prompt_ids: Sequence[int], settings: Settings) -> Iterator[int]:
    """Yield tokens without end, each drawn from the model's scores after all before it.

    Args:
        model: a causal language model, or a PEFT model around one. Its cache holds the past, so that each
            step after the first forwards a single token.
        prompt_ids: at least one token.
        settings: temperature, top_p and seed.

    Raises:
        RunFailed: the model's scores hold NaN.
    """
    device = embedding_table(model).device
    sampler, options = Sampler(settings), _last_only(model)
    ids_BT = torch.tensor([list(prompt_ids)], dtype=torch.long, device=device)
    num_past, cache = 0, None
    while True:
        num_past += ids_BT.shape[1]
        logits_V, cache = _forward(model, ids_BT, num_past, cache, options)
        token = sampler.pick(logits_V)
        yield token
        ids_BT = torch.tensor([[token]], dtype=torch.long, device=device)


def _forward(
    model: PreTrainedModel, ids_BT: Tensor, num_past: int, cache: Any, options: dict[str, int]
) -> tuple[Tensor, Any]:
    """Return the scores after the last token, and the cache. The mode is entered per step: it belongs to the thread."""
    mask_BT = torch.ones((1, num_past), dtype=torch.long, device=ids_BT.device)
    with torch.inference_mode():
        output = model(input_ids=ids_BT, attention_mask=mask_BT, past_key_values=cache, use_cache=True, **options)
    return output.logits[0, -1], output.past_key_values


def _last_only(model: Any) -> dict[str, int]:
    """Return what tells the model to score the last token alone: a long prompt's scores would be gigabytes."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(inner.forward).parameters else {}


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    settings: Settings,
    *,
    end_ids: frozenset[int],
    continues: bool = True,
) -> Iterator[Piece]:
    """Yield an answer's pieces, one per generated token, the last with its `finish`.

    Args:
        model: see `next_tokens`.
        tokenizer: the model's own.
        prompt_ids: at least one token; with the answer's, no more than the model's context.
        settings: how tokens are drawn, how many at most, and the strings that end the text before them.
        end_ids: tokens that end the answer and are not part of its text; see `end_tokens`.
        continues: whether the text goes on from the prompt's (a leading space is kept) or begins anew.

    Raises:
        RunFailed: the model's scores hold NaN.
    """
    detokenizer = Detokenizer(tokenizer, prompt_ids if continues else ())
    matcher = StopMatcher(settings.stop)
    for num_tokens, token in enumerate(next_tokens(model, prompt_ids, settings), start=1):
        ended = token in end_ids
        last = ended or num_tokens >= settings.limit_tokens
        text = "" if ended else detokenizer.push(token)
        if last:
            text += detokenizer.flush()
        text, stopped = matcher.push(text)
        if stopped:
            yield Piece(token, text, "stop")
            return
        if last:
            yield Piece(token, text + matcher.flush(), "stop" if ended else "length")
            return
        yield Piece(token, text)


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
    import jinja2

    answer = "0answer0"
    chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    try:
        shown = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except jinja2.TemplateError:
        return frozenset()
    after = tokenizer(shown.rpartition(answer)[2], add_special_tokens=False)["input_ids"]
    special = set(tokenizer.all_special_ids)
    return frozenset([token for token in after if token in special][:1])
