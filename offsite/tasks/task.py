"""A task as data: what it is in words, its prompts, the input's fields, the answer's form, samples, tests, the measure.

The words are promptfoo's where they fit: ``description``, ``prompts``, ``vars``, ``tests``, ``assert``. It holds no
code, no path and no address that anything follows. In a job it crosses as JSON, and its digest is that of this form.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from offsite.digests import sha256_bytes
from offsite.strictjson import SHOWN, Sparse, Strict, write_compact
from offsite.tasks.forms import Choice, FieldName, Form, FreeText, JsonForm, Labels, has_shape, written
from offsite.tasks.templates import Value, problem_of, render

TASK_FORMAT: Final = "offsite/task/1"
LIMIT_BYTES = 128 * 2**10
"""Largest task, in the form in which it crosses."""

NAME_PATTERN = r"^[a-z0-9][a-z0-9-]{0,62}$"
ANSWER = "answer"
"""The column of a row, and the key of a sample, that holds the answer; no field has this name."""

Measure = Literal["accuracy", "exact-match", "token-f1", "rouge-l", "json-validity"]
MEASURES: Final[Mapping[str, tuple[Measure, ...]]] = {
    "labels": ("accuracy",),
    "choice": ("accuracy",),
    "json": ("json-validity", "exact-match"),
    "text": ("exact-match", "token-f1", "rouge-l"),
}
"""The measures of each form of answer."""

_UNSEEN = re.compile(rf"(?!{SHOWN})[^\n\t]|[\U000e0000-\U000e007f]")
Text = Annotated[str, Field(min_length=1, max_length=16_384)]
Vars = dict[FieldName, Text | tuple[Text, ...]]
Answer = Text | dict[str, Any]


class Sample(Strict):
    """An input and its answer, to show a model what is wanted."""

    vars: Vars
    answer: Answer


class Assertion(Strict):
    """What an answer is held to: it equals a value."""

    type: Literal["equals"]
    value: Answer


class Test(Strict):
    """An input that is measured on, never trained on, and what the answer is held to."""

    vars: Vars
    asserted: tuple[Assertion, ...] = Field(alias="assert", min_length=1, max_length=1)

    @model_serializer(mode="wrap")
    def _named(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {"assert" if name == "asserted" else name: value for name, value in write(self).items()}

    @property
    def answer(self) -> Answer:
        """The answer that is right."""
        return self.asserted[0].value


class Task(Sparse):
    """The content of ``task.yaml``. The first of the prompts is the one that is tuned with and served."""

    optional: ClassVar[frozenset[str]] = frozenset({"attribution", "samples", "tests"})

    format: Literal["offsite/task/1"] = TASK_FORMAT
    name: str = Field(pattern=NAME_PATTERN)
    description: str = Field(min_length=1, max_length=4096)
    attribution: str = Field("", max_length=4096)
    fields: dict[FieldName, Annotated[str, Field(max_length=500)]] = Field(min_length=1, max_length=32)
    prompts: tuple[Text, ...] = Field(min_length=1, max_length=8)
    answer: Form
    samples: tuple[Sample, ...] = Field((), max_length=64)
    tests: tuple[Test, ...] = Field((), max_length=1000)
    measure: Measure

    @model_validator(mode="after")
    def _agree(self) -> Self:
        problems = self._problems()
        if problems:
            raise ValueError("; ".join(problems))
        if len(write_compact(self)) > LIMIT_BYTES:
            raise ValueError(f"as JSON it is over {LIMIT_BYTES} bytes")
        return self

    def _problems(self) -> list[str]:
        found = []
        if ANSWER in self.fields:
            found.append(f"fields: {ANSWER!r} is the answer's name, no field's")
        if isinstance(self.answer, Choice) and self.answer.field not in self.fields:
            found.append(f"answer: {self.answer.field!r} is none of the fields")
        if self.measure not in MEASURES[self.answer.type]:
            suited = ", ".join(MEASURES[self.answer.type])
            found.append(
                f"measure: {self.measure} is not one of {suited}, which go with an answer of {self.answer.type}"
            )
        for number, prompt in enumerate(self.prompts, 1):
            if (problem := problem_of(prompt, list(self.fields))) is not None:
                found.append(f"prompt {number}: {problem}")
        every: dict[str, Sequence[Sample | Test]] = {"sample": self.samples, "test": self.tests}
        for kind, rows in every.items():
            for number, row in enumerate(rows, 1):
                found += [f"{kind} {number}: {problem}" for problem in self.problems_of(row.vars, row.answer)]
        held = [row.vars for row in self.tests]
        found += [f"sample {n}: is a test, too" for n, one in enumerate(self.samples, 1) if one.vars in held]
        found += [f"test {n}: is there twice" for n, one in enumerate(held, 1) if one in held[: n - 1]]
        unseen = {
            f"U+{ord(match[0]):04X}"
            for text in _texts(self.model_dump(mode="json"))
            for match in _UNSEEN.finditer(text)
        }
        if unseen:
            found.append(f"holds characters that are not seen where they stand: {', '.join(sorted(unseen)[:5])}")
        return found

    def input_problems(self, values: Mapping[str, Value]) -> list[str]:
        """Return what is wrong with an input, without repeating it."""
        missing, foreign = self.fields.keys() - values.keys(), values.keys() - self.fields.keys()
        found = [f"field {name!r} is missing" for name in sorted(missing)]
        found += [f"{len(foreign)} of its names are none of the fields"] if foreign else []
        several = self.answer.field if isinstance(self.answer, Choice) else None
        for name in sorted(self.fields.keys() & values.keys()):
            value = values[name]
            if name != several and not isinstance(value, str):
                found.append(f"field {name!r} is a list, expected text")
            elif name == several and (isinstance(value, str) or len({*value}) != len(value) or len(value) < 2):
                found.append(f"field {name!r} is not a list of two different texts or more")
        return found

    def problems_of(self, values: Mapping[str, Value], answer: Answer) -> list[str]:
        """Return what is wrong with a row, without repeating it."""
        found = self.input_problems(values)
        if found:
            return found
        if isinstance(self.answer, JsonForm):
            fits = isinstance(answer, dict) and has_shape(answer, self.answer.schema_)
            return [] if fits else ["the answer is not of the schema"]
        if not isinstance(answer, str):
            return ["the answer is not text"]
        if not isinstance(self.answer, FreeText) and answer not in self.labels_of(values):
            return ["the answer is none of the labels"]
        return []

    def labels_of(self, values: Mapping[str, Value]) -> tuple[str, ...]:
        """Return the answers that an input may have; none where it may have any."""
        if isinstance(self.answer, Labels):
            return self.answer.labels
        listed = values[self.answer.field] if isinstance(self.answer, Choice) else ()
        return (listed,) if isinstance(listed, str) else tuple(listed)

    @property
    def lead(self) -> str:
        """What stands between a prompt and its answer, unless the prompt ends in white space itself."""
        return "\n" if isinstance(self.answer, JsonForm) else " "

    def asked(self, values: Mapping[str, Value], *, prompt: int = 0) -> str:
        """Return the input as the template of that number asks it, without the description."""
        return render(self.prompts[prompt], values)

    def introduced(self, *parts: str) -> str:
        """Return what a model reads: the description, and the parts after it, with empty lines between."""
        return "\n\n".join((self.description.strip(), *parts))

    def led(self, prompt: str) -> str:
        """Return what stands between that prompt and its answer."""
        return "" if prompt[-1:].isspace() else self.lead

    def spelled(self, answer: Answer) -> str:
        """Return an answer as text."""
        return answer if isinstance(answer, str) else written(answer)

    @property
    def digest(self) -> str:
        """SHA-256 of the task as it crosses: what is only spelled otherwise in YAML does not enter."""
        return sha256_bytes(write_compact(self))


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield name
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)


def told(task: Task) -> Sequence[tuple[str, str]]:
    """Return what people are told of a task, by name: what it asks, of what, and how it is measured."""
    form = task.answer
    words = {
        "labels": lambda: f"one of {len(task.labels_of({}))} labels",
        "choice": lambda: "one of the texts that a row lists",
        "json": lambda: "a JSON object of a schema",
        "text": lambda: "free text",
    }
    return (
        ("task", task.name),
        ("fields", ", ".join(task.fields)),
        ("answer", words[form.type]()),
        ("measure", task.measure),
        ("holds", f"prompts: {len(task.prompts)}, samples: {len(task.samples)}, tests: {len(task.tests)}"),
        ("task digest", task.digest),
    )
