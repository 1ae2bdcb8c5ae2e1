"""What a client is left with after tuning, by every way that can be had: a rehearsed client, the client, an attack.

What an emulator lacks as it is sent is no measure of it: tuning heals some emulators (a middle rounded to 3 bits nearly
whole) and others hardly (channels that are gone stay gone). All three are ln(tuned emulator / full model as it was), in
nats per token of the owner's held-out text, as `offsite.evaluation.figures.withheld` defines it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from emulator.audit.recovery import Run
from offsite.artefacts.bundle import AdapterSpec
from offsite.audits.record import (
    Capability,
    Recovery,
    Way,
    Withheld,
)
from offsite.console import say
from offsite.evaluation import figures
from offsite.evaluation.results import Results
from offsite.text.records import Record


def by_rehearsal(run: Run, adapter: AdapterSpec, *, full: float, steps: int, num_rates: int, text: str) -> Withheld:
    """Return what a client that the owner played is left with.

    Args:
        adapter: that it tuned.
        full: the full model's loss in nats per token.
        num_rates: of which the run's was the best on text held out.
        text: what it was tuned on, in words.
    """
    rate = f"rate {run.rate:g}" + (f", the best of {num_rates} on text held out" if num_rates > 1 else "")
    where = "every linear" if adapter.placement == "all" else f"every linear of {adapter.placement} blocks"
    told = f"{adapter.kind} of rank {adapter.rank} on {where}, {steps} step(s) on {text}, {rate}"
    return _withheld("rehearsed client", math.exp(run.loss), full, run.num_tokens, told)


def by_client(text: Capability, results: Results | None) -> Withheld | None:
    """Return what the client is left with, by what ``offsite evaluate`` measured; None where it did not."""
    if results is None or text.emulator_tuned is None:
        return None
    adapter, num = results.adapter, len(results.bundles)
    told = f"{adapter.kind} that came back, {adapter.placement}, mean of {num} bundle(s), by offsite evaluate"
    return _withheld("client", math.exp(text.emulator_tuned), text.full, None, told)


def by_attack(attacks: Sequence[Recovery], *, full: float) -> Withheld | None:
    """Return what the best attack leaves withheld; None where none was trained on any text."""
    points = [(point.perplexity, one.attack, point.num_tokens) for one in attacks for point in one.points]
    most = max((num_tokens for _, _, num_tokens in points), default=0)
    if not most:
        return None
    perplexity, attack, num_tokens = min(points)
    told = f"{attack}, at {num_tokens:,} tokens the best of {len(attacks)} attack(s) of up to {most:,}"
    return _withheld("recovery attack", perplexity, full, most, told)


def without(records: Sequence[Record], held_out: Iterable[Record]) -> list[Record]:
    """Return the records of those documents none of whose rows is among the held-out ones, word for word."""
    known = {record.whole_text for record in held_out}
    theirs = {record.document for record in records if record.whole_text in known}
    if theirs:
        say(f"rehearsed client: {len(theirs)} document(s) of the held-out text are left out of what it is tuned on")
    return [record for record in records if record.document not in theirs]


def _withheld(way: Way, perplexity: float, full: float, num_tokens: int | None, told: str) -> Withheld:
    nats = figures.withheld(perplexity, math.exp(full))
    return Withheld(way=way, nats=nats, perplexity=perplexity, num_tokens=num_tokens, told=told[:200])
