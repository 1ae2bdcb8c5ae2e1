"""Settings of ``offsite evaluate``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from offsite.config import FROM_PROJECT, MACHINE, MEASURING, OUTPUT, PLUGGING, REPEATED, USUAL
from offsite.evaluation.config import ExactSettings, HeldoutSettings
from offsite.keys.config import KeysConfig
from offsite.modelling.config import ModelWord
from offsite.tasks.config import RuleSettings
from offsite.text.config import TextFiles
from server.plugging.config import BetaSettings, CorrectSettings, MeasuredWaySettings
from server.registry.config import WORD_PATTERN

REFERENCE_NAMES = ("ceiling", "lora_full", "full")
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]{0,63})=(.+)")


def named_paths(words: Sequence[str]) -> list[tuple[str, Path]]:
    """Return (name, path) for words of the form ``NAME=PATH`` or ``PATH``, which is named after its last part."""
    found = []
    for word in words:
        match = None if Path(word).exists() else _NAMED.fullmatch(word)
        name, path = (match[1], Path(match[2])) if match else (Path(word).name, Path(word))
        found.append((name, path))
    return found


def registered_id(path: Path) -> str | None:
    """Return the id of a registered bundle that stands in a path's place; None for the path of a folder."""
    return str(path) if re.fullmatch(WORD_PATTERN, str(path)) and not path.exists() else None


class EvaluateConfig(
    ModelWord, KeysConfig, HeldoutSettings, ExactSettings, MeasuredWaySettings, CorrectSettings, BetaSettings
):
    """Settings of ``offsite evaluate MODEL --package PACKAGE --bundle BUNDLE --data HELDOUT -o FOLDER``.

    A client's bundle is named by its id in the registry, once it is accepted. A bundle folder is taken without
    signature, job or cap on norms: it is for what the owner tuned itself.
    """

    verb: ClassVar[str] = "evaluate"

    output: Path = Field(description="results folder to write", json_schema_extra=OUTPUT)
    package: Path = Field(description="package folder the bundles were tuned on")
    bundle: tuple[str, ...] = Field(
        min_length=1,
        description="id of an accepted bundle (with --registry), or a bundle folder of the owner's own making; as "
        "BUNDLE or NAME=BUNDLE; repeat it for several seeds of one adapter",
        json_schema_extra=REPEATED,
    )
    registry: Path | None = Field(
        None,
        description="registry folder, for bundles named by their ids; else offsite.toml's",
        json_schema_extra=USUAL | FROM_PROJECT,
    )
    reference: tuple[str, ...] = Field(
        (),
        description=f"bundle tuned on a package that keeps every block, as NAME=BUNDLE with NAME one of "
        f"{', '.join(REFERENCE_NAMES)}; repeat it for others, or for several seeds",
        json_schema_extra=USUAL | REPEATED,
    )
    reference_package: tuple[Path, ...] = Field(
        (),
        description="package a reference was tuned on; default: found by its owner's record, near the bundle",
        json_schema_extra=MEASURING | REPEATED,
    )

    offset: bool = Field(
        False,
        description="one more row: the full model's scores, moved by what the adapter does to the emulator's, as serve "
        "--offset answers; holds both models",
        json_schema_extra=PLUGGING,
    )

    data: TextFiles = Field(
        min_length=1,
        description="held-out text: .txt, .jsonl, .json, .csv or .tsv, or those as .gz, or .parquet; may be repeated",
        json_schema_extra=REPEATED,
    )
    task_file: Path | None = Field(
        None,
        description="task.yaml, or a job that carries one: --data are rows of it, measured by its measure, too",
        json_schema_extra=USUAL,
    )
    baselines: Path | None = Field(
        None,
        description="what task baseline wrote of the same task and data, to be shown beside",
        json_schema_extra=MEASURING,
    )
    rules: RuleSettings | None = Field(
        None,
        description="what greedy answers to the prompts of --data are measured by, as in tune --objective rloo: "
        "exact=1,max_words=20; of the first --task-limit rows",
        json_schema_extra=MEASURING,
    )
    prompt: tuple[str, ...] = Field(
        (),
        description="text that the full and the plugged-in model go on from, greedily; repeat it for others",
        json_schema_extra=MEASURING | REPEATED,
    )
    answer_tokens: int = Field(
        48, ge=1, description="tokens of an answer (--prompt, --rules), at most", json_schema_extra=MEASURING
    )

    safety: bool = Field(
        False,
        description="also ask 60 harmful requests and 40 harmless look-alikes that ship with offsite, and tell how "
        "many each row refuses, by a list of phrases",
        json_schema_extra=MEASURING,
    )
    safety_limit: float = Field(
        0.1,
        ge=0,
        le=1,
        description="by how large a share of the harmful requests refusals may fall before that is flagged",
        json_schema_extra=MEASURING,
    )

    log: tuple[str, ...] = Field(
        (),
        description="log of a run as NAME=FILE, put into the results; repeat it for distill's and each tune's",
        json_schema_extra=USUAL | REPEATED,
    )
    outcome: tuple[str, ...] = Field(
        (),
        description="JSON object that distill or tune printed, as NAME=FILE: its seconds, tokens/s and peak memory",
        json_schema_extra=USUAL | REPEATED,
    )

    batch_size: int = Field(8, ge=1, description="sequences in one forward pass", json_schema_extra=MACHINE)

    @model_validator(mode="after")
    def _agree(self) -> Self:
        problems = []
        if self.registry is None and any(registered_id(path) for _, path in named_paths(self.bundle)):
            problems.append("--bundle: an id of a bundle needs --registry")
        for _, path in named_paths(self.bundle) if self.registry is not None else []:
            if registered_id(path) is None and not path.exists():
                problems.append(
                    f"--bundle: {path.name!r} is neither a folder nor an id in the registry: its first digits, four or "
                    "more, or latest (offsite registry list)"
                )
        for flag, words in {"--bundle": self.bundle, "--log": self.log, "--outcome": self.outcome}.items():
            names = [name for name, _ in named_paths(words)]
            for name in sorted({name for name in names if names.count(name) > 1}):
                problems.append(f"{flag}: the name {name!r} is given twice; name them, as seed0=PATH")
        for name, path in named_paths(self.reference):
            if name not in REFERENCE_NAMES:
                shown = f"{name}={path.name}" if name != path.name else name
                problems.append(f"--reference: found {shown!r}, expected NAME=BUNDLE, {' or '.join(REFERENCE_NAMES)}")
        if self.baselines is not None and self.task_file is None:
            problems.append("--baselines: they are of a task; give --task-file, too")
        if self.task_file is not None and self.separator is not None:
            problems.append("--separator: rows of a task have fields, plain text has none")
        if "safety_limit" in self.model_fields_set and not self.safety:
            problems.append("--safety-limit: it is of --safety; give that, too")
        if self.rules is not None and self.task_file is not None:
            problems.append("--rules: rows of --task-file are held to the task's form")
        problems += [] if self.rules is None else self.rules.problems()
        if problems:
            raise ValueError("; ".join(problems))
        return self
