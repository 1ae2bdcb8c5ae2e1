"""What ``offsite audit package`` is given, opened and checked before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adapters.targets import require_carried
from emulator.audit.capability import HeldOut, held_out, task_chance
from emulator.audit.config import AuditPackageConfig
from emulator.audit.heal import usual_adapter
from emulator.audit.refill import require_start
from emulator.audit.withheld import without
from emulator.distillation.public import PublicText, prepare
from offsite.artefacts.owner import OwnerRecord, owner_record_path, read_owner_record
from offsite.artefacts.package import Package, open_package
from offsite.console import say
from offsite.errors import ConfigError, UnsupportedModel, WrongBinding
from offsite.evaluation.results import Results, read_results
from offsite.text.batches import Example, encode
from offsite.text.records import Record, read_files, require_files
from offsite.training.devices import choose_device


@dataclass(frozen=True)
class Given:
    """What the verb was given.

    Attributes:
        earlier: the owner's records of other packages.
        text: held-out text as it is measured on.
        public: public text, empty when there is none.
        attackers: the same in batches, for attacks.
        field: text of the clients' field in batches, for a client that is played; None where none is.
    """

    package: Package
    record: OwnerRecord
    earlier: Sequence[OwnerRecord]
    results: Results | None
    tokenizer: PreTrainedTokenizerBase
    text: HeldOut
    public: Sequence[Example] = field(repr=False)
    attackers: PublicText | None
    field: PublicText | None
    device: torch.device


def open_given(config: AuditPackageConfig) -> Given:
    """Return what the settings name, opened and checked, as far as that needs no full model.

    Raises:
        ArtefactError: when a package, its owner's record or the results are unsound or do not belong together.
        ConfigError, DataError: when a text, a task or an attack is not as it must be.
    """
    require_files(config.heldout)
    require_files(config.public)
    require_files(config.field_text)
    package = open_package(config.package)
    package.require_text("audit package")
    record = _record(config.package)
    if record.package_digest != package.digest:
        raise WrongBinding(f"{owner_record_path(config.package).name!r} is the record of another package")
    earlier = [_record(path) for path in config.earlier]
    for path, other in zip(config.earlier, earlier, strict=True):
        if other.base_digest != record.base_digest:
            raise WrongBinding(f"--earlier: {path.name!r} is a package of another model")
    _require_tasks(config)
    results = None if config.results is None else read_results(config.results)
    records = read_files(
        config.heldout, fields=config.fields, document_field=config.document_field, separator=config.separator
    )
    tokenizer = package.load_tokenizer()
    text = held_out(
        records,
        tokenizer,
        packed=config.pack,
        block_tokens=config.block_tokens,
        limit_tokens=config.limit_tokens,
        batch_size=config.batch_size,
    )
    public = _public_records(config)
    examples = encode(public, tokenizer, context=config.block_tokens, whole_text=True).examples if public else []
    attackers = _attackers_text(config, package, record, tokenizer, public) if public else None
    field_text = _field_text(config, package, tokenizer, public, records)
    device = choose_device(config.device)
    return Given(package, record, earlier, results, tokenizer, text, examples, attackers, field_text, device)


def _record(package: Path) -> OwnerRecord:
    return read_owner_record(owner_record_path(package))


def _public_records(config: AuditPackageConfig) -> list[Record]:
    if not config.public:
        return []
    return read_files(
        config.public,
        fields=config.public_fields,
        document_field=config.public_document_field,
        separator=config.public_separator,
    )


def _attackers_text(
    config: AuditPackageConfig,
    package: Package,
    record: OwnerRecord,
    tokenizer: PreTrainedTokenizerBase,
    public: Sequence[Record],
) -> PublicText:
    """Return the public text as attackers read it, when there is work for every attack."""
    model = package.load_model()
    for name in config.attack:
        if not name.startswith("refill_"):
            require_start(name.rpartition("_")[0], model, package.layout, record.num_blocks)
    return _in_batches(config, public, tokenizer, model, packed=True)


def _field_text(
    config: AuditPackageConfig,
    package: Package,
    tokenizer: PreTrainedTokenizerBase,
    public: Sequence[Record],
    held_out: Sequence[Record],
) -> PublicText | None:
    """Return what a client is played on, without what is measured on, when there is text and one can be played."""
    if not config.client_steps or not (config.field_text or public):
        return None
    try:
        require_carried(package, usual_adapter(package.layout))
    except UnsupportedModel as error:
        hint = "--client-steps 0 leaves the rehearsed client out"
        raise UnsupportedModel(f"no client can be played on this package: {error}", hint=hint) from error
    records = public
    if config.field_text:
        records = read_files(
            config.field_text, fields=config.fields, document_field=config.document_field, separator=config.separator
        )
    packed, own = config.pack if config.field_text else True, without(records, held_out)
    if not config.field_text and len({record.document for record in own}) < 2:
        say("warning: no client is played, for too little of the public text is not measured on; give --field-text")
        return None
    return _in_batches(config, own, tokenizer, package.empty_model(), packed=packed)


def _in_batches(
    config: AuditPackageConfig,
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    *,
    packed: bool,
) -> PublicText:
    return prepare(
        records,
        tokenizer,
        model,
        block_tokens=config.block_tokens,
        batch_size=config.batch_size,
        seed=config.seed,
        holdout=config.holdout,
        evaluation_tokens=16 * config.block_tokens,
        calibration_tokens=1,
        packed=packed,
    )


def _require_tasks(config: AuditPackageConfig) -> None:
    for path in config.task:
        if not path.is_file():
            raise ConfigError(f"--task: no file {path.name!r}")
    if config.task and (find_spec("lm_eval") is None or find_spec("datasets") is None):
        raise ConfigError("--task needs the eval extra", hint="pip install 'offsite-tuning[eval]'")
    for path in config.task:
        task_chance(path, config.task_limit)
