"""JSON from strangers: one parser, each key once, no NaN, bounded depth, and then a strict model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, SerializerFunctionWrapHandler, ValidationError, model_serializer

from offsite.errors import BadSchema, WrongBinding
from offsite.tensors import no_duplicates

SHOWN = (
    r"[^\x00-\x1f\x7f-\x9f"  # control
    r"\u00ad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # direction, joining, format
    r"\u2028\u2029\ue000-\uf8ff]"  # separators of lines and paragraphs, private use
)
"""A pattern of a character that is seen where it stands, in the syntax that all languages' patterns share. Characters
beyond 16 bits have no such syntax; `require_seen` looks at those."""

_BEYOND = re.compile("[\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f\U000f0000-\U0010ffff]")


def require_seen(text: str) -> str:
    """Return the text if no character beyond 16 bits is one that is not seen: tags, private use, formats.

    Raises:
        ValueError: naming none of it.
    """
    if _BEYOND.search(text):
        raise ValueError("holds a character that is not seen")
    return text


class Strict(BaseModel):
    """Base of everything read from the other side: frozen, strict, no unknown key, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class Sparse(Strict):
    """Base of what is written without those fields of ``optional`` that have their default: so files stay as they were.

    A zero that is not the default is written: it says something.
    """

    optional: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields = type(self).model_fields
        usual = {name for name in self.optional if getattr(self, name) == fields[name].get_default()}
        return {name: value for name, value in write(self).items() if name not in usual}


Model = TypeVar("Model", bound=Strict)


def parse_object(raw: bytes, what: str) -> dict[str, Any]:
    """Return the JSON object that `raw` holds; the caller has limited its size.

    Raises:
        BadSchema: when it is not an object in UTF-8, repeats a key, holds NaN or infinity, or nests too deep.
    """
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise BadSchema(f"{what} is not JSON with distinct keys") from None
    if not isinstance(found, dict):
        raise BadSchema(f"{what} is not a JSON object")
    return found


def parse_strict(raw: bytes, cls: type[Model], what: str, fixed: Mapping[str, str]) -> Model:
    """Return the `cls` that `raw` states, once the fields of `fixed` (format, suite) hold just those words.

    Raises:
        BadSchema: as `parse_object`, or naming the first field that does not have the form of `cls`.
        WrongBinding: when a field of `fixed` holds anything else. Nothing is negotiated.
    """
    stated = parse_object(raw, what)
    for name, expected in fixed.items():
        found = stated.get(name)
        if found != expected:
            shown = found if isinstance(found, str) and re.fullmatch(r"[a-z0-9/+-]{1,80}", found) else "another one"
            raise WrongBinding(
                f"{what}: {name} is {shown}, expected {expected}", hint="both sides need the same offsite"
            )
    try:
        # what the one parser above read is what the model sees: two parsers could disagree about the same bytes
        return cls.model_validate_json(json.dumps(stated, allow_nan=False))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ascii(".".join(str(part) for part in first["loc"])[:120])  # the key may be the sender's own
        raise BadSchema(f"{what}: {where}: {first['msg'].lower()}") from None
    except ValueError:
        raise BadSchema(f"{what} holds a number that is not finite") from None


def write_compact(model: Strict) -> bytes:
    """Return the one form in which an unsigned file is written: ASCII, keys sorted, no blanks, a line end."""
    content = model.model_dump(mode="json")
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"


def _refuse(constant: str) -> float:
    raise ValueError(constant)
