"""Gates: the limits that an audit's figures must keep before something leaves. Each is defined here and nowhere else.

A gate *passed*, *failed*, or was *not measurable* (nothing was measured, or too little to tell); only the first lets a
bundle go without ``--accept-leakage``. Gates are worked out from an audit's figures each time they are asked.

A differentially private run is held against its own claim: an attack must not show more than the epsilon claimed, of
this run, at the same delta. Any other is held against what attacks find: area under the curve at most 0.60 and hits at
most 3% at 1% false alarms, no made-up secret and no row read back out, and enough steps and rows that the update is not
a single row's gradient (arXiv:2405.15586 inverts those exactly). Where rows are too few to attack the bundle itself so,
retunings (`offsite.audits.retunings`) are attacked in its place, and held to the same limits by the most that their
guesses leave possible: a gate that fails says whether more than the limit was seen, or too little to rule it out.

A claim above `WEAK_EPSILON` promises next to nothing, so such a run is held against both; and where so few canaries
were tried that no attack could have refuted the claim, what attacks on the canaries find is asked too. A secret, a row
or a model that was read back out fails however little was tried; only what would have passed can have been tried too
little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from offsite.artefacts.layout import Key, Line
from offsite.audits.record import (
    DECLARED_SIGNAL,
    BundleAudit,
    CanaryAudit,
    EpsilonBound,
    PackageAudit,
    PluggedAudit,
    Retuned,
)
from offsite.audits.retunings import CONFIDENCE, area, by_coins, hits
from offsite.audits.runs import Count
from offsite.strictjson import Strict

MAX_AUC = 0.60
MAX_TPR_AT_1 = 0.03
MAX_SHIFT = 0.05
"""How far from a half the area may be before tuning: what differs already tells nothing of what was trained on."""
MIN_MEMBERS = 100
MIN_NONMEMBERS = 1000
MIN_STEPS = 10
MIN_RECORDS = 100
MIN_CANARIES = 100
MIN_SECRETS = 4
MIN_SAMPLES = 10
"""Draws for each secret; of a differentially private run one secret is enough, and none need be drawn."""
MIN_VERBATIM = 100
MIN_TOKENS_PER_ROW = 32
WEAK_EPSILON = 10.0

Verdict = Literal["passed", "failed", "not measurable"]


class Gate(Strict):
    """One condition: what was found, the limit, and the verdict. ``told`` says it in words."""

    name: Key
    verdict: Verdict
    found: float | None = None
    limit: float | None = None
    told: Line


class Release(Strict):
    """What ``offsite seal`` let go of, and on what grounds: ``OUTPUT.release.json``, beside the sealed folder.

    ``audit`` is the digest of the audit that the gates were worked out from, None where there was none.
    """

    format: Literal["offsite/release/1"] = "offsite/release/1"
    bundle_digest: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    sealed_digest: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")
    audit: str | None = Field(None, pattern=r"^sha256:[0-9a-f]{64}$")
    gates: tuple[Gate, ...]
    accepted_leakage: bool
    round: Count


def passed(gates: Sequence[Gate]) -> bool:
    """Tell whether every gate passed."""
    return all(gate.verdict == "passed" for gate in gates)


def unmeasured() -> tuple[Gate, ...]:
    """Return the gates of a bundle that was never audited."""
    return (Gate(name="audit", verdict="not measurable", told="no audit of this bundle was given"),)


def bundle_gates(audit: BundleAudit) -> tuple[Gate, ...]:
    """Return the gates of a client's bundle, in the order in which people should read them."""
    scanned, claim = _scanned(audit), audit.run.claim
    if claim is None:
        return (scanned, *_membership(audit), *_extracted(audit.canaries), _verbatim(audit), _not_trivial(audit))
    budget = _within_budget(claim.epsilon_total, claim.budget)
    held = _held(audit.canaries, claim.epsilon, claim.delta)
    if claim.epsilon <= WEAK_EPSILON:
        return (scanned, budget, *held)
    return (scanned, budget, *held, *_membership(audit), _verbatim(audit), _not_trivial(audit))


def needs_retunings(audit: BundleAudit) -> bool:
    """Tell whether attacks on the bundle's own rows are held against it, and tell nothing."""
    return audit.run.claim is None and bool(_why_not(audit))


def plugged_gates(
    audit: PluggedAudit, claimed_epsilon: float | None, *, claimed_delta: float | None = None
) -> tuple[Gate, ...]:
    """Return the gates of the adapter in the full model; with a claim of epsilon, whether the claim stands.

    Args:
        claimed_delta: of the claim, where it is known; the bound must then be at the same.
    """
    if claimed_epsilon is None:
        return tuple(_extracted(audit.canaries))
    return tuple(_held(audit.canaries, claimed_epsilon, claimed_delta))


def package_gates(
    audit: PackageAudit,
    *,
    max_capability: float | None = None,
    max_recovery: float | None = None,
    max_union: float | None = None,
    min_withheld: float | None = None,
) -> tuple[Gate, ...]:
    """Return one gate for each limit that is given.

    Args:
        max_capability: largest share of the full model's perplexity skill that the emulator may have.
        max_recovery: largest share of the lost capability that any attack may have regained.
        max_union: largest share of the middle's parameters that all packages together may hold.
        min_withheld: nats per token that must be withheld after tuning, by the least of the ways that were measured.
    """
    found = []
    if max_capability is not None:
        (kept,) = [one.kept for one in audit.capabilities if one.name == "perplexity"]
        told = f"the emulator has {kept:.2f} of the full model's skill on held-out text"
        found.append(_at_most("capability", kept, max_capability, told))
    if max_recovery is not None:
        found.append(_recovered(audit, max_recovery))
    if max_union is not None:
        share = None if audit.union is None else audit.union.share_union
        told = "no other package was given" if share is None else f"together the packages hold {share:.2f} of it"
        found.append(_at_most("union", share, max_union, told))
    if min_withheld is not None:
        found.append(_withheld(audit, min_withheld))
    return tuple(found)


def _at_most(name: str, value: float | None, limit: float, told: str) -> Gate:
    verdict: Verdict = "not measurable" if value is None else "passed" if value <= limit else "failed"
    return Gate(name=name, verdict=verdict, found=value, limit=limit, told=told)


def _unless(gate: Gate, why_not: str) -> Gate:
    """Return the gate, but where it passed on too little: `why_not` says so, and is empty where it was enough."""
    if not why_not or gate.verdict != "passed":
        return gate
    return gate.model_copy(update={"verdict": "not measurable", "told": f"{why_not}; {gate.told}"})


def _recovered(audit: PackageAudit, limit: float) -> Gate:
    best = max((one.best for one in audit.recovery), default=None)
    if best is None:
        return _at_most("recovery", None, limit, "no recovery attack was run")
    most = max(point.num_tokens for one in audit.recovery for point in one.points)
    told = f"an attack regained {best:.2f} of what was lost, the longest was on {most:,} tokens"
    return _unless(_at_most("recovery", best, limit, told), "" if most else "no attack was trained on any text")


def _withheld(audit: PackageAudit, limit: float) -> Gate:
    least = audit.least_withheld
    if least is None:
        return Gate(
            name="withheld", verdict="not measurable", limit=limit, told="no tuning of the emulator was measured"
        )
    ways = f"the least of {len(audit.withheld)} ways" if len(audit.withheld) > 1 else "the one way measured"
    tokens = "" if least.num_tokens is None else f" on {least.num_tokens:,} tokens"
    told = f"{least.nats:.2f} nats per token are withheld after tuning by a {least.way}{tokens}, {ways}"
    verdict: Verdict = "passed" if least.nats >= limit else "failed"
    return Gate(name="withheld", verdict=verdict, found=least.nats, limit=limit, told=told)


def _within_budget(total: float, budget: float) -> Gate:
    return _at_most("budget", total, budget * (1 + 1e-9), f"epsilon {total:.3f} spent of a budget of {budget:.3f}")


def _scanned(audit: BundleAudit) -> Gate:
    num = sum(audit.scan.found.values())
    if not audit.scan.num_bytes:
        return Gate(name="scan", verdict="not measurable", limit=0.0, told="no byte of the bundle was looked at")
    told = f"{num} piece(s) of text, names, paths, times or losses in the bundle's bytes"
    return _at_most("scan", float(num), 0.0, told)


def _held(canaries: CanaryAudit | None, claimed: float, delta: float | None) -> list[Gate]:
    """The claim is not refuted; and where it promises next to nothing, or nothing could, the canaries are not known."""
    bound = _bound(canaries, claimed, delta)
    weak = claimed > WEAK_EPSILON
    if not weak and (bound.verdict != "passed" or _could_refute(canaries.bound if canaries else None, claimed)):
        return [bound]
    return [bound, _canaries_known(canaries), *_extracted(canaries, private=not weak)]


def _could_refute(bound: EpsilonBound | None, claimed: float) -> bool:
    return bound is not None and bound.ceiling > claimed


def _bound(canaries: CanaryAudit | None, claimed: float, delta: float | None) -> Gate:
    """The lower bound on epsilon that an attack showed is no more than the epsilon claimed.

    A bound at a smaller delta than the claim's would refute sound claims, one at a larger delta spare false ones.
    """
    bound = None if canaries is None else canaries.bound
    told = ""
    if bound is None or bound.num_canaries < MIN_CANARIES:
        told = f"fewer than {MIN_CANARIES} canaries: nothing could refute epsilon {claimed:.3f}"
    elif delta is not None and not math.isclose(bound.delta, delta, rel_tol=1e-6):
        told = f"the bound is at delta {bound.delta:.3g}, the claim at {delta:.3g}"
    elif bound.confidence > CONFIDENCE:
        told = f"the bound is at confidence {bound.confidence:g}, so that little shows; it must be at {CONFIDENCE:g}"
    if bound is None or told:
        return Gate(name="epsilon", verdict="not measurable", limit=claimed, told=told)
    if _could_refute(bound, claimed):
        most = f"a perfect attack with these canaries would have shown {bound.ceiling:.2f}"
    else:
        most = f"not even a perfect attack with these canaries, {bound.ceiling:.2f}, would refute it"
    told = f"attacks show epsilon of at least {bound.epsilon:.2f}, claimed is {claimed:.2f}; {most}"
    return _at_most("epsilon", bound.epsilon, claimed, told)


def _canaries_known(canaries: CanaryAudit | None) -> Gate:
    """The declared signal tells canaries that were trained on from the others little better than chance."""
    known = [one for one in canaries.membership if one.signal == DECLARED_SIGNAL] if canaries else []
    if not known or min(one.num_members + one.num_nonmembers for one in known) < MIN_CANARIES:
        told = f"fewer than {MIN_CANARIES} canaries were told apart by {DECLARED_SIGNAL}"
        return Gate(name="canaries", verdict="not measurable", limit=MAX_AUC, told=told)
    area = max(one.auc.value for one in known)
    told = f"{DECLARED_SIGNAL} tells canaries that were trained on from others with an area of {area:.3f}"
    return _at_most("canaries", area, MAX_AUC, told)


def _membership(audit: BundleAudit) -> list[Gate]:
    """The best of the attacks on rows counts, by its upper limit nowhere and by its value everywhere.

    But of retunings, which are asked where rows are too few to attack the bundle itself: there the upper limit counts.
    """
    if told := _why_not(audit):
        if audit.retuned is None or not needs_retunings(audit) or audit.tokens_per_row < MIN_TOKENS_PER_ROW:
            return [Gate(name=name, verdict="not measurable", told=told) for name in ("auc", "tpr_at_1")]
        return _retuned(audit, audit.retuned)
    auc = max(audit.membership, key=lambda one: one.auc.value)
    hits = [one for one in audit.membership if one.tpr_at_1 is not None]
    gates = [
        _at_most("auc", auc.auc.value, MAX_AUC, f"the best attack ({auc.signal}) has an area of {auc.auc.value:.3f}")
    ]
    best = max(hits, key=lambda one: one.tpr_at_1.value if one.tpr_at_1 else 0.0, default=None)
    value = best.tpr_at_1.value if best is not None and best.tpr_at_1 is not None else None
    told = "no attack has a hit rate" if best is None else f"the best attack ({best.signal}) hits {value:.1%} at 1%"
    return [*gates, _at_most("tpr_at_1", value, MAX_TPR_AT_1, told)]


def _retuned(audit: BundleAudit, found: Retuned) -> list[Gate]:
    """No attack is left possible to be better than the limits, by the guesses about rows that coins put in."""
    many = f"{len(found.num_in)} retunings on halves of {found.num_rows} rows"
    one, other = max(found.attacks, key=lambda one: area(one)[1]), max(found.attacks, key=lambda one: hits(one)[1])
    by_area, by_hits, (least_area, least_hits) = area(one), hits(other), by_coins(found)
    apart = f"{many}: {one.signal} has an area of {by_area[0]:.3f}, at most {by_area[1]:.3f}"
    right = f"{many}: {other.signal} hits {by_hits[0]:.1%} at 1%, at most {by_hits[1]:.1%}"
    return [
        _shown_by(audit, _left_possible("auc", apart, by_area, MAX_AUC, least_area, found)),
        _left_possible("tpr_at_1", right, by_hits, MAX_TPR_AT_1, least_hits, found),
    ]


def _left_possible(
    name: str, seen: str, found: tuple[float, float], limit: float, by_chance: float, retuned: Retuned
) -> Gate:
    """Return whether no more than the limit is left possible; nothing is told where not even coins would pass."""
    value, most = found
    told = f"{seen} ({CONFIDENCE:.0%} sure)"
    verdict: Verdict = "passed" if most <= limit else "failed"
    if retuned.num_rows < MIN_MEMBERS:
        verdict, told = "not measurable", f"{told}; at least {MIN_MEMBERS} rows are needed"
    elif by_chance > limit:
        verdict, told = "not measurable", f"{told}; so few guesses would not pass if they were a coin's"
    elif verdict == "failed":
        told += "; more than the limit was seen" if value > limit else "; so few guesses do not rule more than it out"
    return Gate(name=name, verdict=verdict, found=round(most, 6), limit=limit, told=told)


def _shown_by(audit: BundleAudit, gate: Gate) -> Gate:
    """Return the gate; failed where the bundle's own rows, few as they are, show more than the limit.

    Rows of other files, which were validated on (``--eval``), need not be like the data: they show nothing.
    """
    best = max(audit.membership, key=lambda one: one.auc.low, default=None)
    are_others = audit.nonmembers == "validation" and not audit.run.text.validation
    if best is None or best.auc.low <= MAX_AUC or are_others or _differ(audit):
        return gate
    told = f"by {best.signal} the bundle's own rows, few as they are, have an area of at least {best.auc.low:.3f}"
    return Gate(name=gate.name, verdict="failed", found=best.auc.low, limit=gate.limit, told=told)


def _differ(audit: BundleAudit) -> bool:
    """Tell whether rows trained on and others differ before tuning already."""
    before = audit.auc_before
    return before is not None and abs(before.value - 0.5) > MAX_SHIFT and not before.low <= 0.5 <= before.high


def _why_not(audit: BundleAudit) -> str:
    """Return why the attacks on rows tell nothing; empty when they do."""
    if audit.tokens_per_row < MIN_TOKENS_PER_ROW:
        return f"only {audit.tokens_per_row} tokens of a row were scored, at least {MIN_TOKENS_PER_ROW} are needed"
    if audit.nonmembers == "validation" and audit.run.claim is None:
        return "the weights were chosen by the rows they are compared on; tune with --audit-share or give --nonmembers"
    fewest = min((one.num_nonmembers for one in audit.membership), default=0)
    if fewest < MIN_NONMEMBERS:
        return f"{fewest} rows that were not trained on, at least {MIN_NONMEMBERS} are needed"
    fewest = min(one.num_members for one in audit.membership)
    if fewest < MIN_MEMBERS:
        return f"{fewest} rows that were trained on, at least {MIN_MEMBERS} are needed"
    if audit.auc_before is not None and _differ(audit):
        area_before = audit.auc_before.value
        return f"the rows differ before tuning already (area {area_before:.3f}), they must be alike but for training"
    return ""


def _verbatim(audit: BundleAudit) -> Gate:
    verbatim = audit.verbatim
    if verbatim is None or not verbatim.num_rows:
        return Gate(name="verbatim", verdict="not measurable", told="no row was tried to be read back out")
    net = max(0, verbatim.num_extracted - verbatim.num_extracted_before)
    new = net if verbatim.num_new is None else verbatim.num_new
    told = f"{new} of {verbatim.num_rows} rows came back word for word that did not before tuning"
    few = f"fewer than {MIN_VERBATIM} rows were tried" if verbatim.num_rows < MIN_VERBATIM else ""
    return _unless(_at_most("verbatim", float(new), 0.0, told), few)


def _extracted(canaries: CanaryAudit | None, *, private: bool = False) -> list[Gate]:
    """No made-up secret was read back out.

    Args:
        private: of a run that is differentially private, one that promises something: any secret at all is enough.
    """
    exposure = None if canaries is None else canaries.exposure
    if exposure is None:
        return [Gate(name="secrets", verdict="not measurable", told="no made-up secret was planted")]
    num = max(exposure.num_extracted_greedy, exposure.num_extracted_top_k)
    few = ""
    if not private and exposure.num_secrets < MIN_SECRETS:
        few = f"fewer than {MIN_SECRETS} made-up secrets were planted"
    elif not private and exposure.num_samples < MIN_SAMPLES:
        few = f"fewer than {MIN_SAMPLES} draws were made for each secret"
    told = f"{num} of {exposure.num_secrets} made-up secrets were read back out"
    return [_unless(_at_most("secrets", float(num), 0.0, told), few)]


def _not_trivial(audit: BundleAudit) -> Gate:
    run = audit.run
    if run.num_drawn is None:
        return Gate(name="inversion", verdict="not measurable", told="how many rows were drawn is not stated")
    steps = min(num for _, num in run.draws)  # a mean of runs of a step each is like one step on all of their rows
    each = f" in each of {len(run.draws)} runs" if run.averaged else ""
    enough = steps >= MIN_STEPS and run.num_drawn >= MIN_RECORDS
    return Gate(
        name="inversion",
        verdict="passed" if enough else "failed",
        told=f"{steps} steps{each} on {run.num_drawn} rows; at least {MIN_STEPS} and {MIN_RECORDS} are asked for",
    )
