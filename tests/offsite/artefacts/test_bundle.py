"""The bundle: what the client discloses, and every check on arrival."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.kinds import declared
from offsite.artefacts.bundle import DISCLOSABLE, AdapterSpec, open_bundle, write_bundle
from offsite.errors import (
    ArtefactError,
    BadDigest,
    BadSchema,
    ConfigError,
    NotFinite,
    WrongBinding,
    WrongNames,
    WrongShape,
)

SPEC = AdapterSpec(kind="lora", placement="1+2", rank=2, dtype="float32")
A = "bottom.0.self_attn.q_proj.lora_A"


def tensors_of(expected, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(spec.shape, generator=generator) for name, spec in expected.items()}


@pytest.fixture
def expected(dropped_package):
    return declared(SPEC, dropped_package.layout, dropped_package.block_tensors())


@pytest.fixture
def bundle(tmp_path, dropped_package, expected):
    return write_bundle(
        tmp_path / "bundle", package=dropped_package, spec=SPEC, tensors=tensors_of(expected), expected=expected
    )


def test_what_was_written_is_read(bundle, expected, dropped_package):
    found = bundle.load_tensors(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors_of(expected).items())
    bundle.bind(package_digest=dropped_package.digest, base_digest=dropped_package.manifest.base_digest)
    again = open_bundle(bundle.path)
    assert again == bundle
    assert again.num_bytes == (bundle.path / "adapter.safetensors").stat().st_size


def test_nothing_is_disclosed_unless_named(tmp_path, bundle, expected, dropped_package):
    assert sorted(path.name for path in bundle.path.iterdir()) == ["adapter.safetensors", "offsite.json"]
    stated = json.loads((bundle.path / "offsite.json").read_text())
    assert stated["round_digest"] is None
    assert set(stated) == {
        *("format", "package_digest", "base_digest", "round_digest", "adapter", "tensors", "disclosed", "files")
    }
    assert stated["disclosed"] == {}
    shared = write_bundle(
        tmp_path / "shared",
        package=dropped_package,
        spec=SPEC,
        tensors=tensors_of(expected),
        expected=expected,
        figures={"steps": 40, "validation_loss": 2.5, "num_records": 1234},
        disclose=("steps", "validation_loss"),
    )
    assert shared.manifest.disclosed == {"steps": 40.0, "validation_loss": 2.5}
    assert "1234" not in (shared.path / "offsite.json").read_text()


def test_equal_adapters_make_equal_bundles(tmp_path, bundle, expected, dropped_package):
    again = write_bundle(
        tmp_path / "again", package=dropped_package, spec=SPEC, tensors=tensors_of(expected), expected=expected
    )
    assert again.digest == bundle.digest


def test_tensors_are_cast_to_the_stated_dtype(tmp_path, dropped_package):
    spec = SPEC.model_copy(update={"dtype": "bfloat16"})
    expected = declared(spec, dropped_package.layout, dropped_package.block_tensors())
    tensors = tensors_of(expected)
    bundle = write_bundle(tmp_path / "bundle", package=dropped_package, spec=spec, tensors=tensors, expected=expected)
    assert torch.equal(bundle.load_tensors(expected)[A], tensors[A].to(torch.bfloat16))


# What the client may not write


@pytest.mark.parametrize(
    ("disclose", "figures", "message"),
    [
        (("loss_on_patient_7",), {}, "'loss_on_patient_7' is not one of num_records, num_tokens"),
        (("steps",), {}, "this run has no finite figure 'steps'"),
        (("validation_loss",), {"validation_loss": float("nan")}, "no finite figure 'validation_loss'"),
    ],
)
def test_figures_that_cannot_be_disclosed(tmp_path, expected, dropped_package, disclose, figures, message):
    with pytest.raises(ConfigError, match=message):
        write_bundle(
            tmp_path / "bundle",
            package=dropped_package,
            spec=SPEC,
            tensors=tensors_of(expected),
            expected=expected,
            figures=figures,
            disclose=disclose,
        )
    assert list(tmp_path.iterdir()) == []


CHANGES = {
    "a tensor more": (lambda found: found.update(more=torch.ones(1)), WrongNames),
    "a tensor less": (lambda found: found.pop(A), WrongNames),
    "a tensor of another shape": (lambda found: found.update({A: torch.ones(3, 32)}), WrongShape),
    "NaN": (lambda found: found[A].fill_(float("nan")), NotFinite),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_adapter_that_is_not_the_expected_one_is_not_written(tmp_path, expected, dropped_package, name):
    change, error = CHANGES[name]
    tensors = tensors_of(expected)
    change(tensors)
    with pytest.raises(error):
        write_bundle(tmp_path / "bundle", package=dropped_package, spec=SPEC, tensors=tensors, expected=expected)
    assert list(tmp_path.iterdir()) == []


def test_overflow_in_the_stated_dtype_is_not_written(tmp_path, expected, dropped_package):
    spec = SPEC.model_copy(update={"dtype": "bfloat16"})
    expected = declared(spec, dropped_package.layout, dropped_package.block_tensors())
    tensors = {name: tensor.double() for name, tensor in tensors_of(expected).items()}
    tensors[A][0, 0] = 1e300
    with pytest.raises(NotFinite, match="lora_A"):
        write_bundle(tmp_path / "bundle", package=dropped_package, spec=spec, tensors=tensors, expected=expected)


# What is refused on arrival


def at(*keys, value):
    def edit(manifest):
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return edit


def tensors(edit):
    def change(folder):
        found = load_file(folder / "adapter.safetensors")
        edit(found)
        save_file(found, folder / "adapter.safetensors", metadata={"format": "pt"})

    return change


def code(folder):
    (folder / "adapter.py").write_text("import os")


ON_OPENING = {
    "another version": (None, at("format", value="offsite/bundle/2"), WrongBinding),
    "a package's format": (None, at("format", value="offsite/package/1"), WrongBinding),
    "an unknown key": (None, at("base_model_name_or_path", value="/x"), BadSchema),
    "an infinite scale": (None, at("adapter", "alpha", value=float("inf")), BadSchema),
    "a scale that is NaN": (None, at("adapter", "alpha", value=float("nan")), BadSchema),
    "no rank": (None, at("adapter", "rank", value=0), BadSchema),
    "a huge rank": (None, at("adapter", "rank", value=10**9), BadSchema),
    "a rank that is text": (None, at("adapter", "rank", value="8"), BadSchema),
    "a placement that is none": (None, at("adapter", "placement", value="2+2+2"), BadSchema),
    "a placement of nothing": (None, at("adapter", "placement", value="0+0"), BadSchema),
    "a target by pattern": (None, at("adapter", "targets", value=".*"), BadSchema),
    "a kind with a path": (None, at("adapter", "kind", value="os.system"), BadSchema),
    "a dtype that is none": (None, at("adapter", "dtype", value="float16"), BadSchema),
    "a figure that may not be disclosed": (None, at("disclosed", value={"user": 1.0}), BadSchema),
    "a figure that is infinite": (None, at("disclosed", value={"steps": float("inf")}), BadSchema),
    "a file more": (code, None, WrongNames),
    "a file more, bound": (
        code,
        at("files", "adapter.py", value={"bytes": 0, "sha256": "sha256:" + "0" * 64}),
        WrongNames,
    ),
    "no tensor file": (
        lambda folder: (folder / "adapter.safetensors").unlink(),
        at("files", value={}),
        WrongNames,
    ),
    "a digest that is off": (
        None,
        at("files", "adapter.safetensors", "sha256", value="sha256:" + "0" * 64),
        BadDigest,
    ),
    "a tensor more": (tensors(lambda found: found.update(more=torch.ones(1))), None, WrongNames),
    "a tensor less": (tensors(lambda found: found.pop(A)), None, WrongNames),
    "a tensor under another name": (
        tensors(lambda found: found.update({"bottom.1.x.lora_A": found.pop(A)})),
        None,
        WrongNames,
    ),
    "a tensor of another shape": (tensors(lambda found: found.update({A: torch.ones(32, 2)})), None, WrongShape),
    "a tensor of another dtype": (tensors(lambda found: found.update({A: found[A].double()})), None, WrongShape),
    "a pickle": (lambda folder: torch.save({}, folder / "adapter.safetensors"), None, BadSchema),
}


@pytest.mark.parametrize("name", ON_OPENING)
def test_refused_on_opening(tamper, bundle, name):
    change, edit, expected = ON_OPENING[name]
    with pytest.raises(expected) as caught:
        open_bundle(tamper(bundle.path, change=change, edit=edit))
    assert type(caught.value) is expected
    assert "\n" not in str(caught.value)


ON_LOADING = {
    "a whole set of names of another placement": ({"placement": "2+2"}, WrongNames),
    "another rank": ({"rank": 3}, WrongShape),
    "another kind": ({"kind": "dora"}, WrongNames),
    "fewer targets": ({"targets": "attention"}, WrongNames),
    "another dtype": ({"dtype": "bfloat16"}, WrongShape),
}


@pytest.mark.parametrize("name", ON_LOADING)
def test_a_spec_that_is_not_the_one_of_the_tensors(tamper, bundle, dropped_package, name):
    """Tensors are compared with what the stated adapter must have, whatever the bundle declares."""
    changes, error = ON_LOADING[name]
    opened = open_bundle(tamper(bundle.path, edit=lambda found: found["adapter"].update(changes)))
    names = declared(opened.manifest.adapter, dropped_package.layout, dropped_package.block_tensors())
    with pytest.raises(error):
        opened.load_tensors(names)


def test_values_that_are_not_finite(tamper, bundle, expected):
    change = tensors(lambda found: found[A].view(-1)[5:6].fill_(float("-inf")))
    with pytest.raises(NotFinite, match="lora_A"):
        open_bundle(tamper(bundle.path, change=change)).load_tensors(expected)


def test_a_bundle_of_another_package_or_base(bundle, dropped_package, narrow_package):
    base = dropped_package.manifest.base_digest
    with pytest.raises(WrongBinding, match="was tuned on package"):
        bundle.bind(package_digest=narrow_package.digest, base_digest=base)
    with pytest.raises(WrongBinding, match="belongs to base model"):
        bundle.bind(package_digest=dropped_package.digest, base_digest="sha256:" + "0" * 64)


def test_no_bundle_at_all(tmp_path, dropped_package):
    with pytest.raises(ArtefactError, match="no bundle folder named 'gone'"):
        open_bundle(tmp_path / "gone")
    with pytest.raises(WrongBinding, match="'package' is a package, expected a bundle"):
        open_bundle(dropped_package.path)


def test_counts_of_a_placement():
    assert AdapterSpec(placement="0+2").counts == (0, 2)
    assert AdapterSpec(placement="all").counts is None
    assert (AdapterSpec(placement="last:12").counts, AdapterSpec(placement="last:12").last) == (None, 12)
    assert [AdapterSpec(placement=one).last for one in ("all", "0+2")] == [None, None]
    for wrong in (
        "last",
        "last:",
        "last:0",
        "last:01",
        "last:-1",
        "last:12345",
        "last:3+2",
        "Last:3",
        "last:3 ",
        "last:٣",
    ):
        with pytest.raises(ValueError, match="pattern"):
            AdapterSpec(placement=wrong)
    assert set(DISCLOSABLE) == {"num_records", "num_tokens", "steps", "validation_loss"}
