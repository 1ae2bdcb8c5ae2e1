"""Text that is to be continued, as tokens: what opens a text stands before it, and nothing closes it.

Many tokenizers write an end or a separator behind every text. That is right for a text that ends there, and wrong for
one that goes on: the model would be asked what comes after the end.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from offsite.text.calls import encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBES = ("a", "0", "the", " ")


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the tokens of `text` as the tokenizer writes them, less those that it appends to close a text.

    What `text` itself says stays, also when it says such a token.

    Raises:
        DataError: when the tokenizer fails on it.
    """
    whole = encoded(tokenizer, text, what="a prompt")
    bare = encoded(tokenizer, text, what="a prompt", add_special_tokens=False)
    num_opening = len(frame(tokenizer)[0])
    return whole[: num_opening + len(bare)]


def frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the tokens that the tokenizer writes before every text and those that it appends."""
    for probe in _PROBES:
        whole = list(tokenizer(probe, verbose=False)["input_ids"])
        bare = list(tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"])
        place = _place(bare, whole)
        if bare and place is not None:
            return whole[:place], whole[place + len(bare) :]
    return [], []


def for_prompts(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer like this one that closes no text, for programs that tokenise prompts by themselves.

    It is a copy, but for what it is given to, which may change it; only a fast tokenizer can be told not to close.
    """
    from tokenizers.processors import TemplateProcessing

    found = copy.deepcopy(tokenizer)
    opening, closing = frame(tokenizer)
    backend = getattr(found, "backend_tokenizer", None)
    if closing and backend is not None:
        names = [str(found.convert_ids_to_tokens(token)) for token in opening]
        backend.post_processor = TemplateProcessing(
            single=[*names, "$A"],
            pair=[*names, "$A", "$B"],
            special_tokens=list(dict(zip(names, opening, strict=True)).items()),
        )
    return found


def _place(part: Sequence[int], whole: Sequence[int]) -> int | None:
    """Return where `part` first stands in `whole`, if it does."""
    places = range(len(whole) - len(part) + 1)
    return next((place for place in places if list(whole[place : place + len(part)]) == list(part)), None)
