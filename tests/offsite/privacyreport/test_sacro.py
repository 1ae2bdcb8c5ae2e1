"""The file set for output checkers: what SACRO-ML looks for, beside a signed report that verifies as ever."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from offsite import cli
from offsite.audits.keptscores import kept_scores
from offsite.audits.membership import membership_of
from offsite.audits.record import write_audit
from offsite.errors import ArtefactError
from offsite.exchange.verbs import read_content
from offsite.privacyreport.record import audit_digest


def _loaded(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


s = _loaded("privacy_samples")
MEMBERS = 200


@pytest.fixture
def desk(parties, tmp_path, capsys):
    """An audit and its scores in the folder, and the command on them."""
    rng = np.random.default_rng(2)
    attacks = {name: rng.normal(size=MEMBERS + 150) for name in ("loss", "reference", "min-k")}
    attacks["min-k"][:MEMBERS] += 1  # the strongest, and not the first
    found = tuple(membership_of(name, by[:MEMBERS], by[MEMBERS:]) for name, by in attacks.items())
    audit = s.bundle_audit(membership=found)
    with kept_scores(tmp_path / "scores.json", attacks, MEMBERS, audit=audit_digest(audit)):
        write_audit(tmp_path / "audit", audit)
    _, client = parties

    def run(*words, audits=("audit",), code=0):
        given = ["report", "privacy", *(f"--audit={tmp_path / name}" for name in audits), *client.flags]
        assert cli.run([*given, "-o", str(tmp_path / "out"), *map(str, words)]) == code
        return capsys.readouterr()

    run.audit, run.keys, run.attacks = audit, client.keys, attacks
    return run


def test_the_set_is_what_sacroml_looks_for_and_the_report_verifies(desk, tmp_path, capsys):
    told = json.loads(desk("--format", "sacro", "--scores", tmp_path / "scores.json").out.splitlines()[-1])
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {*told["files"], "report"}
    assert cli.run(["report", "verify", str(out / "report"), "--keys", str(desk.keys)]) == 0
    assert capsys.readouterr()

    target = yaml.safe_load((out / "target.yaml").read_text())
    assert target["model_params"]["bundle_digest"] == s.BUNDLE
    assert not any(target[f"{name}_path"] for name in ("X_train", "y_train", "X_test", "y_test"))
    train, test = (np.loadtxt(out / target[f"proba_{side}_path"]) for side in ("train", "test"))
    strongest = next(one for one in desk.audit.membership if one.signal == "min-k")
    assert membership_of("min-k", train, test).auc.value == pytest.approx(strongest.auc.value, abs=1e-12)

    results = json.loads((out / "attack_results.json").read_text())
    assert next(iter(results.values()))["metadata"]["attack_params"]["signal"] == "min-k"
    for name, one in results.items():
        assert name == f"{one['metadata']['attack_name']}_{one['log_id']}"
        (instance,) = one["attack_experiment_logger"]["attack_instance_logger"].values()
        stated = {audit.signal: audit for audit in desk.audit.membership}[one["metadata"]["attack_params"]["signal"]]
        assert instance["AUC"] == pytest.approx(stated.auc.value, abs=1e-12)
        assert instance["n_pos_test_examples"] == MEMBERS
        assert [tuple(point) for point in zip(instance["fpr"], instance["tpr"], strict=True)] == list(stated.roc)


def test_no_raw_score_no_order_and_no_path_is_handed_over(desk, tmp_path):
    desk("--format", "sacro", "--scores", tmp_path / "scores.json")
    written = b"".join(path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())
    for by in desk.attacks.values():
        assert not any(repr(score).encode() in written for score in by.tolist())
    assert str(tmp_path).encode() not in written
    assert (tmp_path / "out").stat().st_mode & 0o077 == 0
    assert not any(one.stat().st_mode & 0o077 for one in (tmp_path / "out").iterdir() if one.is_file())
    train = np.loadtxt(tmp_path / "out" / "proba_train.csv")
    for kept in (tmp_path / "out", tmp_path / "scores.json"):
        with pytest.raises(ArtefactError):  # none of it can be sealed, and so none of it crosses
            read_content(kept)
    assert read_content(tmp_path / "out" / "report").kind == "report"
    assert (train.argsort() != desk.attacks["min-k"][:MEMBERS].argsort()).any()


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (("--format", "sacro"), "--format sacro and --scores are given together", 2),
        (("--scores", "scores.json"), "--format sacro and --scores are given together", 2),
        (("--format", "sacro", "--scores", "none.json"), "no file of scores named 'none.json'", 2),
        (("--format", "sacro", "--scores", "audit/audit.json"), "format is", 3),
        (("--format", "pdf"), "format", 2),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line_and_nothing_stands(desk, tmp_path, words, message, code):
    given = [tmp_path / word if word.endswith("json") else word for word in words]
    assert message in desk(*given, code=code).err
    assert not (tmp_path / "out").exists()


def test_a_set_needs_an_audit_of_a_bundle(desk, tmp_path):
    write_audit(tmp_path / "package", s.package_audit())
    told = desk("--format", "sacro", "--scores", tmp_path / "scores.json", audits=("package",), code=2).err
    assert "no audit of a bundle is among --audit" in told
