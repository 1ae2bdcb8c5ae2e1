"""``offsite report run``: one page from the folder that ``evaluate`` wrote. It loads nothing and runs nothing.

The page says what was measured and what the files hold, and no more: neither that something is safe nor that it
could not be found out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files

from offsite import __version__
from offsite.console import say
from offsite.evaluation.results import LogRecord, Results, Summary, read_logs, read_results
from offsite.report.config import ReportConfig
from offsite.report.facts import crossed, limits, reproduce
from offsite.report.figures import answers, curves_of, figures, table
from offsite.report.markup import Markup, el, join
from offsite.report.numbers import NONE, TIMES, count, number, size
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
    style = (files("offsite") / "report.css").read_text(encoding="utf-8")
    title = f"{results.model}, plugged in: perplexity {number(results.rows['plugged_in'].perplexity.mean)}"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        el("meta", name="generator", content=f"offsite {__version__}"),
        el("title", title),
        el("style", Markup(style)),
    )
    body = el(
        "main",
        _header(results),
        table(results),
        figures(results),
        answers(results),
        curves_of(results, logs),
        crossed(results),
        limits(results),
        reproduce(results),
        el("footer", f"Made by offsite {__version__} from results.json. This page loads nothing and runs no script."),
    )
    return f"<!doctype html>\n{el('html', head, el('body', body), lang='en')}\n"


def _header(results: Results) -> Markup:
    rows, counts = results.rows, results.parameters
    before, after = rows["zero_shot"].perplexity.mean, rows["plugged_in"].perplexity.mean
    seeds = len(results.bundles)
    part = "it " if results.scale == 1 else f"{results.scale:g} of its update "
    lead = (
        f"The owner of {results.model} ({count(counts.full)} parameters) sent a client a package: the model's two "
        f"ends, and an emulator of {count(counts.emulator)} parameters in place of its middle of "
        f"{count(counts.middle)}. "
        f"The client tuned an adapter on text of its own beside that emulator and returned the adapter alone "
        f"({_kind(results)}, {count(counts.adapter)} parameters{f', {seeds} seeds' if seeds > 1 else ''}). "
        f"The owner put {part}into the full model. Every row below was measured on {results.data.name}, "
        f"{results.data.num_tokens:,} tokens; in perplexity, lower is better."
    )
    tiles = [
        (f"{number(before)} \N{RIGHTWARDS ARROW} {number(after)}", "perplexity of the full model, before and after"),
        _worth(results),
        (_times(results.metrics.get("gap")), "the client's copy over the owner's model, in perplexity"),
        (size(_returned(results)), f"came back, for {size(results.package.num_bytes)} that went out"),
    ]
    return join(
        el("div", "offsite · evaluation", class_="kicker"),
        el("h1", f"What plugging in was worth to {results.model}"),
        el("p", lead, class_="lead"),
        el("dl", *(el("div", el("dt", what), el("dd", shown), class_="tile") for shown, what in tiles), class_="tiles"),
    )


def _worth(results: Results) -> tuple[str, str]:
    """The recovery against the first reference that was run, or the capability given away, which always is."""
    against = {
        "lora": "LoRA on the full model",
        "ceiling": "the same adapter on the true middle",
        "full": "full tuning",
    }
    for name, reference in against.items():
        figure = results.metrics.get(f"recovery_vs_{name}")
        if figure is not None:
            return number(figure.mean), f"of the gain of {reference}"
    figure = results.metrics.get("capability")
    return (number(figure.mean) if figure else NONE), "nats per token from the full model to the emulator as sent"


def _times(figure: Summary | None) -> str:
    return f"{number(figure.mean)}{TIMES}" if figure else NONE


def _kind(results: Results) -> str:
    adapter = results.adapter
    where = "every block" if adapter.placement == "all" else f"the ends' {adapter.placement} blocks"
    if adapter.kind in ("lora", "rslora", "dora"):
        return f"{adapter.kind} of rank {adapter.rank} on {where}, {adapter.targets}"
    return f"{'whole' if adapter.kind == 'blocks' else adapter.kind}: {where}"


def _returned(results: Results) -> float:
    return sum(bundle.num_bytes for bundle in results.bundles.values()) / len(results.bundles)
