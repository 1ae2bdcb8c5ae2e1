"""The verifier: no I/O, and no other way to what may be plugged in."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace

import colours
import pytest
import torch

import server.registry.verify as module
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.job import Policy
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.errors import BadSchema, NormTooLarge, NotFinite, TooLarge, WrongBinding, WrongNames, WrongShape
from server.registry.verify import Verified, adapter_tensors, expected_tensors, verify_adapter, verify_own, verify_sizes


@pytest.fixture
def parts(exchange, small_bundle, dropped_package):
    """What `verify_adapter` takes, for the sound bundle."""
    from adapters.norms import adapted_names, base_tensors

    record = read_owner_record(owner_record_path(dropped_package.path))
    job = exchange.job(register=False)
    expected = adapter_tensors(job.adapter, record)
    envelope = type("Envelope", (), {"job_id": job.job_id, "issuer": job.client, "round": 2})()
    return {
        "what": "bundle x",
        "manifest": small_bundle.manifest,
        "tensors": small_bundle.load_tensors(expected),
        "base": base_tensors(dropped_package, adapted_names(job.adapter, record.layout, record.block_tensors)),
        "envelope": envelope,
        "job": job,
        "record": record,
        "bundle_digest": small_bundle.digest,
    }


def test_a_sound_adapter_is_verified_with_its_norms(parts):
    found = verify_adapter(**parts)
    assert (found.job_id, found.client, found.round) == (parts["job"].job_id, parts["job"].client, 2)
    assert found.tensors.keys() == parts["tensors"].keys()
    assert len(found.norms) == 14
    assert "lora_A" not in repr(found)


def test_nobody_else_makes_a_verified_adapter(parts):
    found = verify_adapter(**parts)
    with pytest.raises(TypeError, match="made by server/registry/verify"):
        Verified(**{**vars(found), "made": None})
    with pytest.raises(TypeError):
        replace(found, made=object())


def test_the_verifier_touches_no_file():
    """No module that reads or writes is imported, no path is opened: what comes in are bytes, rows and tensors."""
    tree = ast.parse(inspect.getsource(module))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert imported.isdisjoint(
        {"pathlib", "os", "sqlite3", "server.registry.registry", "offsite.sealed.encryption", "offsite.staging"}
    )
    assert names.isdisjoint({"open", "Path", "os", "read_manifest", "read_tensors", "print"})


def _without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


NAME = "top.1.mlp.up_proj.lora_A"
WRONG = {
    "missing": (lambda tensors: _without(tensors, NAME), WrongNames),
    "extra": (lambda tensors: {**tensors, "lm_head.weight": torch.zeros(2)}, WrongNames),
    "shape": (lambda tensors: {**tensors, NAME: torch.zeros(1)}, WrongShape),
    "dtype": (lambda tensors: {**tensors, NAME: tensors[NAME].double()}, WrongShape),
    "nan": (lambda tensors: {**tensors, NAME: tensors[NAME] * float("nan")}, NotFinite),
    "norm": (lambda tensors: {**tensors, NAME: tensors[NAME] * 1e5}, NormTooLarge),
}


@pytest.mark.parametrize("case", WRONG)
def test_tensors_are_checked_as_they_are_in_memory(case, parts):
    change, expected = WRONG[case]
    with pytest.raises(expected):
        verify_adapter(**{**parts, "tensors": change(parts["tensors"])})


def test_the_jobs_terms_count(parts):
    other = "sha256:" + "0" * 64
    job = parts["job"]
    for changes, expected in (
        ({"package_digest": other}, WrongBinding),
        ({"base_digest": other}, WrongBinding),
        ({"adapter": AdapterSpec(kind="lora", rank=2, placement="1+1")}, WrongBinding),
        ({"policy": Policy(max_relative_spectral=1e-6)}, NormTooLarge),
    ):
        with pytest.raises(expected):
            verify_adapter(**{**parts, "job": job.model_copy(update=changes)})


def test_the_jobs_task_counts(parts):
    task = colours.task()
    carried = parts["job"].model_copy(update={"task": task})
    bound = parts["manifest"].model_copy(update={"task_digest": task.digest})
    verify_adapter(**{**parts, "job": carried, "manifest": bound})
    other = bound.model_copy(update={"task_digest": colours.task(("Name the", "Tell the")).digest})
    for manifest, job, told in (
        (parts["manifest"], carried, "was tuned by no task, its job carries task sha256:"),
        (other, carried, "was tuned by task sha256:.*, its job carries task"),
        (bound, parts["job"], "its job carries no task"),
    ):
        with pytest.raises(WrongBinding, match=told):
            verify_adapter(**{**parts, "job": job, "manifest": manifest})


def test_the_first_difference_of_adapters_is_named(parts):
    job = parts["job"].model_copy(update={"adapter": AdapterSpec(kind="lora", rank=4, alpha=8.0, placement="1+1")})
    with pytest.raises(WrongBinding, match="holds another adapter than its job asks for: rank, alpha, dtype differ"):
        expected_tensors("bundle x", parts["manifest"], parts["record"], job)


def test_an_adapter_that_the_package_cannot_carry(parts):
    with pytest.raises(BadSchema):
        adapter_tensors(AdapterSpec(kind="lora", placement="9+9"), parts["record"])
    with pytest.raises(BadSchema):
        adapter_tensors(AdapterSpec(kind="evil"), parts["record"])


def test_sizes_are_held_against_the_jobs_adapter(parts):
    expected = adapter_tensors(parts["job"].adapter, parts["record"])
    data = sum(spec.num_bytes for spec in expected.values())

    def envelope(**sizes):
        files = [type("File", (), {"name": name, "bytes": size})() for name, size in sizes.items()]
        return type("Envelope", (), {"files": files})()

    verify_sizes(envelope(**{"offsite.json": 5000, "adapter.safetensors": data + 9000}), expected)
    with pytest.raises(TooLarge, match=r"adapter\.safetensors"):
        verify_sizes(envelope(**{"adapter.safetensors": data + 2**20 + 9}), expected)
    with pytest.raises(TooLarge, match=r"offsite\.json"):
        verify_sizes(envelope(**{"offsite.json": 2**23}), expected)


def test_a_bundle_of_ones_own_has_no_job(parts):
    found = verify_own("bundle x", parts["manifest"], parts["tensors"], parts["record"], bundle_digest="d")
    assert (found.job_id, found.client, found.round, found.norms) == (None, None, None, {})
