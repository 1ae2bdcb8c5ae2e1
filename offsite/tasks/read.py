"""``task.yaml`` read as data: plain YAML of a bounded size, each key once, no tags, no anchors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from offsite.errors import ConfigError, DataError
from offsite.tasks.task import Task
from offsite.tasks.templates import problem_of

LIMIT_BYTES = 64 * 2**10
"""Largest file."""

_EXAMPLES = "docs/tasks.md explains the file, examples/tasks has three"


class _Loader(yaml.SafeLoader):
    """Plain mappings, lists and scalars, each key once; an alias would make a small file a huge one."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(
                None, None, "anchors are not supported", self.peek_event().start_mark
            )  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)  # type: ignore[no-untyped-call]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"{str(twice)[:40]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_task(path: Path) -> Task:
    """Return the task in the file at `path`; of a file that has faults, all are told at once.

    Raises:
        ConfigError: when there is no such file.
        DataError: when it is too large, not plain YAML, or no task.
    """
    try:
        with path.open("rb") as handle:
            raw = handle.read(LIMIT_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read task {path.name!r}: {(error.strerror or 'i/o error').lower()}") from None
    if len(raw) > LIMIT_BYTES:
        raise DataError(
            f"task {path.name!r} is over {LIMIT_BYTES} bytes", hint="keep a few samples in it, and give rows by --data"
        )
    return parse_task(raw, f"task {path.name!r}")


def parse_task(raw: bytes, what: str) -> Task:
    """Return the task that the YAML states; its size is the caller's to limit.

    Raises:
        DataError: as `read_task`.
    """
    try:
        text = json.dumps(yaml.load(raw.decode("utf-8"), _Loader), allow_nan=False)  # noqa: S506 - a SafeLoader
    except UnicodeDecodeError:
        raise DataError(f"{what} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        why = f": {error.problem}" if isinstance(error, yaml.constructor.ConstructorError) else ""
        raise DataError(
            f"{what} is not plain YAML{where}{why}", hint="tags, anchors and code are not supported"
        ) from None
    except (TypeError, ValueError, RecursionError):
        raise DataError(
            f"{what} holds what JSON cannot: a date, a key that is no text, a number without end, or too deep a nest",
            hint="write such values in quotes",
        ) from None
    try:
        return Task.model_validate_json(text)
    except ValidationError as error:
        raise DataError(
            f"{what}: {'; '.join(_problems(error) + _of_prompts(json.loads(text), error))}", hint=_EXAMPLES
        ) from None


def _of_prompts(stated: Any, error: ValidationError) -> list[str]:
    """Return what is wrong with the prompts of a file whose form has faults, too."""
    if not isinstance(stated, dict) or not any(item["loc"] for item in error.errors()):
        return []  # its form is right, and the prompts were looked at
    prompts, fields = stated.get("prompts"), stated.get("fields")
    if not isinstance(prompts, list) or not isinstance(fields, dict):
        return []
    found = [(n, problem_of(one, list(fields))) for n, one in enumerate(prompts, 1) if isinstance(one, str)]
    return [f"prompt {number}: {problem}" for number, problem in found if problem is not None]


def _problems(error: ValidationError) -> list[str]:
    found = []
    for item in error.errors(include_url=False, include_context=False, include_input=False):
        where = ascii(".".join(map(str, item["loc"])))[1:-1][:80]
        message = item["msg"].removeprefix("Value error, ")
        plain = {"missing": "is missing", "extra_forbidden": "is not a key of a task"}.get(item["type"])
        found.append(f"{where}: {plain or message[:1].lower() + message[1:]}" if where else message)
    return found
