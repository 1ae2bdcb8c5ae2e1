"""A task's own measure of every row of an evaluation, and the baselines of the same task and data beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offsite.artefacts.job import task_at
from offsite.baselines.answering import Answerer
from offsite.baselines.asking import Asker
from offsite.baselines.table import Baselines, Figure, figure_of, read_baselines, spelled
from offsite.console import progress, say, table
from offsite.digests import sha256_files
from offsite.errors import ConfigError, WrongBinding
from offsite.evaluation.results import PREFERENCES, SAFETY, Results
from offsite.tasks.rows import TaskRow, read_task_rows, records_of, without
from offsite.tasks.scores import SHARES, scored
from offsite.tasks.task import MEASURES, Task
from offsite.text.records import Record
from server.evaluation.config import EvaluateConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ByTask:
    """A task, the rows that it is measured on, and the baselines that are shown beside, if any are."""

    task: Task
    rows: Sequence[TaskRow] = field(repr=False)
    limit: int = 0
    baselines: Baselines | None = None

    @property
    def records(self) -> list[Record]:
        """The rows as prompts and answers, whose perplexity is measured."""
        return records_of(self.rows, self.task)

    def score(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, label: str, *, batch_size: int, bf16: bool
    ) -> dict[str, float]:
        """Return the model's measures, asked without samples as it was tuned, under ``TASK/MEASURE``."""
        precision = "bf16" if bf16 else "fp32"
        asker = Asker(Answerer(model, tokenizer, self.task, batch_size, precision), "zero-shot")  # type: ignore[arg-type]
        rows, found = self.rows[: self.limit or None], []
        with progress(len(rows), f"{label}: {self.task.name}") as bar:
            for start in range(0, len(rows), batch_size):
                few = rows[start : start + batch_size]
                given = asker.ask(few)
                found += [scored(self.task, one.text, row.answer) for one, row in zip(given, few, strict=True)]
                bar.update(len(found))
        means = {measure: math.fsum(one[measure] for one in found) / len(found) for measure in found[0]}
        return {f"{self.task.name}/{name}": value for name, value in ({"num_rows": float(len(rows))} | means).items()}

    def show(self, results: Results) -> None:
        """The measure of every row is on stderr, with the baselines beside it."""
        if self.baselines is None:
            return
        measures = MEASURES[self.task.answer.type]
        lines = [
            [row.replace("_", " "), "as tuned", *(self._spelled(results, row, measure) for measure in measures)]
            for row in results.rows
        ]
        lines += [
            [row.model, f"{row.method}, prompt {row.prompt}", *(spelled(row.figures[measure]) for measure in measures)]
            for row in self.baselines.rows
        ]
        table(f"task {self.task.name}, beside its baselines; 95 % intervals", ["", "asked", *measures], lines)

    def told(self, results: Results) -> dict[str, Any]:
        """Return what the verb says of it: every row's measures, shares with their intervals, and the baselines."""
        rows = {
            row: {measure: self._figure(results, row, measure) for measure in MEASURES[self.task.answer.type]}
            for row in results.rows
        }
        beside = [] if self.baselines is None else [row.model_dump(mode="json") for row in self.baselines.rows]
        return {"task": {"name": self.task.name, "digest": self.task.digest, "rows": rows, "baselines": beside}}

    def _figure(self, results: Results, row: str, measure: Any) -> dict[str, float]:
        mean = results.rows[row].tasks[self.task.name][measure].mean  # type: ignore[index]
        if measure not in SHARES:
            return {"value": mean}
        return _of_share(mean, results.tasks[self.task.name]).model_dump()

    def _spelled(self, results: Results, row: str, measure: Any) -> str:
        found = self._figure(results, row, measure)
        return spelled(Figure(**found)) if "low" in found else f"{found['value']:.3f}"


def by_task(config: EvaluateConfig) -> ByTask | None:
    """Return what an evaluation measures by a task; None where it names none.

    Raises:
        ConfigError, DataError, ArtefactError: when the task, its rows or the baselines are not as needed.
        WrongBinding: when the baselines are of another task or other data.
    """
    if config.task_file is None:
        return None
    task = task_at(config.task_file)
    if task.name in {PREFERENCES, SAFETY, *(path.stem for path in config.task)}:
        raise ConfigError(f"--task-file: something else is measured as {task.name!r}", hint="rename the task")
    rows = read_task_rows(config.data, task, fields=config.fields, document_field=config.document_field)
    kept = without(rows, (sample.vars for sample in task.samples))
    if len(kept) < len(rows):
        say(f"{len(rows) - len(kept)} rows are samples of task {task.name!r}: they are not measured on")
    if not kept:
        raise ConfigError(f"--data: every row is a sample of task {task.name!r}")
    baselines = None if config.baselines is None else read_baselines(config.baselines)
    if baselines is not None:
        _require_same(config.baselines, baselines, task, config, len(kept[: config.task_limit or None]))
    return ByTask(task, kept, config.task_limit, baselines)


def _require_same(path: Path | None, baselines: Baselines, task: Task, config: EvaluateConfig, num_rows: int) -> None:
    what = f"baselines {path.name!r}" if path is not None else "baselines"
    if baselines.task_digest != task.digest:
        raise WrongBinding(f"{what} are of task {baselines.task_digest[:19]}, the file holds {task.digest[:19]}")
    if baselines.data_sha256 != sha256_files(config.data) or baselines.num_rows != num_rows:
        raise WrongBinding(
            f"{what} were measured on other rows",
            hint="give task baseline and evaluate the same --data, and as many rows",
        )


def _of_share(mean: float, num: int) -> Figure:
    right = round(mean * num)
    return figure_of([1.0] * right + [0.0] * (num - right), "accuracy").model_copy(update={"value": mean})
