"""Tired people swap folders, forget a word, and write results into a folder that was sent to them.

What was met: a swapped folder was told by the number of its format, a flag that lost its value swallowed the next flag,
a result written into a package made that package unusable, private keys were called files that offsite did not write,
and the command said to come after tuning was always refused.
"""

from __future__ import annotations

import re
import shlex

import pytest
from two_parties import TwoParties


@pytest.fixture
def parties(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return TwoParties(tmp_path, monkeypatch, capsys)


TUNE = "--data private.jsonl --steps 2 --block-tokens 64 -o again"
SWAPPED = [
    ("client", f"tune bundle --job job {TUNE}", 3, "'bundle' is a bundle, expected a package"),
    ("client", "audit bundle bundle package --data private.jsonl -o again", 3, "'bundle' is a bundle, expected a pack"),
    ("owner", "serve package", 3, "'package' is a package, expected an adapted folder"),
    ("client", f"tune package --job package {TUNE}", 3, "holds no job.json: it is a package"),
    ("client", f"tune package --job job --data --steps {TUNE}", 2, "--data takes a value, found the flag '--steps'"),
    ("client", "tune package --job job --data -o bundle", 2, "--data takes a value, found the flag '-o' in its place"),
    (
        "client",
        f"tune package --job job {TUNE} --fields prompt",
        2,
        "--fields: expected NAME=VALUE,..., found 'prompt'",
    ),
    ("owner", "job", 2, "offsite job needs a second word: create"),
]


@pytest.mark.parametrize(("party", "words", "code", "told"), SWAPPED)
def test_what_was_swapped_or_left_out_is_named(parties, party, words, code, told):
    parties.run(party, words, code=code)
    assert told in parties.told
    assert not (parties.folder / party / "again").exists()


@pytest.mark.parametrize(
    ("words", "thing"),
    [
        (f"tune package.sealed --job job {TUNE}", "package.sealed"),
        (f"tune package --job job.sealed {TUNE}", "job.sealed"),
    ],
)
def test_the_command_that_opens_what_is_sealed_can_be_typed(parties, words, thing):
    parties.run("client", words, code=3)
    (command,) = re.findall(r"hint: open it first: offsite (.+)$", parties.told, re.MULTILINE)
    assert thing in shlex.split(command)
    parties.run("client", f"{command} --keys keys")


def test_a_report_that_is_still_sealed_is_told_so(parties):
    parties.run("client", "seal privacy --job job --round 1 --keys keys -o privacy.sealed")
    parties.run("client", "report verify privacy.sealed --keys keys", code=3)
    assert "'privacy.sealed' is a sealed report, not a report that was opened" in parties.told


@pytest.mark.parametrize(
    "place", ["package", "job", "package.sealed", "package.sealed/payload", "privacy", "package/x"]
)
def test_nothing_is_added_to_a_folder_that_is_bound_whole(parties, place):
    folder = parties.client / place.split("/")[0]
    before = sorted(folder.rglob("*"))
    parties.run("client", f"tune package --job job {TUNE.replace('again', place + '/again')}", code=2)
    assert "and nothing may be added to that" in parties.told
    assert sorted(folder.rglob("*")) == before


def test_a_folder_with_files_of_such_names_and_others_takes_an_output(parties):
    (parties.client / "job.json").write_text("{}")
    (parties.client / "report.json").write_text("{}")
    parties.run("client", f"tune package --job job {TUNE}")
    assert (parties.client / "again").is_dir()


def test_parts_of_a_folder_are_told_with_it(parties):
    for thing, kind in (
        ("keys/signing-ed25519.pem", "a keys folder"),
        ("keys/ledger.db", "a keys folder"),
        ("keys/ledger.head", "a keys folder"),
        ("registry/registry.db", "a registry"),
        ("package/model.safetensors", "a package"),
    ):
        parties.run("owner", f"inspect {thing}", code=3)
        assert f"'{thing.partition('/')[2]}' lies in {kind} and is told with it" in parties.told
        (command,) = re.findall(r"hint: offsite (.+)$", parties.told, re.MULTILINE)
        parties.run("owner", f"{command} --keys keys")


def test_the_folder_in_which_one_stands_has_a_name(parties):
    (parties.client / "nothing").mkdir()
    parties.run("client/nothing", "inspect .", code=3)
    assert "folder 'nothing' is empty" in parties.told
