"""The client's audit: what it says of a real run, what it refuses to be told, and that it holds no text."""

from __future__ import annotations

import hashlib
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

import client.audit.audit as module
from adapters.kinds import declared
from client.audit.config import AuditBundleConfig
from client.privacy.config import DPSettings
from client.tuning.config import TuneConfig
from client.tuning.data import split_records
from client.tuning.tune import attach_to_package
from client.tuning.verb import run as tune_run
from offsite import cli
from offsite.artefacts.bundle import AdapterSpec, write_bundle
from offsite.audits.canaries import CanarySet, CanaryText, Secret, write_canaries
from offsite.audits.gates import bundle_gates
from offsite.audits.keptscores import read_scores
from offsite.audits.record import AUDIT_NAME, read_audit
from offsite.audits.runs import (
    quoted,
    read_run,
    run_path,
    write_run,
)
from offsite.audits.wordlist import WORDS
from offsite.digests import sha256_file
from offsite.text.records import read_records

WARDS = "fever cough ache rash chill".split()


def notes(first, num):
    """Rows that are alike but for digits nobody could guess."""
    return [f"{WARDS[n % 5]} {hashlib.sha256(str(n).encode()).hexdigest()[:16]}" for n in range(first, first + num)]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, dropped_package):
    """A bundle that knows its text by heart, with canaries, and one that does not, with --dp; read only."""
    folder = tmp_path_factory.mktemp("tuned")
    data = folder / "private-notes.txt"
    data.write_text("\n\n".join(notes(0, 120)), encoding="utf-8")
    made = CanarySet(
        nonce="5a" * 32, package_digest=dropped_package.digest, tokens=24, temperature=1.0, repeats=2,
        num_candidates=8,
        synthetic=tuple(
            CanaryText(text=f"{n * 7907 % 9973} lorem {n}", included=n * 37 % 11 % 2 == 0) for n in range(40)
        ),
        secrets=(Secret(prefix="the code is", secret=" ".join(WORDS[:4]), included=True),),
    )  # fmt: skip
    write_canaries(folder / "canaries", made)
    common = {
        "package": dropped_package.path, "data": data, "block_tokens": 32, "precision": "fp32", "device": "cpu",
        "audit_share": 0.3, "canaries": folder / "canaries",
    }  # fmt: skip
    learnt = {
        "adapter": "blocks",
        "learning_rate": 0.01,
        "steps": 120,
        "batch_size": 16,
        "pack": False,
        "evaluate_every": 120,
    }
    tune_run(TuneConfig(**common, **learnt, output=folder / "bundle"))
    write_canaries(folder / "private" / "canaries", made)
    private = {**common, "canaries": folder / "private" / "canaries"}
    dp = DPSettings(epsilon=4.0, ledger=folder / "ledger")
    tune_run(TuneConfig(**private, adapter="bitfit", steps=6, dp=dp, output=folder / "private" / "bundle"))
    return SimpleNamespace(folder=folder, data=data, package=dropped_package)


@pytest.fixture
def words(tuned, tmp_path):
    """Return the command's words; keywords replace flags, None leaves one out."""

    def make(bundle=None, **changes):
        flags = {
            "data": tuned.data, "canaries": tuned.folder / "canaries", "tokens-per-row": 48, "rows": 60,
            "secrets-samples": 2, "device": "cpu", **changes,
        }  # fmt: skip
        given = [str(word) for name, value in flags.items() if value is not None for word in (f"--{name}", value)]
        bundle = tuned.folder / "bundle" if bundle is None else bundle
        return ["audit", "bundle", str(tuned.package.path), str(bundle), *given, "-o", str(tmp_path / "audit")]

    return make


def test_a_bundle_that_knows_its_text_by_heart_is_found_out(words, tmp_path, capsys, tuned):
    kept = tmp_path / "scores.json"
    assert cli.run(words(**{"keep-scores": kept})) == 0
    out, err = capsys.readouterr()
    told = json.loads(out.splitlines()[-1])
    audit, digest = read_audit(tmp_path / "audit")
    assert read_scores(kept, audit, digest).signals.keys() == {one.signal for one in audit.membership}
    assert (told["audit"], told["audit_digest"]) == ("audit", digest)
    assert told["bundle_digest"] == audit.run.bundle_digest
    record = read_run(run_path(tuned.folder / "bundle"))
    assert audit.run == quoted(record)
    assert record.data_sha256 == sha256_file(tuned.data)
    assert (audit.seed, audit.rows_limit) == (0, 60)
    by_signal = {one.signal: one.auc.value for one in audit.membership}
    assert set(by_signal) == {"loss", "reference", "min-k", "min-k++"}
    assert by_signal["reference"] > 0.8
    assert abs(audit.auc_before.value - 0.5) < 0.2
    assert audit.nonmembers == "set aside"
    assert {one.signal: one.auc.value for one in audit.canaries.membership}["reference"] > 0.8
    assert audit.canaries.num == 40
    assert audit.canaries.exposure.num_samples == 2
    assert audit.verbatim.num_rows > 0
    assert audit.verbatim.num_new <= audit.verbatim.num_extracted
    assert audit.scan.num_bytes > 0
    assert audit.scan.num_ngrams_compared > 0
    assert sum(audit.scan.found.values()) == 0
    gates = {gate.name: gate.verdict for gate in bundle_gates(audit)}
    assert told["gates"] == gates
    assert gates["auc"] == "not measurable"  # a few dozen rows were set aside, a thousand are needed
    assert not told["passed"]
    assert "which is what the client has" in err
    assert "to measure auc: with 100 different rows or more offsite audit bundle retunes (--retunings)" in err
    assert "auc    " in err
    written = (tmp_path / "audit" / AUDIT_NAME).read_text()
    said = "\n".join(line for line in err.splitlines() if not line.startswith("next: "))  # that repeats what was typed
    for text in (out, said, written, kept.read_text()):
        assert not any(word in text for word in (*WARDS, "lorem", "the code is", "private-notes", str(tmp_path.parent)))
    assert sha256_file(tuned.data) not in written


def test_a_private_run_is_held_against_its_claim(words, tmp_path, capsys, tuned):
    given = {"canaries": tuned.folder / "private" / "canaries"}
    assert cli.run(words(tuned.folder / "private" / "bundle", **given)) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    audit, _ = read_audit(tmp_path / "audit")
    assert audit.canaries.bound.delta == audit.run.claim.delta
    assert told["epsilon_claimed"] == audit.run.claim.epsilon <= 4.0
    assert told["gates"] == {"scan": "passed", "budget": "passed", "epsilon": "not measurable"}


def test_the_same_seed_measures_the_same(words, tmp_path, capsys):
    told = []
    for _ in range(2):
        assert cli.run(words(rows=20)) == 0
        told.append(json.loads(capsys.readouterr().out.splitlines()[-1])["audit_digest"])
        shutil.rmtree(tmp_path / "audit")
    assert told[0] == told[1]


def test_rows_of_a_file_stand_in_for_those_set_aside(words, tmp_path, capsys):
    path = tmp_path / "others.txt"
    path.write_text("\n\n".join(notes(500, 30)), encoding="utf-8")
    assert cli.run(words(nonmembers=path, rows=20)) == 0
    audit, _ = read_audit(tmp_path / "audit")
    assert audit.nonmembers == "file"
    assert {(one.num_members, one.num_nonmembers) for one in audit.membership} == {(20, 20)}
    assert "others from a file" in capsys.readouterr().err


def test_without_a_single_other_row_the_rest_is_measured(words, tmp_path, tuned, capsys):
    sides = split_records(read_records(tuned.data), validation=0.1, audit_share=0.3, seed=0)
    path = tmp_path / "known.txt"
    path.write_text("\n\n".join(record.segments[0][0] for record in sides.train), encoding="utf-8")
    assert cli.run(words(nonmembers=path, rows=5)) == 0
    audit, _ = read_audit(tmp_path / "audit")
    assert audit.membership == ()
    assert audit.canaries is not None
    assert "auc" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["blocks", "lora", "dora", "bitfit"])
def test_an_adapter_that_changes_nothing_shows_nothing(tuned, tmp_path, capsys, kind):
    """Whatever its kind, the model is scored without it and with it: a fresh adapter's rows score alike."""
    package, spec = tuned.package, AdapterSpec(kind=kind, rank=2, dtype="float32")
    expected = declared(spec, package.layout, package.block_tensors())
    fresh = attach_to_package(package, spec, device=torch.device("cpu"), seed=3).tensors()
    bundle = write_bundle(tmp_path / "fresh", package=package, spec=spec, tensors=fresh, expected=expected)
    changes = {"bundle_digest": bundle.digest, "adapter": spec, "canaries": None, "num_canaries": 0}
    write_run(run_path(bundle.path), read_run(run_path(tuned.folder / "bundle")).model_copy(update=changes))
    words = ["audit", "bundle", str(package.path), str(bundle.path), "--data", str(tuned.data), "--rows", "20"]
    assert cli.run([*words, "--device", "cpu", "-o", str(tmp_path / "audit")]) == 0
    audit, _ = read_audit(tmp_path / "audit")
    by_signal = {one.signal: one.auc.value for one in audit.membership}
    if kind != "dora":  # whose weights are put together anew, which rounds
        assert by_signal["reference"] == 0.5
    assert by_signal["loss"] == pytest.approx(audit.auc_before.value, abs=0.02)
    assert (audit.verbatim.num_extracted, audit.verbatim.num_new) == (audit.verbatim.num_extracted_before, 0)
    assert audit.canaries is None
    assert "to measure secrets: offsite canaries" in capsys.readouterr().err


def test_of_a_run_too_short_to_say_which_rows_it_drew_the_rest_is_measured(tuned, tmp_path, capsys):
    config = TuneConfig(
        package=tuned.package.path, data=tuned.data, output=tmp_path / "bundle", block_tokens=8, batch_size=1, steps=1,
        precision="fp32", device="cpu", learning_rate=0.01,
    )  # fmt: skip
    tune_run(config)
    words = ["audit", "bundle", str(tuned.package.path), str(config.output), "--data", str(tuned.data)]
    assert cli.run([*words, "--retunings", "0", "--device", "cpu", "-o", str(tmp_path / "audit")]) == 0
    audit, _ = read_audit(tmp_path / "audit")
    assert (audit.membership, audit.auc_before, audit.verbatim.num_rows) == ((), None, 0)
    assert audit.nonmembers == "validation"
    gates = {gate.name: gate.verdict for gate in bundle_gates(audit)}
    assert gates == {
        "scan": "passed", "auc": "not measurable", "tpr_at_1": "not measurable", "secrets": "not measurable",
        "verbatim": "not measurable", "inversion": "failed",
    }  # fmt: skip
    assert "no row was certainly trained on" in capsys.readouterr().err


def test_canaries_that_a_short_run_never_drew_are_neither_in_nor_out(tuned, tmp_path, capsys):
    made = CanarySet(
        nonce="7c" * 32, package_digest=tuned.package.digest, tokens=24, temperature=1.0, num_candidates=8,
        synthetic=tuple(CanaryText(text=f"{n * 7907 % 9973} lorem {n}", included=n % 2 == 0) for n in range(60)),
        secrets=(Secret(prefix="the code is", secret=" ".join(WORDS[:4]), included=True),),
    )  # fmt: skip
    write_canaries(tmp_path / "canaries", made)
    config = TuneConfig(
        package=tuned.package.path, data=tuned.data, output=tmp_path / "bundle", block_tokens=32, batch_size=16,
        steps=5, precision="fp32", device="cpu", learning_rate=0.01, pack=False, canaries=tmp_path / "canaries",
    )  # fmt: skip
    tune_run(config)
    words = ["audit", "bundle", str(tuned.package.path), str(config.output), "--data", str(tuned.data)]
    words += ["--canaries", str(tmp_path / "canaries"), "--rows", "20", "--device", "cpu"]
    assert cli.run([*words, "-o", str(tmp_path / "audit")]) == 0
    audit, _ = read_audit(tmp_path / "audit")
    found = audit.canaries
    assert 0 < found.num_included < 30
    assert found.num == 30 + found.num_included
    assert {(one.num_members, one.num_nonmembers) for one in found.membership} == {(found.num_included, 30)}
    assert found.num_included < found.bound.num_canaries < found.num  # as many are left out of the other side
    assert "were drawn by the step released" in capsys.readouterr().err


WRONG = {
    "no bundle": ({"bundle": "nothing"}, 3, "no bundle folder named 'nothing'"),
    "other data": ({"data": "others.txt"}, 3, "others.txt: not the file that this bundle was tuned on"),
    "no data": ({"data": "nothing.txt"}, 2, "nothing.txt: no such file"),
    "no canaries given": ({"canaries": None}, 2, "--canaries is missing: the run trained on some"),
    "other canaries": ({"canaries": "others"}, 3, "canaries 'others' are sha256:"),
    "no such canaries": ({"canaries": "nothing"}, 3, "no folder of canaries named 'nothing'"),
    "no such others": ({"nonmembers": "nothing.txt"}, 2, "nothing.txt: no such file"),
    "too few tokens": ({"tokens-per-row": 1}, 2, "--tokens-per-row: expected at least 2"),
    "no rows": ({"rows": 0}, 2, "--rows: expected at least 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_are_one_line_and_leave_nothing(words, tuned, tmp_path, capsys, name):
    changes, expected, message = WRONG[name]
    (tmp_path / "others.txt").write_text("\n\n".join(notes(500, 30)), encoding="utf-8")
    made = CanarySet(
        nonce="6b" * 32, package_digest=tuned.package.digest, tokens=8, temperature=1.0,
        synthetic=(CanaryText(text="something else", included=True),),
    )  # fmt: skip
    write_canaries(tmp_path / "others", made)
    given = {flag: tmp_path / value if isinstance(value, str) else value for flag, value in changes.items()}
    code = cli.run(words(**given))
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("offsite: error:")]
    assert (code, out, len(errors)) == (expected, "", 1)
    assert message in errors[0]
    assert not (tmp_path / "audit").exists()


RECORDS = {
    "none": (None, "no run record 'copy.run.json'"),
    "another bundle's": ({"bundle_digest": "sha256:" + "1" * 64}, "is the record of another bundle"),
    "another package's": ({"package_digest": "sha256:" + "1" * 64}, "is the record of another package"),
    "another split": ({"num_records": 7}, "the run's record says 7"),
    "canaries unknown to it": ({"canaries": None, "num_canaries": 0}, "the run trained on none"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_of_something_else_is_refused(words, tuned, tmp_path, capsys, name):
    changes, message = RECORDS[name]
    shutil.copytree(tuned.folder / "bundle", tmp_path / "copy")
    if changes is not None:
        write_run(tmp_path / "copy.run.json", read_run(run_path(tuned.folder / "bundle")).model_copy(update=changes))
    assert cli.run(words(tmp_path / "copy")) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert not (tmp_path / "audit").exists()


def test_another_package_is_refused(words, narrow_package, tuned, tmp_path, capsys):
    given = words()
    given[2] = str(narrow_package.path)
    assert cli.run(given) == 3
    assert "was tuned on package" in capsys.readouterr().err


def test_a_round_of_a_bundle_that_answers_none(words, tuned, tmp_path, capsys):
    assert cli.run(words(round=tmp_path)) == 2
    assert "--round: bundle 'bundle' answers no round" in capsys.readouterr().err
    assert not (tmp_path / "audit").exists()


def test_an_output_that_stands_is_kept(words, tmp_path, capsys):
    (tmp_path / "audit").mkdir()
    assert cli.run(words()) == 2
    assert list((tmp_path / "audit").iterdir()) == []


def test_the_settings_are_the_flags():
    assert AuditBundleConfig.verb == "audit bundle"
    assert {"tokens_per_row", "rows", "secrets_samples", "nonmembers", "canaries"} <= set(
        AuditBundleConfig.model_fields
    )


def test_states_kept_below_the_adapter_change_nothing_but_a_rounding(tuned, tmp_path, capsys, monkeypatch):
    """The oracle is the audit that computes everything; the blocks below run once for both models, not twice."""
    flags = {"data": tuned.data, "output": tmp_path / "top", "adapter": "lora", "placement": "0+1", "pack": False}
    common = {"package": tuned.package.path, "block_tokens": 32, "precision": "fp32", "device": "cpu"}
    changes = {"steps": 12, "learning_rate": 0.02, "audit_share": 0.3, "canaries": tmp_path / "canaries"}
    shutil.copytree(tuned.folder / "canaries", tmp_path / "canaries")
    for path in (tmp_path / "canaries").glob("used*"):
        path.unlink()
    tune_run(TuneConfig(**flags, **common, **changes))
    scratch, num_rows = [], {}
    plain = module.score_rows

    def watched(model, examples, **given):
        scratch.extend(tmp_path.glob(".audit-*.partial/hidden/*"))
        return plain(model, examples, **given)

    monkeypatch.setattr(module, "score_rows", watched)
    audits = {}
    for limit in (0, 1 << 30):
        out = tmp_path / f"audit-{limit}"
        given = {"data": (tuned.data,), "canaries": tmp_path / "canaries", "tokens_per_row": 48, "rows": 60}
        calls = num_rows.setdefault(limit, [])

        def counted(*args, calls=calls, **kwargs):
            attached = attach_to_package(*args, **kwargs)
            attached.blocks[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
            return attached

        with monkeypatch.context() as patched:
            patched.setattr(module, "attach_to_package", counted)
            module.run(
                AuditBundleConfig(
                    package=tuned.package.path, bundle=tmp_path / "top", output=out, cache_bytes=limit,
                    secrets_samples=1, device="cpu", **given,
                )
            )  # fmt: skip
        audits[limit] = read_audit(out)[0]
        assert bool(scratch) == (limit > 0)
        assert not list(tmp_path.glob(".audit-*")), "what is as private as the data is gone"
    computed, kept = audits.values()
    for one, other in zip(computed.membership, kept.membership, strict=True):
        assert other.auc.value == pytest.approx(one.auc.value, abs=0.02), one.signal
        assert other.num_members == one.num_members
    for one, other in zip(computed.canaries.membership, kept.canaries.membership, strict=True):
        assert other.auc.value == pytest.approx(one.auc.value, abs=0.05), one.signal
    assert kept.verbatim == computed.verbatim, "text is written by the model as it is"
    assert kept.canaries.exposure.num_extracted_greedy == computed.canaries.exposure.num_extracted_greedy
    assert {**vars(kept), "membership": (), "canaries": None, "auc_before": None} == {
        **vars(computed), "membership": (), "canaries": None, "auc_before": None
    }  # fmt: skip
    assert len(num_rows[1 << 30]) < len(num_rows[0])


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("audit", "would lie in the audit"),
        ("audit/s.json", "would lie in the audit"),
        ("none/s.json", "no folder 'none'"),
    ],
)
def test_scores_that_could_not_be_written_are_refused_before_anything_is_measured(place, told, words, tmp_path, capsys):
    assert cli.run(words(**{"keep-scores": tmp_path / place})) == 2
    assert told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
