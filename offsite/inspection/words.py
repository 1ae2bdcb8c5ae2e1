"""How things are told: escaped, limited, dates as people read them, one fact a line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from offsite.artefacts.bundle import AdapterSpec
from offsite.audits.gates import Gate
from offsite.console import say, table, utc

LINE_LIMIT = 400
TEXT_LIMIT, TEXT_LINES = 6000, 80
_WITHOUT_RANK = ("blocks", "bitfit")
_UNITS = (("day", 86400), ("hour", 3600), ("minute", 60))


def shown(text: object, limit: int = LINE_LIMIT) -> str:
    r"""Return the text as one line that moves no cursor and turns no direction: what does not print is ``\u202e``."""
    whole = str(text)
    cut = whole[:limit]
    escaped = "".join(one if one.isprintable() else one.encode("unicode_escape", "replace").decode() for one in cut)
    return escaped if len(whole) <= limit else f"{escaped}... ({len(whole):,} characters)"


def fact(name: str, value: object) -> None:
    """One line is on stderr: what it is, and the value, escaped."""
    say(f"  {name:<12} {shown(value)}")


def facts(named: dict[str, object]) -> None:
    """One line for each value that there is."""
    for name, value in named.items():
        if value is not None:
            fact(name, value)


def quoted(name: str, text: str) -> None:
    """A text is on stderr, each line marked as the sender's own words; of what is over the limit the length is told."""
    cut = text[:TEXT_LIMIT].splitlines()
    for number, line in enumerate(cut[:TEXT_LINES]):
        say(f"  {name if number == 0 else '':<12} | {shown(line, TEXT_LIMIT)}")
    if len(text) > TEXT_LIMIT or len(cut) > TEXT_LINES:
        say(f"  {'':<12} ... of {len(text):,} characters in all")


def rows(title: str, columns: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    """A table is on stderr, every cell escaped."""
    table(title, columns, [[shown(cell, 160) for cell in line] for line in lines])


def when(seconds: int, now: int) -> str:
    """Return a date as people read it, and how far off it is: ``2026-12-30 06:24 UTC, in 29 days``."""
    apart = abs(seconds - now)
    unit, size = next((each for each in _UNITS if apart >= 2 * each[1]), ("minute", 60))
    number = apart // size
    if number == 0:
        return f"{utc(seconds)}, now"
    counted = f"{number:,} {unit}{'s' if number != 1 else ''}"
    return f"{utc(seconds)}, {f'in {counted}' if seconds > now else f'{counted} ago'}"


def ends(expires: int, now: int) -> str:
    """Return until when something counts, and whether it is over."""
    return f"{when(expires, now)}{': it is over' if now > expires else ''}"


def adapter_words(spec: AdapterSpec, *, has_rank: bool | None = None) -> str:
    """Return an adapter in a few words.

    Args:
        has_rank: whether its tensors are factors; None to tell by its kind.
    """
    ranked = spec.kind not in _WITHOUT_RANK if has_rank is None else has_rank
    rank = f", rank {spec.rank} on {spec.targets}" if ranked else ""
    return f"{spec.kind} on {spec.placement}{rank}, {spec.dtype}{head_words(spec)}"


def head_words(spec: AdapterSpec) -> str:
    """Return the head of an adapter in a few words, behind a comma; nothing where it has none."""
    if spec.head is None:
        return ""
    if not spec.head.labels:
        return f", a {'reward' if spec.task == 'reward' else 'regression'} head on {spec.head.hidden}"
    few = ", ".join(shown(label) for label in spec.head.labels[:5]) + (", ..." if spec.head.num_labels > 5 else "")
    what = "tags" if spec.task == "tag" else "labels"
    return f", a head for {spec.head.num_labels} {what} ({few}) on {spec.head.hidden}"


def gates(found: Sequence[Gate]) -> dict[str, str]:
    """One line for each gate is on stderr; return their verdicts by name."""
    if found:
        rows("gates", ["gate", "verdict"], [[gate.name, gate.verdict] for gate in found])
    for gate in found:
        if gate.verdict != "passed":
            say(f"  {gate.name}: {shown(gate.told)}")
    return {gate.name: gate.verdict for gate in found}
