"""From the sizes that were tried to any size between them, and from what is asked for to a size.

Three steps, each over what was measured and no further: KL(full || emulator) by size, over all sizes; the emulator's
perplexity after tuning by that KL, over the sizes with a client; and recovery by the line through them. KL is cheap and
tells sizes of one way of compressing apart; of different ways it says nothing, so each method has its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from emulator.dial.exploration import Rung, Tried, figures_of
from emulator.dial.line import Fit, Pair, fit, interpolate, monotone, turned
from emulator.dial.targets import Target
from offsite.artefacts.owner import DialFigures


@dataclass(frozen=True)
class Curve:
    """What any size of one method comes to, by what was measured of some.

    Attributes:
        kls: (size, KL) of every size, never rising.
        tuned: (KL, ln of the emulator's perplexity after tuning) of sizes with a client, never falling.
        sizes_bytes: (size, bytes of the package) of every size, never falling.
        is_turned: whether something measured was out of order, and was put in order.
    """

    method: str
    line: Fit
    kls: list[Pair]
    tuned: list[Pair]
    sizes_bytes: list[Pair]
    zero_shot: float
    lora_full: float
    is_turned: bool

    @property
    def low(self) -> float:
        """The smallest size with a client."""
        return self._ends[0]

    @property
    def high(self) -> float:
        """The largest."""
        return self._ends[1]

    @property
    def _ends(self) -> tuple[float, float]:
        return self.kls[0][0], self.kls[-1][0]

    def at(self, size: float) -> DialFigures:
        """Return what a package of that size is predicted to come to.

        Raises:
            ValueError: when the size lies outside of those that were tried.
        """
        kl = interpolate(self.kls, size)
        low, high = self.tuned[0][0], self.tuned[-1][0]
        log_tuned = interpolate(self.tuned, min(max(kl, low), high))  # ends that were put in order may differ a little
        recovered = self.line.at(log_tuned - math.log(self.zero_shot))
        plugged_in = self.zero_shot - recovered * (self.zero_shot - self.lora_full)
        num_bytes = round(interpolate(self.sizes_bytes, size))
        return figures_of(self.zero_shot, self.lora_full, math.exp(log_tuned), plugged_in, num_bytes)


def curve(method: str, tried: Sequence[Tried], ladder: Sequence[Rung], *, zero_shot: float, lora_full: float) -> Curve:
    """Return the curve of a method; `tried` are its sizes with a client, `ladder` those without, both of it alone.

    Raises:
        ValueError: when there are fewer than two sizes, or nothing differs between them.
    """
    low, high = min(one.size for one in tried), max(one.size for one in tried)
    inner = [rung for rung in ladder if low <= rung.size <= high]
    kls = [(one.size, one.field_kl) for one in tried] + [(rung.size, rung.field_kl) for rung in inner]
    tuned = [(one.field_kl, math.log(one.emulator_tuned)) for one in tried]
    sizes = [(one.size, float(one.figures.num_bytes)) for one in tried]
    sizes += [(rung.size, float(rung.num_bytes)) for rung in inner]
    return Curve(
        method=method,
        line=fit([(one.figures.withheld, one.figures.recovery) for one in tried]),
        kls=monotone(kls, rising=False),
        tuned=monotone(tuned, rising=True),
        sizes_bytes=monotone(sizes, rising=True),
        zero_shot=zero_shot,
        lora_full=lora_full,
        is_turned=turned(kls, rising=False) or turned(tuned, rising=True),
    )


@dataclass(frozen=True)
class Answer:
    """A size, what it is predicted to come to, and whether that is what was asked for."""

    method: str
    size: float
    predicted: DialFigures
    is_met: bool


def answer(target: Target, curves: Sequence[Curve], sizes: Sequence[Sequence[float]]) -> Answer:
    """Return the size that is predicted to give what was asked for; where none is, the one that comes nearest.

    Of a method's sizes that do, it is the smallest for a recovery, which gives the least away, and the largest for
    everything else, which recovers the most; of several methods' the one that recovers most, or for a recovery the
    one that withholds most.

    Args:
        sizes: every size that each curve's method can make; those outside of the curve are left out.
    """
    found: list[Answer] = []
    for one, shares in zip(curves, sizes, strict=True):
        inside = [share for share in sorted(shares) if one.low <= share <= one.high]
        answers = [Answer(one.method, share, at := one.at(share), target.is_met(at)) for share in inside]
        met = [each for each in answers if each.is_met]
        if met:
            found.append(met[0] if target.kind.smallest else met[-1])
        else:
            found.append(min(answers, key=lambda each: abs(target.kind.read(each.predicted) - target.value)))
    met = [each for each in found if each.is_met]
    if not met:
        return min(found, key=lambda each: abs(target.kind.read(each.predicted) - target.value))
    if target.name == "recovery":
        return max(met, key=lambda each: each.predicted.withheld)
    return max(met, key=lambda each: each.predicted.recovery)
