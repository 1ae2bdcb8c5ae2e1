"""The page of an exploration, ``OUTPUT.explore.html``, made of its file alone. It loads nothing and runs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from emulator.dial.exploration import Exploration, Tried
from emulator.dial.targets import Target
from offsite import __version__
from offsite.artefacts.owner import DialFigures
from offsite.report.charts import Mark, plane
from offsite.report.drawing import Drawing, Point
from offsite.report.engine import render
from offsite.report.numbers import MINUS, NONE, number, size
from offsite.staging import staged_file


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    cells: tuple[str, ...]
    css: str = ""


def write_page(path: Path, found: Exploration, *, file: str) -> None:
    """The page stands, in place of an earlier one.

    Args:
        file: name of the exploration's file.
    """
    text = page(found, file=file)
    with staged_file(path, replace=True) as stage:
        stage.write_text(text, encoding="utf-8")


def page(found: Exploration, *, file: str) -> str:
    """Return the whole page as one HTML document that refers to nothing outside itself."""
    values = {
        "calibrated_rows": found.calibration.num_rows,
        "client": _client(found),
        "command": found.command,
        "drawing": _drawing(found),
        "file": file,
        "has_made": found.made is not None,
        "has_wanted": found.wanted is not None,
        "head": _head(found),
        "lines": "; ".join(_line(one.method, one.a, one.b, one.residual) for one in found.lines),
        "lora_full": found.lora_full,
        "measured_rows": found.measured_on.num_rows,
        "model": found.model,
        "next_command": "" if found.wanted else found.command.replace(" --explore", " --target recovery=0.8"),
        "num_tried": len(found.tried),
        "rows": _rows(found),
        "tuned_rows": found.tuned_on.num_rows,
        "verdict": verdict(found),
        "version": __version__,
        "zero_shot": found.zero_shot,
    }
    return render("dial/page.html.jinja", values)


def verdict(found: Exploration) -> str:
    """Return a sentence about what was asked for; nothing where nothing was."""
    wanted = found.wanted
    if wanted is None:
        return ""
    target = Target(wanted.target, wanted.value)
    name, read = f"{wanted.method} {wanted.size:.3g}", target.kind.read
    if not wanted.is_met:
        return (
            f"Asked for: {target.shown()}. No size between those that were tried is predicted to give it; the nearest "
            f"is {name} with {target.shown(read(wanted.predicted))}."
        )
    text = f"Asked for: {target.shown()}. {name} is predicted to give {target.shown(read(wanted.predicted))}"
    if found.made is None:
        return f"{text}."
    return f"{text}, and gave {target.shown(read(found.made.measured))} when a client was played on it."


def _client(found: Exploration) -> str:
    client = found.client
    shape = f"{client['adapter']} of rank {client['rank']}" if "lora" in str(client["adapter"]) else client["adapter"]
    return f"{shape}, {client['steps']} steps at a rate of {client['learning_rate']:g}"


def _line(method: str, a: float, b: float, residual: float) -> str:
    sign = MINUS if b >= 0 else "+"
    return (
        f"{method}: recovery = {a:.2f} {sign} {abs(b):.2f} withheld, which the sizes that were tried lie within "
        f"{residual:.2f} of"
    )


def _head(found: Exploration) -> list[tuple[str, str]]:
    recoveries = [one.figures.recovery for one in found.tried]
    held = [one.figures.withheld for one in found.tried]
    sizes = [one.figures.num_bytes for one in found.tried]
    return [
        (f"{number(min(recoveries))} to {number(max(recoveries))}", "of the gain of LoRA on the full model recovered"),
        (f"{number(min(held))} to {number(max(held))}", "nats per token withheld after tuning"),
        (f"{size(min(sizes))} to {size(max(sizes))}", "is sent"),
    ]


def _rows(found: Exploration) -> list[Row]:
    rows = [(one.method, one.size, Row(f"{one.method} {one.size:.3g}", _cells(one))) for one in found.tried]
    for rung in found.ladder:
        cells = (*([NONE] * 4), size(rung.num_bytes), *([NONE] * 4), number(rung.field_kl))
        rows.append((rung.method, rung.size, Row(f"{rung.method} {rung.size:.3g}", cells, "about")))
    order = [line.method for line in found.lines]
    rows.sort(key=lambda row: (order.index(row[0]), row[1]))
    last = []
    if found.wanted is not None:
        name = f"{found.wanted.method} {found.wanted.size:.3g}"
        last.append(Row(f"{name}, predicted", _predicted(found.wanted.predicted)))
        if found.made is not None:
            last.append(Row(f"{name}, made", _predicted(found.made.measured), "strong"))
    return [*(row for _, _, row in rows), *last]


def _cells(one: Tried) -> tuple[str, ...]:
    perplexities = (
        number(one.emulator_tuned),
        number(one.plugged_in),
        f"{one.scale:g}",
        number(one.emulator_zero_shot),
    )
    return (*_first(one.figures), *perplexities, number(one.field_kl))


def _predicted(figures: DialFigures) -> tuple[str, ...]:
    return (*_first(figures), *([NONE] * 5))


def _first(figures: DialFigures) -> tuple[str, ...]:
    shares = (number(figures.withheld), number(figures.recovery), number(figures.recovery_nats), number(figures.gap))
    return (*shares, size(figures.num_bytes))


def _drawing(found: Exploration) -> Drawing:
    marks = [Mark(_at(one.figures), f"{one.method} {one.size:.2g}", "dot owner") for one in found.tried]
    lines: list[tuple[Point, Point, str]] = []
    for line in found.lines:
        ends = sorted(one.figures.withheld for one in found.of(line.method))
        lines.append(((ends[0], line.a - line.b * ends[0]), (ends[-1], line.a - line.b * ends[-1]), "reference"))
    if found.wanted is not None:
        marks.append(Mark(_at(found.wanted.predicted), "", "dot hollow", 7))
        if found.made is not None:
            marks.append(Mark(_at(found.made.measured), "", "dot client", 7))
    axes = ("withheld after tuning, nats per token", "recovery")
    return plane(marks, lines, title="recovery against what is withheld after tuning", axes=axes)


def _at(figures: DialFigures) -> Point:
    return figures.withheld, figures.recovery
