"""Which arithmetic a run computes in: as asked for, or under "auto" bfloat16 where the device is faster for it.

A processor's flags do not say that: with AVX-512 alone bfloat16 products have run at half the speed of float32, with
AMX at several times it. So one product is timed, once per process. Timings are noisy, and a run must not change its
arithmetic under way: verbs settle "auto" once (`settled`), and a run that is gone on with keeps what it began with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from torch.nn import functional

from offsite.console import say
from offsite.errors import ConfigError
from offsite.staging import staged_file
from offsite.training import checkpoints
from offsite.training.config import Precision
from offsite.training.processes import world

Settled = Literal["bf16", "fp32"]

CLEARLY = 1.3
"""How many times as fast as float32 bfloat16 has to be to be taken."""

PRECISION_NOTE = "precision"
"""Name of the file in which verbs that start others note it."""

_NUM_ROWS, _NUM_INPUTS, _NUM_OUTPUTS = 1024, 576, 1536
_MOST_ROUNDS, _FEWEST_ROUNDS, _ENOUGH_SECONDS = 7, 3, 0.2


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Return whether to compute in bfloat16: as asked, or under "auto" where the device is faster for it.

    Raises:
        ConfigError: when bf16 is asked of a GPU without it.
    """
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "bf16" and not able:
            raise ConfigError("this GPU has no bf16", hint="use precision fp32 or auto")
        return precision == "bf16" or (precision == "auto" and able)
    return precision == "bf16" or (precision == "auto" and _measured() >= CLEARLY)


def settled(
    precision: Precision,
    device: torch.device,
    *,
    works: Iterable[Path] = (),
    stated: str | None = None,
    note: Path | None = None,
) -> Settled:
    """Return the arithmetic of a run, the same in all of its processes, and say it where it was not asked for.

    Under "auto" it is that of the newest checkpoint in the first of the folders `works` that has one, or `stated`, or
    the one noted in `note`; else what is fast here, which is then noted.

    Args:
        works: folders of checkpoints, of a run that is gone on with.
        stated: by what else is left of it.
        note: file for verbs that start others and compare what they do; written where it is missing.

    Raises:
        ConfigError: when bf16 is asked of a GPU without it.
        RunFailed: when a checkpoint is damaged, or `note` cannot be written.
    """
    if precision != "auto":
        return "bf16" if uses_bf16(precision, device) else "fp32"
    processes = world()
    is_bf16, why = False, ""
    if processes.is_main:  # the others must not come to another answer
        earlier = _earlier(works, stated, note)
        if earlier is None:
            is_bf16 = uses_bf16("auto", device)
            ratio = 0.0 if device.type == "cuda" else _measured()
            why = f"one product ran {ratio:.1f} times as fast in bf16 as in fp32" if ratio else ""
        else:
            is_bf16, why = earlier == "bf16", "as before"
    found: Settled = "bf16" if processes.from_main(float(is_bf16)) else "fp32"
    if processes.is_main and why:
        say(f"arithmetic: {found}; {why} (--precision names another)")
    if processes.is_main and note is not None and not note.exists():
        note.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(note) as stage:
            stage.write_text(f"{found}\n", encoding="ascii")
    return found


def speedup(seconds: Callable[[bool], float]) -> float:
    """Return how many times as fast bfloat16 is as float32, the median of several turns; 0.0 without an instruction.

    Args:
        seconds: what one product takes, in bfloat16 or not.
    """
    if not _has_instruction():
        return 0.0
    for is_bf16 in (False, True):
        seconds(is_bf16)  # the first makes room, and chooses its kernel
    found: list[float] = []
    spent = 0.0
    while len(found) < _FEWEST_ROUNDS or (spent < _ENOUGH_SECONDS and len(found) < _MOST_ROUNDS):
        plain, short = seconds(False), seconds(True)
        found.append(plain / max(short, 1e-9))
        spent += plain + short
    return median(found)


@cache
def _measured() -> float:
    """Return `speedup` as this process saw it first."""
    return speedup(_seconds)


@torch.no_grad()
def _seconds(is_bf16: bool) -> float:
    """Return the processor's time, which other programs do not lengthen, of a frozen linear layer, casts included."""
    x_NI, weight_OI = torch.ones(_NUM_ROWS, _NUM_INPUTS), torch.ones(_NUM_OUTPUTS, _NUM_INPUTS)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16, cache_enabled=False):
        began = time.process_time()
        functional.linear(x_NI, weight_OI)
        return time.process_time() - began


def _has_instruction() -> bool:
    """Tell whether the processor says that it computes in bfloat16 itself."""
    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(bool(value) for name, value in found.items() if "bf16" in name)


def _earlier(works: Iterable[Path], stated: str | None, note: Path | None) -> str | None:
    """Return what a run that is gone on with computed in; None where nothing of it says so."""
    found = []
    for work in works:
        folder = checkpoints.newest_checkpoint(work)
        found.append(None if folder is None else checkpoints.read_state(folder).settings.get("precision"))
    found.append(stated)
    if note is not None and note.is_file():
        found.append(note.read_text(encoding="ascii", errors="replace").strip())
    return next((str(one) for one in found if one in ("bf16", "fp32")), None)
