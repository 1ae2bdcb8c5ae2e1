"""The figures an owner chooses by, each defined here and nowhere else. Pure arithmetic on measured numbers.

A *figure* is linear perplexity (not its logarithm) or accuracy; the definitions are the same for both:

- ``recovery_vs_lora``, ``recovery_vs_ceiling``, ``recovery_vs_full``: how much of what a reference gains over the
  zero-shot model is gained by plugging in. The references are LoRA on the full model, the same adapter tuned on the
  true middle, and the fully tuned model. 1 is as good as the reference, 0 is no gain, below 0 is harm.
- ``recovery_nats_vs_lora`` and so on, of perplexities alone: the same share of their logarithms, which does not flatter
  where zero-shot is far off.
- ``offset_recovery_vs_lora`` and so on, where the row ``offset`` was measured: the same of that row.
- ``gap``: emulator-tuned over plugged in. Above 1 in perplexity, the client's own copy is worse than what the owner
  ends up with.
- ``withheld_after_tuning``: ln(emulator-tuned / full zero-shot), by the real client: what its own copy lacks of the
  full model as it was, in nats per token. 0 or less and nothing is withheld.
- ``withheld_zero_shot``: the same of the emulator as it was sent. No measure of what a client is left with: tuning
  heals some emulators and not others. ``capability`` is this figure under its first name, for those who read it there.

The formulas are those of `offsite.evaluation.figures`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from offsite.evaluation.figures import gap, recovery, recovery_nats, withheld
from offsite.evaluation.results import Summary

REFERENCES = {"recovery_vs_lora": "lora_full", "recovery_vs_ceiling": "ceiling", "recovery_vs_full": "full"}
"""Each recovery and the reference row it is measured against."""

IN_NATS = {f"recovery_nats_{name.removeprefix('recovery_')}": row for name, row in REFERENCES.items()}
"""The same of recoveries in nats."""


OFFSET = "offset_"
"""How the recoveries of the row ``offset`` begin, where it was measured; otherwise they are those of plugging in."""


def summarise(values: Mapping[str, float]) -> Summary:
    """Return mean and sample standard deviation (n - 1) of one figure over named seeds.

    Returns:
        The deviation is None for a single value.
    """
    numbers = list(values.values())
    mean = math.fsum(numbers) / len(numbers)
    deviation = None
    if len(numbers) > 1:
        deviation = math.sqrt(math.fsum((number - mean) ** 2 for number in numbers) / (len(numbers) - 1))
    return Summary(mean=mean, deviation=deviation, values=dict(values))


def compare(rows: Mapping[str, Summary]) -> dict[str, Summary | None]:
    """Return the recoveries and the gap of one figure, seed by seed, with mean and deviation.

    Args:
        rows: `zero_shot`, `emulator_tuned`, `plugged_in` and whichever of `offset`, `lora_full`, `ceiling`, `full` were
            run; seeds are matched by name, and a reference counts by its mean.

    Returns:
        None for a recovery whose reference was not run, and where a seed's figure is not defined.
    """
    plugged_in, tuned = rows["plugged_in"].values, rows["emulator_tuned"].values
    found = _recoveries(rows, REFERENCES, recovery)
    found["gap"] = _defined({seed: gap(tuned[seed], value) for seed, value in plugged_in.items()})
    return found


def compare_nats(rows: Mapping[str, Summary]) -> dict[str, Summary | None]:
    """Return what is said of perplexities alone: recoveries in nats, and what is withheld after tuning and before it.

    Args:
        rows: as of `compare`, perplexities, and `emulator_zero_shot`.

    Returns:
        None for a recovery whose reference was not run. ``capability`` is ``withheld_zero_shot``.
    """
    zero_shot = rows["zero_shot"].mean
    found = _recoveries(rows, IN_NATS, recovery_nats)
    found["withheld_after_tuning"] = summarise(_withheld(rows["emulator_tuned"], zero_shot))
    found["withheld_zero_shot"] = found["capability"] = summarise(_withheld(rows["emulator_zero_shot"], zero_shot))
    return found


def _recoveries(
    rows: Mapping[str, Summary],
    references: Mapping[str, str],
    function: Callable[[float, float, float | None], float | None],
) -> dict[str, Summary | None]:
    """Return what plugging in recovers of each reference's gain, and what the offset does where it was measured."""
    zero_shot = rows["zero_shot"].mean
    found: dict[str, Summary | None] = {}
    for prefix, measured in (("", "plugged_in"), (OFFSET, "offset")):
        for name, row in references.items() if measured in rows else ():
            reference = rows[row].mean if row in rows else None
            values = {seed: function(value, zero_shot, reference) for seed, value in rows[measured].values.items()}
            found[prefix + name] = _defined(values)
    return found


def _withheld(emulator: Summary, zero_shot: float) -> dict[str, float]:
    return {seed: withheld(value, zero_shot) for seed, value in emulator.values.items()}


def _defined(values: Mapping[str, float | None]) -> Summary | None:
    numbers = {seed: value for seed, value in values.items() if value is not None}
    return summarise(numbers) if len(numbers) == len(values) else None
