"""From a request to what the engine works on: its prompts as tokens, and how each answer is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from offsite.errors import DataError
from offsite.generation.generate import context_length, embedding_table, end_of_turn_tokens, end_tokens
from offsite.generation.sampling import Settings
from offsite.seq2seq.models import is_seq2seq
from offsite.text.calls import encoded, quietly
from offsite.text.prompts import prompt_ids
from server.batching.rows import RowAdapter
from server.serving.grammar import Grammar, Grammars
from server.serving.protocol import LIMIT_PROMPTS, ApiError, ChatAsk, CompletionAsk, Message, Prompt, Usage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Job:
    """An admitted request: its prompts as tokens, how each answer is drawn, with which adapter, and for whom.

    A prompt stands there once for each of its `num_answers`.
    """

    prompts: tuple[tuple[int, ...], ...]
    settings: tuple[Settings, ...]
    end_ids: frozenset[int]
    continues: bool
    adapter: RowAdapter | None = None
    tenant: str = ""
    num_answers: int = 1
    grammar: Grammar | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each once however many answers it gets."""
        return sum(map(len, self.prompts)) // self.num_answers

    @property
    def most_tokens(self) -> int:
        """Tokens of all prompts and of the longest answers that they may get."""
        return self.num_prompt_tokens + sum(one.limit_tokens for one in self.settings)

    def usage(self, num_answer: int) -> Usage:
        """Return the usage after `num_answer` generated tokens, of all answers together."""
        return Usage(self.num_prompt_tokens, num_answer)


class Jobs:
    """Makes jobs of requests, for one model.

    Args:
        model: a causal language model, or a PEFT model around one.
        tokenizer: its own.
        context: tokens of prompt and answer together; 0 for what the model was made for.
        limit_tokens: most tokens in one answer.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, context: int, limit_tokens: int
    ) -> None:
        self._tokenizer, self._limit_tokens = tokenizer, limit_tokens
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self._is_pair = is_seq2seq(plain)
        self.context = context_length(model, tokenizer, context)
        self._num_vocabulary = int(embedding_table(model).shape[0])
        self._end_ids = end_tokens(model, tokenizer)
        self._turn_ids = end_of_turn_tokens(tokenizer) if tokenizer.chat_template else frozenset()
        self.grammars = Grammars(tokenizer, self._num_vocabulary, self._end_ids | self._turn_ids)

    def of(self, ask: CompletionAsk | ChatAsk, adapter: RowAdapter | None = None, tenant: str = "") -> Job:
        """Return the job that a request asks for.

        Args:
            adapter: for this request; None for the model alone.
            tenant: whose request it is.

        Raises:
            ApiError: 400; a prompt does not fit or holds unknown tokens, or the chat template refuses the messages.
        """
        if isinstance(ask, ChatAsk):
            asked: tuple[tuple[int, ...], ...] = (self._chat_ids(ask.messages),)
        else:
            asked = tuple(map(self._prompt_ids, ask.prompt))
        num_answers = ask.n or 1
        if len(asked) * num_answers > LIMIT_PROMPTS:
            raise ApiError(400, f"n: prompts and answers make more than {LIMIT_PROMPTS} together", param="n")
        prompts = tuple(prompt_ids for prompt_ids in asked for _ in range(num_answers))
        settings = tuple(
            replace(one, seed=None if one.seed is None else one.seed + number)  # answers to one prompt differ
            for one in (self._settings(ask, len(prompt_ids), ask.num_tokens) for prompt_ids in asked)
            for number in range(num_answers)
        )
        is_chat = isinstance(ask, ChatAsk)
        end_ids = self._end_ids | (self._turn_ids if is_chat else frozenset())
        continues = not is_chat and not self._is_pair
        return Job(prompts, settings, end_ids, continues, adapter, tenant, num_answers)

    def _settings(self, ask: CompletionAsk | ChatAsk, num_prompt: int, num_wanted: int | None) -> Settings:
        if any(token >= self._num_vocabulary for token, _ in ask.logit_bias):
            raise ApiError(400, f"logit_bias: token ids are 0 to {self._num_vocabulary - 1}", param="logit_bias")
        room = self.context - num_prompt
        if self._is_pair:  # either text has a context of its own
            room = self.context if num_prompt <= self.context else 0
        if room < 1:
            message = f"the prompt has {num_prompt} tokens; the context is {self.context}"
            message += "" if self._is_pair else ", the answer's first included"
            raise ApiError(
                400, message, param="messages" if isinstance(ask, ChatAsk) else "prompt", code="context_length_exceeded"
            )
        return Settings(
            limit_tokens=min(num_wanted or room, room, self._limit_tokens),
            temperature=1.0 if ask.temperature is None else ask.temperature,
            top_k=max(ask.top_k or 0, 0),
            top_p=1.0 if ask.top_p is None else ask.top_p,
            min_p=ask.min_p or 0.0,
            repetition_penalty=1.0 if ask.repetition_penalty is None else ask.repetition_penalty,
            presence_penalty=ask.presence_penalty or 0.0,
            frequency_penalty=ask.frequency_penalty or 0.0,
            logit_bias=ask.logit_bias,
            seed=ask.seed,
            stop=ask.stop,
            num_likely=ask.num_likely,
        )

    def _prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        if isinstance(prompt, tuple):
            if not all(0 <= token < self._num_vocabulary for token in prompt):
                raise ApiError(400, f"prompt: token ids are 0 to {self._num_vocabulary - 1}", param="prompt")
            return prompt
        try:
            if self._is_pair:  # whose prompts are read as the tokenizer closes them, as they are when it is tuned
                ids = tuple(encoded(self._tokenizer, prompt, what="the prompt"))
            else:
                ids = tuple(prompt_ids(self._tokenizer, prompt))
        except DataError as error:
            raise ApiError(400, str(error), param="prompt", code="tokenizer_failed") from None
        if ids:
            return ids
        start = next((token for token in self._starts() if token is not None), None)
        if start is None:
            raise ApiError(400, "prompt: is empty, and the model has no token to begin with", param="prompt")
        return (start,)

    def _starts(self) -> Sequence[int | None]:
        return self._tokenizer.bos_token_id, self._tokenizer.eos_token_id

    def _chat_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        if not self._tokenizer.chat_template:
            message = "the model has no chat template; use /v1/completions, or add chat_template.jinja to its folder"
            raise ApiError(400, message, param="messages", code="no_chat_template")
        chat = [message.for_template for message in messages]

        def render() -> Any:
            # tokens that close a turn are plain text when a message holds them: a user cannot forge a turn
            return self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, sanitize_control_tokens=True)

        def refusal(_: str) -> ApiError:  # what was raised may quote the request, and is not told
            message = "the model's chat template refuses these messages; roles that it knows may have to alternate"
            return ApiError(400, message, param="messages", code="chat_template_refused")

        return tuple(quietly(render, refusal, compiled=True)["input_ids"])
