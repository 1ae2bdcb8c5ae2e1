"""``offsite audit package``: what a package gives away of the full model, measured by its owner before it is sent.

The Python API, in order: `emulator.audit.capability` scores emulator and full model above chance,
`emulator.audit.similarity` compares weights and hidden states, `emulator.audit.recovery` tries to regain what was lost,
`emulator.audit.withheld` says what a client lacks after tuning, `emulator.audit.union` adds up what several packages
hold. `run` is the verb: it does all of them and writes the audit.

An audit is a measurement: it is written whatever it finds. What refuses to let a package go is ``offsite seal PACKAGE
--audit AUDIT`` with a limit.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import PreTrainedModel

from emulator.audit.capability import (
    floor_by_halves,
    floor_by_public,
    require_same,
    task_capabilities,
    task_scores,
    text_capability,
)
from emulator.audit.config import AuditPackageConfig
from emulator.audit.heal import usual_adapter
from emulator.audit.input import Given, open_given
from emulator.audit.recovery import CLIENT, Attacker, Knowledge, Losses, Setting
from emulator.audit.similarity import similarity
from emulator.audit.table import figures, show
from emulator.audit.union import union_share
from emulator.audit.withheld import by_attack, by_client, by_rehearsal
from emulator.compression.activations import Batch
from emulator.distillation.public import PublicText
from offsite import __version__
from offsite.artefacts.owner import OwnerRecord
from offsite.audits.gates import package_gates
from offsite.audits.record import (
    Capability,
    PackageAudit,
    Recovery,
    Similarity,
    Union,
    Withheld,
    write_audit,
)
from offsite.blockwise import block_by_block
from offsite.console import say
from offsite.digests import model_digest, sha256_files
from offsite.errors import WrongBinding
from offsite.modelling.load import load_model
from offsite.staging import refuse_existing
from offsite.tensors import torch_dtype
from offsite.text.batches import Example, collate
from offsite.training.checkpoints import require_work
from offsite.training.precision import PRECISION_NOTE, settled

LIBRARIES = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class _Measured:
    """What both models were needed for."""

    capabilities: tuple[Capability, ...]
    similarity: Similarity
    middle_parameters: int
    sizes: dict[int, int]
    losses: Losses


def run(config: AuditPackageConfig) -> dict[str, object]:
    """Do what ``offsite audit package`` says: the audit stands when it returns, with the verdicts on given limits.

    Attacks keep what they have done in ``AUDIT.work`` meanwhile, and it stays there when one fails.

    Raises:
        OffsiteError: with the reason; no audit then stands.
    """
    began = time.monotonic()
    refuse_existing(config.output)
    work = config.output.with_name(config.output.name + ".work")
    require_work(work, resume=config.resume)
    given = open_given(config)
    found = _measure(config, given)
    rehearsed = _rehearse(config, given, found.losses, work)
    recovery, recovery_text = _recover(config, given, found.losses, work)
    left = [
        rehearsed,
        by_client(found.capabilities[0], given.results),
        by_attack(recovery, full=found.losses.full),
    ]
    audit = PackageAudit(
        package_digest=given.package.digest,
        base_digest=given.record.base_digest,
        method=given.package.manifest.method,
        middle_parameters=found.middle_parameters,
        emulator_parameters=_emulator_parameters(given.record),
        capabilities=found.capabilities,
        similarity=found.similarity,
        recovery=recovery,
        recovery_text=recovery_text,
        withheld=tuple(one for one in left if one is not None),
        union=_union(given, found),
        versions={"offsite": __version__, **{name: version(name) for name in LIBRARIES}},
    )
    digest = write_audit(config.output, audit)
    shutil.rmtree(work, ignore_errors=True)
    gates = package_gates(
        audit,
        max_capability=config.max_capability,
        max_recovery=config.max_recovery,
        max_union=config.max_union,
        min_withheld=config.min_withheld,
    )
    show(audit, gates)
    say(
        f"audit: {config.output.name} is written; a limit is held at: offsite seal PACKAGE --audit {config.output.name}"
    )
    told = {"audit": config.output.name, "audit_digest": digest, **figures(audit, gates)}
    return {**told, "seconds": round(time.monotonic() - began, 1)}


# --- what is measured with the full model


def _measure(config: AuditPackageConfig, given: Given) -> _Measured:
    """Return what needs the full model, which is gone from memory afterwards."""
    full = load_model(config.model)
    if (digest := model_digest(full)) != given.record.base_digest:
        raise WrongBinding(
            f"model {Path(config.model).name!r} has digest {digest[:19]}, the package was made of "
            f"{given.record.base_digest[:19]}",
            hint="give the model that the package was made of, in the same dtype",
        )
    with ExitStack() as stack:
        if given.device.type == "cpu":  # stays mapped from its files: a block of it is in memory, and float32
            stack.enter_context(block_by_block(full, torch.float32))
        else:
            full.float().to(given.device)  # type: ignore[arg-type]
        return _measured(config, given, full)


def _measured(config: AuditPackageConfig, given: Given, full: PreTrainedModel) -> _Measured:
    emulator = given.package.load_model(device=str(given.device))
    losses = Losses(
        full=given.text.loss(full, "full model on held-out text"),
        emulator=given.text.loss(emulator, "emulator on held-out text"),
    )
    capabilities = (
        _text_capability(config, given, full, losses),
        *_task_capabilities(config, given, full, emulator),
    )
    dtypes = Counter(
        spec.dtype for spec in given.package.manifest.tensors.values() if torch_dtype(spec.dtype).is_floating_point
    )
    alike = similarity(
        full,
        emulator,
        given.record,
        _compared(config, given),
        dtype=torch_dtype(dtypes.most_common(1)[0][0]),
    )
    sizes = _sizes(full, given.record)
    middle = sum(size for number, size in sizes.items() if number in _middle(given.record))
    return _Measured(capabilities, alike, middle, sizes, losses)


def _text_capability(config: AuditPackageConfig, given: Given, full: PreTrainedModel, losses: Losses) -> Capability:
    if given.results is not None:
        require_same(
            given.results,
            package_digest=given.package.digest,
            data_sha256=sha256_files(config.heldout),
            text=given.text,
            full=losses.full,
        )
    vocabulary = int(full.get_input_embeddings().weight.shape[0])  # type: ignore[index, union-attr, arg-type]
    if given.public:
        say("capability: chance is a unigram model of the public text")
        chance = floor_by_public(given.text, given.public, vocabulary)
    else:
        say("capability: chance is a unigram model of the held-out text, each half by the other half's")
        chance = floor_by_halves(given.text, vocabulary)
    return text_capability(given.text, chance=chance, full=losses.full, emulator=losses.emulator, results=given.results)


def _task_capabilities(
    config: AuditPackageConfig, given: Given, full: PreTrainedModel, emulator: PreTrainedModel
) -> tuple[Capability, ...]:
    scores = [
        task_scores(model, given.tokenizer, config.task, batch_size=config.batch_size, limit=config.task_limit)
        for model in (full, emulator)
    ]
    return task_capabilities(config.task, *scores, limit=config.task_limit)


def _compared(config: AuditPackageConfig, given: Given) -> list[Batch]:
    """Return held-out text of about as many tokens as hidden states are to be compared at."""
    batches: list[Batch] = []
    left = config.similarity_tokens
    for example in given.text.examples:
        if left < 2:
            break
        cut = Example(example.input_ids[:left], example.labels[:left])
        batches.append(collate([cut], given.text.pad_id))
        left -= len(cut.input_ids)
    return batches


def _sizes(full: PreTrainedModel, record: OwnerRecord) -> dict[int, int]:
    blocks = full.get_submodule(record.layout.stack).children()
    return {n: sum(parameter.numel() for parameter in block.parameters()) for n, block in enumerate(blocks)}


def _middle(record: OwnerRecord) -> set[int]:
    layout = record.layout
    ends = {*record.kept[: layout.num_bottom], *record.kept[len(record.kept) - layout.num_top :]}
    return set(range(record.num_blocks)) - ends


def _emulator_parameters(record: OwnerRecord) -> int:
    return sum(
        record.num_stored(name)
        for name in record.block_tensors
        if name.startswith("middle.") and name not in record.layout.buffers
    )


# --- what can be done without it


def _rehearse(config: AuditPackageConfig, given: Given, losses: Losses, work: Path) -> Withheld | None:
    """Return what a client is left with that is played on text of the field; None where there is none."""
    if given.field is None:
        say("withheld after tuning: no client is played")
        return None
    run = _attacker(config, given, given.field, losses, work).rehearse(config.client_steps)
    text = "text of the field" if config.field_text else "the public text"
    steps, num_rates = config.client_steps, len(config.client_rates)
    adapter = usual_adapter(given.package.layout)
    found = by_rehearsal(run, adapter, full=losses.full, steps=steps, num_rates=num_rates, text=text)
    say(f"rehearsed client: {found.nats:.3f} nats per token are withheld after {run.num_tokens:,} tokens")
    return found


def _recover(config: AuditPackageConfig, given: Given, losses: Losses, work: Path) -> tuple[tuple[Recovery, ...], str]:
    if given.attackers is None:
        say("recovery: no public text was given, no attack is tried")
        return (), ""
    attacker = _attacker(config, given, given.attackers, losses, work)
    found = attacker.attack(config.attack)
    num = sum(len(example.input_ids) for example in given.public)
    return found, (
        f"from the package alone, knowing that the full model has {attacker.knowledge.num_blocks} blocks; public text "
        f"of {num:,} tokens, rates chosen on {config.holdout:.0%} of its documents"
    )


def _attacker(config: AuditPackageConfig, given: Given, text: PublicText, losses: Losses, work: Path) -> Attacker:
    setting = Setting(
        marks=config.recovery_tokens,
        rates={"lora": config.lora_rates, "all": config.all_rates, CLIENT: config.client_rates},
        step_tokens=config.batch_size * config.block_tokens,
        work=work,
        seed=config.seed,
        precision=settled(config.precision, given.device, note=work / PRECISION_NOTE),
        checkpoint_every=config.checkpoint_every,
        device=str(given.device),
    )
    return Attacker(given.package, Knowledge(given.record.num_blocks), text, setting, given.text, losses)


def _union(given: Given, found: _Measured) -> Union | None:
    return union_share([given.record, *given.earlier], sizes=found.sizes) if given.earlier else None
