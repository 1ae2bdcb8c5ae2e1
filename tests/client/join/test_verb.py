"""The whole side of a client, played once through its functions; what stops it, and how it goes on."""

from __future__ import annotations

import json
import shutil

import pytest

import client.join.people as people
from offsite.artefacts.bundle import open_bundle
from offsite.audits.gates import bundle_gates
from offsite.audits.record import read_audit
from offsite.errors import ConfigError, PolicyError


def test_a_newcomer_has_keys_and_a_card_to_hand_over(whole_path):
    first = whole_path.told[0]
    assert (first["state"], first["fingerprint"]) == ("card", whole_path.client)
    assert first["card"].endswith("example-hospital.card.json")
    client = whole_path.players.client
    assert (client / "keys").stat().st_mode & 0o777 == 0o700
    assert 'keys = "keys"' in (client / "offsite.toml").read_text()


def test_a_gate_that_did_not_pass_is_not_answered_by_yes(whole_path):
    error = whole_path.refused
    assert str(error).startswith("nothing is sent: auc (not measurable)")
    assert error.hint is not None
    assert "--accept-leakage lets the bundle go all the same" in error.hint


def test_stopped_anywhere_it_goes_on_where_it_was(whole_path):
    assert [*whole_path.stopped, whole_path.played] == [[], ["canaries"], ["tune"], ["audit"]]
    assert whole_path.err.count("what was done is kept in 'joined': the same command goes on from there") == 3
    assert whole_path.err.count("as far as they are known now") == 1, "asked once of the same data and settings"


def test_the_same_command_computes_nothing_twice(whole_path):
    assert str(whole_path.again) == str(whole_path.refused)
    assert whole_path.replayed == []


def test_what_leaves_is_the_audited_bundle_sealed(whole_path):
    told = whole_path.told[1]
    work = whole_path.work
    assert (told["state"], told["accepted_leakage"], told["passed"]) == ("sealed", True, False)
    assert told["bundle_digest"] == open_bundle(work / "bundle").digest
    release = json.loads((work / "bundle.sealed.release.json").read_text())
    assert (release["bundle_digest"], release["accepted_leakage"]) == (told["bundle_digest"], True)
    again = whole_path.players.join(whole_path.hello, accept_leakage=True)
    assert again["sealed_digest"] == told["sealed_digest"]


def test_what_was_said_of_the_gates_beforehand_held(whole_path):
    audit, _ = read_audit(whole_path.work / "audit")
    found = {gate.name: gate.verdict for gate in bundle_gates(audit)}
    before = whole_path.err.partition("as far as they are known now:")[2].partition("not every gate can pass")[0]
    said = {line.split()[0]: line for line in before.strip().splitlines()}
    assert list(said) == list(found)
    unmeasured = {name for name, line in said.items() if "not measurable" in line}
    assert unmeasured == {"auc", "tpr_at_1", "verbatim"} <= {name for name in found if found[name] == "not measurable"}
    assert ("will fail" in said["inversion"], found["inversion"]) == (True, "failed")


def test_no_row_is_said_where_no_terminal_is(whole_path):
    for row in whole_path.players.data.read_text().splitlines()[:3]:
        for value in json.loads(row).values():
            assert value.strip() not in whole_path.err
    notes = "".join(path.read_text() for path in (whole_path.work / "notes").iterdir())
    assert "cough" not in notes


# what leaves


@pytest.fixture
def unsealed(whole_path):
    """The whole path, with what was sealed set aside, as before anybody was asked."""
    work, aside = whole_path.work, whole_path.work.parent / "aside"
    names = ["bundle.sealed", "bundle.sealed.release.json"]
    aside.mkdir()
    for name in names:
        (work / name).rename(aside / name)
    yield whole_path
    for name in names:
        shutil.rmtree(work / name) if (work / name).is_dir() else (work / name).unlink(missing_ok=True)
        (aside / name).rename(work / name)
    aside.rmdir()


def test_asked_and_not_agreed(unsealed, monkeypatch):
    join = unsealed.players.join
    with pytest.raises(ConfigError, match="nobody is here to answer: is it to be sealed and sent"):
        join(unsealed.hello, accept_leakage=True, yes=False)
    monkeypatch.setattr(people, "can_ask", lambda: True)
    monkeypatch.setattr(people, "typed", lambda _question: "n")
    with pytest.raises(PolicyError, match="not agreed: nothing has left this machine"):
        join(unsealed.hello, accept_leakage=True, yes=False)
    assert not (unsealed.work / "bundle.sealed").exists()


def test_a_terminal_does_not_pass_a_gate_either(unsealed, monkeypatch):
    monkeypatch.setattr(people, "can_ask", lambda: True)
    monkeypatch.setattr(people, "typed", lambda _question: "yes")
    with pytest.raises(PolicyError, match="nothing is sent"):
        unsealed.players.join(unsealed.hello, yes=False)
    assert not (unsealed.work / "bundle.sealed").exists()


def test_what_lies_ready_to_be_handed_over_is_not_replaced_unasked(unsealed):
    first = unsealed.players.join(unsealed.hello, accept_leakage=True)
    try:
        for changed in ({"canaries": 9}, {"retunings": 0}):
            with pytest.raises(ConfigError, match="or lies ready to"):
                unsealed.players.join(unsealed.hello, accept_leakage=True, **changed)
        assert unsealed.players.join(unsealed.hello, accept_leakage=True)["sealed_digest"] == first["sealed_digest"]
    finally:
        (unsealed.work / "notes" / "sent.json").unlink()


def test_killed_between_the_seal_and_its_record_it_is_sealed_anew(unsealed):
    first = unsealed.players.join(unsealed.hello, accept_leakage=True)
    (unsealed.work / "bundle.sealed.release.json").unlink()
    second = unsealed.players.join(unsealed.hello, accept_leakage=True)
    assert (second["bundle_digest"], unsealed.played) == (first["bundle_digest"], ["audit"])
    assert second["sealed_digest"] != first["sealed_digest"]


def test_what_left_already_is_not_computed_again_with_other_settings(unsealed):
    note = unsealed.work / "notes" / "sent.json"
    note.write_text("{}")
    try:
        with pytest.raises(ConfigError, match="a bundle of this job's round 1 has left already"):
            unsealed.players.join(unsealed.hello, accept_leakage=True, canaries=9)
    finally:
        note.unlink()
    assert unsealed.players.played == []


# rounds


def test_another_round_has_a_bundle_of_its_own_and_leaves_the_first_alone(whole_path):
    players, work = whole_path.players, whole_path.work
    before = (work / "bundle.sealed" / "manifest.json").read_bytes()
    other = players.client / "other.jsonl"
    other.write_text(players.data.read_text().replace("cough", "fever"))
    given = {"data": [str(other)], "round": 2, "accept_leakage": True}
    told = players.join(whole_path.hello, **given)
    assert players.played == ["canaries", "tune", "audit"]
    assert (told["state"], told["round"]) == ("sealed", 2)
    assert (
        told["bundle_digest"] == open_bundle(work / "round-2" / "bundle").digest != whole_path.told[1]["bundle_digest"]
    )
    sealed = [
        json.loads((folder / "bundle.sealed" / "manifest.json").read_bytes()) for folder in (work, work / "round-2")
    ]
    assert [one["round"] for one in sealed] == [1, 2]
    assert sealed[0]["job_id"] == sealed[1]["job_id"]
    assert (work / "bundle.sealed" / "manifest.json").read_bytes() == before
    assert players.join(whole_path.hello, **given)["sealed_digest"] == told["sealed_digest"]
    assert players.played == []


def test_a_round_that_the_job_does_not_allow(whole_path):
    with pytest.raises(ConfigError, match="--round 3: the job allows rounds 1 to 2"):
        whole_path.players.join(whole_path.hello, round=3)
    assert not (whole_path.work / "round-3").exists()
