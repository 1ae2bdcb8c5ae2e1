"""Attempts on intake with heads of encoders, which have more tensors than those of decoders, and a trunk beside them.

A client signs a sound classifier's bundle for a job of another head, or one of the job's with other tensors in it.
"""

from __future__ import annotations

import math

import pytest
import torch
from checkpoints_lab import distill
from encoders_lab import saved, separating_tokenizer
from safetensors.torch import load_file, save_file

from offsite.artefacts.bundle import AdapterSpec, Head
from offsite.artefacts.job import Policy
from offsite.artefacts.package import open_package
from offsite.errors import BadSchema, NormTooLarge, NotFinite, WrongNames, WrongShape

LABELS = ("card", "transfer", "loan")
HEAD = Head(task="classify", labels=LABELS, hidden=32, encoder="bert")
SPEC = AdapterSpec(kind="lora", rank=2, placement="1+1", dtype="float32", head=HEAD)
WEIGHT, DENSE = "head.weight", "head.dense.weight"
TRUNK = "top.0.attention.output.dense.weight"


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    checkpoint = saved(folder / "bert", "bert", separating_tokenizer())
    assert distill(checkpoint, folder / "package") == 0
    return open_package(folder / "package")


@pytest.fixture(scope="module")
def bundle(package, make_bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("head") / "bundle"
    return make_bundle(out, package, shake=0.01, **{key: value for key, value in SPEC if key != "dtype"})


@pytest.fixture
def hand_in(exchange, package, tmp_path):
    """Take in a bundle's folder under a job for that adapter, both of the encoder's package."""
    exchange.package = package

    def handed(folder, spec=SPEC, **changes):
        job = exchange.job(adapter=spec, **changes)
        return exchange.take_in(exchange.seal(folder, job, tmp_path / f"sealed-{job.job_id}"))

    return handed


def other(**changes):
    return SPEC.model_copy(update={"head": HEAD.model_copy(update=changes)})


def test_a_sound_one_is_taken(hand_in, bundle):
    verdict = hand_in(bundle.path)
    assert verdict.state == "verified", verdict.error


@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(other(labels=LABELS[::-1]), id="labels in another order"),
        pytest.param(other(labels=(*LABELS[:2], "fees")), id="a label by another name"),
        pytest.param(other(labels=LABELS[:2]), id="fewer labels"),
        pytest.param(other(hidden=64), id="states of another size"),
        pytest.param(other(encoder="roberta"), id="another family's head"),
        pytest.param(other(encoder=""), id="a decoder's head"),
        pytest.param(other(task="reward", labels=(), encoder=""), id="a reward head"),
        pytest.param(other(task="regress", labels=()), id="a head for values"),
        pytest.param(other(task="tag"), id="a head for tags of these labels"),
        pytest.param(SPEC.model_copy(update={"head": None}), id="a job for text"),
    ],
)
def test_row_17_another_head_than_the_jobs(hand_in, bundle, spec):
    verdict = hand_in(bundle.path, spec)
    assert (verdict.state, verdict.reason_class) == ("refused", "WrongBinding")
    assert "holds another adapter than its job asks for: head differ" in str(verdict.error)


def put(**tensors):
    return lambda found: found.update({name.replace("__", "."): tensor for name, tensor in tensors.items()})


def without(name):
    return lambda found: found.pop(name)


CONTENT = {
    "row 17: a row more": (put(head__weight=torch.zeros(4, 32)), WrongShape),
    "row 17: a row that broadcasts": (put(head__weight=torch.zeros(1, 32)), WrongShape),
    "row 17: an inner layer of another size": (put(head__dense__weight=torch.zeros(16, 32)), WrongShape),
    "row 17: a bias of another size": (put(head__dense__bias=torch.zeros(1)), WrongShape),
    "row 17: another dtype": (put(head__weight=torch.zeros(3, 32, dtype=torch.float64)), WrongShape),
    "row 17: without its inner layer": (without(DENSE), WrongNames),
    "row 17: without its bias": (without("head.bias"), WrongNames),
    "row 17: another family's norm": (put(head__norm__weight=torch.ones(32)), WrongNames),
    "row 17: a tensor of the trunk": (put(**{TRUNK.replace(".", "__"): torch.zeros(32, 32)}), WrongNames),
    "row 17: the trunk's own pooler": (put(bert__pooler__dense__weight=torch.zeros(32, 32)), WrongNames),
    "row 17: transformers' name for it": (put(classifier__weight=torch.zeros(3, 32)), WrongNames),
    "row 18: nan": (put(head__weight=torch.full((3, 32), math.nan)), NotFinite),
    "row 18: nan in the inner layer": (put(head__dense__bias=torch.full((32,), math.nan)), NotFinite),
    "row 18: infinity": (put(head__bias=torch.full((3,), math.inf)), NotFinite),
    "row 18: a flood of subnormals": (put(head__dense__weight=torch.full((32, 32), 1e-44)), BadSchema),
    "row 19: too large a head": (put(head__weight=torch.full((3, 32), 11.0)), NormTooLarge),
    "row 19: in the inner layer": (put(head__dense__weight=torch.full((32, 32), 4.0)), NormTooLarge),
    "row 19: beyond floats": (put(head__weight=torch.full((3, 32), 3e38)), NormTooLarge),
}


@pytest.mark.parametrize("case", CONTENT)
def test_rows_17_18_19_the_jobs_head_with_other_tensors(case, hand_in, bundle, tamper, exchange):
    """The manifest states the job's adapter and declares the file as it is."""
    change, expected = CONTENT[case]

    def rewrite(folder):
        found = load_file(folder / "adapter.safetensors")
        change(found)
        save_file(found, folder / "adapter.safetensors")

    verdict = hand_in(tamper(bundle.path, change=rewrite, redeclare=True))
    assert (verdict.state, verdict.reason_class) == ("refused", expected.__name__), verdict.error
    assert "\n" not in str(verdict.error)
    assert not list((exchange.registry_folder / "bundles").iterdir())


def test_row_17_a_manifest_that_states_an_impossible_head(hand_in, bundle, tamper):
    """A reward head of an encoder; a family that does not exist; both in a job for the sound one."""
    impossible = [
        ("task", "reward"),
        ("task", "regress"),
        ("task", "rank"),
        ("encoder", "electra"),
        ("labels", ["card"]),
    ]
    for key, value in impossible:

        def edit(manifest, key=key, value=value):
            manifest["adapter"]["head"][key] = value

        folder = tamper(bundle.path, edit=edit)
        verdict = hand_in(folder)
        assert (verdict.state, verdict.reason_class) == ("refused", "BadSchema"), verdict.error
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_row_19_the_cap_is_the_jobs(hand_in, bundle):
    policy = Policy(max_head_norm=1e-3)
    verdict = hand_in(bundle.path, policy=policy)
    assert verdict.reason_class == NormTooLarge.__name__


TAG_HEAD = Head(task="tag", labels=("O", "B-card", "I-card"), hidden=32, encoder="bert")
TAG_SPEC = SPEC.model_copy(update={"head": TAG_HEAD})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (put(head__weight=torch.zeros(4, 32)), WrongShape),
        (put(head__bias=torch.zeros(1)), WrongShape),
        (put(head__dense__weight=torch.zeros(32, 32)), WrongNames),
        (without("head.bias"), WrongNames),
        (put(head__weight=torch.full((3, 32), math.nan)), NotFinite),
    ],
    ids=["a row more", "a bias that broadcasts", "a classifier's inner layer", "without its bias", "nan"],
)
def test_rows_17_18_a_head_for_tags_with_other_tensors(
    change, expected, hand_in, package, make_bundle, tamper, tmp_path
):
    spec = {key: value for key, value in TAG_SPEC if key != "dtype"}
    sound = make_bundle(tmp_path / "tags", package, shake=0.01, **spec)
    assert {name for name in sound.manifest.tensors if name.startswith("head.")} == {WEIGHT, "head.bias"}

    def rewrite(folder):
        found = load_file(folder / "adapter.safetensors")
        change(found)
        save_file(found, folder / "adapter.safetensors")

    verdict = hand_in(tamper(sound.path, change=rewrite, redeclare=True), TAG_SPEC)
    assert (verdict.state, verdict.reason_class) == ("refused", expected.__name__), verdict.error
