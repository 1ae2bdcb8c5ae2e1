"""Writing the package, which leaves, and the owner's record beside it, which stays."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedModel

from adapters.updates import placed
from emulator.compression.compress import Compressed
from offsite.artefacts.layout import Layout, Method, Text, describe_layout, saved_tensors
from offsite.artefacts.owner import OwnerRecord, write_owner_record
from offsite.artefacts.package import Package, write_config, write_package
from offsite.artefacts.trial import require_rebuildable
from offsite.errors import ConfigError
from offsite.modelling.depth import source_name
from offsite.modelling.split import Plan
from offsite.vision.reader import Reader

TERMS_LIMIT = 20_000
"""Characters of terms of use that a package may state."""


def publish(
    out: Path,
    *,
    model: PreTrainedModel,
    tokenizer: Reader,
    plan: Plan,
    compressed: Compressed,
    method: str,
    base_digest: str,
    figures: Mapping[str, float],
    dtype: str,
    dtypes: Mapping[str, str] | None = None,
    licence: str = "",
    terms: str = "",
) -> Package:
    """Write the package at `out` and, beside it, the record that never ships.

    Args:
        model: the emulator with its ends, whole, on any device: ``compressed.model`` unless that was sharded.
        dtype: dtype of the floating tensors in the package.
        dtypes: dtypes of the full model's tensors by name, for each to keep its own.

    Raises:
        ConfigError: when `out` exists.
        UnsupportedModel: when the tokenizer has no fast form.
        RunFailed: when the disk is full.
    """
    keep = plan.by_stack(model, compressed.kept)
    package = write_package(
        out,
        model=model,
        tokenizer=tokenizer,
        layout=layout_of(model, plan, compressed),
        base_digest=base_digest,
        method=Method(name=method, settings=dict(compressed.settings)),
        figures=figures,
        licence=licence,
        terms=terms,
        dtype=dtype,
        dtypes=None if dtypes is None else {name: dtypes[source_name(name, keep)] for name in saved_tensors(model)},
        encoded=compressed.encoded,
        compute=compressed.compute,
    )
    record = OwnerRecord(
        package_digest=package.digest,
        base_digest=base_digest,
        layout=package.layout,
        block_tensors=package.block_tensors(),
        num_blocks=plan.stack.num_blocks,
        num_encoder_blocks=None if plan.encoder is None else plan.encoder.stack.num_blocks,
        kept=compressed.kept,
        channels=dict(compressed.channels),
        experts=dict(compressed.experts),
        variant=compressed.variant,
        encodings={
            name: package.manifest.encodings[stored]
            for name in package.block_tensors()
            if (stored := placed(name, package.layout.blocks)) in package.manifest.encodings
        },
        figures=dict(compressed.figures),
    )
    try:
        write_owner_record(out, record)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # without its record a package can never be plugged in
        raise
    return package


def layout_of(model: PreTrainedModel, plan: Plan, compressed: Compressed) -> Layout:
    """Return the layout of the emulator with its ends."""
    return describe_layout(
        model,
        num_bottom=plan.num_bottom,
        num_top=plan.num_top,
        encoder_ends=(0, 0) if plan.encoder is None else (plan.encoder.num_bottom, plan.encoder.num_top),
        adaptable_middle=compressed.adaptable_middle,
        middle_whole=compressed.middle_whole,
        stand_ins=any(one.encoding.kind == "low-rank" for one in compressed.encoded.values()),
    )


def try_out(plan: Plan, compressed: Compressed) -> None:
    """Return only if a client can build the emulator of its settings: asked before it is trained for hours.

    Raises:
        UnsupportedModel: saying what the client would not get.
    """
    with TemporaryDirectory() as folder:
        write_config(Path(folder), compressed.model, "float32")
        layout = layout_of(compressed.model, plan, compressed)
        require_rebuildable(Path(folder), compressed.model, layout, compressed.compute)


def read_terms(path: Path | None) -> str:
    """Return the text of the file with the terms of use; nothing for no file.

    Raises:
        ConfigError: when it cannot be read, is not UTF-8, is too long, or holds characters that are not seen.
    """
    if path is None:
        return ""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read terms {path.name!r}: {(error.strerror or 'i/o error').lower()}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"terms {path.name!r} are not UTF-8 text") from None
    if len(text) > TERMS_LIMIT:
        raise ConfigError(f"terms {path.name!r} have {len(text)} characters, a package holds at most {TERMS_LIMIT}")
    for number, line in enumerate(text.split("\n"), 1):
        try:
            TypeAdapter(Text).validate_python(line)
        except ValidationError:
            raise ConfigError(
                f"line {number} of terms {path.name!r} holds a control, direction or other unseen character",
                hint="write it anew without: what a person agrees to must be what is seen",
            ) from None
    return text
