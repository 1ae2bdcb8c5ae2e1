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
from offsite.modelling.load import load_model

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


def test_what_is_distilled_is_packed_afterwards(model_folder, public_file, tmp_path):
    """The same run without packing gives the middle that the packed package holds, but for rounding."""
    trained = {"method": "width", "width": "0.5", "steps": "3", "warmup_steps": "1", "holdout": "0.2"}
    plain = run(settings(model_folder, tmp_path / "plain", public=str(public_file), **trained))
    told = run(settings(model_folder, tmp_path / "packed", public=str(public_file), **trained, pack="int8"))
    assert told["held_out_kl"] == plain["held_out_kl"]
    assert 0 < told["packing_error"] < 0.02
    assert 8 < told["packed_bits"] < 9
    packages = [open_package(tmp_path / name) for name in ("plain", "packed")]
    assert packages[1].num_bytes < packages[0].num_bytes
    stated = packages[1].manifest
    assert stated.method.settings == {"width": 0.5, "pack": "int8"}
    assert stated.figures["held_out_kl_before_packing"] == pytest.approx(plain["held_out_kl"], rel=1e-5)
    assert "held_out_kl" not in stated.figures
    models = [package.load_model() for package in packages]
    changed = whole = 0.0
    for name, parameter in models[0].named_parameters():
        other = models[1].get_parameter(name)
        if name not in stated.encodings:
            assert torch.equal(parameter, other)
            continue
        assert name.split(".")[2] not in ("0", "5")  # the ends never
        changed += float((parameter.detach().double() - other.detach().double()).square().sum())
        whole += float(parameter.detach().double().square().sum())
    record = read_owner_record(owner_record_path(tmp_path / "packed"))
    assert record.figures["packing_error"] == pytest.approx((changed / whole) ** 0.5, rel=1e-4)
    assert "figures" not in owner_record_path(tmp_path / "plain").read_text()


def test_a_share_of_one_is_the_model_bit_for_bit(model_folder, public_file, tmp_path):
    run(settings(model_folder, tmp_path / "package", public=str(public_file), method="low-rank", rank_share="1"))
    package, full = open_package(tmp_path / "package"), load_model(str(model_folder))
    assert package.layout.middle_whole
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(package.load_model()(ids).logits, full(ids).logits)
