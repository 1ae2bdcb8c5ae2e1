"""Writing the package, which leaves, and the owner's record beside it, which stays."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from emulator.compression.compress import Compressed
from offsite.artefacts.layout import Method, describe_layout
from offsite.artefacts.owner import OwnerRecord, write_owner_record
from offsite.artefacts.package import Package, write_package
from offsite.errors import ConfigError
from offsite.modelling.split import Plan

TERMS_LIMIT = 20_000
"""Characters of terms of use that a package may state."""


def publish(
    out: Path,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    plan: Plan,
    compressed: Compressed,
    method: str,
    base_digest: str,
    figures: Mapping[str, float],
    dtype: str,
    licence: str = "",
    terms: str = "",
) -> Package:
    """Write the package at `out` and, beside it, the record that never ships.

    Args:
        model: the emulator with its ends, whole, on any device: ``compressed.model`` unless that was sharded.
        dtype: dtype of the floating tensors in the package.

    Raises:
        ConfigError: when `out` exists.
        UnsupportedModel: when the tokenizer has no fast form.
        RunFailed: when the disk is full.
    """
    package = write_package(
        out,
        model=model,
        tokenizer=tokenizer,
        layout=describe_layout(
            model,
            num_bottom=plan.num_bottom,
            num_top=plan.num_top,
            adaptable_middle=compressed.adaptable_middle,
            middle_whole=compressed.middle_whole,
        ),
        base_digest=base_digest,
        method=Method(name=method, settings=dict(compressed.settings)),
        figures=figures,
        licence=licence,
        terms=terms,
        dtype=dtype,
    )
    record = OwnerRecord(
        package_digest=package.digest,
        base_digest=base_digest,
        layout=package.layout,
        block_tensors=package.block_tensors(),
        num_blocks=plan.stack.num_blocks,
        kept=compressed.kept,
        channels=dict(compressed.channels),
    )
    try:
        write_owner_record(out, record)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)  # without its record a package can never be plugged in
        raise
    return package


def read_terms(path: Path | None) -> str:
    """Return the text of the file with the terms of use; nothing for no file.

    Raises:
        ConfigError: when it cannot be read, is not UTF-8 or is too long.
    """
    if path is None:
        return ""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read terms {path.name!r}: {(error.strerror or 'i/o error').lower()}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"terms {path.name!r} are not UTF-8 text") from None
    if len(text) > TERMS_LIMIT:
        raise ConfigError(f"terms {path.name!r} have {len(text)} characters, a package holds at most {TERMS_LIMIT}")
    return text
