"""Taking in: a sound bundle is registered once; whatever is not sound is refused by the check that it fails."""

from __future__ import annotations

import json
import os
import stat

import pytest

from offsite import faults
from offsite.artefacts.bundle import AdapterSpec
from offsite.errors import BadDigest, ConfigError, RunFailed
from server.registry.intake import job_package, read_registered


def states(exchange):
    return [(entry.round, entry.state) for entry in exchange.registry.entries()]


def test_a_sound_bundle_is_verified_and_its_files_are_kept(exchange, small_bundle, tmp_path):
    job = exchange.job()
    sealed = exchange.seal(small_bundle.path, job, tmp_path / "sealed")
    verdict = exchange.take_in(sealed)
    assert (verdict.state, verdict.is_again, verdict.error) == ("verified", False, None)
    entry = exchange.registry.entry(verdict.id)
    assert (entry.bundle_digest, entry.job_id, entry.round) == (small_bundle.digest, job.job_id, 1)
    folder = exchange.registry.bundle_folder(verdict.id)
    for name in ("offsite.json", "adapter.safetensors"):
        assert (folder / name).read_bytes() == (small_bundle.path / name).read_bytes()
    figures = json.loads(entry.figures)
    assert 0 < figures["max_relative_frobenius"] < 1
    assert figures["num_modules"] == 14
    assert not list((exchange.registry_folder / "incoming").iterdir())
    assert exchange.registry.verify_log().number == 4  # schema, job, received, verified


def test_an_adapter_on_every_kept_block_is_held_to_its_job(exchange, kept_package, make_bundle, tmp_path):
    exchange.package = kept_package
    asked = AdapterSpec(kind="lora", dtype="float32", rank=2, placement="all")
    bundle = make_bundle(tmp_path / "bundle", kept_package, kind="lora", rank=2, placement="all", shake=0.02)
    verdict = exchange.take_in(exchange.seal(bundle.path, exchange.job(adapter=asked), tmp_path / "sealed"))
    assert (verdict.state, verdict.error) == ("verified", None)
    figures = json.loads(exchange.registry.entry(verdict.id).figures)
    assert figures["num_modules"] == 6 * 7
    fewer = make_bundle(tmp_path / "fewer", kept_package, kind="lora", rank=2, placement="2+2", shake=0.02)
    verdict = exchange.take_in(exchange.seal(fewer.path, exchange.job(adapter=asked), tmp_path / "sealed-fewer"))
    assert verdict.state == "refused"


def test_nothing_in_the_registry_is_readable_by_others(exchange, small_bundle, tmp_path):
    exchange.take_in(exchange.seal(small_bundle.path, exchange.job(), tmp_path / "sealed"))
    assert stat.S_IMODE(exchange.registry_folder.stat().st_mode) == 0o700


def test_what_is_read_for_plugging_in_is_what_was_verified(exchange, small_bundle, tmp_path):
    job = exchange.job()
    verdict = exchange.take_in(exchange.seal(small_bundle.path, job, tmp_path / "sealed"))
    _, record = job_package(exchange.registry, job)
    entry = exchange.registry.entry(verdict.id)
    verified = read_registered(exchange.registry, entry, record)
    assert (verified.job_id, verified.client, verified.round) == (job.job_id, job.client, 1)
    assert verified.bundle_digest == small_bundle.digest


@pytest.mark.parametrize("name", ["offsite.json", "adapter.safetensors"])
@pytest.mark.parametrize("how", ["flipped", "gone", "link", "pipe"])
def test_row_15_a_file_changed_in_the_registry_is_noticed(name, how, exchange, small_bundle, tmp_path):
    job = exchange.job()
    verdict = exchange.take_in(exchange.seal(small_bundle.path, job, tmp_path / "sealed"))
    path = exchange.registry.bundle_folder(verdict.id) / name
    raw = bytearray(path.read_bytes())
    path.unlink()
    if how == "flipped":
        raw[-3] ^= 1
        path.write_bytes(raw)
    elif how == "link":
        path.symlink_to(small_bundle.path / name)
    elif how == "pipe":
        os.mkfifo(path)
    _, record = job_package(exchange.registry, job)
    with pytest.raises(Exception, match=f"bundle {verdict.id}: its '{name}'") as caught:
        read_registered(exchange.registry, exchange.registry.entry(verdict.id), record)
    assert type(caught.value).__name__ in {"BadDigest", "BadSchema"}
    assert how == "pipe" or isinstance(caught.value, BadDigest)


def test_a_package_that_moved_is_the_owners_problem_not_the_clients(
    exchange, make_package, make_bundle, tmp_path, full_llama
):
    package = make_package(tmp_path / "moving")
    exchange.package = package
    job = exchange.job()
    bundle = make_bundle(tmp_path / "bundle", package, kind="lora", rank=2, placement="1+1", shake=0.02)
    sealed = exchange.seal(bundle.path, job, tmp_path / "sealed")
    package.path.rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="package 'moving' of the job") as caught:
        exchange.take_in(sealed)
    assert "from its new place" in caught.value.hint
    assert states(exchange) == []
    (tmp_path / "elsewhere").rename(package.path)
    assert exchange.take_in(sealed).state == "verified"


@pytest.mark.parametrize("point", ["intake-decrypted", "intake-verified", "intake-stored"])
def test_row_25_a_disk_that_fails_registers_nothing_and_again_works(point, exchange, small_bundle, tmp_path):
    sealed = exchange.seal(small_bundle.path, exchange.job(), tmp_path / "sealed")

    def full(reached):
        if reached == point:
            raise OSError(28, "No space left on device")

    faults.set_hook(full)
    try:
        with pytest.raises(RunFailed, match="no space left on device"):
            exchange.take_in(sealed)
    finally:
        faults.set_hook(None)
    assert states(exchange) == []
    assert not list((exchange.registry_folder / "incoming").iterdir())
    assert not list((exchange.registry_folder / "bundles").iterdir())
    assert exchange.take_in(sealed).state == "verified"
    exchange.registry.verify_log()


def test_a_folder_that_is_not_sealed_is_refused_and_logged(exchange, small_bundle, tmp_path):
    from offsite.errors import WrongNames

    with pytest.raises(WrongNames):
        exchange.take_in(small_bundle.path)
    assert b'"check":"WrongNames"' in (exchange.registry_folder / "registry.log").read_bytes()
