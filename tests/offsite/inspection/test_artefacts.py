"""What is shown of an artefact is what was verified; no tensor is loaded for it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from math import prod

import pytest
import torch

from adapters.kinds import declared
from offsite import cli
from offsite.artefacts.bundle import AdapterSpec, open_bundle, write_bundle
from offsite.artefacts.inspect import inspect_artefact
from offsite.errors import ArtefactError, BadDigest, BadSchema, WrongBinding, WrongNames, WrongShape
from offsite.inspection.config import InspectConfig
from offsite.inspection.inspect import run


@pytest.fixture
def bundle(tmp_path, dropped_package):
    spec = AdapterSpec(kind="lora", placement="1+2", rank=3, dtype="float32")
    expected = declared(spec, dropped_package.layout, dropped_package.block_tensors())
    tensors = {name: torch.ones(each.shape) for name, each in expected.items()}
    return write_bundle(
        tmp_path / "bundle",
        package=dropped_package,
        spec=spec,
        tensors=tensors,
        expected=expected,
        figures={"steps": 7},
        disclose=("steps",),
    )


def shown(capsys, *words):
    code = cli.run(["inspect", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_package(capsys, dropped_package, full_llama):
    code, out, err = shown(capsys, dropped_package.path)
    assert code == 0
    told = json.loads(out)
    blocks = [sum(p.numel() for p in block.parameters()) for block in full_llama.model.layers]
    total = sum(p.numel() for p in full_llama.parameters()) - blocks[3]
    assert told == {
        "kind": "package",
        "digest": dropped_package.digest,
        "bytes": sum(p.stat().st_size for p in dropped_package.path.iterdir() if p.name != "offsite.json"),
        "parameters": total,
        "middle_parameters": 3 * blocks[0],
        "verified": True,
        "checked": "every file agrees with the manifest",
    }
    for line in (
        "llama: 2 bottom + 3 middle + 2 top",
        "licence      Apache-2.0",
        "middle       drop",
        "on the ends only",
    ):
        assert line in err
    assert dropped_package.digest in err
    assert dropped_package.manifest.base_digest in err
    assert f"{total - 7 * blocks[0]:,}" in err  # embeddings, norms, head
    for name in dropped_package.manifest.files:
        assert name in err
    assert "q_proj" not in err


def test_every_tensor_when_asked(capsys, narrow_package):
    code, _, err = shown(capsys, narrow_package.path, "--tensors")
    assert code == 0
    for name, spec in narrow_package.manifest.tensors.items():
        (line,) = [line for line in err.splitlines() if line.split()[:1] == [name]]
        assert line.split()[1:] == [spec.dtype, "x".join(map(str, spec.shape))]
    assert "and 7 modules of each middle block" in err


def test_a_bundle(capsys, bundle):
    code, out, err = shown(capsys, bundle.path)
    assert code == 0
    told = json.loads(out)
    assert told["kind"] == "bundle"
    assert told["digest"] == open_bundle(bundle.path).digest
    assert told["bytes"] == (bundle.path / "adapter.safetensors").stat().st_size
    assert told["parameters"] == sum(prod(spec.shape) for spec in bundle.manifest.tensors.values())
    assert "adapter      lora on 1+2, rank 3 on all-linear, float32" in err
    assert "disclosed    steps 7" in err
    assert bundle.manifest.package_digest in err


def test_whole_blocks_have_no_rank_and_nothing_is_disclosed(capsys, tmp_path, dropped_package):
    spec = AdapterSpec(kind="blocks", placement="0+1", dtype="float32")
    expected = declared(spec, dropped_package.layout, dropped_package.block_tensors())
    tensors = {name: torch.ones(each.shape) for name, each in expected.items()}
    write_bundle(tmp_path / "b", package=dropped_package, spec=spec, tensors=tensors, expected=expected)
    _, _, err = shown(capsys, tmp_path / "b")
    assert "adapter      blocks on 0+1, float32" in err
    assert "nothing beyond shapes" in err


def test_terms_are_counted_not_printed_and_figures_are_shown(capsys, tmp_path, make_package):
    package = make_package(tmp_path / "p", terms="Do as\nyou like.", licence="", figures={"held_out_kl": 0.25})
    _, _, err = shown(capsys, package.path)
    assert "terms        15 characters, in offsite.json" in err
    assert "none stated" in err
    assert "held_out_kl  0.25" in err


def test_no_tensor_is_loaded(monkeypatch, bundle, dropped_package):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a tensor was loaded")

    for name in ("safetensors.safe_open", "safetensors.torch.load_file", "safetensors.torch.load"):
        monkeypatch.setattr(name, refuse)
    assert run(InspectConfig(thing=bundle.path))["kind"] == "bundle"
    assert run(InspectConfig(thing=dropped_package.path, tensors=True))["kind"] == "package"


def test_torch_is_not_even_imported(bundle, dropped_package):
    lines = [
        "import sys",
        "from pathlib import Path",
        "from offsite.inspection.inspect import run",
        "from offsite.inspection.config import InspectConfig",
        "for path in sys.argv[1:]: run(InspectConfig(thing=Path(path)))",
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules",
    ]
    words = [sys.executable, "-c", "\n".join(lines), str(bundle.path), str(dropped_package.path)]
    subprocess.run(words, check=True, capture_output=True)


def edit(change):
    def apply(folder):
        manifest = json.loads((folder / "offsite.json").read_text())
        change(manifest)
        (folder / "offsite.json").write_text(json.dumps(manifest))

    return apply


def flip(name):
    def apply(folder):
        raw = bytearray((folder / name).read_bytes())
        raw[-1] ^= 1
        (folder / name).write_bytes(bytes(raw))

    return apply


def retype(folder):
    manifest = json.loads((folder / "offsite.json").read_text())
    name = next(iter(manifest["tensors"]))
    manifest["tensors"][name]["shape"] = [1]
    (folder / "offsite.json").write_text(json.dumps(manifest))


TAMPERED = {
    "a flipped bit of a tensor": (flip("{tensors}"), BadDigest),
    "a file added": (lambda folder: (folder / "code.py").write_text("x"), WrongNames),
    "the tensors missing": (lambda folder: next(folder.glob("*.safetensors")).unlink(), WrongNames),
    "no manifest": (lambda folder: (folder / "offsite.json").unlink(), ArtefactError),
    "a manifest that is not JSON": (lambda folder: (folder / "offsite.json").write_bytes(b"{"), BadSchema),
    "a manifest that is a list": (lambda folder: (folder / "offsite.json").write_bytes(b"[]"), WrongBinding),
    "a manifest of bytes": (lambda folder: (folder / "offsite.json").write_bytes(b"\xff\xfe"), BadSchema),
    "a manifest nested too deep": (lambda folder: (folder / "offsite.json").write_bytes(b"[" * 200_000), BadSchema),
    "another version": (edit(lambda m: m.update(format=m["format"][:-1] + "2")), WrongBinding),
    "the other kind": (
        edit(lambda m: m.update(format="offsite/" + {"p": "bundle/1", "b": "package/1"}[m["format"][8]])),
        BadSchema,
    ),
    "a key more": (edit(lambda m: m.update(note="hello")), BadSchema),
    "another shape": (retype, WrongShape),
}


@pytest.mark.parametrize("kind", ["package", "bundle"])
@pytest.mark.parametrize("name", list(TAMPERED))
def test_nothing_is_shown_of_what_does_not_verify(capsys, tmp_path, bundle, dropped_package, kind, name):
    source = {"package": dropped_package, "bundle": bundle}[kind].path
    shutil.copytree(source, tmp_path / "copy")
    change, expected = TAMPERED[name]
    if name.startswith("a flipped bit"):
        change = flip(next(path.name for path in source.glob("*.safetensors")))
    change(tmp_path / "copy")
    with pytest.raises(expected) as caught:
        inspect_artefact(tmp_path / "copy")
    assert type(caught.value) is expected
    code, out, err = shown(capsys, tmp_path / "copy")
    assert (code, out) == (3, "")
    lines = err.splitlines()
    assert lines[0].startswith("offsite: error: ")
    assert len(lines) <= 2
    assert str(tmp_path) not in err


def test_what_is_no_folder(capsys, tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "nothing", tmp_path / "file", tmp_path):
        code, out, err = shown(capsys, path)
        assert (code, out) == (3, "")
        assert err.startswith("offsite: error: ")
