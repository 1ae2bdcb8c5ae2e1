"""``offsite task baseline``: what models make of a task as they are, each asked in several ways, as one table."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

import offsite
from offsite.artefacts.job import task_at
from offsite.artefacts.package import open_package
from offsite.baselines.answering import Answerer
from offsite.baselines.asking import Asker, Given
from offsite.baselines.config import METHODS, BaselineConfig, Method
from offsite.baselines.table import BaselineRow, Baselines, figure_of, show
from offsite.baselines.work import Work
from offsite.console import progress, say
from offsite.digests import model_digest, sha256_files
from offsite.errors import ConfigError, DataError
from offsite.folders import kind_of
from offsite.modelling.dtypes import cast_model
from offsite.modelling.load import load_model, load_tokenizer, refuse_encoder, require_weights
from offsite.staging import refuse_existing, staged_file
from offsite.tasks.rows import TaskRow, read_task_rows, test_rows, without
from offsite.tasks.scores import scored
from offsite.tasks.task import Task
from offsite.training.devices import choose_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BOUND = (
    "seed",
    "shots",
    "rows",
    "thought_tokens",
    "part_tokens",
    "parts",
    "rows_at_once",
    "precision",
    "model",
    "method",
)


@dataclass(frozen=True)
class Loaded:
    """A model that is asked: what it is called, whether it came as a package, its digest, and itself."""

    name: str
    kind: Literal["package", "model"]
    digest: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def run(config: BaselineConfig) -> dict[str, object]:
    """Carry out ``offsite task baseline``: ask every model in every way, write the table, show it.

    Killed and called again it goes on from the answers that it has.

    Raises:
        ConfigError, DataError: when settings, the task, data or a model are not as needed; before any model is loaded,
            where that can be told.
        ArtefactError: when a package or a job is rejected.
        RunFailed: when a model's output is not finite, or the disk is full.
    """
    refuse_existing(config.output)
    task = task_at(config.task)
    rows = rows_of(config, task)
    methods = methods_for(task, config)
    device = choose_device(config.device)
    for name in config.model:
        if _is_package(name):
            open_package(Path(name)).require_text("task baseline")
        else:
            refuse_encoder(name)
            require_weights(name)
    data = sha256_files(config.data) if config.data else None
    settings = config.model_dump(mode="json", include={*_BOUND})
    bound = {"task": task.digest, "data": data, "fields": dict(config.fields), "device": device.type, **settings}
    work = Work(config.output.with_name(f"{config.output.name}.work"), {**bound, "offsite": offsite.__version__})
    found: list[BaselineRow] = []
    for name in config.model:
        loaded = _load(name, config, device)
        for prompt in range(len(task.prompts)):
            for method in methods:
                found.append(_row(config, task, rows, loaded, method, prompt, work, number=len(found)))
        del loaded  # one model in memory at a time
    baselines = Baselines(
        task=task.name,
        task_digest=task.digest,
        measure=task.measure,
        data_sha256=data,
        num_rows=len(rows),
        seed=config.seed,
        rows=tuple(found),
        config={**settings, "model": [Path(name).name for name in config.model]},
        versions={
            "offsite": offsite.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers")},
        },
        device=device.type,
    )
    content = baselines.model_dump(mode="json")
    with staged_file(config.output) as stage:
        stage.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    work.remove()
    show(baselines)
    return {"baselines": config.output.name, **{name: value for name, value in content.items() if name != "config"}}


def rows_of(config: BaselineConfig, task: Task) -> list[TaskRow]:
    """Return the rows that are measured on: of the data, else the task's tests; none that is a sample.

    Raises:
        DataError: when there are none, or as `read_task_rows`.
    """
    if not config.data and not task.tests:
        raise DataError(f"task {task.name!r} has no tests to measure on", hint="give rows by --data")
    every = read_task_rows(config.data, task, fields=config.fields) if config.data else test_rows(task)
    rows = without(every, (sample.vars for sample in task.samples))
    if len(rows) < len(every):
        say(f"{len(every) - len(rows)} rows are samples of task {task.name!r}: they are not measured on")
    if not rows:
        raise DataError(f"every row is a sample of task {task.name!r}", hint="give other rows by --data")
    return rows[: config.rows or None]


def methods_for(task: Task, config: BaselineConfig) -> tuple[Method, ...]:
    """Return the ways of asking, in the order of `METHODS`; those with samples are left out where there are none.

    Raises:
        ConfigError: when such a way was asked for by name.
    """
    shown = {"in-context", "nearest"}
    if not task.samples and "method" in config.model_fields_set and shown & set(config.method):
        raise ConfigError(f"--method: task {task.name!r} has no samples to show", hint="add samples to the task")
    wanted = set(config.method) - (set() if task.samples else shown)
    return tuple(method for method in METHODS if method in wanted)


def _is_package(name: str) -> bool:
    path = Path(name)
    return path.is_dir() and kind_of(path) == "a package"


def _load(name: str, config: BaselineConfig, device: torch.device) -> Loaded:
    dtype = "bfloat16" if config.precision == "bf16" else "float32"
    if _is_package(name):
        package = open_package(Path(name))
        model = package.load_model(dtype=dtype).to(device)  # type: ignore[arg-type]
        return Loaded(Path(name).name, "package", package.digest, model, package.load_tokenizer())
    model = load_model(name)
    digest = model_digest(model)
    cast_model(model, getattr(torch, dtype))
    return Loaded(Path(name).name, "model", digest, model.to(device), load_tokenizer(name))  # type: ignore[arg-type]


def _row(
    config: BaselineConfig,
    task: Task,
    rows: Sequence[TaskRow],
    loaded: Loaded,
    method: Method,
    prompt: int,
    work: Work,
    *,
    number: int,
) -> BaselineRow:
    """Return a row of the table; answers that the work folder has are not asked for again."""
    asker = Asker(
        Answerer(loaded.model, loaded.tokenizer, task, precision=config.precision),
        method,
        prompt,
        shots=config.shots,
        thought_tokens=config.thought_tokens,
        part_tokens=config.part_tokens,
        parts=config.parts,
        seed=config.seed,
    )
    given: list[Given] = []
    seconds = 0.0
    with progress(len(rows), f"{loaded.name}: {method}") as bar:
        for chunk, few in _chunks(rows, config.rows_at_once):
            kept = work.done((number, chunk))
            if kept is None:
                began = time.monotonic()
                work.keep((number, chunk), asker.ask(few), round(time.monotonic() - began, 3))
                kept = work.done((number, chunk))
            answers, took = kept if kept is not None else ([], 0.0)
            given, seconds = [*given, *answers], seconds + took
            bar.update(len(given))
    scores = [scored(task, one.text, row.answer) for one, row in zip(given, rows, strict=True)]
    return BaselineRow(
        model=loaded.name,
        kind=loaded.kind,
        digest=loaded.digest,
        method=method,
        prompt=prompt + 1,
        num_short=sum(one.short for one in given),
        num_too_long=sum(one.too_long for one in given),
        figures={
            measure: figure_of([score[measure] for score in scores], measure, seed=config.seed) for measure in scores[0]
        },
        seconds=round(seconds, 1),
    )


def _chunks(rows: Sequence[TaskRow], size: int) -> Iterator[tuple[int, Sequence[TaskRow]]]:
    for number, start in enumerate(range(0, len(rows), size)):
        yield number, rows[start : start + size]
