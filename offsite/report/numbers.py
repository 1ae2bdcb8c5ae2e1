"""Numbers as people read them, in the pages."""

from __future__ import annotations

MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
NONE = "\N{EN DASH}"


def number(value: float) -> str:
    """Return the number with about three digits that tell."""
    if value and abs(value) < 1e-3:
        return f"{value:.2g}".replace("-", MINUS)
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}".replace("-", MINUS)


def whole(value: float) -> str:
    """Return the number without decimals, as 40,800."""
    return f"{value:,.0f}"


def fixed(value: float, digits: int) -> str:
    """Return the number with that many decimals, as 0.850."""
    return f"{value:.{digits}f}"


def general(value: float) -> str:
    """Return the number as short as it is exact to six digits, as 0.5."""
    return f"{value:g}"


def rough(value: float) -> str:
    """Return the number with two digits that tell, as 0.12."""
    return f"{value:.2g}"


def percent(value: float, digits: int = 0) -> str:
    """Return a share with that many decimals, as 33%."""
    return f"{value:.{digits}%}"


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
