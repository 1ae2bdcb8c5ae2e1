"""What a privacy report says in words, worked out from its figures: its first line, its grounds, what it does not say.

An auditor's program works the same words out anew and compares them: they are part of the format.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from decimal import Decimal

from offsite.audits.gates import WEAK_EPSILON, Gate, Release
from offsite.audits.record import (
    BundleAudit,
    CanaryAudit,
    PackageAudit,
    PluggedAudit,
)
from offsite.audits.runs import AnsweredRound, Claim

NOT_PRIVATE = "NOT DIFFERENTIALLY PRIVATE"
_ELSEWHERE = "on an audit that is not in this report"


def headline(
    bundle: BundleAudit | None, plugged: PluggedAudit | None, package: PackageAudit | None, gates: Iterable[Gate]
) -> str:
    """Return the report's first line: whether the run is differentially private, as claimed and as attacked."""
    if bundle is None and plugged is None:
        kept = [one.kept for one in package.capabilities if one.name == "perplexity"] if package else []
        told = f": the emulator has {kept[0]:.2f} of the full model's skill on held-out text" if kept else ""
        least = package.least_withheld if package else None
        if least is not None:
            told += (
                f"{';' if told else ':'} after tuning it falls {least.nats:.2f} nats per token short of the full model"
            )
        return f"What a package gives away of its model{told}"
    if bundle is None:
        return "DIFFERENTIAL PRIVACY NOT SHOWN: this report quotes no run of the client's"
    claim = bundle.run.claim
    if claim is None:
        return f"{NOT_PRIVATE}: nothing bounds what this adapter may reveal of the text it was tuned on"
    failed = {gate.name: gate.found for gate in gates if gate.verdict == "failed"}
    if "epsilon" in failed:
        return (
            f"CLAIM OF DIFFERENTIAL PRIVACY REFUTED: an attack shows epsilon of at least {failed['epsilon']:.2f}, "
            f"claimed is {upper(claim.epsilon)}"
        )
    if "budget" in failed:
        return f"PRIVACY BUDGET EXCEEDED: epsilon {upper(claim.epsilon_total)} spent of {claim.budget:.3f}"
    total = "" if claim.num_runs == 1 else f"; {upper(claim.epsilon_total)} in all of {claim.num_runs} runs"
    start = f"Differentially private per {unit(claim)}, as claimed"
    if claim.epsilon > WEAK_EPSILON:
        start = (
            f"HARDLY DIFFERENTIALLY PRIVATE, above {WEAK_EPSILON:g} a claim per {unit(claim)} promises next to nothing"
        )
    return f"{start}: epsilon {upper(claim.epsilon)} at delta {upper_delta(claim.delta)}{total}"


def unit(claim: Claim) -> str:
    """Return whose influence the claim bounds."""
    return claim.unit if claim.rows_per_user is None else f"{claim.unit} of at most {claim.rows_per_user} rows"


def upper(epsilon: float) -> str:
    """Return epsilon with three decimals, never less than it is."""
    return f"{math.ceil(epsilon * 1000 - 1e-6) / 1000:.3f}"


def upper_delta(delta: float) -> str:
    """Return delta with two digits that tell, never less than it is."""
    digits, exponent = f"{delta:.1e}".split("e")
    if float(f"{digits}e{exponent}") < delta * (1 - 1e-9):
        digits = f"{float(digits) + 0.1:.1f}"
    shown = f"{float(digits):g}e{int(exponent)}"
    return f"{Decimal(shown):f}" if delta > 1e-7 else shown


def not_accounted(claim: Claim) -> str:
    """Return what no epsilon of the claim's covers."""
    runs = "1 run is" if claim.num_runs == 1 else f"{claim.num_runs} runs are"
    return (
        f"Settings chosen by looking at results (rate, rank, steps, which run to keep) are not accounted for: {runs} "
        "on record for any of these records, and the total counts what they spent, not what was learned by comparing "
        "them."
    )


def released(release: Release | None, quoted: str | None) -> str:
    """Return on what grounds the bundle was let go.

    Args:
        quoted: digest of the bundle's audit in the report, None where there is none: no gate can be worked out then.
    """
    if release is None:
        return "No release record is in this report: whether the bundle was let go, and on what, it does not say."
    elsewhere = release.audit is not None and release.audit != quoted
    verdicts = {gate.verdict for gate in release.gates}
    if not release.accepted_leakage:
        return f"Released {_ELSEWHERE}." if elsewhere else "Released after every gate had passed."
    words = {"failed": "gates failed", "not measurable": "gates could not be measured"}
    told = " and others ".join(words[verdict] for verdict in ("failed", "not measurable") if verdict in verdicts)
    where = f", {_ELSEWHERE}" if elsewhere else ""
    return f"Released although {told.replace('others gates', 'others')}{where}: --accept-leakage was given."


_NOT_ATTESTED = (
    "No trusted hardware and no attestation: signatures show whose keys were used, not which program ran or on "
    "which machine. Figures are as the issuer states them; what follows from others was worked out again."
)
_ATTESTED = (
    "A TPM's quote is given. It counts once it is verified against a policy of the reader's own, and says then in what "
    "state the machine was that quoted this report. Not that tuning or audits ran there, nor which program made the "
    "figures: they are as the issuer states them; what follows from others was worked out again."
)


def non_claims(
    bundle: BundleAudit | None, plugged: PluggedAudit | None, package: PackageAudit | None, *, attested: bool = False
) -> tuple[str, ...]:
    """Return what the report does not say, a sentence each.

    Args:
        attested: whether the report quotes evidence of the machine that issued it.
    """
    found = [
        _ATTESTED if attested else _NOT_ATTESTED,
        "An attack that found nothing proves nothing: a better one may find more.",
    ]
    if bundle is not None:
        found += _of_the_data(bundle)
    if plugged is not None:
        found.append(
            "In the full model only canaries were tried: its owner does not have the rows that were trained on."
        )
        if plugged.way or plugged.corrected:
            how = f"{plugged.way or 'it is'}{', corrected' if plugged.corrected else ''}"
            found.append(f"In the full model the adapter was plugged in as {how}; otherwise it may reveal more.")
    if any(canaries is not None for canaries in _canaries(bundle, plugged)):
        found += [
            "Canaries stand for canaries: rows made up for the purpose. Rows of the data may stand out more, or less.",
            "Nobody but the client can see whether the canaries it committed to were trained on. Which came first, the "
            "commitment or the bundle, is in the sealed manifests, and this report does not check it.",
        ]
    if package is not None:
        found += [
            "Recovery figures hold for the attacks, the text and the numbers of tokens stated. Another attack, or more "
            "tokens, may regain more.",
            "Capability holds for the texts and tasks stated; what the package is good for beyond them was not "
            "measured.",
        ]
        if package.withheld:
            found.append(
                "What is withheld after tuning holds for the ways of tuning stated. More text, or text nearer to what "
                "is measured on, may leave less."
            )
    return tuple(found)


def _of_the_data(bundle: BundleAudit) -> list[str]:
    claim, answered = bundle.run.claim, bundle.run.round
    private = (
        "Without differential privacy no figure here is a bound: each says what one attack found."
        if claim is None
        else "Differential privacy covers the adapter's tensors alone: not how long a run took, not metrics told "
        "beside them, not choices made by looking at several runs."
    )
    return [
        private,
        *_of_the_objective(bundle),
        *([] if bundle.retuned is None else [_OF_RETUNINGS]),
        *([] if answered is None else [_of_a_round(answered)]),
        "Figures of the bundle are of the emulator, with and without the adapter. The full model with the same adapter "
        "may reveal more, or less.",
        "The scan finds what it looks for in the bundle's bytes, and what is encoded otherwise it does not.",
    ]


_OF_RETUNINGS = (
    "Retunings are other adapters than the bundle's, tuned in the same way on halves of the same rows: what attacks "
    "found of them is of the way of tuning on these rows. Their limits take guesses for independent, as they are of "
    "adapters that tell nothing; of others they are not quite."
)
_OF_PAIRS = (
    "Rewards were of a reward model, which was tuned on preferences before. What the adapter may have taken over from "
    "those was not tried."
)


_SAME = "the two say the same"
_OF_HEADS = {
    "classify": ("a text and its label", "the label given the text", _SAME),
    "reward": ("a pair of answers", "how far the chosen answer is rewarded above the other", _SAME),
    "tag": ("words and their tags", "the mean loss of the tags given the words", _SAME),
    "regress": (
        "a text and its value",
        "the squared error of the value",
        "before tuning a value is told by its size alone, and the reference counts that as well",
    ),
}
"""Of each head's task what a row is, what attacks go by, and what that it begins at zero means for the reference."""


def _of_the_objective(bundle: BundleAudit) -> list[str]:
    """Return what the rows of a run are that did not learn the next token of a text."""
    head = bundle.run.adapter.head
    if head is not None:
        row, goes_by, alike = _OF_HEADS[head.task]
        return [
            f"The run trained a head ({head.task}): a row is {row}, and the attacks loss and reference go by "
            f"{goes_by}. The head begins at zero, so {alike}."
        ]
    loss = None if bundle.objective is None else bundle.objective.loss
    if loss == "rloo":
        rewarded = None if bundle.objective is None else bundle.objective.rloo
        return [
            "The run learned from rewards of sampled answers (rloo): attacks score a row's own answer after its "
            "prompt. No loss was of that answer; rules may have looked at it. Whether prompts were seen was not tried.",
            *([_OF_PAIRS] if rewarded is not None and rewarded.reward_weight is not None else []),
        ]
    if loss != "dpo":
        return []
    return [
        "The run learned from preferences (dpo): a row is a pair of answers, and the attacks loss and reference go by "
        "how far the chosen answer is ahead of the rejected one. Whether one of the two alone was seen was not tried."
    ]


def _of_a_round(answered: AnsweredRound) -> str:
    return (
        f"The bundle answers round {answered.number} of a federation: what attacks found is what this round added to "
        "the weights that it began with. What the rounds give away together was not measured."
    )


def _canaries(bundle: BundleAudit | None, plugged: PluggedAudit | None) -> list[CanaryAudit | None]:
    return [bundle.canaries if bundle else None, plugged.canaries if plugged else None]
