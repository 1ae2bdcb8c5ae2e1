"""The run's own record: it stands whenever its bundle does, says how the text was read, and holds no text."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import client.tuning.tune as module
from client.privacy.config import DPSettings
from client.tuning.data import split_records
from client.tuning.runrecord import read_as, require_unused
from client.tuning.verb import run
from offsite.artefacts.bundle import open_bundle
from offsite.audits.canaries import CanarySet, CanaryText, Secret, read_canaries, records_of, write_canaries
from offsite.audits.runs import read_run, run_path, write_run
from offsite.audits.wordlist import WORDS
from offsite.digests import sha256_file
from offsite.errors import ArtefactError, ConfigError, PolicyError, WrongBinding


def test_the_record_names_everything_by_digest_and_repeats_the_split(settings, dropped_package, notes):
    config = settings(dropped_package.path, adapter="lora", rank=2, audit_share=0.3, seed=4)
    told = run(config)
    found = read_run(run_path(config.output))
    assert found.bundle_digest == told["bundle_digest"] == open_bundle(config.output).digest
    assert (found.package_digest, found.base_digest) == (dropped_package.digest, dropped_package.manifest.base_digest)
    assert found.data_sha256 == sha256_file(config.data[0])
    assert found.adapter == config.spec()
    assert (found.steps, found.batch_size, found.learning_rate) == (6, 4, 2e-3)
    assert (found.claim, found.canaries, found.num_canaries, found.job_id) == (None, None, 0, None)
    records = read_as(config.data, found.text)
    kept = {name: getattr(found.text, name) for name in ("validation", "audit_share", "seed")}
    sides = split_records(records, **kept)
    assert found.num_records == told["num_records"] == len(sides.train) == 60 - len(sides.validation) - len(sides.audit)
    assert len(sides.audit) > 5
    written = run_path(config.output).read_text()
    assert not any(word in written for word in (*notes, "ward", "secret", str(config.output.parent)))


def test_a_private_run_states_its_claim(settings, dropped_package, tmp_path):
    dp = DPSettings(noise_multiplier=1.0, ledger=tmp_path / "ledger")
    told = run(settings(dropped_package.path, adapter="bitfit", learning_rate=0.01, dp=dp))["privacy"]
    claim = read_run(run_path(tmp_path / "bundle")).claim
    assert claim is not None
    stated = claim.model_dump(mode="json")
    assert stated == {name: told[name] for name in stated}
    assert set(told) - set(stated) == {"run", "data_set"}  # names of the ledger's, which stays here
    assert not read_run(run_path(tmp_path / "bundle")).text.packed


def test_documents_set_aside_are_not_charged(settings, dropped_package, tmp_path):
    """A later run on only these is a stranger to the first: its budget is its own."""
    dp = DPSettings(noise_multiplier=1.0, ledger=tmp_path / "ledger")
    common = {"adapter": "bitfit", "learning_rate": 0.01, "dp": dp, "batch_size": 2}
    config = settings(dropped_package.path, audit_share=0.4, **common)
    run(config)
    records = read_as(config.data, read_run(run_path(config.output)).text)
    sides = split_records(records, validation=0.1, audit_share=0.4, seed=0)
    for name, rows in (("aside", sides.audit), ("trained", sides.train)):
        data = tmp_path / f"{name}.txt"
        data.write_text("\n\n".join(row.segments[0][0] for row in rows), encoding="utf-8")
        later = settings(dropped_package.path, **common, data=data, output=tmp_path / name, validation=0.3)
        if name == "aside":
            assert run(later)["privacy"]["num_runs"] == 1
            continue
        with pytest.raises(PolicyError, match="with 1 earlier run"):
            run(later)


def test_a_break_before_the_bundle_stands_leaves_at_most_the_record(settings, dropped_package, monkeypatch):
    config = settings(dropped_package.path)

    def broken(path, found):
        write_run(path, found)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("client.tuning.verb.write_run", broken)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert run_path(config.output).is_file()
    assert not config.output.exists()
    told = run(config.model_copy(update={"resume": True}))
    assert read_run(run_path(config.output)).bundle_digest == told["bundle_digest"]


def test_a_record_that_cannot_be_written_keeps_the_bundle_back(settings, dropped_package, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("client.tuning.verb.write_run", full)
    config = settings(dropped_package.path)
    with pytest.raises(module.RunFailed, match="no space left"):
        run(config)
    assert not config.output.exists()
    assert not list(config.output.parent.glob(".*"))


def test_an_older_record_gives_way(settings, dropped_package, tmp_path):
    (tmp_path / "bundle.run.json").write_text("{}")
    told = run(settings(dropped_package.path))
    assert read_run(tmp_path / "bundle.run.json").bundle_digest == told["bundle_digest"]


@pytest.mark.parametrize(("changes", "refused"), [({"audit_share": 0.2}, True), ({}, False)])
def test_another_share_is_another_run(settings, dropped_package, monkeypatch, changes, refused):
    config = settings(dropped_package.path)

    def broken(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("client.tuning.verb.write_run", broken)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    again = config.model_copy(update={"resume": True, **changes})
    if not refused:
        run(again)
        return
    with pytest.raises(module.ConfigError, match="audit_share"):
        run(again)


def test_a_set_of_canaries_is_for_one_bundle(settings, dropped_package, tmp_path):
    config = settings(dropped_package.path)
    run(config)
    path, used = run_path(config.output), "sha256:" + "7" * 64
    require_unused(tmp_path / "other", used, resume=False)
    write_run(path, read_run(path).model_copy(update={"canaries": used, "num_canaries": 3}))
    (tmp_path / "strange.run.json").write_text(json.dumps({"format": "other/run/3"}))
    require_unused(tmp_path / "other", "sha256:" + "8" * 64, resume=False)
    require_unused(tmp_path / "bundle", used, resume=True)
    for output, resume in (("other", False), ("other", True), ("bundle", False)):
        with pytest.raises(PolicyError, match=r"for the bundle of 'bundle.run.json'"):
            require_unused(tmp_path / output, used, resume=resume)


# Canaries


@pytest.fixture
def canaries(tmp_path, dropped_package):
    """Write a folder of four synthetic canaries, two of them in, and a secret that is repeated three times."""

    def make(name="canaries", **changes):
        texts = [CanaryText(text=f"lorem {number} ipsum", included=number % 2 == 0) for number in range(4)]
        given = {
            "nonce": "5a" * 32, "package_digest": dropped_package.digest, "tokens": 16, "temperature": 1.0,
            "synthetic": tuple(texts), "repeats": 3, "num_candidates": 8,
            "secrets": (Secret(prefix="the code is", secret=" ".join(WORDS[:4]), included=True),),
        }  # fmt: skip
        return tmp_path / name, write_canaries(tmp_path / name, CanarySet(**{**given, **changes}))

    return make


def test_canaries_are_trained_on_after_the_split_and_committed_to(settings, dropped_package, canaries, tmp_path):
    folder, commitment = canaries()
    plain = run(settings(dropped_package.path, output=tmp_path / "plain"))
    told = run(settings(dropped_package.path, canaries=folder))
    found, without = (read_run(tmp_path / f"{name}.run.json") for name in ("bundle", "plain"))
    assert (found.canaries, found.num_canaries) == (commitment.digest, 2 + 3)
    assert (without.canaries, without.num_canaries) == (None, 0)
    assert found.num_records == without.num_records
    assert found.num_tokens == without.num_tokens
    assert told["bundle_digest"] != plain["bundle_digest"]
    with pytest.raises(PolicyError, match="a set is for one bundle"):
        run(settings(dropped_package.path, canaries=folder, output=tmp_path / "second"))
    assert not (tmp_path / "second.work").exists()


def test_a_private_run_draws_each_row_of_canaries_by_itself(settings, dropped_package, canaries, tmp_path):
    folder, _ = canaries()
    dp = DPSettings(noise_multiplier=1.0, ledger=tmp_path / "ledger")
    given = {"adapter": "bitfit", "learning_rate": 0.01, "dp": dp}
    told = run(settings(dropped_package.path, canaries=folder, **given))["privacy"]
    num_units = read_run(tmp_path / "bundle.run.json").num_records + 2 + 3
    assert told["sample_rate"] == pytest.approx(4 / num_units)
    assert told["delta"] == pytest.approx(num_units**-1.1)


def test_a_set_is_for_one_bundle_wherever_bundles_are_written(settings, dropped_package, canaries, tmp_path):
    folder, _ = canaries()
    (tmp_path / "elsewhere").mkdir()
    first = settings(dropped_package.path, canaries=folder)
    run(first)
    assert (folder / "used.json").stat().st_mode & 0o077 == 0
    assert str(tmp_path) not in (folder / "used.json").read_text()
    elsewhere = settings(dropped_package.path, canaries=folder, output=tmp_path / "elsewhere" / "bundle")
    for resume in (False, True):
        with pytest.raises(PolicyError, match="trained on for another output, a set is for one bundle"):
            run(elsewhere.model_copy(update={"resume": resume}))
    for path in (run_path(first.output), first.output):
        path.rename(tmp_path / "elsewhere" / path.name)  # nothing beside the output tells of it now
    for resume in (False, True):
        with pytest.raises(PolicyError, match="trained on for this output"):
            run(first.model_copy(update={"resume": resume}))


def test_the_mark_stands_before_training_and_the_same_run_goes_on(settings, dropped_package, canaries, monkeypatch):
    folder, _ = canaries()
    config = settings(dropped_package.path, canaries=folder)

    def broken(*_, **__):
        assert (folder / "used.json").is_file()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "tune", broken)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    with pytest.raises(PolicyError, match="trained on for this output") as refused:
        run(config)
    assert refused.value.hint.startswith("--resume goes on with that run")
    run(config.model_copy(update={"resume": True}))
    assert config.output.is_dir()


def test_a_run_that_is_sealed_off_may_mark_its_canaries(settings, dropped_package, canaries, tmp_path):
    folder, _ = canaries("apart/canaries")
    run(settings(dropped_package.path, canaries=folder, output=tmp_path / "out" / "bundle", sealed_off=True))
    assert (folder / "used.json").is_file()


def test_the_step_released_is_recorded_not_the_last(settings, dropped_package, monkeypatch):
    def best_first(*args, **given):
        return replace(tune(*args, **given), best_step=2)

    tune = module.tune
    monkeypatch.setattr(module, "tune", best_first)
    config = settings(dropped_package.path)
    run(config)
    found = read_run(run_path(config.output))
    assert (found.steps, found.steps_run) == (2, 6)
    assert 2 * config.batch_size <= found.num_drawn < found.num_records  # rows: several to a block


def test_a_mark_that_is_none_is_refused(settings, dropped_package, canaries):
    folder, _ = canaries()
    (folder / "used.json").write_text("{}")
    with pytest.raises(ArtefactError, match=r"used\.json"):
        run(settings(dropped_package.path, canaries=folder))


def test_two_sets_of_canaries_are_not_one_user(canaries):
    (one, _), (other, _) = canaries(), canaries("others", nonce="6b" * 32)
    names = [{row.document for row in records_of(read_canaries(folder)[0])} for folder in (one, other)]
    assert len(names[0]) == len(names[1]) == 2 + 3
    assert not names[0] & names[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"package_digest": "sha256:" + "3" * 64}, "canaries 'canaries' were made for package sha256:333333333333"),
        ({"job_id": "4" * 32}, "were made for job 444444444444, this run is for no job"),
    ],
)
def test_canaries_of_something_else_are_refused(settings, dropped_package, canaries, tmp_path, changes, message):
    folder, _ = canaries(**changes)
    with pytest.raises(WrongBinding, match=message):
        run(settings(dropped_package.path, canaries=folder))
    with pytest.raises(ArtefactError, match="no folder of canaries named 'nothing'"):
        run(settings(dropped_package.path, canaries=tmp_path / "nothing"))
    assert not (tmp_path / "bundle.work").exists()


def test_a_run_is_resumed_with_its_canaries_only(settings, dropped_package, canaries, monkeypatch):
    (one, commitment), (other, _) = canaries(), canaries("others", nonce="6b" * 32)
    config = settings(dropped_package.path, canaries=one)

    def broken(path, found):
        write_run(path, found)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("client.tuning.verb.write_run", broken)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    with pytest.raises(ConfigError, match="canaries"):
        run(config.model_copy(update={"resume": True, "canaries": other}))
    run(config.model_copy(update={"resume": True}))
    assert read_run(run_path(config.output)).canaries == commitment.digest
