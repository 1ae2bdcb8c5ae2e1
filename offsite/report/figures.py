"""The report's figures: the rows as chart and table, what they come to, answers, and the runs' curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from offsite.evaluation.results import ROWS, LogRecord, Results, RowName
from offsite.report.charts import Curve, Dot, curves, dots, smooth
from offsite.report.markup import Markup, el, join
from offsite.report.numbers import MINUS, NONE, number, size, spread

CSS: dict[RowName, str] = {
    "zero_shot": "owner",
    "emulator_zero_shot": "client",
    "emulator_tuned": "client",
    "plugged_in": "owner",
    "ceiling": "reference",
    "lora_full": "reference",
    "full": "reference",
}
NAMES: dict[RowName, str] = {
    "zero_shot": "zero-shot",
    "emulator_zero_shot": "emulator zero-shot",
    "emulator_tuned": "emulator-tuned",
    "plugged_in": "plugged in",
    "ceiling": "ceiling",
    "lora_full": "full-model LoRA",
    "full": "fully tuned",
}
METRICS = {
    "recovery_vs_lora": "Share of the gain of LoRA on the full model that plugging in gains: "
    f"(plugged in {MINUS} zero-shot) / (LoRA {MINUS} zero-shot). 1 is as good, 0 is no gain.",
    "recovery_vs_ceiling": "The same against the same adapter tuned on the true middle.",
    "recovery_vs_full": "The same against the fully tuned model.",
    "gap": "Emulator-tuned over plugged in. Above 1, the copy that the client can run is worse than what the owner "
    "ends up with.",
    "capability": "ln(emulator zero-shot / zero-shot), in nats per token: how far the package as sent falls behind the "
    "full model on this text. 0 would be no distance at all.",
}


def table(results: Results) -> Markup:
    """Return the chart and the table of all rows."""
    tasks = [(task, metric) for task, row in results.rows["zero_shot"].tasks.items() for metric in row]
    zero_shot = results.rows["zero_shot"].perplexity.mean
    drawn = [
        Dot(
            NAMES[name],
            tuple(row.perplexity.values.values()),
            number(row.perplexity.mean),
            CSS[name].replace("reference", "hollow"),
        )
        for name, row in results.rows.items()
    ]
    columns = ["perplexity", *(f"{task} {metric}" for task, metric in tasks), "seeds"]
    titles = (el("th", column, class_="number") for column in columns)
    head = el("tr", el("th", ""), el("th", "", class_="about"), *titles)
    lines = []
    for name, row in results.rows.items():
        cells = [spread(row.perplexity), *(spread(row.tasks[task][metric]) for task, metric in tasks)]
        lines.append(
            el(
                "tr",
                el("th", NAMES[name], el("small", ROWS[name], class_="narrow"), class_=f"key {CSS[name]}", scope="row"),
                el("td", ROWS[name], class_="about"),
                *(el("td", cell, class_="number") for cell in cells),
                el("td", len(row.perplexity.values), class_="number"),
                class_="strong" if name == "plugged_in" else None,
            )
        )
    caption = (
        "Perplexity, on a logarithmic axis; the dashed line is zero-shot, small dots are seeds. Green is what the "
        "owner runs, orange what the client can run, hollow are references that the owner tuned for comparison."
    )
    note = "± is the sample standard deviation over seeds; nothing else that could vary was varied."
    several = any(len(row.perplexity.values) > 1 for row in results.rows.values())
    return join(
        el("h2", "What was measured"),
        el(
            "figure",
            dots(drawn, title="perplexity of every row", reference=zero_shot),
            el("figcaption", caption),
        ),
        el("div", el("table", el("thead", head), el("tbody", *lines)), class_="scroll"),
        el("p", note, class_="note") if several else None,
    )


def figures(results: Results) -> Markup:
    """Return recoveries, gap and capability, each with its definition."""
    found = []
    for name, what in METRICS.items():
        figure = results.metrics.get(name)
        shown = spread(figure) if figure else el("span", "not run", class_="deviation")
        found += [el("dt", shown, el("span", name, class_="name")), el("dd", what)]
    parts = [el("h2", "What it comes to"), el("dl", *found, class_="figures")]
    if results.task_metrics:
        parts.append(_task_figures(results))
    return join(*parts)


def _task_figures(results: Results) -> Markup:
    names = [name for name in METRICS if name != "capability"]
    lines = [
        el(
            "tr",
            el("th", f"{task} {metric}", scope="row"),
            *(el("td", spread(figures[name]) if figures.get(name) else NONE, class_="number") for name in names),
        )
        for task, metrics in results.task_metrics.items()
        for metric, figures in metrics.items()
    ]
    head = el("tr", el("th", ""), *(el("th", name, class_="number") for name in names))
    return join(
        el("h3", "The same in accuracy, where higher is better"),
        el("div", el("table", el("thead", head), el("tbody", *lines)), class_="scroll"),
    )


def answers(results: Results) -> Markup | None:
    """Return the prompts and how the model went on before and after; nothing when there were none."""
    if not results.answers:
        return None
    parts = [
        el("h2", "Before and after"),
        el("p", "How the full model goes on from a prompt, greedily, without and with the adapter.", class_="note"),
    ]
    for answer in results.answers:
        before = el("div", el("b", "zero-shot"), answer.before.strip() or "(nothing)")
        after = el("div", el("b", "plugged in"), answer.after.strip() or "(nothing)", class_="after")
        parts += [el("blockquote", answer.prompt), el("div", before, after, class_="answers")]
    return join(*parts)


def curves_of(results: Results, logs: Mapping[str, Sequence[LogRecord]]) -> Markup | None:
    """Return a chart per log and the figures of every run; nothing when there were none."""
    drawn = [_curve(name, records, results.runs.get(name, {})) for name, records in logs.items()]
    shown = [figure for figure in drawn if figure is not None]
    alone = [name for name in results.runs if name not in logs]
    if not shown and not alone:
        return None
    legend = el("p", el("span", "training loss"), el("span", "loss held out", class_="evaluated"), class_="note legend")
    listed = el("ul", *(el("li", f"{name}: {_ran(results.runs[name])}") for name in alone)) if alone else None
    intro = "Every run in the unit of its own objective. A client's log is here only if it was handed over."
    return join(el("h2", "The runs"), el("p", intro, class_="note"), legend if shown else None, *shown, listed)


def _curve(name: str, records: Sequence[LogRecord], run: Mapping[str, float]) -> Markup | None:
    training = _points(records, "loss")
    held_out = _points(records, "evaluation_loss")
    lines = []
    if training:
        lines += [Curve("training", training, "raw"), Curve("training, smoothed", smooth(training), "smooth")]
    if held_out:
        lines.append(Curve("held out", held_out, "evaluated"))
    if not lines:
        return None
    figures = {**_from_log(records), **run}
    caption = join(el("b", name), ": ", _ran(figures))
    return el("figure", curves(lines, title=f"loss of {name} by step"), el("figcaption", caption))


def _from_log(records: Sequence[LogRecord]) -> dict[str, float]:
    last = records[-1]
    found = {"steps": last.get("step"), "tokens": last.get("tokens"), "seconds": last.get("seconds")}
    return {key: float(value) for key, value in found.items() if value is not None}


def _points(records: Sequence[LogRecord], key: str) -> tuple[tuple[float, float], ...]:
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
