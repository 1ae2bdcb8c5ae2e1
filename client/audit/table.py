"""What people read of the client's audit: a table of attacks, the gates with their verdicts, and what is missing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from offsite.audits.canaries import MAX_CANARIES
from offsite.audits.gates import MIN_CANARIES, MIN_MEMBERS, MIN_NONMEMBERS, Gate
from offsite.audits.lowerbound import SHARES
from offsite.audits.record import BundleAudit, Estimate, Membership, Retuned
from offsite.audits.retunings import area, hits
from offsite.console import say, table

_SOURCES = {"set aside": "set aside at random", "validation": "validated on", "file": "from a file"}
_HOW = {
    "auc": "with {members} different rows or more offsite audit bundle retunes (--retunings); otherwise tune with "
    "--audit-share so large that {rows} rows are set aside, or give --nonmembers FILE with as many",
    "tpr_at_1": "more --retunings, or more rows",
    "epsilon": "offsite canaries --count {canaries} or more, then tune with --canaries",
    "secrets": "offsite canaries with --secrets, then tune with --canaries",
    "verbatim": "no row is long enough to be cut in a beginning and the rest",
    "scan": "give the bundle folder as tune wrote it",
}


def show(audit: BundleAudit, gates: Sequence[Gate], *, num_nonmembers: int) -> None:
    """The attacks, the gates, and how to measure what was not, are on stderr.

    Args:
        num_nonmembers: rows that there were to choose from.
    """
    source = "" if audit.nonmembers is None else f", others {_SOURCES[audit.nonmembers]}"
    table(
        f"attacks on the emulator with the adapter, which is what the client has ({audit.tokens_per_row} tokens a row"
        f"{source}; 95% intervals)",
        ("attack", "in", "out", "area", "interval", "hits at 1%", "interval"),
        [_row("rows", one) for one in audit.membership]
        + [_row("canaries", one) for one in (audit.canaries.membership if audit.canaries else ())],
    )
    if audit.retuned is not None:
        _show_retunings(audit.retuned)
    if audit.objective is not None:
        say(f"  the run's objective: {audit.objective.loss}")
    for line in _lines(audit):
        say(f"  {line}")
    say("gates")
    width = max(len(gate.name) for gate in gates)
    for gate in gates:
        limit = "" if gate.limit is None else f" (limit {gate.limit:g})"
        say(f"  {gate.name.ljust(width)}  {gate.verdict.ljust(14)}  {gate.told}{limit}")
    for name in dict.fromkeys(gate.name for gate in gates if gate.verdict == "not measurable"):
        if why := _never(audit, name):
            say(f"  {name}: {why}; a bundle goes without it by --accept-leakage alone")
        elif name in _HOW:
            how = _HOW[name].format(rows=f"{MIN_NONMEMBERS:,}", members=MIN_MEMBERS, canaries=MIN_CANARIES)
            here = f"; there were {num_nonmembers:,}" if name == "auc" else ""
            say(f"  to measure {name}: {how}{here}")
    if more := _more_canaries(audit):
        say(f"  {more}")


def _show_retunings(found: Retuned) -> None:
    named = [(one.signal, area(one), hits(one)) for one in found.attacks]
    table(
        f"attacks on {len(found.num_in)} retunings, each on a random half of {found.num_rows:,} rows: of the way of "
        "tuning, not of this bundle (at most: what they leave possible, with 95% confidence)",
        ("attack", "area", "at most", "hits at 1%", "at most"),
        [
            (f"retunings: {name}", f"{of_all[0]:.3f}", f"{of_all[1]:.3f}", f"{first[0]:.1%}", f"{first[1]:.1%}")
            for name, of_all, first in named
        ],
    )


def _never(audit: BundleAudit, name: str) -> str:
    """Return why the gate can be measured of no run of this kind; empty where it can."""
    head = audit.run.adapter.head
    if head is not None and name in ("secrets", "epsilon"):
        return "no made-up text is planted beside rows that a head learns from"
    return (
        "an encoder writes nothing, no row can be asked of it" if head and head.encoder and name == "verbatim" else ""
    )


def _more_canaries(audit: BundleAudit) -> str:
    """Return how canaries could have refuted the claim; empty when these could have."""
    claim, bound = audit.run.claim, None if audit.canaries is None else audit.canaries.bound
    if claim is None or bound is None or bound.ceiling > claim.epsilon:
        return ""
    num = canaries_to_refute(claim.epsilon, bound.confidence)
    if num > MAX_CANARIES:
        return f"no audit by canaries could refute epsilon {claim.epsilon:.2f}: that takes {num:,} of them"
    wanted = f"{num:,} canaries or more and a delta far below 1/{num:,} (dp.delta)"
    return f"for canaries to be able to refute epsilon {claim.epsilon:.2f}, tune with {wanted}"


def canaries_to_refute(epsilon: float, confidence: float) -> int:
    """Return the fewest canaries of which guesses that are never wrong show more than epsilon, at a delta next to 0."""
    significance = (1 - confidence) / len(SHARES)
    num_guesses = math.log(1 / significance) / math.log1p(math.exp(-epsilon))
    return math.floor(num_guesses / max(SHARES)) + 2


def _row(what: str, one: Membership) -> tuple[str, ...]:
    hits = one.tpr_at_1
    return (
        f"{what}: {one.signal}",
        f"{one.num_members:,}",
        f"{one.num_nonmembers:,}",
        f"{one.auc.value:.3f}",
        _interval(one.auc, 1),
        "-" if hits is None else f"{hits.value:.1%}",
        "-" if hits is None else _interval(hits, 100),
    )


def _interval(found: Estimate, scale: int) -> str:
    digits, unit = (3, "") if scale == 1 else (1, "%")
    return f"{scale * found.low:.{digits}f}-{scale * found.high:.{digits}f}{unit}"


_OF_HEAD = {
    "classify": "the head's loss of a row's label",
    "reward": "by how far the rejected answer is ahead",
    "regress": "the squared error of a row's value",
    "tag": "the head's mean loss of a row's tags",
}


def _lines(audit: BundleAudit) -> list[str]:
    found = []
    head = audit.run.adapter.head
    if head is not None:
        what = _OF_HEAD[head.task]
        told = "min-k and min-k++ are of the text, as is the area before tuning"
        if head.encoder:
            told = "an encoder says nothing of a text: no min-k, no area before tuning, no row to read back"
        found.append(f"loss and reference are {what}; {told}")
    if audit.objective is not None and audit.objective.loss == "dpo":
        found.append(
            "a row is a pair of answers: loss is by how far the chosen one is ahead of the other, reference by how "
            "much further than before tuning; min-k and min-k++ are of the chosen one"
        )
    if audit.objective is not None and audit.objective.loss == "rloo":
        found.append(
            "a row is its own answer after its prompt: rules may have looked at it, no loss was of it; neither prompts "
            "nor sampled answers are scored"
        )
        if audit.objective.rloo is not None and audit.objective.rloo.reward_weight is not None:
            found.append("a reward model gave rewards: what the adapter took over from its pairs is not tried here")
    if audit.auc_before is not None:
        found.append(f"before tuning the same rows are told apart with an area of {audit.auc_before.value:.3f}")
    canaries = audit.canaries
    if canaries is not None and canaries.bound is not None:
        bound = canaries.bound
        claim = audit.run.claim
        claimed = "none is claimed" if claim is None else f"claimed is {claim.epsilon:.2f}"
        found.append(
            f"epsilon: at least {bound.epsilon:.2f} by {bound.num_correct} of {bound.num_guesses} guesses right, "
            f"at most {bound.ceiling:.2f} could have shown; {claimed}"
        )
    if canaries is not None and canaries.exposure is not None:
        exposure = canaries.exposure
        mean = [sum(bits) / max(1, len(bits)) for bits in (exposure.bits, exposure.bits_before)]
        found += [
            f"secrets: {mean[0]:.1f} bits of exposure on average, {mean[1]:.1f} before tuning, "
            f"{exposure.most_bits:.1f} at most",
            f"secrets read back out: {exposure.num_extracted_greedy} greedily, {exposure.num_extracted_top_k} in "
            f"{exposure.num_samples} draws, of {exposure.num_secrets}",
        ]
    if audit.verbatim is not None and audit.verbatim.num_rows:
        back = audit.verbatim
        found.append(
            f"rows: {back.num_extracted} of {back.num_rows} go on word for word for {back.continuation_tokens} tokens "
            f"after {back.prefix_tokens}, {back.num_extracted_before} before tuning"
        )
    return found
