"""``offsite plug-in``: put an accepted adapter into the full model and write it under the full model's own names.

What is plugged in is named by its id in the registry, and no other way: it was verified when it was taken in
(``server/registry/verify.py``), and its files are held against the registry's digests as they are read. The full
model's checkpoint is never touched. What is written is opened again the way its users open it, and its logits on a
fixed batch are compared with the plugged-in model's before it is published; then the registry is told. A crash in
between is made good by the same command.

The full model stays mapped from its files all the while, also when it is merged (``server/plugging/merging.py``):
memory holds a block of it at a time, its embeddings and head, and the adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from adapters.heads import as_classifier, detach_head, put_head
from adapters.kinds import Attached
from adapters.targets import PEFT_KINDS
from offsite.artefacts.bundle import TENSOR_FILE, Head
from offsite.artefacts.layout import PackageManifest
from offsite.artefacts.manifest import MANIFEST_NAME, read_manifest
from offsite.artefacts.owner import OwnerRecord, owner_record_path, read_owner_record
from offsite.artefacts.package import PACKAGE_FORMAT, Package, open_package
from offsite.console import say
from offsite.digests import model_digest
from offsite.errors import ArtefactError, ConfigError, PolicyError, RunFailed, WrongBinding
from offsite.evaluation.results import read_results
from offsite.faults import reach
from offsite.modelling.load import is_vision_name, load_model, load_reader, load_tokenizer, require_weights
from offsite.seq2seq.refusals import refuse_settings
from offsite.staging import leftovers, refuse_existing, remove, staged_folder
from offsite.tensors import read_tensors, spec_of, write_tensors
from offsite.text.batches import Example, pad_id
from offsite.text.records import require_files
from offsite.vision.reader import ImageReader, Reader
from server.plugging.adapted import AdaptedManifest, encoder_in, finish_folder, open_adapted, stored_names
from server.plugging.card import Card, Form, require_results
from server.plugging.config import PlugConfig
from server.plugging.fit import Fitted, fit, plain_model, plug, require_correctable, unplug
from server.plugging.fullmodel import FullModel, called, remember
from server.plugging.merging import merge, write_checkpoint
from server.plugging.peftfolder import open_with_peft, write_peft_folder
from server.plugging.probe import READ_BACK_TOLERANCE, TOLERANCES, deviation, probe_heads, probe_logits
from server.plugging.shares import as_rehearsed, require_way, taken
from server.plugging.sparing import public_text
from server.plugging.ways import Way
from server.registry.intake import asked_round, read_registered
from server.registry.registry import Registry
from server.registry.rows import Entry, refusal, withdrawn
from server.registry.verify import Verified

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["merge", "run"]

_MERGED = ".merged"
"""Folder of merged weights inside the one that is written, until the checkpoint stands."""


def run(config: PlugConfig) -> dict[str, object]:
    """Run the verb: read, plug in, write, compare, publish, tell the registry.

    Raises:
        ConfigError: when the model, the bundle or the owner's record is not found, or the output exists.
        PolicyError: when the bundle was not accepted.
        ArtefactError: when it was refused, or its files are not those that were verified.
        RunFailed: when what was written does not compute what the plugged-in model does.
    """
    with Registry.open(config.registry, config.keys) as registry, registry.one_plug_in():
        entry = accepted(registry, config.id)
        config = config.model_copy(update={"id": entry.id})
        config = _with_share(config, registry, entry)
        public = _public(config)
        if entry.state == "accepted" and is_of(
            config.output, entry, config.way, public, merged=config.merge, corrected=config.correct
        ):
            say(f"{config.output.name} was published before the registry was told; now it is")
            manifest = open_adapted(config.output)
            _remember(config, manifest)
            _tell(registry, entry, manifest)
            return _result(config, manifest, None, None)
        refuse_existing(config.output)
        require_weights(config.model)
        record = record_of(registry, entry, config.package)
        verified = read_registered(registry, entry, record)
        require_way(verified.spec, config.way)
        refuse_for_two_stacks(record, config)
        emulator = emulator_of(config.package, registry, verified, record) if config.correct else None
        collect_partial(config.output)
        licence = licence_of(config.package or registry.package_path(record.package_digest), record)
        card = _card(config, verified, record, licence, public)
        manifest, effect, error = _plug_in(config, entry, verified, record, card, public, emulator)
        reach("plug-published")
        _remember(config, manifest)
        _tell(registry, entry, manifest)
    shown = f"{len(manifest.tensors)} tensors on {len(manifest.sites)} blocks"
    if not manifest.plugged.is_plain:
        shown += f", {manifest.plugged.told}"
    if manifest.corrected:
        shown += ", corrected"
    if manifest.adapter.head is not None and manifest.scale != 1:
        shown += ", its head whole"
    say(f"{config.output.name}: {_SHOWN[manifest.form]}, {shown}")
    return _result(config, manifest, effect, error)


def refuse_for_two_stacks(record: OwnerRecord, config: PlugConfig) -> None:
    """Return only if an encoder-decoder's adapter is asked to be plugged in as a share of it, and no other way.

    Raises:
        ConfigError: naming the setting.
    """
    if record.layout.encoder is not None:
        hint = "plug it in as it is, or as a share of it (--scale)"
        refuse_settings("the base model", {"--spare": bool(config.spare)}, hint)


def _with_share(config: PlugConfig, registry: Registry, entry: Entry) -> PlugConfig:
    """Return the settings with the share that was rehearsed, where none is given.

    Where the package's record is gone and the folder stands already, it is the folder's: a crash came in between.

    Raises:
        ConfigError, ArtefactError, WrongBinding: as `record_of`.
    """
    if "scale" in config.model_fields_set:
        return config
    try:
        record = record_of(registry, entry, config.package)
    except (ConfigError, ArtefactError):
        if not (config.output / MANIFEST_NAME).is_file():
            raise
        return config.model_copy(update={"scale": open_adapted(config.output).plugged.scale})
    return as_rehearsed(config, registry.job(entry.job_id).adapter, record)


def accepted(registry: Registry, word: str) -> Entry:
    """Return the bundle of that id, which the owner has accepted, and which stands on the package's own weights.

    Args:
        word: the id, or what else `Registry.named` takes.

    Raises:
        ConfigError: when there is none, or it answers a federation's later round.
        PolicyError: when it was not accepted yet, or was withdrawn.
        ArtefactError: with its class, when it was refused.
    """
    entry = registry.named(word)
    if entry.state == "refused":
        raise refusal(entry.reason or "", f"bundle {entry.id} was refused: {entry.message}")
    if entry.state == "withdrawn":
        raise withdrawn(entry.id)
    if entry.state in ("received", "verified"):
        hint = f"offsite registry accept {entry.id} --registry {registry.folder}"
        raise PolicyError(f"bundle {entry.id} is {entry.state}, not accepted", hint=hint)
    asked = asked_round(registry, entry.job_id, entry.round)
    if asked is not None and not asked.is_first:
        raise ConfigError(
            f"bundle {entry.id} answers round {entry.round} of a federation: it stands on what earlier rounds added",
            hint="offsite federate serve writes the model with all of them in it",
        )
    return entry


def record_of(registry: Registry, entry: Entry, package: Path | None) -> OwnerRecord:
    """Return the owner's record of the package that the bundle was tuned on: the named one's, or the job's.

    Raises:
        ConfigError, ArtefactError: when it is not there.
        WrongBinding: when the named package is another.
    """
    digest = registry.job(entry.job_id).package_digest
    path = owner_record_path(registry.package_path(digest) if package is None else package)
    if package is None and not path.is_file():
        raise ConfigError(f"owner's record {path.name!r} is not where it was", hint="name the package with --package")
    record = read_owner_record(path)
    if record.package_digest != digest:
        raise WrongBinding(
            f"bundle {entry.id} was tuned on package {digest[:19]}, not {record.package_digest[:19]}",
            hint="name the package with --package",
        )
    return record


def emulator_of(package: Path | None, registry: Registry, verified: Verified, record: OwnerRecord) -> Package:
    """Return the package that the adapter is corrected by: the named one, or the job's.

    Raises:
        ConfigError: when an adapter of that kind, on that package, cannot be corrected.
        ArtefactError, WrongBinding: when the package is not sound, or another.
    """
    found = package_of(package, registry, record)
    require_correctable(verified.spec, found)
    return found


def package_of(package: Path | None, registry: Registry, record: OwnerRecord) -> Package:
    """Return the package that the owner's record is of: the named one, or the job's.

    Raises:
        ArtefactError, WrongBinding: when the package is not sound, or another.
    """
    known = registry.known_files()
    found = open_package(package or registry.package_path(record.package_digest), known)
    known.save()
    if found.digest != record.package_digest:
        raise WrongBinding(f"package {found.path.name!r} is not the one that the owner's record is of")
    return found


def is_of(
    output: Path, entry: Entry, way: Way, public: Public | None, *, merged: bool, corrected: bool = False
) -> bool:
    """Tell whether a sound adapted folder of this bundle, so plugged in, merged and corrected, stands at `output`."""
    if not output.is_dir():
        return False
    try:
        manifest = open_adapted(output)
    except ArtefactError:
        return False
    of_bundle = manifest.intake == entry.id and manifest.bundle_digest == entry.bundle_digest
    in_this_way = manifest.plugged == way and manifest.spare_text == _digest(public)
    alike = in_this_way and manifest.corrected == corrected
    return of_bundle and alike and (manifest.form == "merged") == merged


def collect_partial(output: Path) -> None:
    """What a plugging in to `output` that was killed left beside it is gone."""
    for path in leftovers(output):
        remove(path)


def licence_of(package: Path, record: OwnerRecord) -> str:
    """Return the licence that the package states; empty where it states none or is not there any more."""
    try:
        manifest, digest = read_manifest(package, PackageManifest, PACKAGE_FORMAT)
    except ArtefactError:
        return ""
    return manifest.licence if digest == record.package_digest else ""


def _card(config: PlugConfig, verified: Verified, record: OwnerRecord, licence: str, public: Public | None) -> Card:
    """Return what the folder will say of itself, but for what is measured.

    Raises:
        ConfigError, ArtefactError: when the results that were named are not there or of something else.
    """
    form: Form = "merged" if config.merge else "peft" if verified.spec.kind in PEFT_KINDS else "own"
    results = None
    if config.results is not None:
        results = require_results(
            read_results(config.results),
            base_digest=record.base_digest,
            bundle_digest=verified.bundle_digest,
            way=config.way,
            spare_text=_digest(public),
            corrected=config.correct,
        )
    return Card(
        name=config.output.name,
        form=form,
        base=called(config.model),
        base_digest=record.base_digest,
        adapter=verified.spec,
        licence=licence,
        way=config.way,
        corrected=config.correct,
        results=results,
        is_seq2seq=record.layout.encoder is not None,
    )


Probe = Callable[["PreTrainedModel", str], Tensor]
Public = tuple[list[Example], str]
"""Public text in blocks, and the digest of its tokens."""


def _public(config: PlugConfig) -> Public | None:
    """Return the public text of a way that spares directions, None without one; read before any model is."""
    if not config.spare:
        return None
    require_files(config.spare)
    if is_vision_name(config.model):
        raise ConfigError("--spare: it goes by text, this model reads images", hint="plug the adapter in as it is")
    return public_text(config.spare, load_tokenizer(config.model), limit_tokens=config.spare_tokens)


def _digest(public: Public | None) -> str:
    return public[1] if public is not None else ""


def _tell(registry: Registry, entry: Entry, manifest: AdaptedManifest) -> None:
    """The registry knows in which way the bundle was plugged in, and that it was."""
    registry.note_way(entry.id, "plugged-in", str(manifest.plugged), manifest.spare_text)
    registry.advance(entry.id, "plugged-in")


def _remember(config: PlugConfig, manifest: AdaptedManifest) -> None:
    """The note beside the folder says where its full model is; a merged checkpoint needs none."""
    base = called(config.model)
    remember(config.output, base if manifest.form != "merged" else FullModel(base.name), manifest.base_digest)


def _plug_in(
    config: PlugConfig,
    entry: Entry,
    verified: Verified,
    record: OwnerRecord,
    card: Card,
    public: Public | None,
    emulator: Package | None,
) -> tuple[AdaptedManifest, float, float]:
    """Write the adapted folder, and return its manifest, the adapter's effect and the error of what was read back."""
    has_head = verified.spec.head is not None
    model = load_model(config.model, encoders=has_head, seq2seq=not has_head)
    tokenizer = load_reader(config.model)
    if verified.spec.head is not None and not isinstance(tokenizer, ImageReader) and tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # the folder says before which token a text is read
    fitted = fit(model, verified, record, emulator=emulator)
    adapter = taken(model, fitted, config.way, public[0] if public is not None else ())
    probe, what = probe_for(adapter), f"the model with {verified.what} plugged in"
    with only_head(model, adapter):
        before = probe(model, "the full model")
    attached = plug(model, adapter)
    expected = probe(plain_model(attached), what)
    effect = deviation(expected, before)
    merged_digest: str | None = None
    with staged_folder(config.output) as stage:
        if card.form == "merged":
            (stage / _MERGED).mkdir()
            merged = as_opened(merge(attached, stage / _MERGED), adapter, tokenizer)
            del model, attached
            error = _require_close(probe(merged, "the merged model"), expected, merged, effect)
            merged_digest = _write_merged(stage, merged, probe, verified.spec.head)
            del merged
            remove(stage / _MERGED)
        else:
            error = _write_adapter(stage, card.form, attached, adapter, card.base.name, expected, tokenizer)
        manifest = finish_folder(
            stage,
            tokenizer,
            replace(card, adapter=adapter.spec, effect=effect, deviation=error),
            package_digest=record.package_digest,
            bundle_digest=verified.bundle_digest,
            merged_digest=merged_digest,
            intake=entry.id,
            spare_text=_digest(public),
            sites=adapter.sites,
            tensors={name: spec_of(tensor) for name, tensor in _all(adapter).items()},
        )
        reach("plug-written")
    return manifest, effect, error


_SHOWN: dict[Form, str] = {"peft": "a PEFT folder", "own": "the changed tensors", "merged": "a merged checkpoint"}


def _require_close(found: Tensor, expected: Tensor, merged: PreTrainedModel, effect: float) -> float:
    """Return the deviation of the merged model's logits.

    Raises:
        RunFailed: when it is beyond the tolerance of the merged weights' dtype.
    """
    error, tolerance = deviation(found, expected), TOLERANCES[merged.dtype]
    if error > tolerance:
        raise RunFailed(
            f"merged logits differ from unmerged ones by {error:.2g}, tolerance {tolerance:.2g} in {merged.dtype}",
            hint="plug in without --merge, or use a checkpoint in float32",
        )
    if error > effect / 2 > 0:
        say(
            f"warning: rounding to {merged.dtype} changes the logits by {error:.2g}, the adapter itself by {effect:.2g}"
        )
    return error


def _write_merged(stage: Path, merged: PreTrainedModel, probe: Probe, head: Head | None) -> str:
    """Write the checkpoint, and return the model's digest, once they were read back as they were.

    Raises:
        RunFailed: when the checkpoint read back is another.
    """
    write_checkpoint(merged, stage)
    digest, expected = model_digest(merged), probe(merged, "the merged model")
    read_back = load_model(str(stage), with_head=head.task if head else None, seq2seq=head is None)
    if model_digest(read_back) != digest:
        raise RunFailed("the merged checkpoint reads back as other tensors than were written")
    error = deviation(probe(read_back, "what was read back"), expected)  # the configuration counts too
    if error > READ_BACK_TOLERANCE:
        raise RunFailed(f"the merged checkpoint reads back with logits that differ by {error:.2g}")
    return digest


def _write_adapter(
    stage: Path,
    form: Form,
    attached: Attached,
    adapter: Fitted,
    base: str,
    expected: Tensor,
    tokenizer: Reader,
) -> float:
    """Write the adapter alone and return the deviation of its logits when it is opened again.

    Raises:
        RunFailed: when it computes something else.
    """
    model = plain_model(attached)
    if form == "own":
        tensors = _all(adapter)
        names = stored_names(form, adapter.sites, tensors, adapter.spec.head)
        write_tensors(stage / TENSOR_FILE, {names[name]: tensor for name, tensor in tensors.items()})
        read_tensors(stage / TENSOR_FILE, {names[name]: spec_of(tensor) for name, tensor in tensors.items()})
        return 0.0
    unplug(attached)
    detach_head(model)
    bare = as_opened(model, adapter, tokenizer)
    write_peft_folder(stage, bare if encoder_in(adapter.spec) else model, adapter, base=base)
    opened = open_with_peft(bare, stage)
    error = deviation(probe_for(adapter)(opened, "the model opened by peft"), expected)
    if error > READ_BACK_TOLERANCE:
        raise RunFailed(f"peft opens the adapter with logits that differ by {error:.2g}", hint="plug in with --merge")
    return error


def _all(adapter: Fitted) -> dict[str, Tensor]:
    """Return the adapter's tensors, its head among them."""
    return {**adapter.tensors, **adapter.head}


def as_opened(model: PreTrainedModel, adapter: Fitted, tokenizer: Reader) -> PreTrainedModel:
    """Return the model as others open it: where the adapter has a head, with that in place of the vocabulary's."""
    head = adapter.spec.head
    return model if head is None else as_classifier(model, head, pad_id=pad_id(tokenizer))


def probe_for(adapter: Fitted) -> Probe:
    """Return what tells two forms of a model with this adapter apart: scores of its head, or of the vocabulary."""
    return probe_heads if adapter.head else probe_logits


@contextmanager
def only_head(model: PreTrainedModel, adapter: Fitted) -> Iterator[None]:
    """Inside, the model carries the adapter's head, if it has one, and nothing else of it."""
    if adapter.spec.head is not None:
        put_head(model, adapter.spec.head, adapter.head)
    try:
        yield
    finally:
        detach_head(model)


def _result(
    config: PlugConfig, manifest: AdaptedManifest, effect: float | None, error: float | None
) -> dict[str, object]:
    return {
        "adapted": config.output.name,
        "id": config.id,
        "form": manifest.form,
        "merged": manifest.form == "merged",
        "kind": manifest.adapter.kind,
        "placement": manifest.adapter.placement,
        "scale": manifest.scale,
        "way": str(manifest.plugged),
        "corrected": manifest.corrected,
        "num_tensors": len(manifest.tensors),
        "num_blocks": len(manifest.sites),
        "num_bytes": sum(entry.bytes for entry in manifest.files.values()),
        "effect": effect,
        "deviation": error,
        "base_digest": manifest.base_digest,
        "package_digest": manifest.package_digest,
        "bundle_digest": manifest.bundle_digest,
        "merged_digest": manifest.merged_digest,
    }
