"""Two parties in two folders: what lies between them is sealed, and everything else of each stays in its folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from offsite.artefacts.bundle import open_bundle
from offsite.artefacts.owner import owner_record_path
from offsite.demo.handover import introduce, receive, send, set_terms, take_in
from offsite.errors import RunFailed
from offsite.stages import Stage, play

pytestmark = pytest.mark.slow
BUNDLE_WORDS = ["--job", "job", "--accept-leakage"]
ADAPTER = ["--adapter", "lora", "--placement", "all", "--rank", "2"]


@pytest.fixture(scope="module")
def played(tmp_path_factory, narrow_package):
    """The whole exchange once, on a tiny package, every step a process of its own."""
    root = tmp_path_factory.mktemp("two")
    owner, client, notes = root / "owner", root / "client", root / "notes"
    owner.mkdir()
    client.mkdir()
    shutil.copytree(narrow_package.path, owner / "package")
    shutil.copyfile(owner_record_path(narrow_package.path), owner / "package.owner.json")
    rows = [f"case {number}: rest and water for {number % 9} days" for number in range(60)]
    (client / "private.txt").write_text("\n\n".join(rows) + "\n")

    parties = introduce(owner, client, notes)
    job_id = set_terms(parties, narrow_package.digest, ADAPTER)
    sealed = {
        "job": send(parties, owner, "job", job_id=job_id, digest=job_id, words=[]),
        "package": send(parties, owner, "package", job_id=job_id, digest=narrow_package.digest, words=["--job", "job"]),
    }
    for name, digest in sealed.items():
        receive(parties, name, digest)
    words = ["tune", "package", "--job", "job", "--data", "private.txt", "--block-tokens", "32", "--steps", "2"]
    tuned = Stage("tune", client, [*words, "-o", "bundle"], client / "bundle")
    play([tuned], notes)
    digest = tuned.outcome["bundle_digest"]
    sealed["bundle"] = send(parties, client, "bundle", job_id=job_id, digest=digest, words=BUNDLE_WORDS)
    return parties, sealed, take_in(parties), digest


def test_what_was_sent_is_what_was_taken_in(played):
    parties, _, verdict, digest = played
    assert verdict["state"] in {"verified", "accepted"}
    kept = open_bundle(parties.owner / "registry" / "bundles" / verdict["id"])
    assert kept.digest == digest
    assert (kept.manifest.adapter.kind, kept.manifest.adapter.rank) == ("lora", 2)
    assert open_bundle(parties.client / "bundle").digest == digest


def test_nothing_else_crossed(played):
    parties, _, _, _ = played
    assert {path.name for path in parties.client.iterdir()} == {
        *("keys", "passphrase", "owner.card.json", "job.sealed", "job", "package.sealed", "package"),
        *(
            "private.txt",
            "bundle",
            "bundle.log.jsonl",
            "bundle.run.json",
            "bundle.sealed",
            "bundle.sealed.release.json",
        ),
    }
    theirs = {path.name for path in parties.owner.iterdir()}
    assert not theirs & {"private.txt", "bundle", "bundle.log.jsonl", "bundle.run.json"}
    text = (parties.client / "private.txt").read_bytes().split(b"\n\n")[0]
    for path in (parties.owner, parties.client / "bundle.sealed"):
        assert not any(text in file.read_bytes() for file in path.rglob("*") if file.is_file())


def test_a_second_run_sends_the_same_and_is_told_that_it_was_accepted(played):
    parties, sealed, verdict, digest = played
    again = introduce(parties.owner, parties.client, parties.notes)
    assert again == parties
    job_id = json.loads((parties.owner / "job" / "job.json").read_bytes())["job_id"]
    assert send(parties, parties.client, "bundle", job_id=job_id, digest=digest, words=BUNDLE_WORDS) == sealed["bundle"]
    assert take_in(parties)["id"] == verdict["id"]


def test_a_bundle_that_was_changed_on_the_way_stops_the_play(played, tmp_path, capfd):
    parties, _, _, _ = played
    arrived = parties.owner / "bundle.sealed"
    kept = tmp_path / "kept"
    shutil.copytree(arrived, kept)
    (payload, *_) = sorted((arrived / "payload").iterdir())
    raw = bytearray(payload.read_bytes())
    raw[-1] ^= 1
    payload.write_bytes(bytes(raw))
    manifest = arrived / "manifest.json"
    manifest.write_bytes(manifest.read_bytes().replace(b'"round"', b'"Round"', 1))
    with pytest.raises(RunFailed, match="step 'intake' ended with exit code 3"):
        take_in(parties)
    assert "signature" in capfd.readouterr().err
    shutil.rmtree(arrived)
    shutil.copytree(kept, arrived)


def test_keys_of_another_party_open_nothing(played, tmp_path):
    parties, _, _, _ = played
    words = ["open", parties.client / "package.sealed", "--keys", parties.owner / "keys", "-o", tmp_path / "package"]
    words += ["--passphrase-file", parties.owner / "passphrase"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "offsite", *map(str, words)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (3, "")
    assert list(Path(tmp_path).iterdir()) == []
