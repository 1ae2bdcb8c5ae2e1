"""A model's folder came with a file cut short, or another folder was given where the full model belongs.

What was met: for a checkpoint whose copy had broken off, and for a package given as the model, the same line said that
the weights were not those of the configuration. Now a damaged file is named, and a folder of another kind by its kind.
"""

from __future__ import annotations

import shutil

import pytest
from two_parties import TwoParties

from offsite.errors import ConfigError
from offsite.modelling.load import load_model, load_tokenizer


@pytest.fixture
def parties(tmp_path, monkeypatch, capsys):
    return TwoParties(tmp_path / "parties", monkeypatch, capsys)


def cut(path, at):
    path.write_bytes(path.read_bytes()[:at])


DAMAGES = {
    "cut in the data": (lambda path: cut(path, -100), "is cut short or damaged"),
    "cut in the header": (lambda path: cut(path, 50), "is cut short or damaged"),
    "empty": (lambda path: cut(path, 0), "is cut short or damaged"),
    "more at the end": (lambda path: path.write_bytes(path.read_bytes() + b"xx"), "is cut short or damaged"),
    "a pointer": (
        lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        "is a Git LFS pointer, not the weights themselves",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_weight_file_that_is_damaged_is_named(parties, damage):
    do, told = DAMAGES[damage]
    do(parties.owner / "model" / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        load_model(str(parties.owner / "model"))
    assert str(caught.value) == f"model.safetensors of model 'model' {told}"
    assert caught.value.hint


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("at", [0, 100])
def test_the_tokenizers_file_that_is_damaged_is_named(parties, file, at):
    cut(parties.owner / "model" / file, at)
    with pytest.raises(ConfigError, match=rf"^{file} of model 'model' is not JSON$"):
        load_tokenizer(str(parties.owner / "model"))


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("package", "an offsite package"),
        ("registry/bundles/{id}", "an offsite bundle"),
        ("bundle.sealed", "a sealed folder"),
    ],
)
def test_a_folder_of_another_kind_is_told_by_its_kind(parties, given, kind):
    given = given.format(id=parties.figures["id"])
    parties.run(
        "owner",
        f"plug-in {given} {parties.figures['id']} --registry registry --keys keys --package package -o again",
        code=2,
    )
    assert f"folder '{given.rpartition('/')[2]}' is {kind}, not the full model" in parties.told
    assert not (parties.owner / "again").exists()


def test_a_file_of_that_name_that_is_not_ours_is_no_reason(parties):
    model = parties.owner / "model"
    shutil.copy(model / "tokenizer_config.json", model / "offsite.json")
    assert load_model(str(model))
    (model / "offsite.json").write_text("{")
    assert load_model(str(model))
