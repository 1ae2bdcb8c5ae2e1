"""``offsite audit plugged-in``: what an adapter gives away in the full model, by canaries that the client revealed.

The client committed to them before it tuned, so it could not choose them by what its adapter says. What they show is of
the full model with the adapter in it, which the client never has; no text of the client's is needed for it. That the
client trained on the canaries as it says cannot be seen: canaries that nobody trained on show nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from offsite.artefacts.owner import OwnerRecord
from offsite.artefacts.package import Package
from offsite.audits.canaries import CanarySet, Commitment, open_reveal, read_commitment
from offsite.audits.canaryaudit import CanaryScores, audit_canaries, score_canaries
from offsite.audits.gates import Gate, plugged_gates
from offsite.audits.record import PluggedAudit, write_audit
from offsite.audits.statistics import require_extra
from offsite.console import say, table
from offsite.digests import model_digest
from offsite.errors import WrongBinding
from offsite.modelling.dtypes import cast_model
from offsite.modelling.load import load_model, load_tokenizer
from offsite.staging import refuse_existing
from offsite.text.batches import Example
from offsite.training.devices import choose_device
from server.evaluation.auditconfig import AuditPluggedConfig
from server.evaluation.summary import versions
from server.plugging.fit import fit, plugged
from server.plugging.plug import accepted, emulator_of, record_of
from server.plugging.shares import as_rehearsed, require_way, taken
from server.plugging.sparing import public_text
from server.plugging.ways import Way, told
from server.registry.intake import read_registered
from server.registry.registry import Registry
from server.registry.verify import Verified

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def run(config: AuditPluggedConfig) -> dict[str, object]:
    """Run the verb: open, score the canaries before and after, write the audit folder, show its figures.

    Raises:
        ConfigError: when the output exists, the model or the bundle is not found, SciPy is missing, or the adapter
            cannot be plugged in in that way.
        PolicyError: when the bundle was not accepted.
        ArtefactError: when the reveal is not what was committed to, or the commitment is of another package or job.
        DataError: when a canary cannot be scored.
        RunFailed: when a loss is not finite.
    """
    refuse_existing(config.output)
    require_extra()
    commitment = read_commitment(config.commitment)
    with Registry.open(config.registry, config.keys) as registry:
        entry = accepted(registry, config.id)
        config = config.model_copy(update={"id": entry.id})
        record = record_of(registry, entry, config.package)
        require_committed(commitment, package_digest=record.package_digest, job_id=entry.job_id)
        verified = read_registered(registry, entry, record)
        config = as_rehearsed(config, verified.spec, record)
        require_way(verified.spec, config.way)
        emulator = emulator_of(config.package, registry, verified, record) if config.correct else None
        public = _public(config)
        _warn(registry, config, public[1])
    canaries = open_reveal(config.reveal, commitment)
    untuned, tuned = _scores(config, canaries, verified, record, public[0], emulator)
    audit = PluggedAudit(
        bundle_digest=verified.bundle_digest,
        package_digest=record.package_digest,
        base_digest=record.base_digest,
        way="" if config.way.is_plain else str(config.way),
        spare_text=public[1],
        corrected=config.correct,
        canaries=audit_canaries(canaries, commitment.digest, tuned=tuned, untuned=untuned, delta=config.delta),
        versions=versions(),
    )
    digest = write_audit(config.output, audit)
    gates = plugged_gates(audit, config.epsilon, claimed_delta=config.delta)
    _show(audit, gates)
    return {"audit": config.output.name, "audit_digest": digest, **_flat(audit, gates)}


def require_committed(commitment: Commitment, *, package_digest: str, job_id: str) -> None:
    """Return only if the canaries were committed to for this package and job.

    Raises:
        WrongBinding: naming what differs.
    """
    for what, stated, wanted in (
        ("package", commitment.package_digest, package_digest),
        ("job", commitment.job_id, job_id),
    ):
        if stated != wanted:
            shown = "none" if stated is None else stated[:19]
            raise WrongBinding(
                f"the canaries were committed to for {what} {shown}, the bundle is of {wanted[:19]}",
                hint="give the commitment that came with this job; offsite canaries --job makes it",
            )


def _public(config: AuditPluggedConfig) -> tuple[list[Example], str]:
    """Return the public text of a way that spares directions, and its digest; nothing and no digest without one."""
    if not config.spare:
        return [], ""
    return public_text(config.spare, load_tokenizer(config.model), limit_tokens=config.spare_tokens)


def _warn(registry: Registry, config: AuditPluggedConfig, spare_text: str) -> None:
    """A line is on stderr when the bundle was served or plugged in, and never in the way that is measured here."""
    served, written = registry.ways(config.id, "served"), registry.ways(config.id, "plugged-in")
    known, way = (served, config.way) if served else (written, config.way.written)
    if known and (str(way), spare_text) not in known:
        others = "; ".join(sorted({told(word) for word, _ in known}))
        verb = "served" if served else "plugged in"
        text = ", of other public text" if (str(way)) in dict(known) else ""
        say(f"warning: {verb} was {others}{text}; this measures {config.way.told}")


def _scores(
    config: AuditPluggedConfig,
    canaries: CanarySet,
    verified: Verified,
    record: OwnerRecord,
    public: Sequence[Example],
    emulator: Package | None,
) -> tuple[CanaryScores, CanaryScores]:
    """Return what the full model says of the canaries, and what it says with the adapter plugged in."""
    tokenizer = load_tokenizer(config.model)
    model: PreTrainedModel = load_model(config.model)
    fitted = fit(model, verified, record, base_digest=model_digest(model), emulator=emulator)
    adapter = taken(model, fitted, config.way, public)
    cast_model(model, torch.bfloat16 if config.precision == "bf16" else torch.float32)
    model.to(choose_device(config.device))  # type: ignore[arg-type]
    untuned = score_canaries(
        model, tokenizer, canaries, label="full model", extract=False, batch_size=config.batch_size
    )
    with plugged(model, adapter, mix=config.way.mix) as adapted:
        tuned = score_canaries(
            adapted,
            tokenizer,
            canaries,
            label="plugged in",
            extract=True,
            batch_size=config.batch_size,
            num_samples=config.samples,
            seed=config.seed,
        )
    return untuned, tuned


def _show(audit: PluggedAudit, gates: tuple[Gate, ...]) -> None:
    """Attacks and gates are on stderr."""
    found = audit.canaries
    if audit.way or audit.corrected:
        say(f"plugged in: {Way.parse(audit.way or '1').told}{', corrected' if audit.corrected else ''}")
    lines = [
        [one.signal, f"{one.auc.value:.3f}", f"{one.auc.low:.3f}-{one.auc.high:.3f}", f"{one.balanced_accuracy:.3f}"]
        for one in found.membership
    ]
    table(f"{found.num_included} of {found.num} canaries were trained on", ["attack", "area", "95%", "accuracy"], lines)
    if found.bound is not None:
        say(f"epsilon is at least {found.bound.epsilon:.2f}; the most that could have shown: {found.bound.ceiling:.2f}")
    if found.exposure is not None:
        mean = sum(found.exposure.bits) / len(found.exposure.bits)
        say(f"exposure of secrets: {mean:.2f} of {found.exposure.most_bits:.0f} bits on average")
    for gate in gates:
        say(f"{gate.name} {gate.verdict}: {gate.told}")


def _flat(audit: PluggedAudit, gates: tuple[Gate, ...]) -> dict[str, object]:
    found = audit.canaries
    exposure, bound = found.exposure, found.bound
    return {
        "bundle_digest": audit.bundle_digest,
        "way": audit.way or "1",
        "corrected": audit.corrected,
        "num_canaries": found.num,
        "num_included": found.num_included,
        "auc": {one.signal: one.auc.value for one in found.membership},
        "epsilon_at_least": None if bound is None else bound.epsilon,
        "epsilon_ceiling": None if bound is None else bound.ceiling,
        "exposure_bits": None if exposure is None else sum(exposure.bits) / len(exposure.bits),
        "num_extracted": None if exposure is None else max(exposure.num_extracted_greedy, exposure.num_extracted_top_k),
        "gates": {gate.name: gate.verdict for gate in gates},
    }
