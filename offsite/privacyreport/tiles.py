"""The few figures at the head of a privacy report's page."""

from __future__ import annotations

from offsite.audits.record import BundleAudit, CanaryAudit, PackageAudit
from offsite.privacyreport.record import PrivacyReport
from offsite.privacyreport.words import upper, upper_delta

MOST = 6
"""So many tiles are shown at most."""


def tiles(report: PrivacyReport) -> list[tuple[str, str]]:
    """Return the figures that a reader looks for first, as far as they were measured, and what each is."""
    audits = report.audits
    found: list[tuple[str, str]] = []
    if report.privacy is not None:
        claim = report.privacy.claim
        found.append((upper(claim.epsilon), f"epsilon claimed, at delta {upper_delta(claim.delta)} per {claim.unit}"))
    elif audits.bundle is not None:
        found.append(("none", "bound on what one row may have changed"))
    if audits.bundle is not None:
        found += _of_bundle(audits.bundle)
    elif audits.plugged_in is not None:
        found += _of_canaries(audits.plugged_in.canaries, "with the full model")
    if audits.package is not None:
        found += _of_package(audits.package)
    return found[:MOST]


def _of_bundle(audit: BundleAudit) -> list[tuple[str, str]]:
    found = []
    best = max(audit.membership, key=lambda one: one.auc.value, default=None)
    if best is not None:
        found.append((f"{best.auc.value:.3f}", f"area under the curve of the best attack on rows, {best.signal}"))
    hits = [one.tpr_at_1.value for one in audit.membership if one.tpr_at_1 is not None]
    if hits:
        found.append((f"{max(hits):.1%}", "of rows found at 1% false alarms, by the best attack"))
    return found + (_of_canaries(audit.canaries, "with the emulator") if audit.canaries is not None else [])


def _of_canaries(canaries: CanaryAudit, where: str) -> list[tuple[str, str]]:
    found = []
    if canaries.bound is not None:
        found.append(
            (f"\N{GREATER-THAN OR EQUAL TO} {canaries.bound.epsilon:.2f}", f"epsilon shown by canaries {where}")
        )
    if (exposure := canaries.exposure) is not None:
        num = max(exposure.num_extracted_greedy, exposure.num_extracted_top_k)
        found.append((f"{num} of {exposure.num_secrets}", f"made-up secrets read back out {where}"))
    return found


def _of_package(audit: PackageAudit) -> list[tuple[str, str]]:
    found = [
        (f"{one.kept:.2f}", "of the full model's skill is in the emulator, on held-out text")
        for one in audit.capabilities
        if one.name == "perplexity"
    ]
    if (least := audit.least_withheld) is not None:
        found.append((f"{least.nats:.2f}", f"nats per token withheld after tuning, by a {least.way}"))
    if audit.recovery:
        best = max(audit.recovery, key=lambda one: one.best)
        found.append(
            (f"{best.best:.2f}", f"of what was lost regained by the best attack, {best.attack.replace('_', ' ')}")
        )
    similarity = audit.similarity
    exact = max(similarity.num_verbatim, similarity.num_verbatim_by_row)
    near = similarity.num_within_rounding or 0
    how = "bit for bit" if exact >= near else "to within one step of bfloat16"
    share = max(exact, near) / similarity.num_parameters
    found.append((f"{share:.0%}", f"of the package's parameters are the full model's, {how}"))
    return found
