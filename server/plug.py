"""``offsite plug-in``: put a returned adapter into the full model and write it under the full model's own names.

What is checked on the bundle is in ``offsite/bundle.py`` and ``server/fit.py``. The full model's checkpoint is never
touched. What is written is opened again the way its users open it, and its logits on a fixed batch are compared with
the plugged-in model's before it is published.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from adapters.kinds import Attached
from offsite.bundle import TENSOR_FILE, Bundle, open_bundle
from offsite.console import say
from offsite.digests import model_digest
from offsite.errors import RunFailed
from offsite.fetch import fetched_folder, known
from offsite.manifest import entries, write_manifest
from offsite.models import load_model, load_tokenizer
from offsite.owner import OwnerRecord, find_owner_record
from offsite.staging import refuse_existing, staged_folder
from offsite.tensors import read_tensors, spec_of, write_tensors
from server.adapted import AdaptedManifest, Form, load_adapted, stored_names
from server.config import PlugConfig
from server.fit import Fitted, fit, plain_model, plug, plugged, read_adapter, unplug
from server.peftfolder import open_with_peft, write_peft_folder
from server.probe import READ_BACK_TOLERANCE, TOLERANCES, deviation, probe_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Fitted", "fit", "load_adapted", "merge", "plug", "plugged", "read_adapter", "run"]

PEFT_KINDS = ("lora", "rslora", "dora")


def run(config: PlugConfig) -> dict[str, object]:
    """Run the verb: check, plug in, write, compare, publish.

    Raises:
        ConfigError: when the model or the owner's record is not found, or the output exists.
        ArtefactError: with the subclass of the check that the bundle failed.
        RunFailed: when what was written does not compute what the plugged-in model does.
    """
    refuse_existing(config.output)
    bundle = open_bundle(config.bundle)
    record = find_record(bundle, config.package)
    read_adapter(bundle, record)  # a bad bundle is refused before the full model is loaded
    model = load_model(config.model)
    adapter = fit(model, bundle, record)
    before = probe_logits(model, "the full model")
    attached = plug(model, adapter)
    expected = probe_logits(plain_model(attached), f"the model with bundle {bundle.path.name!r} plugged in")
    effect = deviation(expected, before)
    with staged_folder(config.output) as stage:
        base = base_name(config.model)
        if config.merge:
            form: Form = "merged"
            merged = merge(attached)
            del model, attached
            error = _require_close(probe_logits(merged, "the merged model"), expected, merged, effect)
            merged_digest: str | None = _write_merged(stage, merged, config.model)
            del merged
        else:
            form = "peft" if adapter.spec.kind in PEFT_KINDS else "own"
            merged_digest, error = None, _write_adapter(stage, form, attached, adapter, base, expected)
        manifest = AdaptedManifest(
            form=form,
            base=base,
            base_digest=record.base_digest,
            package_digest=record.package_digest,
            bundle_digest=bundle.digest,
            merged_digest=merged_digest,
            adapter=adapter.spec,
            sites=dict(adapter.sites),
            tensors={name: spec_of(tensor) for name, tensor in adapter.tensors.items()},
            files=entries(stage, [path.name for path in stage.iterdir()]),
        )
        write_manifest(stage, manifest)
    say(f"{config.output.name}: {_SHOWN[form]}, {len(manifest.tensors)} tensors on {len(manifest.sites)} blocks")
    return _result(config, manifest, effect, error)


_SHOWN: dict[Form, str] = {"peft": "a PEFT folder", "own": "the changed tensors", "merged": "a merged checkpoint"}


def base_name(model: str) -> str:
    """Return where the full model is found again, also by other programs: a folder's absolute path, or a hub id."""
    folder = Path(model) if Path(model).is_dir() else fetched_folder(model) if model in known() else None
    return str(folder.resolve()) if folder else model


def find_record(bundle: Bundle, package: Path | None) -> OwnerRecord:
    """Return the owner's record of the package the bundle was tuned on: the named one's, or one found near.

    Raises:
        ConfigError: when none is found near the bundle or the current folder.
        ArtefactError: when the named package has none.
    """
    folder = bundle.path.resolve().parent
    return find_owner_record(bundle.manifest.package_digest, package, [folder, Path.cwd(), folder.parent])


def merge(attached: Attached) -> PreTrainedModel:
    """Return the full model with the adapter merged into its own weights, in their dtype; `attached` is used up.

    Raises:
        RunFailed: when a merged weight is not finite.
    """
    if not hasattr(attached.model, "merge_and_unload"):
        return plain_model(attached)
    try:
        return attached.model.merge_and_unload(safe_merge=True)  # type: ignore[no-any-return,operator]
    except ValueError as error:
        raise RunFailed("a merged weight is not finite in the model's dtype", hint="plug in without --merge") from error


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


def _write_merged(stage: Path, merged: PreTrainedModel, name: str) -> str:
    """Write checkpoint and tokenizer, and return the model's digest, once they were read back as they were.

    Raises:
        RunFailed: when the checkpoint read back is another.
    """
    merged.save_pretrained(stage)
    load_tokenizer(name).save_pretrained(stage)
    digest, expected = model_digest(merged), probe_logits(merged)
    read_back = load_model(str(stage))
    if model_digest(read_back) != digest:
        raise RunFailed("the merged checkpoint reads back as other tensors than were written")
    error = deviation(probe_logits(read_back), expected)  # the configuration counts too
    if error > READ_BACK_TOLERANCE:
        raise RunFailed(f"the merged checkpoint reads back with logits that differ by {error:.2g}")
    return digest


def _write_adapter(stage: Path, form: Form, attached: Attached, adapter: Fitted, base: str, expected: Tensor) -> float:
    """Write the adapter alone and return the deviation of its logits when it is opened again.

    Raises:
        RunFailed: when it computes something else.
    """
    model = plain_model(attached)
    if form == "own":
        names = stored_names(form, adapter.sites, adapter.tensors)
        write_tensors(stage / TENSOR_FILE, {names[name]: tensor for name, tensor in adapter.tensors.items()})
        read_tensors(stage / TENSOR_FILE, {names[name]: spec_of(tensor) for name, tensor in adapter.tensors.items()})
        return 0.0
    unplug(attached)
    write_peft_folder(stage, model, adapter, base=base)
    error = deviation(probe_logits(open_with_peft(model, stage), "the model opened by peft"), expected)
    if error > READ_BACK_TOLERANCE:
        raise RunFailed(f"peft opens the adapter with logits that differ by {error:.2g}", hint="plug in with --merge")
    return error


def _result(config: PlugConfig, manifest: AdaptedManifest, effect: float, error: float) -> dict[str, object]:
    return {
        "adapted": config.output.name,
        "form": manifest.form,
        "merged": manifest.form == "merged",
        "kind": manifest.adapter.kind,
        "placement": manifest.adapter.placement,
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
