"""Settings of ``offsite task check``, what every verb on a task takes, and the rules that an answer may be held to."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from offsite.config import DATA, POSITIONAL, REPEATED
from offsite.text.config import ColumnSettings, TextFiles

RuleName = Literal["exact", "json_schema", "words", "tokens"]

_RANGES = ("words", "tokens")


class RuleSettings(BaseModel):
    """Settings of ``--rules``: what answers are rewarded for, or measured by. Each gives its weight or nothing."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    exact: float | None = Field(
        None, gt=0, description="weight of saying the row's own answer, case, Unicode form and white space apart"
    )
    json_schema: Path | None = Field(None, description="file with a JSON schema that the answer is to meet")
    json_schema_weight: float = Field(1.0, gt=0, description="weight of meeting it")
    min_words: int | None = Field(None, ge=0, description="fewest words of an answer, told apart by white space")
    max_words: int | None = Field(None, ge=1, description="most words of an answer")
    words_weight: float = Field(1.0, gt=0, description="weight of a number of words within these bounds")
    min_tokens: int | None = Field(None, ge=0, description="fewest tokens of an answer, its end apart")
    max_tokens: int | None = Field(None, ge=1, description="most tokens of an answer")
    tokens_weight: float = Field(1.0, gt=0, description="weight of a number of tokens within these bounds")

    @property
    def names(self) -> tuple[RuleName, ...]:
        """The rules that are on."""
        found: list[RuleName] = [] if self.exact is None else ["exact"]
        found += [] if self.json_schema is None else ["json_schema"]
        found += [] if self.min_words is None and self.max_words is None else ["words"]
        found += [] if self.min_tokens is None and self.max_tokens is None else ["tokens"]
        return tuple(found)

    def weight(self, name: RuleName) -> float:
        """Return what meeting a rule that is on is worth."""
        return (self.exact or 0.0) if name == "exact" else float(getattr(self, f"{name}_weight"))

    @property
    def word(self) -> str:
        """What is typed for these rules, with a schema's file name in place of its path."""
        given = {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}
        shown = {name: one.name if isinstance(one, Path) else one for name, one in given.items()}
        return ",".join(f"{name}={one}" for name, one in shown.items())

    def problems(self) -> list[str]:
        """Return what is wrong with the rules together, a line each."""
        if not self.names:
            return ["--rules: nothing is rewarded, give exact, json_schema, or a range of words or tokens"]
        found = [
            f"--rules {name}_weight: there is no rule {name}"
            for name in ("json_schema", *_RANGES)
            if f"{name}_weight" in self.model_fields_set and name not in self.names
        ]
        for name in _RANGES:
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if least is not None and most is not None and least > most:
                found.append(f"--rules: min_{name} {least} is above max_{name} {most}")
        return found


class TaskWord(ColumnSettings):
    """Base of verbs that are about a task, with or without rows of it."""

    task: Path = Field(description="task.yaml, or a job folder that carries a task", json_schema_extra=POSITIONAL)
    data: TextFiles = Field(
        (),
        description="rows of the task, a file as tune reads but .txt, with a column for each field and "
        "answer; may be repeated",
        json_schema_extra=DATA | REPEATED,
    )


class TaskCheckConfig(TaskWord):
    """Settings of ``offsite task check TASK``."""

    verb: ClassVar[str] = "task check"
