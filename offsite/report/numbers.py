"""Numbers as people read them, in the report."""

from __future__ import annotations

from offsite.evaluation.results import Summary
from offsite.report.markup import Markup, el, join

MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
NONE = Markup("\N{EN DASH}")


def spread(figure: Summary | None) -> Markup:
    """Return mean and, where there are several seeds, deviation."""
    if figure is None:
        return NONE
    mean = number(figure.mean)
    if figure.deviation is None:
        return join(mean)
    return join(mean, el("span", f" ± {figure.deviation:.2g}", class_="deviation"))


def number(value: float) -> str:
    """Return the number with about three digits that tell."""
    if value and abs(value) < 1e-3:
        return f"{value:.2g}".replace("-", MINUS)
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}".replace("-", MINUS)


def count(number: float) -> str:
    """Return a count of parameters, as 134 M."""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}\N{NO-BREAK SPACE}{name}"
    return f"{number:,.0f}"


def size(number: float) -> str:
    """Return an amount of bytes, as 45.7 MB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= unit:
            return f"{number / unit:.3g}\N{NO-BREAK SPACE}{name}"
    return f"{number:,.0f}\N{NO-BREAK SPACE}bytes"
