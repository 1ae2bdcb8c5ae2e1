"""Everything that lies in a party's folder is told for what its files say it is, in words, and nothing of it leaks."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest

from offsite import cli
from offsite.artefacts.job import Job, read_job, write_job
from offsite.console import utc
from offsite.inspection.inspect import ELSEWHERE, FILES, FOLDERS, MARKED, recognise

INVITATION = Path(__file__).parents[2] / "vectors" / "invitation" / "invitation.offsite.json"
EVERY = [
    ("owner", "package", "package", True),
    ("client", "bundle", "bundle", True),
    ("client", "job", "job", False),
    ("client", "job/job.json", "job", False),
    ("client", "job.sealed", "sealed", True),
    ("client", "package.sealed", "sealed", True),
    ("owner", "bundle.sealed", "sealed", True),
    ("owner", "adapted", "adapted", True),
    ("client", "privacy", "privacy-report", False),
    ("client", "privacy/report.json", "privacy-report", False),
    ("owner", "results", "results", False),
    ("client", "audit", "audit", False),
    ("client", "canaries", "canaries", False),
    ("client", "canaries/commitment", "commitment", False),
    ("client", "canaries/reveal", "reveal", False),
    ("client", "bundle.run.json", "run", False),
    ("client", "bundle.sealed.release.json", "release", False),
    ("owner", "package.owner.json", "owner", False),
    ("client", "keys", "keys", True),
    ("client", "owner.card.json", "card", True),
    ("owner", "registry", "registry", True),
    ("owner", "registry/bundles/c4ff4ff7ac24dafb", "bundle", True),
    ("owner", ".", "folder", False),
]
TOLD_WITHIN = (".", "privacy/report.json")
SECOND = re.compile(r"(?<![\w.,-])1[78]\d{8}(?![\w.,-])|(?<![\w.,-])2[01]\d{8}(?![\w.,-])")
"""A date of those years as a number of seconds."""


@pytest.mark.parametrize(("party", "thing", "kind", "verified"), EVERY)
def test_every_thing_is_told_and_what_was_verified_is_said(parties, party, thing, kind, verified):
    told, words = parties.inspect(party, thing, "--keys", "keys")
    assert (told["kind"], told["verified"]) == (kind, verified)
    assert told["checked"]
    assert words.strip()
    assert SECOND.search(words) is None
    assert str(parties.owner.parent) not in words
    for line in words.splitlines():
        assert line.isprintable()


@pytest.mark.parametrize(("party", "thing", "kind", "verified"), [one for one in EVERY if one[1] not in TOLD_WITHIN])
def test_its_name_says_nothing(parties, party, thing, kind, verified):
    renamed = (parties.owner.parent / party / thing).rename(parties.owner.parent / party / "anything at all")
    keys = "anything at all" if thing == "keys" else "keys"
    told, _ = parties.inspect(party, renamed, "--keys", keys)
    assert (told["kind"], told["verified"]) == (kind, verified)


def test_a_folder_of_things_is_listed(parties):
    told, words = parties.inspect("owner", ".")
    assert told["things"] == {
        "adapted": "adapted folder",
        "bundle.sealed": "sealed folder",
        "client.card.json": "card",
        "job": "job",
        "keys": "keys folder",
        "package": "package",
        "package.owner.json": "owner's record of a package",
        "registry": "registry",
        "results": "results",
    }
    assert "heldout.jsonl" not in words


def test_a_job_in_words(parties, monkeypatch):
    job = read_job(parties.client / "job").job
    monkeypatch.setattr(time, "time", lambda: float(job.expires - 29 * 86400 - 3600))
    told, words = parties.inspect("client", "job", "--keys", "keys")
    assert f"{utc(job.expires)}, in 29 days\n" in words
    assert f"{job.owner} (owner, pinned here)" in words
    assert f"{job.client} (client, these keys)" in words
    assert "lora on all, rank 2 on all-linear, bfloat16" in words
    assert "none advised" in words
    assert "at most 1 times the weight's Frobenius norm and 2 times its largest singular value" in words
    assert told["rounds"] == 2
    assert told["expired"] is False
    assert told["digest"] == read_job(parties.client / "job").digest
    monkeypatch.setattr(time, "time", lambda: float(job.expires + 3 * 3600))
    told, words = parties.inspect("client", "job")
    assert f"{utc(job.expires)}, 3 hours ago: it is over" in words
    assert told["expired"] is True
    assert f"client       {job.client}\n" in words  # without keys nobody has a name


def test_a_jobs_terms_are_its_senders_words(parties):
    stated = read_job(parties.client / "job").job.model_dump()
    terms = "Line one.\nverified: every byte\n" + "x\n" * 500
    write_job(parties.client / "other", Job(**{**stated, "terms": terms, "learning_rate": 0.002}))
    _, words = parties.inspect("client", "other")
    assert "  terms        | Line one.\n               | verified: every byte\n               | x\n" in words
    assert f"... of {len(terms):,} characters in all" in words
    assert len(words.splitlines()) < 110
    assert "0.002 advised" in words


def test_a_sealed_folder_without_its_issuers_card(parties):
    told, words = parties.inspect("client", "job.sealed")
    assert told["verified"] is False
    assert words.startswith("sealed job job.sealed; signatures not checked: --keys names no keys folder")
    shutil.copytree(parties.client / "keys", parties.client / "strangers")
    (parties.client / "strangers" / "trust.json").unlink()
    (parties.client / "strangers").chmod(0o700)
    told, words = parties.inspect("client", "job.sealed", "--keys", "strangers")
    assert told["verified"] is False
    assert "signatures not checked: " in words
    assert "is not pinned here" in words
    told, _ = parties.inspect("client", "job.sealed", "--keys", "../owner/keys")
    assert told["verified"] is True  # the owner's own seal, by its own card


def test_the_keys_folder_at_home_is_used(parties):
    shutil.copytree(parties.client / "keys", parties.client.parent / ".offsite" / "keys")
    (parties.client.parent / ".offsite" / "keys").chmod(0o700)
    told, words = parties.inspect("client", "job.sealed")
    assert told["verified"] is True
    assert "(owner, pinned here)" in words


def test_a_sealed_folder_whose_date_has_passed_is_told(parties, monkeypatch):
    stated = json.loads((parties.client / "job.sealed" / "manifest.json").read_text())
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: float(stated["created"]) - 400 * 86400)
    told, words = parties.inspect("client", "job.sealed", "--keys", "keys")
    assert told["verified"] is False  # before the card's own date nobody is trusted
    assert "not yet valid" in words
    monkeypatch.setattr(time, "time", lambda: now)
    told, words = parties.inspect("client", "package.sealed", "--keys", "keys")
    files = json.loads((parties.client / "package.sealed" / "manifest.json").read_text())["files"]
    assert told["files"] == {file["name"]: file["bytes"] for file in files}
    for file in files:
        assert f"{file['bytes']:,}  " in words
        assert f"{file['sealed_bytes']:,}" in words


def edited(path, change):
    stated = json.loads(path.read_text())
    change(stated)
    path.write_text(json.dumps(stated, sort_keys=True, indent=1))


SEALED_TAMPERED = {
    "the date moved": ("manifest.json", lambda m: m.update(expires=m["expires"] + 1)),
    "another job": ("manifest.json", lambda m: m.update(job_id="0" * 32)),
    "a size": ("manifest.json", lambda m: m["files"][0].update(bytes=1, sealed_bytes=73)),
}


@pytest.mark.parametrize("name", list(SEALED_TAMPERED))
def test_nothing_is_shown_of_a_seal_that_does_not_fit(parties, name):
    file, change = SEALED_TAMPERED[name]
    edited(parties.client / "job.sealed" / file, change)
    out, words = parties.inspect("client", "job.sealed", "--keys", "keys", code=3)
    assert out == ""
    assert words.startswith("offsite: error: the ed25519 signature")
    assert parties.inspect("client", "job.sealed")[0]["verified"] is False  # and without keys it is not called verified


def test_an_encrypted_byte_that_was_changed(parties):
    (path,) = (parties.client / "job.sealed" / "payload").iterdir()
    raw = bytearray(path.read_bytes())
    raw[100] ^= 1
    path.write_bytes(bytes(raw))
    _, words = parties.inspect("client", "job.sealed", "--keys", "keys", code=3)
    assert "is not the signed one" in words


def test_a_seal_by_another_than_its_manifest_says(parties):
    edited(parties.client / "job.sealed" / "manifest.json", lambda m: m.update(issuer=m["recipients"][0]))
    _, words = parties.inspect("client", "job.sealed", code=3)
    assert "names another issuer" in words


def test_canaries_are_counted_and_never_shown(parties):
    stated = json.loads((parties.client / "canaries" / "canaries.json").read_text())
    for thing in ("canaries", "canaries/reveal", "canaries/canaries.json"):
        told, words = parties.inspect("client", thing)
        assert told["commitment"] == json.loads((parties.client / "bundle.run.json").read_text())["canaries"]
        assert (told["num"], told["num_secrets"]) == (len(stated["synthetic"]), len(stated["secrets"]))
        everything = words + json.dumps(told)
        for secret in stated["secrets"]:
            assert secret["secret"] not in everything
            assert secret["prefix"] not in everything
        for one in stated["synthetic"]:
            assert one["text"] not in everything
        assert stated["nonce"] not in everything
    told, _ = parties.inspect("client", "canaries")
    assert told["bundle_digest"] == parties.figures["audit"]["bundle_digest"]
    assert parties.inspect("client", "canaries/commitment")[0]["commitment"] == told["commitment"]


def test_private_keys_are_counted_and_not_opened(parties):
    for path in (parties.client / "keys").glob("*.pem"):
        path.chmod(0o000)
    told, words = parties.inspect("client", "keys")
    assert told["private_keys"] == 4
    assert told["fingerprint"] == parties.figures["client"]
    assert told["pinned"] == {parties.figures["owner"]: "trusted"}
    assert "PRIVATE" not in words
    (parties.client / "keys").chmod(0o755)
    assert "open to others" in parties.inspect("client", "keys", code=3)[1]


def test_the_owners_record_keeps_its_secret(parties):
    told, words = parties.inspect("owner", "package.owner.json")
    stated = json.loads((parties.owner / "package.owner.json").read_text())
    assert told["num_blocks"] == stated["num_blocks"]
    assert "channels" not in json.dumps(told) + words
    assert str(stated["channels"]["middle.0"])[1:12] not in words


def test_figures_are_those_of_the_files(parties):
    results, words = parties.inspect("owner", "results")
    for row, value in results["rows"].items():
        assert value == parties.figures["evaluate"][row]
        assert f"{value:.4g}" in words
    assert results["metrics"]["gap"] == parties.figures["evaluate"]["gap"]
    audit, words = parties.inspect("client", "audit")
    assert audit["gates"] == parties.figures["audit"]["gates"]
    assert audit["digest"] == parties.figures["audit"]["audit_digest"]
    for signal, value in parties.figures["audit"]["auc"].items():
        assert re.search(rf"^  {re.escape(signal)} +{value:.3f} ", words, re.MULTILINE)
    release, _ = parties.inspect("client", "bundle.sealed.release.json")
    assert release["gates"] == audit["gates"]
    assert release["accepted_leakage"] is True
    adapted, words = parties.inspect("owner", "adapted")
    for name in ("bundle_digest", "base_digest", "package_digest", "form", "scale", "merged_digest", "id"):
        assert adapted[name] == parties.figures["plug"][name]
    assert "/srv" not in words  # where the model was


def test_a_privacy_report_is_what_its_issuer_says(parties):
    told, words = parties.inspect("client", "privacy", "--keys", "keys")
    stated = json.loads((parties.client / "privacy" / "report.json").read_text())
    assert told["headline"] == stated["headline"]
    assert f"it says      {stated['headline']}" in words
    assert "offsite report verify privacy" in words
    assert told["attestation"] == stated.get("attestation", {"kind": None})["kind"]
    assert utc(stated["created"]) in words
    assert f"{stated['issuer']} (client, these keys), the client" in words


def test_a_registry_is_opened_against_its_head_only(parties):
    told, words = parties.inspect("owner", "registry", "--keys", "keys")
    assert told["bundles"] == {parties.figures["id"]: "plugged-in"}
    (job,) = told["jobs"]
    assert job == read_job(parties.owner / "job").job.job_id
    assert utc(told["jobs"][job]) in words
    for keys in ([], ["--keys", "../client/keys"]):
        before = {path.name: path.read_bytes() for path in (parties.owner / "registry").glob("registry.*")}
        told, words = parties.inspect("owner", "registry", *keys)
        assert told["verified"] is False
        assert "its head lies" in words
        assert {path.name: path.read_bytes() for path in (parties.owner / "registry").glob("registry.*")} == before
    (parties.owner / "registry" / "registry.id").write_text("../../somewhere\n")
    assert "is not 32 hex digits" in parties.inspect("owner", "registry", "--keys", "keys", code=3)[1]


def test_a_federations_result(parties):
    digest = "sha256:" + "0" * 64
    stated = {
        "name": "trial\x1b[2J",
        "federation_id": "5" * 32,
        "mode": "shared",
        "settings": {},
        "package_digest": digest,
        "base_digest": digest,
        "rounds": [{"round": 1, "used": ["anna"], "left_out": {"bert\u202e": "no answer"}, "norms": {}}],
        "zero_shot": {"held": 3.5},
        "plugged_in": {"held": 3.25},
        "not_better": [],
    }
    folder = parties.owner / "result"
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(stated))
    told, words = parties.inspect("owner", "result")
    assert (told["kind"], told["rounds"], told["plugged_in"]) == ("federation", 1, {"held": 3.25})
    assert "trial\\x1b[2J" in words
    assert "bert\\u202e" in words
    (folder / "results.json").write_text("{}")
    assert "neither results" in parties.inspect("owner", "result", code=3)[1]


def test_a_note(parties):
    (parties.client / "from the owner").mkdir()
    (parties.client / "from the owner" / "note.bin").write_bytes(b"\x00" * 1234)
    told, words = parties.inspect("client", "from the owner")
    assert (told["kind"], told["bytes"]) == ("note", 1234)
    assert "1,234 bytes" in words


@pytest.mark.parametrize("stated", list(ELSEWHERE))
def test_what_other_verbs_work_with_is_named(parties, stated):
    (parties.client / "file").write_text(json.dumps({"format": stated}))
    _, words = parties.inspect("client", "file", code=3)
    assert ELSEWHERE[stated][0] in words
    assert f"hint: {ELSEWHERE[stated][1]}" in words


def test_what_is_unknown_is_said_in_one_line(parties):
    for party, thing, said in (
        ("client", "private.jsonl", "'private.jsonl' is no file that offsite shows"),
        ("client", "nothing", "no file or folder named 'nothing'"),
        (
            "client",
            "canaries/used.json",
            "format 'offsite/canaries-used/1', which is no file that offsite shows",
        ),
        ("owner", "model", "'config.json', 'generation_config.json', 'model.safetensors'"),
        ("owner", "model/model.safetensors", "is no file that offsite shows"),
    ):
        out, words = parties.inspect(party, thing, code=3)
        assert out == ""
        assert said in words
        assert len(words.splitlines()) == 2
    (parties.client / "empty").mkdir()
    assert "folder 'empty' is empty" in parties.inspect("client", "empty", code=3)[1]
    assert "sealed folder, job, privacy report" in parties.inspect("client", "empty", code=3)[1]
    assert "offsite distill" in parties.inspect("owner", "model", code=3)[1]
    (parties.client / "empty" / "job.json").write_text('{"format": "offsite/job/2"}')
    assert "states format 'offsite/job/2', expected offsite/job/1" in parties.inspect("client", "empty", code=3)[1]


MARKERS = [*FOLDERS, "registry.id"]


@pytest.mark.parametrize("marker", MARKERS)
@pytest.mark.parametrize("bad", ["link", "pipe", "folder", "not json", "list", "huge", "deep", "twice", "nan"])
def test_hostile_files_are_refused_in_one_line(parties, tmp_path, marker, bad):
    folder = tmp_path / "bad\x1b]0;owned\x07\u202ename"
    folder.mkdir()
    path = folder / marker
    outside = tmp_path / "outside.json"
    outside.write_text(json.dumps({"format": next(iter(FOLDERS.get(marker, {"": 0}))), "secret": "hunter2"}))
    if bad == "link":
        path.symlink_to(outside)
    elif bad == "pipe":
        os.mkfifo(path)
    elif bad == "folder":
        path.mkdir()
    elif bad == "huge":
        path.write_bytes(b"{")
        os.truncate(path, 2**31)
    else:
        content = {
            "not json": b"\xff\xfe{",
            "list": b"[]",
            "deep": b"[" * 100_000,
            "twice": b'{"format": 1, "format": 2}',
            "nan": b'{"format": "offsite/job/1", "a": NaN}',
        }[bad]
        path.write_bytes(content)
    out, words = parties.inspect("client", folder, "--keys", "keys", code=3)
    assert out == ""
    lines = words.splitlines()
    assert lines[0].startswith("offsite: error: ")
    assert len(lines) <= 2
    assert all(line.isprintable() for line in lines)
    assert "hunter2" not in words
    assert len(words) < 1500


def test_a_file_that_is_a_link_is_not_followed(parties):
    (parties.client / "other.json").symlink_to(parties.client / "bundle.run.json")
    assert "is not a plain file" in parties.inspect("client", "other.json", code=3)[1]


HOSTILE = "a\x1b[31m\u202eb\u2066c\r"
STRINGS = [
    ("owner", "results/results.json", ("model",)),
    ("owner", "results/results.json", ("data", "name")),
    ("owner", "results/results.json", ("device",)),
    ("owner", "adapted/offsite.json", ("base",)),
]


@pytest.mark.parametrize(("party", "file", "where"), STRINGS)
def test_hostile_text_is_escaped(parties, party, file, where):
    path = parties.owner.parent / party / file

    def change(stated):
        for key in where[:-1]:
            stated = stated[key]
        stated[where[-1]] = HOSTILE

    edited(path, change)
    _, words = parties.inspect(party, path.parent)
    assert "a\\x1b[31m\\u202eb\\u2066c\\r" in words
    assert all(line.isprintable() for line in words.splitlines())


@pytest.mark.parametrize("line", ["licence", "setting"])
def test_a_direction_mark_in_a_package_is_refused_and_not_shown(parties, line):
    path = parties.owner / "package" / "offsite.json"
    marked = "MIT\u202e"

    def change(stated):
        if line == "licence":
            stated["licence"] = marked
        else:
            stated["method"]["settings"]["how"] = marked

    edited(path, change)
    out, words = parties.inspect("owner", "package", code=3)
    assert out == ""
    assert "\u202e" not in words


def test_every_kind_has_a_function_that_is_there():
    import importlib

    for what, shower in [
        *(each for one in FOLDERS.values() for each in one.values()),
        *MARKED.values(),
        *FILES.values(),
    ]:
        module, _, name = shower.partition(":")
        assert callable(getattr(importlib.import_module(module), name)), what


def test_nothing_but_the_file_that_tells_the_kind_is_read(parties):
    shutil.rmtree(parties.client / "package.sealed" / "payload")
    assert recognise(parties.client / "package.sealed").what == "sealed folder"


def test_the_current_folder_is_told_by_its_name(tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli.run(["inspect", "."]) == 3
    assert "folder 'here' is empty" in capsys.readouterr().err


def test_a_packages_figures_stand_in_the_place_of_nothing(parties, tmp_path):
    shutil.copytree(parties.owner / "package", parties.owner / "renamed")
    manifest = parties.owner / "renamed" / "offsite.json"
    stated = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**stated, "figures": {"digest": 7.0, "architecture": 8.0}}))
    told, words = parties.inspect("owner", "renamed")
    assert told["digest"] in words
    assert "bottom + " in words
    shutil.rmtree(parties.owner / "renamed")


def test_an_invitation_is_told_and_its_card_is_not_shown(parties):
    told, shown = parties.inspect("owner", INVITATION, "--keys", "keys")
    assert (told["kind"], told["verified"], told["title"]) == ("invitation", True, "a trial")
    assert "(owner, these keys)" in shown
    assert "sealed folders beside the invitation" in shown
    assert "card" not in told
    changed = parties.owner / "changed.json"
    changed.write_text(INVITATION.read_text().replace('"ed25519": "', '"ed25519": "AAAA', 1))
    _, shown = parties.inspect("owner", changed, code=3)
    assert "signatures: ed25519" in shown
