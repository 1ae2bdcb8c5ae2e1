"""Packages whose middle is stored as factors or packed, made by the verb and opened as a client does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from emulator.distillation.config import DistillConfig
from emulator.distillation.distill import run
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.artefacts.package import open_package
from offsite.config import build

SMALL = {"batch_size": "4", "block_tokens": "16", "bottom": "1", "top": "1", "precision": "fp32", "device": "cpu"}


def settings(model: Path, output: Path, **changes: object) -> DistillConfig:
    flags = {"model": str(model), "output": str(output), **SMALL, "steps": "0", **changes}
    return build(DistillConfig, flags={key: value for key, value in flags.items() if value is not None})


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "low-rank", "rank_share": "0.5"},
        {"method": "low-rank", "rank_share": "0.5", "pack": "nf4"},
        {"method": "packed", "pack": "int8", "public": None},
        {"method": "packed", "pack": "nf3", "public": None},
        {"method": "width", "width": "0.5", "pack": "int4"},
        {"method": "width", "width": "0.5", "pack": "nf4", "steps": "2", "warmup_steps": "1", "holdout": "0.2"},
        {"method": "drop", "blocks": "2", "pack": "nf3", "public": None},
    ],
)
def test_the_verb_writes_an_encoded_package_that_opens(model_folder, public_file, tmp_path, changes):
    out = tmp_path / "package"
    told = run(settings(model_folder, out, **{"public": str(public_file), **changes}))
    package = open_package(out)
    assert told["package_bytes"] == package.num_bytes
    record = read_owner_record(owner_record_path(out))
    assert len(record.encodings) == len(package.manifest.encodings) > 0
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.isfinite(package.load_model()(ids).logits).all()
