"""The round: what an owner asks, and every check on arrival."""

from __future__ import annotations

import secrets

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.inspect import inspect_artefact, tensors_of
from offsite.artefacts.job import Job
from offsite.artefacts.round import ROUND_FORMAT, RoundManifest, open_round, write_round
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

SPEC = AdapterSpec(kind="lora", placement="1+1", rank=2, dtype="float32")
OTHER = "sha256:" + "0" * 64
A, B = "top.1.mlp.up_proj.weight.lora_A", "top.1.mlp.up_proj.weight.lora_B"
UPDATE = {A: torch.ones(3, 32), B: torch.full((48, 3), 0.5)}
START = {"top.1.mlp.up_proj.lora_A": torch.ones(2, 32)}


@pytest.fixture
def manifest(dropped_package):
    def make(**changes):
        stated = {
            "format": ROUND_FORMAT,
            "federation_id": "5" * 32,
            "round": 2,
            "num_rounds": 3,
            "package_digest": dropped_package.digest,
            "base_digest": dropped_package.manifest.base_digest,
            "adapter": SPEC,
            "steps": 40,
            "learning_rate": 1e-3,
        }
        return RoundManifest(**{**stated, **changes})

    return make


@pytest.fixture
def written(tmp_path, manifest):
    return write_round(tmp_path / "round", manifest(), update=UPDATE, start=START)


@pytest.fixture
def job(dropped_package):
    parties = {name: "-".join([letter * 4] * 13) for name, letter in (("owner", "a"), ("client", "b"))}
    return Job(
        job_id=secrets.token_hex(16),
        adapter=SPEC,
        rounds=3,
        created=1,
        expires=2,
        package_digest=dropped_package.digest,
        base_digest=dropped_package.manifest.base_digest,
        **parties,
    )


def test_what_was_written_is_read(written, manifest, job):
    again = open_round(written.path)
    assert again == written
    assert {**dict(again.manifest), "update": {}, "start": {}, "files": {}} == dict(manifest())
    for found, given in ((again.load_update(), UPDATE), (again.load_start(), START)):
        assert found.keys() == given.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in given.items())
    assert again.num_bytes == sum(path.stat().st_size for path in written.path.glob("*.safetensors"))
    assert not again.is_first
    again.bind(job)


def test_a_first_round_has_no_files(tmp_path, manifest):
    found = write_round(tmp_path / "first", manifest(round=1))
    assert [path.name for path in found.path.iterdir()] == ["offsite.json"]
    assert (found.load_update(), found.load_emulator(), found.load_start()) == ({}, {}, {})
    assert found.is_first
    assert found.num_bytes == 0


def test_equal_rounds_have_equal_digests(tmp_path, written, manifest):
    again = write_round(tmp_path / "again", manifest(), update=dict(reversed(UPDATE.items())), start=START)
    assert again.digest == written.digest
    finish = write_round(tmp_path / "finish", manifest(task="finish"), update=UPDATE, start=START)
    assert finish.digest != written.digest
    assert finish.manifest.task == "finish"


def test_inspect_knows_it(written):
    found = inspect_artefact(written.path)
    assert found == written
    assert tensors_of(found).keys() == UPDATE.keys() | START.keys()


# What an owner cannot write


@pytest.mark.parametrize("given", [{"update": {A: torch.tensor([float("nan")])}}, {"start": {A: torch.tensor([1e39])}}])
def test_what_is_not_finite_is_not_written(tmp_path, manifest, given):
    with pytest.raises(NotFinite):
        write_round(tmp_path / "round", manifest(), **given)
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_in_both_files_is_not_written(tmp_path, manifest):
    with pytest.raises((ValidationError, WrongNames)):
        write_round(tmp_path / "round", manifest(), update=UPDATE, start={A: torch.ones(2)})
    assert list(tmp_path.iterdir()) == []


def test_what_stands_there_stays(written, manifest):
    with pytest.raises(ConfigError, match="already exists"):
        write_round(written.path, manifest())
    open_round(written.path)


# What is refused on arrival


def at(*keys, value):
    def edit(manifest):
        for key in keys[:-1]:
            manifest = manifest[key]
        manifest[keys[-1]] = value

    return edit


def without(*names):
    def edit(manifest):
        for name in names:
            del manifest[name]

    return edit


def tensors(name, edit):
    def change(folder):
        found = load_file(folder / name)
        edit(found)
        save_file(found, folder / name)

    return change


def code(folder):
    (folder / "round.py").write_text("import os")


def drop(manifest):
    del manifest["files"]["start.safetensors"]


def both(manifest):
    manifest["start"][A] = manifest["update"][A]


FILE = {"bytes": 0, "sha256": OTHER}
ON_OPENING = {
    "another version": (None, at("format", value="offsite/round/2"), WrongBinding),
    "a bundle's format": (None, at("format", value="offsite/bundle/1"), WrongBinding),
    "an unknown key": (None, at("callback", value="os.system"), BadSchema),
    "no federation": (None, without("federation_id"), BadSchema),
    "a federation that is a path": (None, at("federation_id", value="../" + "a" * 29), BadSchema),
    "a task that is none": (None, at("task", value="upload"), BadSchema),
    "round zero": (None, at("round", value=0), BadSchema),
    "a round beyond the last": (None, at("round", value=4), BadSchema),
    "more rounds than there can be": (None, at("num_rounds", value=10_001), BadSchema),
    "a round that is text": (None, at("round", value="2"), BadSchema),
    "a round that is a bool": (None, at("round", value=True), BadSchema),
    "no steps": (None, at("steps", value=0), BadSchema),
    "a million steps and one": (None, at("steps", value=1_000_001), BadSchema),
    "a rate of zero": (None, at("learning_rate", value=0.0), BadSchema),
    "a rate that is NaN": (None, at("learning_rate", value=float("nan")), BadSchema),
    "a rate beyond reason": (None, at("learning_rate", value=11.0), BadSchema),
    "a negative mu": (None, at("proximal", value=-0.1), BadSchema),
    "an infinite mu": (None, at("proximal", value=float("inf")), BadSchema),
    "a clip of zero": (None, at("clip", value=0.0), BadSchema),
    "secure without a clip": (None, at("secure", value="{}"), BadSchema),
    "a package that is no digest": (None, at("package_digest", value="x"), BadSchema),
    "an adapter with a path": (None, at("adapter", "kind", value="os.system"), BadSchema),
    "a rank of zero": (None, at("adapter", "rank", value=0), BadSchema),
    "a file more": (code, None, WrongNames),
    "a file more, bound": (code, at("files", "round.py", value=FILE), WrongNames),
    "a file of a bundle's": (None, at("files", "adapter.safetensors", value=FILE), WrongNames),
    "a file without tensors": (None, at("start", value={}), BadSchema),
    "tensors without a file": (None, drop, BadSchema),
    "a tensor in both files": (None, both, BadSchema),
    "a file that is gone": (lambda folder: (folder / "start.safetensors").unlink(), None, WrongNames),
    "a digest that is off": (None, at("files", "update.safetensors", "sha256", value=OTHER), BadDigest),
    "a size that is off": (None, at("files", "update.safetensors", "bytes", value=1), BadDigest),
    "a tensor more": (tensors("update.safetensors", lambda found: found.update(x=torch.ones(1))), None, WrongNames),
    "a tensor less": (tensors("update.safetensors", lambda found: found.pop(A)), None, WrongNames),
    "another shape": (
        tensors("update.safetensors", lambda found: found.update({A: torch.ones(2, 32)})),
        None,
        WrongShape,
    ),
    "another dtype": (
        tensors("start.safetensors", lambda found: found.update({next(iter(START)): torch.ones(2, 32).double()})),
        None,
        WrongShape,
    ),
    "a pickle": (lambda folder: torch.save({}, folder / "update.safetensors"), None, BadSchema),
    "a link": (
        lambda folder: (
            (folder / "update.safetensors").rename(folder.parent / "outside"),
            (folder / "update.safetensors").symlink_to(folder.parent / "outside"),
        ),
        None,
        WrongNames,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_OPENING)
def test_refused_on_opening(tamper, written, name):
    change, edit, expected = ON_OPENING[name]
    with pytest.raises(expected) as caught:
        open_round(tamper(written.path, change=change, edit=edit))
    assert type(caught.value) is expected
    assert "\n" not in str(caught.value)


def test_every_field_is_checked(tamper, written):
    """Whatever field is something else altogether, the round is refused: no field is read without a look at it."""
    import json

    stated = json.loads((written.path / "offsite.json").read_text())
    for number, key in enumerate(sorted(stated)):
        copy = tamper(written.path, edit=at(key, value=[{"x": 1}]))
        with pytest.raises(ArtefactError):
            open_round(copy)
        copy.rename(copy.with_name(f"tampered-{number}"))


def test_values_that_are_not_finite(tamper, written):
    change = tensors("update.safetensors", lambda found: found[A].view(-1)[5:6].fill_(float("-inf")))
    with pytest.raises(NotFinite, match="lora_A"):
        open_round(tamper(written.path, change=change)).load_update()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"package_digest": OTHER}, "package_digest"),
        ({"base_digest": OTHER}, "base_digest"),
        ({"adapter": SPEC.model_copy(update={"rank": 3})}, "another adapter"),
        ({"rounds": 1}, "round 2, the job has 1"),
    ],
)
def test_a_round_of_another_job(written, job, changes, message):
    with pytest.raises(WrongBinding, match=message):
        written.bind(job.model_copy(update=changes))


def test_no_round_at_all(tmp_path, dropped_package):
    with pytest.raises(ArtefactError, match="no round folder named 'gone'"):
        open_round(tmp_path / "gone")
    with pytest.raises(WrongBinding, match="is a package, expected a round"):
        open_round(dropped_package.path)
