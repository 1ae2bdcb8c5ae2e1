"""What an answer is rewarded for, or measured by: rules that anybody can check, given as settings and never as code.

Each rule that is on gives its weight or nothing, and they add up:

- ``exact``: the answer is the row's own, case, Unicode form (NFKC), invisible characters and white space apart;
- ``json_schema``: the answer is a JSON object of that schema and nothing else, white space around it apart, as a task's
  answers are (`offsite.tasks.forms`);
- ``words``, ``tokens``: there are so many of them, words told apart by white space, tokens without the one that ends an
  answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from offsite.digests import sha256_file
from offsite.errors import ArtefactError, ConfigError, DataError
from offsite.strictjson import parse_object
from offsite.tasks.forms import JsonForm, object_in
from offsite.text.fold import folded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from offsite.tasks.config import RuleName, RuleSettings
    from offsite.text.batches import Example

LIMIT_BYTES = 65_536
"""Largest schema."""


@dataclass(frozen=True)
class Rules:
    """The rules that are on, read and ready."""

    settings: RuleSettings
    form: JsonForm | None = field(default=None, repr=False)
    digest: str | None = None

    @property
    def asks_for_answers(self) -> bool:
        """Whether a row must have an answer of its own."""
        return self.settings.exact is not None

    def binding(self) -> dict[str, str]:
        """Return what a resumed run must share of them, one entry per setting; of a schema its digest."""
        given = self.settings.model_dump(mode="json", exclude={"json_schema"}) | {"json_schema": self.digest}
        return {f"rules.{name}": str(value) for name, value in given.items() if value is not None}

    def met(self, text: str, *, num_tokens: int, answer: str | None) -> dict[RuleName, bool]:
        """Return of every rule that is on whether an answer meets it; arguments as of `reward`."""
        rules = self.settings
        found: dict[RuleName, bool] = {}
        if rules.exact is not None:
            found["exact"] = answer is not None and _plain(text) == _plain(answer)
        if self.form is not None:
            found["json_schema"] = object_in(text.strip(), self.form.schema_) is not None
        if "words" in rules.names:
            found["words"] = _within(len(text.split()), rules.min_words, rules.max_words)
        if "tokens" in rules.names:
            found["tokens"] = _within(num_tokens, rules.min_tokens, rules.max_tokens)
        return found

    def reward(self, text: str, *, num_tokens: int, answer: str | None) -> float:
        """Return what an answer is worth, from 0 to the sum of the weights.

        Args:
            num_tokens: that it was made of, without the one that ends it.
            answer: the row's own, where it has one.
        """
        return self.worth(self.met(text, num_tokens=num_tokens, answer=answer))

    def worth(self, met: Mapping[RuleName, bool]) -> float:
        """Return what an answer that meets these rules is worth."""
        return sum((self.settings.weight(name) for name, is_met in met.items() if is_met), 0.0)


def require_answers(examples: Sequence[Example], rules: Rules) -> None:
    """Return only if every row has what the rules compare with.

    Raises:
        DataError: when a row has no answer and answers are compared.
    """
    missing = sum(example.answer is None for example in examples) if rules.asks_for_answers else 0
    if missing:
        raise DataError(
            f"--rules exact: {missing} of {len(examples)} rows have no answer to compare with",
            hint="give it as 'completion', or as the last message; --fields completion=COLUMN names another column",
        )


def read_rules(settings: RuleSettings) -> Rules:
    """Return the rules of these settings, their schema read.

    Raises:
        DataError: when there is no such schema file, or it holds no JSON object.
        ConfigError: when it is no schema of an object, or asks for what is not supported.
    """
    path = settings.json_schema
    if path is None:
        return Rules(settings)
    try:
        form = JsonForm.model_validate({"type": "json", "schema": _object(path)})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].splitlines()[0].removeprefix("Value error, ")[:160]
        raise ConfigError(f"--rules json_schema: the schema cannot be followed: {reason}") from None
    return Rules(settings, form, sha256_file(path))


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path.name}: no such file, expected a JSON schema", hint="check --rules json_schema")
    if path.stat().st_size > LIMIT_BYTES:
        raise DataError(f"{path.name}: over {LIMIT_BYTES} bytes, which no schema here may be")
    try:
        return parse_object(path.read_bytes(), path.name)
    except ArtefactError as error:  # the client's own file: nothing was rejected
        raise DataError(str(error), hint='a JSON schema is one object, as {"type": "object", ...}') from None


def _plain(text: str) -> str:
    return " ".join(folded(text).split())


def _within(num: int, least: int | None, most: int | None) -> bool:
    return (least is None or num >= least) and (most is None or num <= most)
