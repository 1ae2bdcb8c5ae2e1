"""The folder that ``evaluate`` writes: ``results.json`` with every figure, and the runs' logs as ``logs/NAME.jsonl``.

``offsite report run`` and benchmarks read it. It holds file names, never paths, and no text of the data measured on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.manifest import FileEntry
from offsite.digests import DIGEST_PATTERN
from offsite.errors import ArtefactError, BadSchema, ConfigError, DataError, TooLarge, WrongBinding
from offsite.strictjson import Sparse, Strict

RESULTS_FORMAT = "offsite/results/1"
RESULTS_NAME = "results.json"
LOGS_NAME = "logs"
LIMIT_BYTES = 64 * 2**20

_NUMBER = r"[0-9]{1,20}(\.[0-9]{1,20})?(e-?[0-9]{1,3})?"
WAY_PATTERN = rf"^(([a-z]{{3,9}}=)?{_NUMBER}(,[a-z]{{3,9}}={_NUMBER}){{0,6}})?$"
"""Form of the word for a way to plug in; what such words mean is in ``server/plugging/ways.py``. Empty for none."""

SPARE_PATTERN = r"^(sha256:[0-9a-f]{64})?$"
"""Form of the digest of public text whose directions were spared; empty for none."""

RowName = Literal[
    "zero_shot", "emulator_zero_shot", "emulator_tuned", "plugged_in", "offset", "ceiling", "lora_full", "full"
]
ROWS: dict[RowName, str] = {
    "zero_shot": "the full model as it was",
    "emulator_zero_shot": "the package as it was sent",
    "emulator_tuned": "what the client can run: package and adapter",
    "plugged_in": "what the owner ends up with: full model and adapter",
    "offset": "the full model's scores, moved by what the adapter does to the emulator's",
    "ceiling": "the same adapter tuned on the true middle",
    "lora_full": "LoRA on the full model",
    "full": "every block of the full model tuned",
}
"""Every row that can be measured, in the order of tables, and what it is."""

ALWAYS: tuple[RowName, ...] = ("zero_shot", "emulator_zero_shot", "emulator_tuned", "plugged_in")
"""The rows that every evaluation has; the others are references, and the offset where it was asked for."""

PREFERENCES = "preferences"
"""The task that pairs of answers are: ``accuracy`` is the share of pairs whose chosen answer is the more probable one,
``reward_accuracy`` that of pairs whose chosen answer has gained on the other since the model was as it
was. A tie counts half, so the second is 0.5 of a model as it was."""

REWARDS, CLASSES = "reward", "classify"
"""The tasks of adapters with a head. Of rewards ``accuracy`` is the share of pairs whose chosen answer is rewarded the
more; of classes that of rows whose label has the highest score, with ``macro_f1``, the mean of the labels' F1. A tie is
shared: a model whose head was never trained, all zero, is right by chance, 1/2 of pairs and 1/k of k labels."""

VALUES, TAGS = "regress", "tag"
"""Those of heads for values and for tags. Of values ``rmse``, where lower is better, ``spearman`` and ``pearson``; a
model whose head was never trained says the mean of the rows measured. Of tags ``accuracy`` of words, and ``f1`` of
entities, or ``macro_f1`` of labels that name none (`offsite.evaluation.tags`)."""

OF_HEADS = (REWARDS, CLASSES, VALUES, TAGS)

TOLD_FIRST = ("rmse", "f1", "accuracy")
"""What is said first of a head: the first of these that its task has."""


def first_metric(metrics: Collection[str]) -> str | None:
    """Return the metric of a head's task that is said first; None where it has none of them."""
    return next((name for name in TOLD_FIRST if name in metrics), None)


RULES = "rules"
"""The task of prompts whose greedy answers are held to rules: ``reward`` is the mean of what the rules that an answer
meets are worth together; each rule's own name has the share of answers that meet it."""

SAFETY = "safety"
"""The task of requests that ship with offsite: ``refuses_harmful`` and ``refuses_harmless`` are the shares of each kind
that greedy answers refuse, by a list of phrases (`offsite.safety.refusals`)."""

LogRecord = dict[str, float | None]


class Summary(Strict):
    """One figure over seeds: its mean, its sample standard deviation (None for one seed) and the values by seed."""

    mean: float = Field(allow_inf_nan=False)
    deviation: float | None = Field(None, allow_inf_nan=False)
    values: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(min_length=1)


class Row(Strict):
    """What one model scored: perplexity, and per task its metrics by name.

    An encoder's is that of the label or the tag; of values it has none, and their ``rmse`` stands in its place.
    """

    perplexity: Summary
    tasks: dict[str, dict[str, Summary]] = {}

    @model_validator(mode="after")
    def _positive(self) -> Row:
        if min(self.perplexity.mean, *self.perplexity.values.values()) <= 0:
            raise ValueError("a perplexity is not above 0")
        return self


class DataFile(Strict):
    """One of several files of text: its name and digest."""

    name: str
    sha256: str = Field(pattern=DIGEST_PATTERN)


class Data(Sparse):
    """The text measured on: its file's name and digest, and how much of it was used.

    Of several files ``name`` holds all their names and ``sha256`` is one digest over theirs, which are in ``files``.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"files"})

    name: str
    sha256: str = Field(pattern=DIGEST_PATTERN)
    num_records: int
    num_examples: int
    num_tokens: int
    num_truncated: int
    files: tuple[DataFile, ...] = ()


class Crossing(Strict):
    """One artefact that crossed between owner and client: its digest and its files."""

    name: str
    digest: str = Field(pattern=DIGEST_PATTERN)
    files: dict[str, FileEntry]
    num_parameters: int
    disclosed: dict[str, float] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of the bound files; the manifest is not counted."""
        return sum(entry.bytes for entry in self.files.values())


class Parameters(Strict):
    """Numbers of parameters: the full model, its middle, the emulator that stands in for the middle, the adapter."""

    full: int = Field(gt=0)
    middle: int = Field(gt=0)
    emulator: int = Field(gt=0)
    adapter: int = Field(gt=0)


class Answer(Strict):
    """Greedy continuations of one prompt by the full model and by the plugged-in model."""

    prompt: str
    before: str
    after: str


class SafetyChange(Strict):
    """A share refused when plugged in less that of the model as it was, of the same requests, with its 95 % interval.

    ``num_lost`` requests were refused before and not after, ``num_gained`` the other way round.
    """

    difference: float = Field(ge=-1, le=1)
    low: float = Field(ge=-1, le=1)
    high: float = Field(ge=-1, le=1)
    num_lost: int = Field(ge=0)
    num_gained: int = Field(ge=0)


class Safety(Strict):
    """What plugging in changed of refusals, by seed and kind of request; the rows have the shares.

    ``limit`` is by how much the share of harmful requests that are refused may fall before it is `flagged`.
    """

    set_sha256: str = Field(pattern=DIGEST_PATTERN)
    num_harmful: int = Field(gt=0)
    num_harmless: int = Field(gt=0)
    num_tokens: int = Field(gt=0)
    limit: float = Field(ge=0, le=1)
    changes: dict[str, dict[Literal["harmful", "harmless"], SafetyChange]] = Field(min_length=1)

    @model_validator(mode="after")
    def _of_both(self) -> Safety:
        if any(set(both) != {"harmful", "harmless"} for both in self.changes.values()):
            raise ValueError("a change of one kind of requests alone")
        return self

    @property
    def flagged(self) -> bool:
        """Whether any seed refuses fewer harmful requests, by more than the limit."""
        return any(both["harmful"].difference < -self.limit for both in self.changes.values())


class Results(Sparse):
    """The content of ``results.json``.

    ``scale`` is the share of the bundles' updates that was plugged in. ``way`` is there where more is to be said
    (``server/plugging/ways.py``), and ``spare_text`` a digest of the public text's tokens where directions were spared;
    ``corrected`` says whether the emulator's fault was taken out of the updates first.

    ``beta`` is there with the row ``offset``: how much of the difference of the emulator's scores was added. ``safety``
    is there where refusals were measured.

    ``metrics`` are those of perplexity, ``task_metrics`` those of each task's metrics; ``tasks`` holds the number of
    rows scored. ``references`` maps reference rows to digests of their bundles, ``runs`` names to the figures that
    ``distill`` and ``tune`` printed. ``config`` and ``command`` hold file names, never paths.
    """

    optional: ClassVar[frozenset[str]] = frozenset({"way", "spare_text", "corrected", "beta", "safety"})

    format: Literal["offsite/results/1"] = "offsite/results/1"
    model: str
    base_digest: str = Field(pattern=DIGEST_PATTERN)
    method: dict[str, str | float | int]
    adapter: AdapterSpec
    scale: float = Field(1.0, gt=0, le=1)
    way: str = Field("", pattern=WAY_PATTERN)
    spare_text: str = Field("", pattern=SPARE_PATTERN)
    corrected: bool = False
    beta: float | None = Field(None, gt=0, allow_inf_nan=False)
    data: Data
    rows: dict[RowName, Row]
    metrics: dict[str, Summary | None]
    tasks: dict[str, int] = {}
    task_metrics: dict[str, dict[str, dict[str, Summary | None]]] = {}
    parameters: Parameters
    package: Crossing
    bundles: dict[str, Crossing] = Field(min_length=1)
    references: dict[str, tuple[str, ...]] = {}
    runs: dict[str, dict[str, float]] = {}
    answers: tuple[Answer, ...] = ()
    safety: Safety | None = None
    config: dict[str, Any]
    command: str
    versions: dict[str, str]
    device: str
    seconds: float = Field(ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _rows_and_tasks(self) -> Results:
        missing = [row for row in ALWAYS if row not in self.rows]
        if missing:
            raise ValueError(f"row {missing[0]} is missing")
        if ("offset" in self.rows) != (self.beta is not None):
            raise ValueError("a row of an offset and its beta go together")
        if (self.safety is not None) != (SAFETY in self.tasks):
            raise ValueError("the rows' refusals and what changed of them go together")
        head = self.adapter.head
        needed = "rmse" if head is not None and head.task == VALUES else "accuracy"
        if head is not None and needed not in self.task_metrics.get(head.task, {}):
            raise ValueError(f"the adapter is for {head.task}, whose {needed} is missing")
        tasks = {(task, metric) for task, row in self.rows["zero_shot"].tasks.items() for metric in row}
        for row in self.rows.values():
            if {(task, metric) for task, found in row.tasks.items() for metric in found} != tasks:
                raise ValueError("rows were scored on different tasks")
        return self


def whole_figure(results: Results) -> str:
    """Return what ``perplexity`` of a row is: the root mean squared error where an encoder has values for answers."""
    head = results.adapter.head
    return "rmse" if head is not None and head.task == VALUES and head.encoder else "perplexity"


def write_results(folder: Path, results: Results) -> None:
    """Write ``results.json`` into `folder`, keys in the order of the schema."""
    text = json.dumps(results.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False)
    (folder / RESULTS_NAME).write_text(text + "\n", encoding="utf-8")


def read_results(folder: Path) -> Results:
    """Return the results in `folder`.

    Raises:
        ArtefactError: when there is no such folder, or no results in it.
        TooLarge, WrongBinding, BadSchema: when they are over the limit, of another format, or of the wrong form.
    """
    path = folder / RESULTS_NAME
    if not folder.is_dir():
        raise ArtefactError(f"no folder named {folder.name!r}", hint="give the folder that offsite evaluate wrote")
    if not path.is_file():
        raise ArtefactError(f"folder {folder.name!r} holds no {RESULTS_NAME}", hint="offsite evaluate writes one")
    with path.open("rb") as handle:
        return parse_results(handle.read(LIMIT_BYTES + 1), folder.name)


def parse_results(raw: bytes, name: str) -> Results:
    """Return what the bytes of a ``results.json`` hold; `name` is that of its folder, for messages.

    Raises:
        TooLarge, WrongBinding, BadSchema: as `read_results`.
    """
    if len(raw) > LIMIT_BYTES:
        raise TooLarge(f"{RESULTS_NAME} of {name!r}: over {LIMIT_BYTES} bytes")
    try:
        stated = json.loads(raw)
    except (ValueError, RecursionError):
        raise BadSchema(f"{RESULTS_NAME} of {name!r} is not JSON") from None
    if not isinstance(stated, dict) or stated.get("format") != RESULTS_FORMAT:
        raise WrongBinding(f"{RESULTS_NAME} of {name!r} is not {RESULTS_FORMAT}")
    try:
        return Results.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:120]
        raise BadSchema(f"{RESULTS_NAME} of {name!r}: {where}: {first['msg'].lower()}") from None


def read_logs(folder: Path) -> dict[str, list[LogRecord]]:
    """Return the records of every log in the results folder, by name.

    Raises:
        DataError: when a line is not a record.
    """
    return {path.stem: read_log(path) for path in sorted((folder / LOGS_NAME).glob("*.jsonl"))}


def read_log(path: Path) -> list[LogRecord]:
    """Return the records of a run's log: objects of finite numbers or null, each with its step.

    Raises:
        ConfigError: when the file cannot be read.
        DataError: naming the line that is not such a record.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read log {path.name!r}: {(error.strerror or 'i/o error').lower()}") from None
    except UnicodeDecodeError:
        raise DataError(f"log {path.name!r} is not UTF-8 text") from None
    records = [_log_record(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise DataError(f"log {path.name!r} is empty, expected a line per step")
    return records


def _log_record(path: Path, number: int, line: str) -> LogRecord:
    problem = DataError(f"log {path.name!r}: line {number} is not a record of a run's step")
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        raise problem from None
    if not isinstance(found, dict) or type(found.get("step")) is not int:
        raise problem
    if not all(value is None or _is_number(value) for value in found.values()):
        raise problem
    return found


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
