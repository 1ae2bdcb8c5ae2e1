"""The forms that an answer may have, and whether a text has one: a label, a choice, JSON of a schema, or free text.

Of JSON Schema (draft 2020-12) the keywords of `Shape` are taken and no others: nothing that refers elsewhere, and no
pattern, whose matching could take for ever. pydantic checks values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    create_model,
    model_serializer,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import from_json

from offsite.strictjson import Strict
from offsite.tasks.templates import NAME_PATTERN
from offsite.tensors import no_duplicates

MAX_LABELS = 512
MAX_DEPTH = 8
LIMIT_CHARACTERS = 65_536
"""Longest answer that is looked at."""

Label = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^\S[^\r\n]*$")]
FieldName = Annotated[str, Field(pattern=NAME_PATTERN)]
Scoring = Literal["per-token", "per-character", "sum"]


class Labels(Strict):
    """One of a few texts. Which, is told by how probable each is after the prompt, as ``scoring`` says."""

    type: Literal["labels"]
    labels: tuple[Label, ...] = Field(min_length=2, max_length=MAX_LABELS)
    scoring: Scoring = "per-token"

    @model_validator(mode="after")
    def _differ(self) -> Self:
        if len({folded(label) for label in self.labels}) < len(self.labels):
            raise ValueError("two labels are one but for case and blanks at their ends")
        return self


class Choice(Strict):
    """One of the texts that a row itself lists, in the field that is named."""

    type: Literal["choice"]
    field: FieldName
    scoring: Scoring = "per-token"


class JsonForm(Strict):
    """A JSON object of a schema."""

    type: Literal["json"]
    schema_: dict[str, Any] = Field(alias="schema")
    max_tokens: int = Field(256, ge=1, le=4096)

    @model_validator(mode="after")
    def _sound(self) -> Self:
        shape = Shape.model_validate_json(json.dumps(self.schema_))
        if shape.type != "object":
            raise ValueError("the schema's type is not object")
        shape.require_depth(MAX_DEPTH)
        return self

    @model_serializer(mode="wrap")
    def _named(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"schema" if name == "schema_" else name: value for name, value in write(self).items()}


class FreeText(Strict):
    """Any text, up to the first of the ``stop`` texts or so many tokens."""

    type: Literal["text"]
    max_tokens: int = Field(64, ge=1, le=4096)
    stop: tuple[Annotated[str, Field(min_length=1, max_length=40)], ...] = Field((), max_length=4)


Form = Annotated[Labels | Choice | JsonForm | FreeText, Field(discriminator="type")]


class Shape(BaseModel):
    """A JSON schema, as far as one is taken."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", alias_generator=to_camel)

    type: Literal["object", "array", "string", "integer", "number", "boolean", "null"]
    title: str | None = None
    description: str | None = None
    properties: dict[str, Shape] = {}
    required: tuple[str, ...] = ()
    additional_properties: bool = True
    items: Shape | None = None
    enum: tuple[str, ...] | None = Field(None, min_length=1)
    min_items: int | None = Field(None, ge=0)
    max_items: int | None = Field(None, ge=0)
    min_length: int | None = Field(None, ge=0)
    max_length: int | None = Field(None, ge=0)
    minimum: float | None = None
    maximum: float | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        belongs = {
            "object": {"properties", "required", "additional_properties"},
            "array": {"items", "min_items", "max_items"},
            "string": {"enum", "min_length", "max_length"},
            "integer": {"minimum", "maximum"},
            "number": {"minimum", "maximum"},
        }
        allowed = belongs.get(self.type, set()) | {"type", "title", "description"}
        if foreign := sorted(to_camel(name) for name in self.model_fields_set - allowed):
            raise ValueError(f"{', '.join(foreign)}: not of a value of type {self.type}")
        if unknown := sorted(set(self.required) - set(self.properties)):
            raise ValueError(f"{len(unknown)} of the required properties are not among the properties")
        return self

    def require_depth(self, left: int) -> None:
        """Return only if the schema is at most so deep; ValueError otherwise."""
        if not left:
            raise ValueError(f"the schema is deeper than {MAX_DEPTH}")
        for inner in (*self.properties.values(), *([self.items] if self.items is not None else [])):
            inner.require_depth(left - 1)

    def kind(self) -> Any:
        """Return the type by which pydantic checks values of the schema."""
        if self.type == "object":
            return self._object()
        if self.type == "array":
            inner: Any = Any if self.items is None else self.items.kind()
            return Annotated[list[inner], Field(min_length=self.min_items, max_length=self.max_items)]  # type: ignore[valid-type]
        if self.type == "string":
            if self.enum is not None:
                return Literal[self.enum]
            return Annotated[str, Field(min_length=self.min_length, max_length=self.max_length)]
        if self.type in ("integer", "number"):
            number = int if self.type == "integer" else float
            return Annotated[number, Field(ge=self.minimum, le=self.maximum, allow_inf_nan=False)]
        return bool if self.type == "boolean" else None

    def _object(self) -> Any:
        fields: dict[str, Any] = {}
        for number, (name, shape) in enumerate(self.properties.items()):
            default = ... if name in self.required else None
            fields[f"f{number}"] = (shape.kind(), Field(default, alias=name))
        extra: Literal["allow", "forbid"] = "allow" if self.additional_properties else "forbid"
        return create_model("Answer", __config__=ConfigDict(strict=True, extra=extra), **fields)


def folded(text: str) -> str:
    """Return a text as labels are compared: without blanks at its ends, case and a last full stop."""
    return text.strip().removesuffix(".").rstrip().casefold()


def label_in(text: str, labels: tuple[str, ...]) -> str | None:
    """Return the label that the text's first line is, as `folded` compares; None where it is none."""
    lines = text.strip().splitlines()
    found = folded(lines[0]) if lines else ""
    return next((label for label in labels if folded(label) == found), None)


def up_to(text: str, stop: Sequence[str]) -> str:
    """Return the text without white space at its ends, up to the first of the `stop` texts in it."""
    text = text.lstrip()
    return text[: min([text.find(one) for one in stop if one in text], default=len(text))].rstrip()


def object_in(text: str, schema: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the JSON object that the text is, if it is one of the schema and nothing else; else None."""
    if len(text) > LIMIT_CHARACTERS:
        return None
    try:
        found = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=_none)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and has_shape(found, schema) else None


def has_shape(found: object, schema: Mapping[str, Any]) -> bool:
    """Tell whether a value has the shape of the schema, which `JsonForm` has taken."""
    try:
        _checker(json.dumps(schema)).validate_json(json.dumps(found, allow_nan=False))
    except ValidationError:
        return False
    except ValueError:  # a number that is not finite
        return False
    return True


def written(value: Mapping[str, Any]) -> str:
    """Return an object as an answer spells it: on one line, keys in their order."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


@lru_cache(maxsize=16)
def _checker(schema: str) -> TypeAdapter[Any]:
    return TypeAdapter(Shape.model_validate(from_json(schema), strict=False).kind())


def _none(constant: str) -> float:
    raise ValueError(constant)
