"""The kind of an artefact is told by its manifest, and by nothing else."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from adapters.kinds import declared
from offsite.artefacts.bundle import AdapterSpec, open_bundle, write_bundle
from offsite.artefacts.inspect import inspect_artefact, tensors_of
from offsite.artefacts.package import open_package
from offsite.errors import ArtefactError, WrongBinding


@pytest.fixture
def bundle(tmp_path, dropped_package):
    spec = AdapterSpec(kind="lora", placement="0+1", rank=2, dtype="float32")
    expected = declared(spec, dropped_package.layout, dropped_package.block_tensors())
    tensors = {name: torch.ones(each.shape) for name, each in expected.items()}
    return write_bundle(tmp_path / "bundle", package=dropped_package, spec=spec, tensors=tensors, expected=expected)


def test_the_kind_is_told_by_the_manifest(bundle, dropped_package):
    assert inspect_artefact(bundle.path) == open_bundle(bundle.path)
    assert inspect_artefact(dropped_package.path) == open_package(dropped_package.path)
    assert tensors_of(bundle) == bundle.manifest.tensors


def test_a_manifest_that_is_a_link_is_not_followed(tmp_path, bundle):
    shutil.copytree(bundle.path, tmp_path / "copy")
    (tmp_path / "copy" / "offsite.json").unlink()
    (tmp_path / "copy" / "offsite.json").symlink_to(bundle.path / "offsite.json")
    with pytest.raises(ArtefactError, match=r"holds no offsite\.json"):
        inspect_artefact(tmp_path / "copy")


@pytest.mark.parametrize("stated", ["offsite/adapted/1", "offsite/bundle/2", 7, "a\x1b[2J"])
def test_a_format_that_does_not_cross_is_refused(tmp_path, stated):
    (tmp_path / "offsite.json").write_text(json.dumps({"format": stated}))
    with pytest.raises(WrongBinding, match="expected one of offsite/package/1, offsite/round/1, offsite/bundle/1") as e:
        inspect_artefact(tmp_path)
    assert str(e.value).isprintable()
