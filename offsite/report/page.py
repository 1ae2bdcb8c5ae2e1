"""``offsite report run``: one page from the folder that ``evaluate`` wrote. It loads nothing and runs nothing.

The page says what was measured and what the files hold, and no more: neither that something is safe nor that it
could not be found out. ``templates/run/page.html.jinja`` lays it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from offsite import __version__
from offsite.console import say
from offsite.evaluation.results import LogRecord, Results, RowName, Summary, first_metric, read_logs, read_results
from offsite.report.config import ReportConfig
from offsite.report.engine import render
from offsite.report.facts import Crossed, facts, limits, one_flag_a_line
from offsite.report.figures import Measured, Refusals, Runs, comes_to, in_tasks
from offsite.report.numbers import NONE, TIMES, number, size
from offsite.staging import refuse_existing, staged_file


def run(config: ReportConfig) -> dict[str, object]:
    """Run the verb: read the folder, write the page.

    Raises:
        ConfigError: when the output exists.
        ArtefactError, DataError: when the folder does not hold results and logs as ``evaluate`` writes them.
    """
    refuse_existing(config.output)
    results = read_results(config.folder)
    text = page(results, read_logs(config.folder))
    with staged_file(config.output) as stage:
        stage.write_text(text, encoding="utf-8")
    say(f"{config.output.name}: open it in a browser")
    return {"report": config.output.name, "num_bytes": len(text.encode())}


def page(results: Results, logs: Mapping[str, Sequence[LogRecord]]) -> str:
    """Return the whole page as one HTML document that refers to nothing outside itself."""
    values = {
        "adapter": _kind(results),
        "comes_to": comes_to(results),
        "command": one_flag_a_line(results.command),
        "crossed": Crossed.of(results),
        "facts": facts(results),
        "head": _head(results),
        "in_tasks": in_tasks(results),
        "judged": _judged(results),
        "limits": limits(results),
        "measured": Measured.of(results),
        "num_seeds": len(results.bundles),
        "refusals": Refusals.of(results),
        "results": results,
        "runs": Runs.of(results, logs),
        "version": __version__,
    }
    return render("run/page.html.jinja", values)


@dataclass(frozen=True)
class Judged:
    """What the page leads with, of every row: perplexity, or what a head was tuned for: its accuracy, F1 or error."""

    name: str
    better: str
    rows: Mapping[RowName, Summary]
    metric: str = ""


def _judged(results: Results) -> Judged:
    head = results.adapter.head
    if head is None:
        return Judged("perplexity", "lower", {name: row.perplexity for name, row in results.rows.items()})
    metric = first_metric(results.task_metrics[head.task]) or "accuracy"
    found = {name: row.tasks[head.task][metric] for name, row in results.rows.items()}
    return Judged(_NAMED.get(metric, metric), "lower" if metric == "rmse" else "higher", found, metric)


_NAMED = {"rmse": "root mean squared error", "f1": "entity F1"}


def _head(results: Results) -> list[tuple[str, str]]:
    """The figures of the tiles, and what each is."""
    judged, head = _judged(results), results.adapter.head
    before, after = (judged.rows[name].mean for name in ("zero_shot", "plugged_in"))
    returned = sum(bundle.num_bytes for bundle in results.bundles.values()) / len(results.bundles)
    shown = f"{number(before)} \N{RIGHTWARDS ARROW} {number(after)}"
    found = [(shown, f"{judged.name} of the full model, before and after")]
    if head is None:
        found += _worth(results.metrics) or [_given_away(results)]
        found += [(_times(results.metrics.get("gap")), "the client's copy over the owner's model, in perplexity")]
        found += _withheld(results)
    else:
        found += _worth(results.task_metrics[head.task][judged.metric])
        found += [(number(judged.rows["emulator_tuned"].mean), f"{judged.name} of the client's copy, tuned")]
    return [*found, (size(returned), f"came back, for {size(results.package.num_bytes)} that went out")]


def _given_away(results: Results) -> tuple[str, str]:
    figure = results.metrics.get("capability")
    return (number(figure.mean) if figure else NONE), "nats per token from the full model to the emulator as sent"


def _worth(metrics: Mapping[str, Summary | None]) -> list[tuple[str, str]]:
    """The recovery against the first reference that was run, if one was."""
    against = {
        "lora": "LoRA on the full model",
        "ceiling": "the same adapter on the true middle",
        "full": "full tuning",
    }
    for name, reference in against.items():
        figure = metrics.get(f"recovery_vs_{name}")
        if figure is not None:
            return [(number(figure.mean), f"of the gain of {reference}")]
    return []


def _withheld(results: Results) -> list[tuple[str, str]]:
    """What is withheld after tuning, where the results have it: those of earlier versions do not."""
    figure = results.metrics.get("withheld_after_tuning")
    return [(number(figure.mean), "nats per token withheld from the client's copy, tuned")] if figure else []


def _times(figure: Summary | None) -> str:
    return f"{number(figure.mean)}{TIMES}" if figure else NONE


def _kind(results: Results) -> str:
    adapter = results.adapter
    where = "every block" if adapter.placement == "all" else f"the ends' {adapter.placement} blocks"
    if adapter.last is not None:
        where = f"the last {adapter.last} blocks"
    if adapter.kind in ("lora", "rslora", "dora"):
        return f"{adapter.kind} of rank {adapter.rank} on {where}, {adapter.targets}"
    return f"{'whole' if adapter.kind == 'blocks' else adapter.kind}: {where}"
