"""Names that cross between the parties with digits of another script in them.

A pattern that says "digit" lets fullwidth, Arabic and many other digits through, in some languages' patterns more than
in others'; a shard called so passed one check and failed in the next with a traceback. What is named in an artefact is
named in ASCII.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from offsite import errors
from offsite.artefacts import package as packages
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.layout import Layout, PackageManifest
from offsite.artefacts.package import open_package
from offsite.audits.record import BlockAlignment
from offsite.config import _read_yaml
from offsite.errors import ArtefactError, ConfigError
from offsite.training.devices import choose_device

DIGITS = {
    "fullwidth": "\uff11",
    "arabic": "\u0661",
    "devanagari": "\u0967",
    "mathematical": "\U0001d7cf",
    "superscript": "\u00b9",
    "roman": "\u2160",
}


@pytest.fixture(params=list(DIGITS))
def digit(request):
    return DIGITS[request.param]


@pytest.fixture
def sharded(tmp_path, make_package, monkeypatch):
    monkeypatch.setattr(packages, "SHARD_LIMIT_BYTES", 60_000)
    return make_package(tmp_path / "package")


def test_a_shards_name(sharded, digit, tamper):
    names = sorted(path.name for path in sharded.path.glob("model-*.safetensors"))
    assert len(names) > 1
    other = names[0].replace("1", digit, 1)

    def rename(folder):
        (folder / names[0]).rename(folder / other)
        index = folder / "model.safetensors.index.json"
        index.write_text(index.read_text().replace(names[0], other), encoding="utf-8")

    def edit(manifest):
        manifest["files"][other] = manifest["files"].pop(names[0])

    with pytest.raises(errors.WrongNames, match="binds a file name that an artefact may not hold") as caught:
        open_package(tamper(sharded.path, change=rename, edit=edit))
    assert str(caught.value).isascii()


PLACES = """a linear, an MLP's linear, a buffer, an adaptable linear, a tensor, the stack, the architecture, the method,
a figure""".replace("\n", " ").split(", ")


def places(package):
    """Every name that a package's manifest states, as a change to it."""
    layout = package.manifest.layout.model_dump()
    linear = next(iter(layout["linears"]))
    tensor = next(iter(package.manifest.tensors))

    def renamed(found, old, new):
        return {new if name == old else name: value for name, value in found.items()}

    return {
        "a linear": lambda m, d: m["layout"].update(linears=renamed(m["layout"]["linears"], linear, f"{linear}{d}")),
        "an MLP's linear": lambda m, d: m["layout"].update(mlp_linears=[*m["layout"]["mlp_linears"], f"bottom.{d}.x"]),
        "a buffer": lambda m, d: m["layout"].update(buffers=[f"bottom.{d}.bias"]),
        "an adaptable linear": lambda m, d: m["layout"].update(adaptable_middle=[f"mlp{d}"]),
        "a tensor": lambda m, d: m.update(tensors=renamed(m["tensors"], tensor, f"{tensor}{d}")),
        "the stack": lambda m, d: m["layout"].update(stack=f"model.layers{d}"),
        "the architecture": lambda m, d: m["layout"].update(model_type=f"llama{d}"),
        "the method": lambda m, d: m["method"].update(name=f"drop{d}"),
        "a figure": lambda m, d: m.update(figures={f"kl{d}": 1.0}),
    }


@pytest.mark.parametrize("place", PLACES)
def test_every_name_in_a_packages_manifest(place, digit, dropped_package, tamper):
    change = places(dropped_package)[place]
    with pytest.raises(ArtefactError) as caught:
        open_package(tamper(dropped_package.path, edit=lambda manifest: change(manifest, digit)))
    assert type(caught.value) is errors.BadSchema
    assert str(caught.value).isascii()


def test_numbers_in_words(digit):
    with pytest.raises(ValidationError):
        AdapterSpec(placement=f"{digit}+1")
    with pytest.raises(ValidationError):
        BlockAlignment(block=f"top.{digit}", cosine=1.0, cka=1.0)
    with pytest.raises(ConfigError):
        choose_device(f"cuda:{digit}")


def test_numbers_in_settings(digit, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(f"steps: 1{digit}\n", encoding="utf-8")
    assert _read_yaml(path) == {"steps": f"1{digit}"}  # a word, which no number's setting takes


def test_no_pattern_of_ours_says_digit_or_word_for_every_script():
    """But for what looks for times and paths in text that is to leave, where more is safer than less."""
    import offsite

    root = Path(offsite.__file__).parents[1]
    names = ("offsite", "emulator", "client", "server", "adapters")
    found = [
        f"{path.name}: {line.strip()}"
        for name in names
        for path in sorted((root / name).rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(r"\\[dw]", line) and path.name != "scan.py"
    ]
    assert found == []


def test_the_forms_that_are_meant_still_pass(dropped_package):
    assert AdapterSpec(placement="12+3").counts == (12, 3)
    assert Layout.model_validate(dropped_package.layout.model_dump()) == dropped_package.layout
    assert PackageManifest.model_validate(dropped_package.manifest.model_dump()) == dropped_package.manifest
