"""Packages with encoded tensors: what they hold, and what is refused of a copy with one change, bound anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from emulator.compression.packed import quantised
from offsite.artefacts.encodings import Encoded, Encoding, decode
from offsite.artefacts.package import open_package
from offsite.errors import ArtefactError, BadSchema, NotFinite, TooLarge, WrongNames, WrongShape
from offsite.tensors import spec_of

UP, DOWN = "model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.down_proj.weight"
QUERY, OUT = "model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn.o_proj.weight"


def parts_for(model):
    """One tensor of every kind, and factors that are packed."""
    up, down = (model.get_parameter(name).detach() for name in (UP, DOWN))
    u, sigma, vt = torch.linalg.svd(up, full_matrices=False)
    left, right = (u[:, :3] * sigma[:3]).bfloat16(), vt[:3].bfloat16()
    factors = {
        f"{side}.{key}": one
        for side, w in (("left", left), ("right", right))
        for key, one in quantised(w, "int8").items()
    }
    gate = UP.replace("up_proj", "gate_proj")
    return {
        UP: Encoded(Encoding(kind="low-rank", rank=3), {"left": left, "right": right}),
        gate: Encoded(Encoding(kind="low-rank", rank=3, group=64, factors="int8"), factors),
        DOWN: Encoded(Encoding(kind="nf3", group=64), quantised(down, "nf3")),
        QUERY: Encoded(Encoding(kind="int8", group=64), quantised(model.get_parameter(QUERY).detach(), "int8")),
        OUT: Encoded(
            Encoding(kind="int4", group=64, turned=True), quantised(model.get_parameter(OUT).detach().T, "int4")
        ),
    }


@pytest.fixture(scope="module")
def parts(full_llama):
    return parts_for(full_llama)


@pytest.fixture(scope="module")
def encoded_package(tmp_path_factory, make_package, parts):
    out = tmp_path_factory.mktemp("encoded") / "package"
    return make_package(out, kept=tuple(range(8)), encoded=parts)


def test_the_file_holds_the_parts_and_the_manifest_the_model(encoded_package, whole_package, parts):
    held = load_file(encoded_package.path / "model.safetensors")
    manifest = json.loads((encoded_package.path / "offsite.json").read_text())
    assert manifest["tensors"] == json.loads((whole_package.path / "offsite.json").read_text())["tensors"]
    assert held.keys() == (manifest["tensors"].keys() - parts.keys()) | {
        f"{name}.{suffix}" for name, one in parts.items() for suffix in one.parts
    }
    assert manifest["encodings"][UP] == {"kind": "low-rank", "rank": 3}
    assert manifest["encodings"][OUT] == {"kind": "int4", "group": 64, "turned": True}


def test_a_package_without_says_nothing_of_it(whole_package):
    assert "encodings" not in json.loads((whole_package.path / "offsite.json").read_text())


def test_the_model_has_what_the_parts_stand_for(encoded_package, full_llama, parts):
    model = encoded_package.load_model()
    for name, parameter in model.named_parameters():
        if name in parts:
            wanted = decode(name, spec_of(parameter), parts[name].encoding, parts[name].parts)
            assert torch.equal(parameter, wanted)
        else:
            assert torch.equal(parameter, full_llama.get_parameter(name))
    some = encoded_package.load_tensors([UP, OUT, "model.norm.weight"])
    assert some.keys() == {UP, OUT, "model.norm.weight"}
    assert all(torch.equal(tensor, model.get_parameter(name)) for name, tensor in some.items())
    assert encoded_package.empty_model().get_parameter(UP).shape == (48, 32)


def test_parts_in_several_shards(tmp_path, monkeypatch, make_package, parts):
    monkeypatch.setattr("offsite.artefacts.package.SHARD_LIMIT_BYTES", 3000)
    package = make_package(tmp_path / "package", kept=tuple(range(8)), encoded=parts)
    assert len(list(package.path.glob("model-*.safetensors"))) > 5
    assert torch.equal(package.load_tensors([DOWN])[DOWN], package.load_model().get_parameter(DOWN))


# --- one change to a valid package


def tensors(**edits):
    def change(folder):
        found = load_file(folder / "model.safetensors")
        for name, value in edits.items():
            key = KEYS[name]
            found[key] = value(found[key]) if callable(value) else value
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def gone(name):
    def change(folder):
        found = load_file(folder / "model.safetensors")
        del found[KEYS[name]]
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def more(folder):
    found = load_file(folder / "model.safetensors")
    found[UP] = found[f"{UP}.left"] @ found[f"{UP}.right"]  # the plain tensor beside its parts
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


KEYS = {
    "left": f"{UP}.left",
    "right": f"{UP}.right",
    "nf3": f"{DOWN}.codes",
    "nf3_scales": f"{DOWN}.scales",
    "int8": f"{QUERY}.codes",
    "int8_scales": f"{QUERY}.scales",
    "int4": f"{OUT}.codes",
    "packed_left": f"{UP.replace('up_proj', 'gate_proj')}.left.codes",
}


def stated(name, **changes):
    def edit(manifest):
        manifest["encodings"][name] = {**manifest["encodings"].get(name, {}), **changes}

    return edit


def instead(name, encoding):
    def edit(manifest):
        manifest["encodings"][name] = encoding

    return edit


def without(name):
    return lambda manifest: manifest["encodings"].pop(name)


def first(value):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


def bomb(manifest):
    for name, spec in manifest["tensors"].items():
        if name in (UP, DOWN):
            manifest["tensors"][name] = {**spec, "shape": [2**20, 2**20]}
    manifest["encodings"] = {UP: {"kind": "low-rank", "rank": 3}}


ON_OPENING = {
    "an unknown kind": (None, stated(UP, kind="nf2"), BadSchema),
    "a kind that is a path": (None, stated(UP, kind="../x.py"), BadSchema),
    "code beside a kind": (None, stated(UP, decoder="import os"), BadSchema),
    "encodings that are a list": (None, lambda manifest: manifest.update(encodings=[]), BadSchema),
    "no kind": (None, instead(UP, {"rank": 3}), BadSchema),
    "no rank": (None, instead(UP, {"kind": "low-rank"}), BadSchema),
    "a rank of zero": (None, stated(UP, rank=0), BadSchema),
    "a rank that is no number": (None, stated(UP, rank="3"), BadSchema),
    "another rank": (None, stated(UP, rank=4), WrongShape),
    "a rank above what fits": (None, stated(UP, rank=33), WrongShape),
    "a rank above any": (None, stated(UP, rank=2**60), BadSchema),
    "a rank where there is none": (None, stated(DOWN, rank=2), BadSchema),
    "a group that is none": (None, stated(DOWN, group=48), BadSchema),
    "no group": (None, instead(DOWN, {"kind": "nf3"}), BadSchema),
    "another group": (None, stated(DOWN, group=32), WrongShape),
    "a group where nothing is packed": (None, stated(UP, group=64), BadSchema),
    "another number of bits": (None, stated(DOWN, kind="nf4"), WrongShape),
    "factors packed otherwise": (None, stated(UP, factors="nf4", group=64), WrongNames),
    "an encoding turned": (None, stated(DOWN, turned=True), WrongShape),
    "an encoding of no tensor": (None, stated("model.layers.3.x", kind="nf3", group=64), BadSchema),
    "an encoding of a norm": (None, stated("model.norm.weight", kind="nf3", group=64), WrongShape),
    "an encoding of a plain tensor": (None, stated("model.embed_tokens.weight", kind="nf3", group=64), WrongNames),
    "an encoding less": (None, without(UP), WrongNames),
    "a part less": (gone("right"), None, WrongNames),
    "a tensor beside its parts": (more, None, WrongNames),
    "a part of another shape": (tensors(left=lambda one: one[:-1].clone()), None, WrongShape),
    "a part of another dtype": (tensors(left=lambda one: one.float()), None, WrongShape),
    "codes of another dtype": (tensors(int8=lambda one: one.to(torch.int32)), None, WrongShape),
    "codes too few": (tensors(nf3=lambda one: one[:-1].clone()), None, WrongShape),
    "scales too many": (tensors(int8_scales=lambda one: torch.cat([one, one], 1)), None, WrongShape),
    "a tensor far larger than what is stored": (None, bomb, ArtefactError),
    "a declared dtype that is no float": (
        None,
        lambda manifest: manifest["tensors"][UP].update(dtype="int64"),
        BadSchema,
    ),
}
ON_LOADING = {
    "a factor that is infinite": (tensors(left=first(float("inf"))), NotFinite),
    "a scale that is no number": (tensors(nf3_scales=first(float("nan"))), NotFinite),
    "a scale below zero": (tensors(nf3_scales=first(-1.0)), BadSchema),
    "a flood of subnormal scales": (tensors(int8_scales=lambda one: torch.full_like(one, 1e-39)), BadSchema),
    "a flood of subnormal factors": (tensors(left=lambda one: torch.full_like(one, 1e-39)), BadSchema),
    "factors whose product is subnormal": (
        tensors(left=lambda one: torch.full_like(one, 1e-20), right=lambda one: torch.full_like(one, 1e-20)),
        BadSchema,
    ),
    "factors whose product is infinite": (
        tensors(left=lambda one: torch.full_like(one, 1e30), right=lambda one: torch.full_like(one, 1e30)),
        NotFinite,
    ),
    "a code that int8 does not have": (tensors(int8=first(0)), BadSchema),
    "a code that int4 does not have": (tensors(int4=first(0x80)), BadSchema),
    "a code of a factor that int8 does not have": (tensors(packed_left=first(0)), BadSchema),
}


@pytest.mark.parametrize("name", ON_OPENING)
def test_refused_on_opening(tamper, encoded_package, name):
    change, edit, expected = ON_OPENING[name]
    folder = tamper(encoded_package.path, change=change, edit=edit)
    with pytest.raises(expected) as caught:
        open_package(folder)
    assert expected is ArtefactError or type(caught.value) is expected
    assert "\n" not in str(caught.value)
    assert str(folder.parent) not in str(caught.value)


@pytest.mark.parametrize("name", ON_LOADING)
def test_refused_on_loading(tamper, encoded_package, name):
    change, expected = ON_LOADING[name]
    package = open_package(tamper(encoded_package.path, change=change))
    with pytest.raises(expected) as caught:
        package.load_model()
    assert type(caught.value) is expected


def test_an_untouched_copy_opens(tamper, encoded_package):
    assert open_package(tamper(encoded_package.path)).manifest == encoded_package.manifest


def test_little_that_stands_for_much_is_refused_on_both_sides(tmp_path, make_package, tamper, monkeypatch, parts):
    """The bytes of the files limit what a reader gives memory for."""
    package = make_package(tmp_path / "package", kept=tuple(range(8)), encoded=parts)
    monkeypatch.setattr("offsite.artefacts.layout.EXPANSION_LIMIT", 1)
    with pytest.raises(TooLarge, match="expected at least one byte for every 1"):
        open_package(package.path)
    with pytest.raises(TooLarge):
        make_package(tmp_path / "second", kept=tuple(range(8)), encoded=parts)
    assert {path.name for path in tmp_path.iterdir()} == {"package", "package.owner.json"}


VECTORS = Path(__file__).parents[2] / "vectors" / "encodings"


@pytest.mark.parametrize("name", ["low-rank", "low-rank-nf4", "int8", "int4", "nf4", "nf3"])
def test_frozen_packages_open_to_the_bit(name):
    """A reader that finds other numbers has changed a format. The sums are in float64, of every entry by its place."""
    package = open_package(VECTORS / name)
    expected = json.loads((VECTORS / "expected.json").read_text())[name]
    assert package.digest == expected["digest"]
    model = package.load_model()
    assert package.manifest.encodings
    for tensor, (sum_, by_place) in expected["sums"].items():
        flat = model.get_parameter(tensor).detach().double().flatten()
        place = torch.arange(1, len(flat) + 1, dtype=torch.float64)
        found = [float(flat.sum()), float(flat @ place)]
        if name == "low-rank-nf4" or name == "low-rank":  # a product: sums of other order, then rounded
            assert found == pytest.approx([sum_, by_place], rel=1e-4, abs=1e-4)
        else:
            assert found == pytest.approx([sum_, by_place], rel=1e-12, abs=1e-12)
