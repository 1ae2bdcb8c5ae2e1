from __future__ import annotations

import subprocess
import sys

import pytest
import safetensors
import safetensors.torch
import torch

from adapters.kinds import declared
from offsite.bundle import AdapterSpec, Bundle, write_bundle
from offsite.errors import ArtefactError, BadDigest, BadSchema, WrongBinding
from offsite.inspect import inspect_artefact, run
from offsite.package import Package
from offsite.settings import InspectConfig


@pytest.fixture
def bundle(tmp_path, dropped_package):
    spec = AdapterSpec(kind="lora", placement="0+1", rank=2)
    names = declared(spec, dropped_package.layout, dropped_package.block_tensors())
    tensors = {name: torch.ones(stated.shape) for name, stated in names.items()}
    settings = {"figures": {"steps": 40}, "disclose": ("steps",)}
    return write_bundle(
        tmp_path / "bundle", package=dropped_package, spec=spec, tensors=tensors, expected=names, **settings
    )


def test_a_package_is_shown_with_its_parts(narrow_package, capsys):
    found = run(InspectConfig(artefact=narrow_package.path))
    assert found == {
        "kind": "package",
        "parameters": sum(stated.num_bytes // 4 for stated in narrow_package.manifest.tensors.values()),
        "middle_parameters": 4 * 2 * (32 * 32 + 32 * 16 + 32)
        + 3 * 32 * sum(len(range(n, 48, 3 + n % 2)) for n in range(4)),
        "digest": narrow_package.digest,
        "bytes": narrow_package.num_bytes,
        "verified": True,
    }
    out, err = capsys.readouterr()
    assert out == ""
    for shown in (
        "offsite/package/1",
        narrow_package.digest,
        "2 bottom + 4 middle + 2 top",
        "Apache-2.0",
        "config.json",
    ):
        assert shown in err
    assert "tokenizer.json" in err
    assert str(narrow_package.path.parent) not in err


def test_a_bundle_is_shown_with_what_it_discloses(bundle, dropped_package, capsys):
    found = run(InspectConfig(artefact=bundle.path, tensors=True))
    assert found["kind"] == "bundle"
    assert found["parameters"] == sum(stated.num_bytes // 2 for stated in bundle.manifest.tensors.values())
    err = capsys.readouterr().err
    for shown in ("lora on 0+1, rank 2 on all-linear", "steps 40", dropped_package.digest, "top.1.mlp.up_proj.lora_A"):
        assert shown in err


def test_no_tensor_is_loaded_and_no_torch(narrow_package, bundle, monkeypatch):
    def refuse(*arguments, **settings):
        raise AssertionError("a tensor was loaded")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    monkeypatch.setattr(safetensors.torch, "load_file", refuse)
    assert isinstance(inspect_artefact(narrow_package.path), Package)
    assert isinstance(inspect_artefact(bundle.path), Bundle)
    lines = [
        "import sys",
        "from offsite import cli",
        "assert cli.run(['inspect', sys.argv[1]]) == 0",
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines), str(bundle.path)], check=True, capture_output=True)


def test_what_is_neither(tmp_path, tamper, bundle):
    with pytest.raises(ArtefactError, match="no package folder named 'gone'"):
        inspect_artefact(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtefactError, match=r"folder 'empty' holds no offsite\.json"):
        inspect_artefact(tmp_path / "empty")
    (tmp_path / "empty" / "offsite.json").write_bytes(b"\xff")
    with pytest.raises(BadSchema):
        inspect_artefact(tmp_path / "empty")
    (tmp_path / "empty" / "offsite.json").write_text('{"format": "offsite/else/1"}')
    with pytest.raises(WrongBinding, match="'empty' is offsite/else/1"):
        inspect_artefact(tmp_path / "empty")


def test_a_changed_byte_is_found(tamper, bundle):
    folder = tamper(bundle.path)
    raw = bytearray((folder / "adapter.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "adapter.safetensors").write_bytes(raw)
    with pytest.raises(BadDigest):
        inspect_artefact(folder)
