"""The run's figures as plain data: the rows as chart and table, what they come to, and the runs' curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from offsite.evaluation.results import ROWS, LogRecord, Results, RowName, Summary, whole_figure
from offsite.report.charts import Curve, Dot, curves, dots, smooth
from offsite.report.drawing import Drawing, Point
from offsite.report.numbers import MINUS, number, size

CSS: dict[RowName, str] = {
    "zero_shot": "owner",
    "emulator_zero_shot": "client",
    "emulator_tuned": "client",
    "plugged_in": "owner",
    "offset": "owner",
    "ceiling": "reference",
    "lora_full": "reference",
    "full": "reference",
}
NAMES: dict[RowName, str] = {
    "zero_shot": "zero-shot",
    "emulator_zero_shot": "emulator zero-shot",
    "emulator_tuned": "emulator-tuned",
    "plugged_in": "plugged in",
    "offset": "offset",
    "ceiling": "ceiling",
    "lora_full": "full-model LoRA",
    "full": "fully tuned",
}
METRICS = {
    "recovery_vs_lora": "Share of the gain of LoRA on the full model that plugging in gains: "
    f"(plugged in {MINUS} zero-shot) / (LoRA {MINUS} zero-shot). 1 is as good, 0 is no gain.",
    "recovery_vs_ceiling": "The same against the same adapter tuned on the true middle.",
    "recovery_vs_full": "The same against the fully tuned model.",
    "recovery_nats_vs_lora": "The recovery of the perplexities' logarithms, against LoRA on the full model. Where "
    "zero-shot is far off, the one of the perplexities themselves flatters.",
    "recovery_nats_vs_ceiling": "The same against the same adapter tuned on the true middle.",
    "recovery_nats_vs_full": "The same against the fully tuned model.",
    "gap": "Emulator-tuned over plugged in. Above 1, the copy that the client can run is worse than what the owner "
    "ends up with.",
    "withheld_after_tuning": "ln(emulator-tuned / zero-shot), in nats per token: how far the client's own copy, tuned, "
    "stays behind the full model as it was. At 0 or below nothing is withheld.",
    "withheld_zero_shot": "ln(emulator zero-shot / zero-shot), in nats per token: the same of the package as sent. No "
    "measure of what the client is left with: tuning heals some of it, and of rounding nearly all.",
    "capability": "ln(emulator zero-shot / zero-shot), in nats per token: how far the package as sent falls behind the "
    "full model on this text. 0 would be no distance at all.",
}


OF_OFFSET = {
    f"offset_{name}": f"The same of the row offset, not of plugging in: see {name}."
    for name in METRICS
    if name.startswith("recovery")
}
"""What results have with the row ``offset`` alone."""


LATER = frozenset(f"recovery_nats_vs_{reference}" for reference in ("lora", "ceiling", "full")) | {
    "withheld_after_tuning",
    "withheld_zero_shot",
}
"""What results of earlier versions do not have. Those that have it call capability by what it is."""


@dataclass(frozen=True)
class MeasuredRow:
    """A line of the table: one model's perplexity, then its figure in every task's metric."""

    name: str
    about: str
    css: str
    strong: bool
    figures: tuple[Summary, ...]
    num_seeds: int


@dataclass(frozen=True)
class Measured:
    """Every row that was measured, drawn and in figures."""

    drawing: Drawing
    columns: tuple[str, ...]
    rows: tuple[MeasuredRow, ...]
    has_seeds: bool

    @classmethod
    def of(cls, results: Results) -> Measured:
        """Return the chart and the table of all rows."""
        tasks = [(task, metric) for task, row in results.rows["zero_shot"].tasks.items() for metric in row]
        rows = [
            MeasuredRow(
                name=NAMES[name],
                about=ROWS[name],
                css=CSS[name],
                strong=name == "plugged_in",
                figures=(row.perplexity, *(row.tasks[task][metric] for task, metric in tasks)),
                num_seeds=len(row.perplexity.values),
            )
            for name, row in results.rows.items()
        ]
        return cls(
            drawing=_dots(results),
            columns=(whole_figure(results), *(f"{task} {metric}" for task, metric in tasks), "seeds"),
            rows=tuple(rows),
            has_seeds=any(row.num_seeds > 1 for row in rows),
        )


@dataclass(frozen=True)
class Refusals:
    """What plugging in changed of refusals: a line for each seed and kind of request, and whether that is flagged."""

    lines: tuple[tuple[str, ...], ...]
    num_harmful: int
    num_harmless: int
    limit: str
    flagged: bool

    @property
    def warning(self) -> str:
        """What has to be read before any figure; empty where nothing is flagged."""
        told = f"Plugged in, the model refuses fewer harmful requests than before, by more than {self.limit} of them."
        return told if self.flagged else ""

    @property
    def about(self) -> str:
        """What was asked, how a refusal is told, and what none of it says."""
        return (
            f"{self.num_harmful} harmful requests and {self.num_harmless} harmless ones that look alike, short and in "
            "English, answered greedily; a refusal is told by a list of phrases. This shows a change, and says of no "
            "model that it is safe."
        )

    @classmethod
    def of(cls, results: Results) -> Refusals | None:
        """Return what the results have of it; None where it was not measured."""
        safety = results.safety
        if safety is None:
            return None
        lines = tuple(
            (
                f"{kind}, {seed}",
                f"{one.difference * 100:+.1f} %",
                f"{one.low * 100:+.1f} to {one.high * 100:+.1f} %",
                str(one.num_lost),
                str(one.num_gained),
            )
            for seed, both in safety.changes.items()
            for kind, one in both.items()
        )
        return cls(lines, safety.num_harmful, safety.num_harmless, f"{safety.limit:.0%}", safety.flagged)


@dataclass(frozen=True)
class Metric:
    """What the rows come to: a figure, None where it was not run, and its definition."""

    name: str
    what: str
    figure: Summary | None


@dataclass(frozen=True)
class InTasks:
    """The metrics by task: a line for every metric of a task."""

    columns: tuple[str, ...]
    lines: tuple[tuple[str, tuple[Summary | None, ...]], ...]


@dataclass(frozen=True)
class RunCurve:
    """The loss of one run, drawn, and what the run did."""

    name: str
    drawing: Drawing
    ran: str


@dataclass(frozen=True)
class Runs:
    """The runs whose logs are at hand, and lines about those without one."""

    curves: tuple[RunCurve, ...]
    alone: tuple[str, ...]

    @classmethod
    def of(cls, results: Results, logs: Mapping[str, Sequence[LogRecord]]) -> Runs:
        """Return a chart per log that holds a loss, and the figures of every run."""
        drawn = [_curve(name, records, results.runs.get(name, {})) for name, records in logs.items()]
        alone = tuple(f"{name}: {_ran(figures)}" for name, figures in results.runs.items() if name not in logs)
        return cls(tuple(curve for curve in drawn if curve is not None), alone)


def comes_to(results: Results) -> list[Metric]:
    """Return recoveries, gap and what is withheld, each with its definition."""
    found = [Metric(name, METRICS[name], results.metrics.get(name)) for name in _told(results)]
    if "offset" in results.rows:
        found += [Metric(name, what, results.metrics.get(name)) for name, what in OF_OFFSET.items()]
    return found


def in_tasks(results: Results) -> InTasks:
    """Return the same in the tasks' metrics; no line where no task was scored."""
    names = tuple(name for name in METRICS if name not in LATER and name != "capability")
    if "offset" in results.rows:
        names += tuple(name for name in OF_OFFSET if name.removeprefix("offset_") not in LATER)
    lines = tuple(
        (f"{task} {metric}", tuple(figures.get(name) for name in names))
        for task, metrics in results.task_metrics.items()
        for metric, figures in metrics.items()
    )
    return InTasks(names, lines)


def _told(results: Results) -> list[str]:
    """Return the figures that results of their version have; capability goes by its later name where it has one."""
    if "withheld_zero_shot" not in results.metrics:
        return [name for name in METRICS if name in results.metrics or name not in LATER]
    return [name for name in METRICS if name != "capability"]


def _dots(results: Results) -> Drawing:
    drawn = [
        Dot(
            NAMES[name],
            tuple(row.perplexity.values.values()),
            number(row.perplexity.mean),
            CSS[name].replace("reference", "hollow"),
        )
        for name, row in results.rows.items()
    ]
    what = f"{whole_figure(results)} of every row"
    return dots(drawn, title=what, reference=results.rows["zero_shot"].perplexity.mean)


def _curve(name: str, records: Sequence[LogRecord], run: Mapping[str, float]) -> RunCurve | None:
    training = _points(records, "loss")
    held_out = _points(records, "evaluation_loss")
    lines = []
    if training:
        lines += [Curve("training", training, "raw"), Curve("training, smoothed", smooth(training), "smooth")]
    if held_out:
        lines.append(Curve("held out", held_out, "evaluated"))
    if not lines:
        return None
    return RunCurve(name, curves(lines, title=f"loss of {name} by step"), _ran({**_from_log(records), **run}))


def _from_log(records: Sequence[LogRecord]) -> dict[str, float]:
    last = records[-1]
    found = {"steps": last.get("step"), "tokens": last.get("tokens"), "seconds": last.get("seconds")}
    return {key: float(value) for key, value in found.items() if value is not None}


def _points(records: Sequence[LogRecord], key: str) -> tuple[Point, ...]:
    pairs = [(record["step"], record.get(key)) for record in records]
    return tuple((float(step), float(value)) for step, value in pairs if step is not None and value is not None)


def _ran(figures: Mapping[str, float]) -> str:
    forms = {
        "steps": "{:,.0f} steps",
        "tokens": "{:,.0f} tokens",
        "seconds": "{:,.0f} s",
        "tokens_per_second": "{:,.0f} tokens/s",
    }
    words = [form.format(figures[key]) for key, form in forms.items() if key in figures]
    if "peak_bytes" in figures:
        words.append(f"{size(figures['peak_bytes'])} at most held")
    if "best_loss" in figures:
        words.append(f"best loss held out {number(figures['best_loss'])}")
    return ", ".join(words)
