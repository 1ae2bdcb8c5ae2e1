"""Answers that are held to a JSON schema: which tokens may come next, by llguidance (extra ``structured``).

A schema comes from a client. It is bounded in size here and in what its parser may use there; what it refers to
elsewhere is not fetched.

Shape letters: V vocabulary.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from offsite.errors import RunFailed
from server.serving.protocol import ApiError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LIMIT_BYTES = 65_536
"""Largest schema, as JSON."""

_PARAMETER = "response_format"


class Grammar:
    """What one answer may go on with."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> Grammar:
        """Return the same for another answer, at the same place."""
        return Grammar(self._matcher.deep_copy())

    def allowed(self, scores_V: Tensor) -> Tensor:
        """Return the scores, in storage of their own, with those of tokens that may not come next at -inf.

        Raises:
            RunFailed: when the schema turns out to need more than its parser may use.
        """
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        allowed_V = ((bits[:, None] >> torch.arange(8)) & 1).bool().flatten()[: len(scores_V)]
        if self._matcher.is_error() or not bool(allowed_V.any()):
            raise RunFailed("the answer cannot be held to its schema any further")
        found_V = torch.full_like(scores_V, -torch.inf)
        found_V[: len(allowed_V)] = torch.where(allowed_V, scores_V[: len(allowed_V)], -torch.inf)
        return found_V

    def take(self, token: int) -> None:
        """The token was drawn."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class Grammars:
    """Grammars for one tokenizer; its vocabulary is read once, when the first is asked for.

    Args:
        num_vocabulary: of the model's scores.
        end_ids: tokens that end an answer, allowed where the schema is met.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, num_vocabulary: int, end_ids: Collection[int]) -> None:
        self._tokenizer, self._num_vocabulary, self._end_ids = tokenizer, num_vocabulary, sorted(end_ids)
        self._lock = threading.Lock()
        self._read: Any = None

    def of(self, schema: Mapping[str, Any]) -> Grammar:
        """Return the grammar of a JSON schema. Takes seconds the first time; call it from a thread of its own.

        Raises:
            ApiError: 400; the schema is none, is too large, or asks for what is not supported; or the server lacks the
                extra, or its model's tokenizer cannot be read.
        """
        text = json.dumps(schema)
        if len(text) > LIMIT_BYTES:
            raise ApiError(400, f"{_PARAMETER}: the schema is over {LIMIT_BYTES} bytes", param=_PARAMETER)
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise _unsupported("this server was installed without the extra 'structured'") from None
        vocabulary = self._vocabulary()
        grammar = LLMatcher.grammar_from_json_schema(text, overrides={"whitespace_flexible": False})
        matcher = LLMatcher(vocabulary, grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().splitlines()[0][:160]
            raise ApiError(400, f"{_PARAMETER}: the schema cannot be followed: {reason}", param=_PARAMETER)
        return Grammar(matcher)

    def of_texts(self, texts: Sequence[str]) -> Grammar:
        """Return the grammar of answers that are one of the texts, word for word; call it from a thread of its own.

        Raises:
            ApiError: 400; they are too many or too long, or as `of`.
        """
        grammar = "start: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        if len(grammar) > LIMIT_BYTES:
            raise ApiError(400, f"the answers to choose from are over {LIMIT_BYTES} bytes", param="vars")
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise _unsupported("this server was installed without the extra 'structured'") from None
        matcher = LLMatcher(self._vocabulary(), LLMatcher.grammar_from_lark(grammar), log_level=0)
        if matcher.is_error():
            raise ApiError(400, "the answers to choose from cannot be followed", param="vars")
        return Grammar(matcher)

    def _vocabulary(self) -> Any:
        from llguidance.hf import from_tokenizer
        from transformers import PreTrainedTokenizerFast

        with self._lock:
            if self._read is None:
                if not isinstance(self._tokenizer, PreTrainedTokenizerFast) or not self._end_ids:
                    raise _unsupported("this model's tokenizer cannot be read for it")
                size = max(self._num_vocabulary, len(self._tokenizer))
                self._read = from_tokenizer(self._tokenizer, n_vocab=size, eos_token=self._end_ids)
            return self._read


def _unsupported(reason: str) -> ApiError:
    message = f"{_PARAMETER} is not supported here: {reason}"
    return ApiError(400, message, param=_PARAMETER, code="unsupported_parameter")
