"""The figures by which an exchange is judged, each defined here and nowhere else. Pure arithmetic on measured numbers.

A *figure* is linear perplexity or accuracy where nothing else is said. Two questions, each answered twice:

- *What does the owner get?* ``recovery`` is the share of what a reference gains over the zero-shot model that plugging
  in gains too: 1 is as good as the reference, 0 is no gain, below 0 is harm. ``recovery_nats`` is the same share of
  log perplexities. The linear one flatters where zero-shot is far off: from 124 to 20 is nearly all of the way to 14
  counted in perplexity (0.94), and 0.83 of it counted in nats.
- *What is the client left with?* ``withheld`` of a tuned emulator is how many nats per token it stays above the full
  model as it was: what the client's own copy lacks once tuning has healed what tuning heals. Of an emulator as it was
  sent it is an upper limit and no more: a middle rounded to 3 bits looked the worst of all untuned and was the best of
  all after 40 steps.
"""

from __future__ import annotations

import math


def recovery(plugged_in: float, zero_shot: float, reference: float | None) -> float | None:
    """Return (plugged in - zero-shot) / (reference - zero-shot), of perplexities or of accuracies.

    Returns:
        None when the reference was not run, or does not differ from zero-shot, so that there is nothing to recover.
    """
    if reference is None or reference == zero_shot:
        return None
    return (plugged_in - zero_shot) / (reference - zero_shot)


def recovery_nats(plugged_in: float, zero_shot: float, reference: float | None) -> float | None:
    """Return `recovery` of the natural logarithms of three perplexities.

    Returns:
        None as `recovery`.

    Raises:
        ValueError: when a perplexity is not above 0.
    """
    if reference is None or reference == zero_shot:
        return None
    return recovery(math.log(plugged_in), math.log(zero_shot), math.log(reference))


def gap(emulator_tuned: float, plugged_in: float) -> float | None:
    """Return emulator-tuned / plugged in; None when plugged in is 0, as an accuracy can be."""
    return emulator_tuned / plugged_in if plugged_in else None


def withheld(emulator: float, zero_shot: float) -> float:
    """Return ln(emulator / full zero-shot), both perplexities, in nats per token; below 0 where nothing is withheld.

    Args:
        emulator: of the package with a tuned adapter: *withheld after tuning*; of the package as it was sent:
            *withheld zero-shot*, which is no measure of what a client is left with.
    """
    return math.log(emulator / zero_shot)
