"""What a client measures of a round's bundle before it goes, and what then stays."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch

from client.audit.audit import run as audit
from client.audit.config import AuditBundleConfig
from client.tuning.tune import attach_to_package
from offsite import cli
from offsite.artefacts.bundle import open_bundle
from offsite.audits.record import read_audit
from offsite.audits.scores import score_rows
from offsite.config import build
from offsite.errors import ConfigError, PolicyError, WrongBinding
from offsite.exchange.packing import pack
from offsite.privacyreport.words import non_claims
from offsite.sealed.release import read_release, release_path


@pytest.fixture
def second(federated):
    """The second round, sealed for anna: every client answered the first."""
    with federated.opened() as federation:
        for name, sealed in ((name, federation.ask(1)[federated.key(name)]) for name in federated.NAMES):
            member = federated.member(name)
            assert federation.take_in(pack(member.answer(member.take(sealed)))).state == "verified"
        federation.close_round(1, {})
        return federation.ask(2)[federated.key("anna")]


def audit_words(member, round_, out, **changes):
    bundle = round_.path.parent / "bundle"
    given = {"package": member.config.package, "bundle": bundle, "data": member.config.data[0], "round": round_.path}
    stated = {name: str(value) for name, value in {**given, "output": out, **changes}.items() if value is not None}
    return build(AuditBundleConfig, flags={**stated, "rows": 20, "device": "cpu"})


def test_a_round_s_bundle_is_measured_on_the_weights_that_the_round_gave(federated, second, tmp_path, monkeypatch):
    member = federated.member("anna")
    round_ = member.take(second)
    member.answer(round_)
    ids, seen = torch.arange(1, 9)[None], []

    def looked_at(model, *args, **kwargs):
        seen.append(model(input_ids=ids).logits)
        return score_rows(model, *args, **kwargs)

    monkeypatch.setattr("client.audit.audit.score_rows", looked_at)
    told = audit(audit_words(member, round_, tmp_path / "audit"))
    found, _ = read_audit(tmp_path / "audit")
    assert found.run.bundle_digest == told["bundle_digest"] == open_bundle(round_.path.parent / "bundle").digest
    assert (found.run.round.number, found.run.round.digest) == (2, round_.digest)
    assert found.run.round.first_step == round_.manifest.steps
    spec, cpu = round_.manifest.adapter, torch.device("cpu")
    grown = attach_to_package(member.package, spec, device=cpu, round_=round_)
    package = attach_to_package(member.package, spec, device=cpu)
    for attached in (grown, package):
        attached.model.eval()
    with torch.no_grad():
        assert torch.equal(seen[0], grown.model(input_ids=ids).logits)
        assert not torch.allclose(seen[0], package.model(input_ids=ids).logits)
        # Whether rows are alike before training is asked of a model that no round taught anything.
        assert torch.equal(seen[1], package.model(input_ids=ids).logits)
        assert not torch.allclose(seen[2], seen[0])
    assert any("answers round 2 of a federation" in line for line in non_claims(found, None, None))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [(None, ConfigError, "was tuned on a federation's round"), ("first", WrongBinding, "answers round sha256:")],
)
def test_a_round_s_bundle_is_not_measured_on_other_weights(federated, second, tmp_path, given, error, message):
    member = federated.member("anna")
    round_ = member.take(second)
    member.answer(round_)
    other = None if given is None else round_.path.parents[1] / "round-0001" / "round"
    with pytest.raises(error, match=message):
        audit(audit_words(member, round_, tmp_path / "audit", round=other))
    assert not (tmp_path / "audit").exists()


def test_each_round_is_measured_before_it_goes(federated, seal_round, tmp_path, monkeypatch):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"row {number} of many"}) + "\n" for number in range(400)))
    tune = {"batch_size": 20, "block_tokens": 32, "precision": "fp32", "pack": False, "audit_share": 0.3}
    member = federated.member("anna", data=str(data), audit=True, tune=tune)
    round_ = member.take(seal_round(1, steps=12))
    sealed = member.answer(round_)
    found, digest = read_audit(round_.path.parent / "audit")
    assert found.nonmembers == "set aside"
    release = read_release(release_path(sealed))
    assert (release.audit, release.accepted_leakage) == (digest, True)
    assert {gate.name for gate in release.gates} > {"scan"}
    keys = ["--keys", str(member.config.keys), "--passphrase-file", str(member.config.passphrase_file)]
    words = ["--audit", str(round_.path.parent / "audit"), "--release", str(release_path(sealed))]
    report = tmp_path / "privacy"
    assert cli.run(["report", "privacy", *words, "--job", str(member.config.job), *keys, "-o", str(report)]) == 0
    bundle = ["--bundle", str(round_.path.parent / "bundle"), "--package", str(member.config.package)]
    assert cli.run(["report", "verify", str(report), *keys[:2], *bundle]) == 0
    assert "answers round 1 of a federation" in (report / "report.html").read_text()
    shutil.rmtree(sealed)
    monkeypatch.setattr("client.federation.member.audit_run", None)  # it stands: nothing is measured again
    assert member.answer(round_) == sealed


def test_what_fails_a_gate_stays_whatever_is_accepted(federated, seal_round, tmp_path):
    data = tmp_path / "secrets.jsonl"
    rows = [{"text": hashlib.sha256(str(number).encode()).hexdigest()[:24]} for number in range(60)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tune = {"batch_size": 8, "block_tokens": 32, "precision": "fp32", "pack": False, "audit_share": 0.4}
    member = federated.member("anna", data=str(data), audit=True, tune=tune)
    round_ = member.take(seal_round(1, steps=150, learning_rate=0.05))
    for _ in range(2):  # nor does asking again let it go
        with pytest.raises(PolicyError, match=r"round 1: gate '.*' failed"):
            member.answer(round_)
    assert (round_.path.parent / "audit").is_dir()
    assert not (round_.path.parent / "sealed").exists()
