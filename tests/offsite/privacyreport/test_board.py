"""The sheet for a board: the record's own verdicts, sentences and figures, and nothing from anywhere else."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest
from page_lab import EVIL, Outline, hostile

from offsite import cli
from offsite.audits.gates import Release, bundle_gates
from offsite.audits.record import write_audit
from offsite.privacyreport import board as module
from offsite.privacyreport.board import board
from offsite.privacyreport.page import page
from offsite.privacyreport.record import Limits, audit_digest, report_raw
from offsite.report.engine import render


def _loaded(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


s = _loaded("privacy_samples")
DIGEST = "sha256:" + "d" * 64
WORDS_OF_ITS_OWN = {"0.5", "1", "10"}  # what an area means, how rare hits are told, where epsilon stops promising


def released(audit):
    gates = bundle_gates(audit)
    accepted = any(gate.verdict != "passed" for gate in gates)
    given = {"bundle_digest": s.BUNDLE, "sealed_digest": s.OTHER, "audit": audit_digest(audit)}
    return Release(**given, gates=gates, accepted_leakage=accepted, round=1)


PRIVATE = s.bundle_audit(s.made_up_claim(), power=0.95)
LEAKY = s.bundle_audit(power=0.4, canaries=s.canaries(power=0.3, secrets=60, exposed=6.0, extracted=3))
OWNERS = {
    "plugged": s.plugged_audit(),
    "package": s.package_audit(withheld=s.ways()),
    "limits": Limits(max_capability=0.7, max_recovery=0.4, max_union=0.5, min_withheld=0.2),
}
REPORTS = {
    "private": s.report(bundle=PRIVATE, release=released(PRIVATE)),
    "leaky": s.report(bundle=LEAKY, release=released(LEAKY)),
    "everything": s.report(bundle=LEAKY, release=released(LEAKY), **OWNERS),
    "a package": s.report(package=s.package_audit()),
    "plugged in": s.report(plugged=s.plugged_audit()),
}


def figures(text):
    return set(re.findall(r"\d+(?:[.,]\d+)*", text))


@pytest.mark.parametrize("name", REPORTS)
def test_every_verdict_sentence_and_figure_is_the_records(name):
    report = REPORTS[name]
    shown = Outline(board(report, DIGEST)).text
    assert report.headline in shown
    for gate in report.gates.every:
        assert gate.told in shown
        assert gate.verdict in shown
    for sentence in report.non_claims:
        assert sentence in shown
    body = shown[shown.index("For the board") :].replace(DIGEST, "").replace(report.issuer, "")
    raw = report_raw(report).decode()
    known = figures(raw) | {f"{int(one):,}" for one in figures(raw) if one.isdigit()}
    known |= figures(Outline(page(report)).text) | {str(len(report.gates.every))}
    known |= {str(sum(gate.verdict == one for gate in report.gates.every)) for one in ("passed", "failed")}
    assert figures(body) - known - WORDS_OF_ITS_OWN <= figures("2026-09-21")


def test_what_was_let_go_although_gates_failed_stands_in_bold_at_the_top():
    text = board(REPORTS["leaky"], DIGEST)
    assert text.index("<b>Released although gates failed") < text.index("What left")
    assert '<h1 class="bad">NOT DIFFERENTIALLY PRIVATE' in text
    assert "Nothing. The adapter was tuned without" in text
    assert "<h1>Differentially private per example" in board(REPORTS["private"], DIGEST)


def test_a_gate_without_words_of_its_own_is_shown_by_its_name():
    gates = REPORTS["leaky"].gates
    new = gates.bundle[0].model_copy(update={"name": "another-gate"})
    changed = REPORTS["leaky"].model_copy(update={"gates": gates.model_copy(update={"bundle": (new,)})})
    assert "another-gate" in board(changed, DIGEST)


def test_no_string_becomes_markup_and_nothing_is_loaded(monkeypatch):
    seen = []
    with monkeypatch.context() as patched:
        patched.setattr(module, "render", lambda template, values: seen.append((template, values)) or "")
        board(REPORTS["everything"], DIGEST)
    template, values = seen[0]
    plain, read = Outline(render(template, values)), Outline(render(template, hostile(values)))
    assert read.tags == plain.tags
    assert sum(said.count(EVIL) for said in read.said if said) > 40
    tags = {tag for tag, _ in plain.tags}
    assert not {"script", "link", "img", "iframe", "a"} & tags
    for reference in ("http:", "https:", "url(", "@import", "//"):
        assert reference not in render(template, values)


def test_the_verb_writes_it_and_a_verifier_makes_the_same(parties, tmp_path, capsys):
    owner, client = parties
    write_audit(tmp_path / "audit", LEAKY)
    words = ["report", "privacy", "--audit", str(tmp_path / "audit"), "--format", "board", "-o", str(tmp_path / "out")]
    assert cli.run([*words, *client.flags]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["files"] == ["board.html"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"board.html", "report"}
    again = tmp_path / "again.html"
    verify = ["report", "verify", str(tmp_path / "out" / "report"), "--keys", str(owner.keys), "--board", str(again)]
    assert cli.run(verify) == 0
    assert again.read_bytes() == (tmp_path / "out" / "board.html").read_bytes()
    again.unlink()
    assert cli.run(["report", "verify", str(tmp_path / "out"), "--keys", str(owner.keys)]) == 3
    assert "offsite report verify out/report" in capsys.readouterr().err, "where the signed one lies"
    report = tmp_path / "out" / "report" / "report.json"
    report.write_bytes(report.read_bytes().replace(b"NOT DIFFERENTIALLY", b"DIFFERENTIALLY"))
    assert cli.run(verify) == 3
    assert not again.exists()
