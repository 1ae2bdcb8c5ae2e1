"""OpenAI's requests and replies: what a request may hold, what a reply looks like, how a refusal reads.

No field is dropped in silence: that would give another answer than the one asked for. What is not worked with is
refused by name, unless it holds a value that changes nothing (null, or one of `_NEUTRAL`) or never changes an answer
(`_LABELS`). Messages never repeat a prompt.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError, from_json

from offsite.generation.generate import Piece
from offsite.generation.sampling import Likely

Prompt = str | tuple[int, ...]

LIMIT_PROMPTS = 64
_LIMIT_STOP = 4
_LIMIT_ANSWERS = 16
_FIELD_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,63}", re.ASCII)
_TOKEN_ID = re.compile(r"[0-9]{1,9}", re.ASCII)
_COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions

_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "store": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "ignore_eos": (False,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
    "include_obfuscation": (False,),
    "tool_calls": ([],),
    "annotations": ([],),
}
"""Fields of a request, and of what lies in it, that may be given as long as they ask for nothing."""

_LABELS = frozenset({"user", "safety_identifier", "prompt_cache_key", "metadata"})
"""Fields by which clients tell their requests apart: no answer depends on them, and nothing of them is kept."""


class ApiError(Exception):
    """A refusal, on its way to the client as a status and an OpenAI-shaped body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Wire(BaseModel):
    """An object of a request. Fields that it does not have are refused, those that ask for nothing apart."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _nothing_dropped(cls, found: object) -> object:
        for name, value in found.items() if isinstance(found, dict) else ():
            known = {field.alias or key for key, field in cls.model_fields.items()}
            if name not in known and not _changes_nothing(name, value):
                raise PydanticCustomError("unsupported", "{name}", {"name": name})
        return found


class StreamOptions(_Wire):
    """What a stream carries besides text."""

    include_usage: bool | None = False


class Ask(_Wire):
    """What both kinds of request share. `None` is what a client sends for "your default"."""

    model: str
    n: int | None = Field(None, ge=1, le=_LIMIT_ANSWERS)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: tuple[str, ...] = ()
    temperature: float | None = Field(None, ge=0, le=2)
    top_k: int | None = Field(None, ge=-1)  # 0 and -1: all tokens
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1)

    @field_validator("stop", mode="before")
    @classmethod
    def _stop(cls, value: object) -> tuple[str, ...]:
        found = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(found, list) or len(found) > _LIMIT_STOP or not all(isinstance(x, str) and x for x in found):
            raise PydanticCustomError("stop", f"must be a string or up to {_LIMIT_STOP} strings, none of them empty")
        return tuple(found)

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _logit_bias(cls, value: object) -> tuple[tuple[int, float], ...]:
        found = {} if value is None else value
        if not isinstance(found, dict) or not all(map(_is_bias, found.items())):
            raise PydanticCustomError("logit_bias", "must map token ids, as text, to numbers from -100 to 100")
        return tuple((int(token), float(bias)) for token, bias in found.items())

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionAsk(Ask):
    """Body of ``POST /v1/completions``."""

    prompt: tuple[Prompt, ...] = ("",)
    logprobs: int | None = Field(None, ge=0, le=5)

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompt(cls, value: object) -> tuple[Prompt, ...]:
        if value is None:
            return ("",)
        prompts = _prompts(value)
        if not 1 <= len(prompts) <= LIMIT_PROMPTS:
            raise PydanticCustomError("prompt", f"holds {len(prompts)} prompts, at most {LIMIT_PROMPTS} are answered")
        return prompts

    @property
    def num_likely(self) -> int | None:
        """How many of the likeliest tokens are told beside each; `None`: nothing is."""
        return self.logprobs

    @property
    def num_tokens(self) -> int | None:
        """Most tokens wanted in each answer."""
        return self.max_tokens or _COMPLETION_TOKENS


class Message(_Wire):
    """One turn of a chat. `content` is text, or a list of text parts, which are joined."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _content(cls, value: object) -> str:
        parts = value if isinstance(value, list) else [{"type": "text", "text": value}]
        spoken = [part for part in parts if isinstance(part, dict) and part.get("type") == "text"]
        texts = [part.get("text") for part in spoken]
        if not parts or len(spoken) != len(parts) or not all(isinstance(text, str) for text in texts):
            raise PydanticCustomError("content", "must be text, or a list of parts of type 'text'")
        for name, one in (pair for part in spoken for pair in part.items()):
            if name not in ("type", "text") and not _changes_nothing(name, one):
                raise PydanticCustomError("unsupported", "{name}", {"name": name})
        return "".join(map(str, texts))

    @property
    def for_template(self) -> dict[str, str]:
        """The turn as chat templates know it."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class JsonSchema(_Wire):
    """A schema that an answer is held to; it is held to it whether or not `strict` is asked for."""

    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(_Wire):
    """What form an answer has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("json_schema", "json_schema goes with type 'json_schema', and with no other")
        return self


class ChatAsk(Ask):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    max_completion_tokens: int | None = Field(None, ge=1)

    @field_validator("top_logprobs")
    @classmethod
    def _top_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise PydanticCustomError("top_logprobs", "goes with logprobs: true")
        return value

    @property
    def num_likely(self) -> int | None:
        """How many of the likeliest tokens are told beside each; `None`: nothing is."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def schema_asked(self) -> dict[str, Any] | None:
        """The JSON schema that the answer is to be held to."""
        form = self.response_format
        if form is None or form.type == "text":
            return None
        return {"type": "object"} if form.json_schema is None else form.json_schema.schema_

    @property
    def num_tokens(self) -> int | None:
        """Most tokens wanted in the answer; `None`: what there is room for."""
        return self.max_completion_tokens or self.max_tokens


class TaskAsk(_Wire):
    """Body of ``POST /v1/tasks/NAME``: the input's fields, and the model, where several are served."""

    model: str | None = None
    vars: dict[str, str | list[str]]


class ClassifyAsk(_Wire):
    """Body of ``POST /v1/classify``."""

    model: str
    input: tuple[str, ...]

    @field_validator("input", mode="before")
    @classmethod
    def _input(cls, value: object) -> tuple[str, ...]:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(one, str) and one.strip() for one in texts):
            raise PydanticCustomError("input", "must be a text or a list of texts, none of them empty")
        if not 1 <= len(texts) <= LIMIT_PROMPTS:
            raise PydanticCustomError("input", f"holds {len(texts)} texts, 1 to {LIMIT_PROMPTS} are read")
        return tuple(texts)


class EmbeddingAsk(_Wire):
    """Body of ``POST /v1/embeddings``."""

    model: str
    input: tuple[Prompt, ...]
    encoding_format: Literal["float", "base64"] | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _input(cls, value: object) -> tuple[Prompt, ...]:
        found = () if value == [] else _prompts(value)
        if not 1 <= len(found) <= LIMIT_PROMPTS:
            raise PydanticCustomError("input", f"holds {len(found)} texts, 1 to {LIMIT_PROMPTS} are read")
        if any(isinstance(one, str) and not one.strip() for one in found):
            raise PydanticCustomError("input", "holds an empty text")
        return found


class RerankAsk(_Wire):
    """Body of ``POST /v1/rerank``: documents to be ordered by how much each is rewarded behind the query."""

    model: str
    query: str | tuple[Message, ...]
    documents: tuple[str, ...]
    top_n: int | None = Field(None, ge=1)
    return_documents: bool | None = False

    @field_validator("query", mode="before")
    @classmethod
    def _query(cls, value: object) -> object:
        if isinstance(value, list) and value:
            return tuple(value)
        if not isinstance(value, str) or not value.strip():
            raise PydanticCustomError("query", "must be a text or a list of messages, and not empty")
        return value

    @field_validator("documents", mode="before")
    @classmethod
    def _documents(cls, value: object) -> tuple[str, ...]:
        if not isinstance(value, list):
            raise PydanticCustomError("documents", "must be a list of texts")
        texts = [one["text"] if isinstance(one, dict) and set(one) == {"text"} else one for one in value]
        if not all(isinstance(one, str) and one.strip() for one in texts):
            raise PydanticCustomError("documents", "must be texts, or objects with a text alone, none of them empty")
        if not 1 <= len(texts) <= LIMIT_PROMPTS:
            raise PydanticCustomError("documents", f"holds {len(texts)} texts, 1 to {LIMIT_PROMPTS} are read")
        return tuple(texts)


AnyAsk = TypeVar("AnyAsk", bound=_Wire)


def parse(body: bytes, cls: type[AnyAsk]) -> AnyAsk:
    """Return the request that `body` holds.

    Raises:
        ApiError: 400; not JSON, a field of the wrong type or range, or a field that cannot be honoured.
    """
    try:
        found = from_json(body, allow_inf_nan=False)
    except ValueError:
        raise ApiError(400, "the body is not valid JSON") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"the body holds a {type(found).__name__}, expected a JSON object")
    try:
        return cls.model_validate(found)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> ApiError:
    """Return the first problem; one that names a field that is not worked with comes before any other."""
    problems = error.errors(include_url=False, include_input=False)
    problem = next((item for item in problems if item["type"] == "unsupported"), problems[0])
    if problem["type"] == "unsupported":
        name = problem["msg"] if _FIELD_NAME.fullmatch(problem["msg"]) else "a field of another form"
        where = ".".join(map(str, (*problem["loc"], name)))
        message = f"{where} is not supported here; leave it out"
        return ApiError(400, message, param=where, code="unsupported_parameter")
    where = ".".join(map(str, problem["loc"]))
    message = "is missing" if problem["type"] == "missing" else problem["msg"]
    return ApiError(400, f"{where}: {message[:1].lower()}{message[1:]}", param=where)


def _changes_nothing(name: str, value: object) -> bool:
    neutral = _NEUTRAL.get(name, ())
    return value is None or name in _LABELS or any(type(value) is type(one) and value == one for one in neutral)


def _prompts(value: object) -> tuple[Prompt, ...]:
    """Return texts and lists of token ids, of which one may stand alone; how many there may be is the caller's."""
    many: list[Any] = value if isinstance(value, list) and value and not _is_int(value[0]) else [value]
    found = tuple(tuple(one) if isinstance(one, list) else one for one in many)
    if not all(isinstance(one, str) or (isinstance(one, tuple) and one and all(map(_is_int, one))) for one in found):
        raise PydanticCustomError("prompt", "must be a string, a list of strings, token ids, or a list of token ids")
    return found


def _is_bias(pair: tuple[object, object]) -> bool:
    token, bias = pair
    is_number = isinstance(bias, (int, float)) and not isinstance(bias, bool)
    return isinstance(token, str) and bool(_TOKEN_ID.fullmatch(token)) and is_number and -100 <= float(bias) <= 100  # type: ignore[arg-type]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Usage:
    """Tokens of all prompts and of all answers of one request."""

    num_prompt: int
    num_answer: int

    @property
    def body(self) -> dict[str, int]:
        """As the wire spells it."""
        total = self.num_prompt + self.num_answer
        return {"prompt_tokens": self.num_prompt, "completion_tokens": self.num_answer, "total_tokens": total}


@dataclass(frozen=True)
class Reply:
    """The frame of one reply: its kind, its id, when it began, and whether a stream ends with usage."""

    model_id: str
    is_chat: bool
    wants_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    token: str = field(default_factory=lambda: secrets.token_hex(12))

    def whole(self, answers: Sequence[Sequence[Piece]], usage: Usage) -> dict[str, Any]:
        """Return the body of an unstreamed reply; each answer is its pieces."""
        choices = []
        for index, pieces in enumerate(answers):
            text, finish = "".join(piece.text for piece in pieces), (pieces[-1].finish or "") if pieces else ""
            choices.append(self._choice(index, text, finish, pieces))
        return {**self._frame("chat.completion"), "choices": choices, "usage": usage.body}

    def opening(self, num_answers: int = 1) -> str:
        """Return the events that open streamed answers: for chat each one's role, otherwise nothing."""
        said = {"role": "assistant", "content": ""}
        indices = range(num_answers if self.is_chat else 0)
        return "".join(self._event([self._delta(index, said, None)]) for index in indices)

    def part(self, index: int, piece: Piece) -> str:
        """Return the events for what became final in answer `index` with the piece, and for the answer's end."""
        if not piece.text and not piece.likely:
            told = ""
        elif self.is_chat:
            told = self._event([self._delta(index, {"content": piece.text}, None, [piece])])
        else:
            return self._event([self._choice(index, piece.text, piece.finish, [piece])])
        if piece.finish is None:
            return told
        end = self._delta(index, {}, piece.finish) if self.is_chat else self._choice(index, "", piece.finish, ())
        return told + self._event([end])

    def closing(self, usage: Usage) -> str:
        """Return the events that end a stream."""
        return (self._event([], usage) if self.wants_usage else "") + sse("[DONE]")

    def _frame(self, chat_object: str) -> dict[str, Any]:
        prefix, kind = ("chatcmpl", chat_object) if self.is_chat else ("cmpl", "text_completion")
        return {"id": f"{prefix}-{self.token}", "object": kind, "created": self.created, "model": self.model_id}

    def _choice(self, index: int, text: str, finish: str | None, pieces: Sequence[Piece]) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        return {"index": index, **said, "logprobs": self._logprobs(pieces), "finish_reason": finish}

    def _delta(
        self, index: int, delta: dict[str, str], finish: str | None, pieces: Sequence[Piece] = ()
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": self._logprobs(pieces), "finish_reason": finish}

    def _logprobs(self, pieces: Sequence[Piece]) -> dict[str, Any] | None:
        told = [piece.likely for piece in pieces if piece.likely]
        if not told:
            return None
        if self.is_chat:
            content = [{**_entry(own), "top_logprobs": list(map(_entry, top))} for own, *top in told]
            return {"content": content, "refusal": None}
        return {
            "tokens": [own.text for own, *_ in told],
            "token_logprobs": [own.logprob for own, *_ in told],
            "top_logprobs": [{one.text: one.logprob for one in top} for _, *top in told],
            "text_offset": [own.offset for own, *_ in told],
        }

    def _event(self, choices: list[dict[str, Any]], usage: Usage | None = None) -> str:
        counts = {"usage": usage.body if usage else None} if self.wants_usage else {}
        return sse({**self._frame("chat.completion.chunk"), "choices": choices, **counts})


def _entry(likely: Likely) -> dict[str, Any]:
    whole = "\N{REPLACEMENT CHARACTER}" not in likely.text  # a part of a character has bytes that no text shows
    return {
        "token": likely.text,
        "logprob": likely.logprob,
        "bytes": list(likely.text.encode("utf-8", "surrogatepass")) if whole else None,
    }


def sse(data: str | Mapping[str, Any]) -> str:
    """Return `data` as one server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, separators=(',', ':'))}\n\n"
