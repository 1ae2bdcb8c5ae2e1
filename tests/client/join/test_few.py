"""`offsite join` on 300 rows: every gate is measured, and passed or failed for a reason that is said."""

from __future__ import annotations

import contextlib
import hashlib
import json

import pytest

from offsite.audits.gates import bundle_gates
from offsite.audits.record import read_audit
from offsite.errors import PolicyError

ROWS = [
    {"question": f"what of ward {n}?", "answer": f" {hashlib.sha256(str(n).encode()).hexdigest()[:20]} after {n} days"}
    for n in range(300)
]
SETTINGS = "steps=40,batch_size=8,block_tokens=56,pack=false,precision=fp32,sealed_off=false"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_with_300_rows_all_gates_are_measured(players, monkeypatch, capsys):
    players.data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    players.quick["audit"] = ["secrets_samples=10", "batch_size=64"]
    monkeypatch.setattr("client.audit.canaries.coins", lambda num: [place % 2 == 0 for place in range(num)])
    invitation = players.invited()
    capsys.readouterr()
    with contextlib.suppress(PolicyError):  # where a gate fails, for a reason that is looked at below
        players.join(invitation, tune=SETTINGS, retunings=10)
    audit, _ = read_audit(players.client / "joined" / "audit")
    gates = {gate.name: gate for gate in bundle_gates(audit)}
    assert list(gates) == ["scan", "auc", "tpr_at_1", "secrets", "verbatim", "inversion"]
    assert "not measurable" not in {gate.verdict for gate in gates.values()}
    failed = {name: gate.told for name, gate in gates.items() if gate.verdict == "failed"}
    assert failed.keys() <= {"auc", "tpr_at_1"}
    assert all("was seen" in told or "do not rule more than it out" in told for told in failed.values())
    assert (players.client / "joined" / "bundle.sealed").is_dir() == (not failed)
    said = capsys.readouterr().err
    before = said.partition("as far as they are known now:")[2].partition("canaries")[0]
    assert "by 10 retunings on random halves of 270 rows: about 5 times what tuning takes" in before
    assert "not every gate can pass" not in said
    assert not (players.client / "joined" / "audit.work").exists()
