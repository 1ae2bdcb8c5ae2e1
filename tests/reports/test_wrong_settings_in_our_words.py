"""Wrong settings were answered in a validator's words, without the right spelling, or only after the data was read."""

from __future__ import annotations

import re

import pytest
from two_parties import TwoParties

from client.tuning import ready as module
from offsite import cli
from offsite.commands.verbs import VERBS
from offsite.config import build, flag_name, is_positional
from offsite.errors import ConfigError
from offsite.problems import near


@pytest.fixture
def parties(tmp_path, monkeypatch, capsys):
    return TwoParties(tmp_path, monkeypatch, capsys)


TUNE = "tune package --data private.jsonl -o out"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--dp 8", "--dp: expected NAME=VALUE,... of epsilon, noise_multiplier, delta ..., found '8'; "
                   "did you mean --dp epsilon=8?"),
        ("--placement two", "--placement two: expected BOTTOM+TOP, as 2+2 or 0+2, top, last:N, or all"),
        ("--lr 1e-3", "no such option '--lr'; did you mean '--learning-rate'?"),
        ("--learning-rat 1e-3", "no such option '--learning-rat'; did you mean '--learning-rate'?"),
        ("--epoch 1", "no such option '--epoch'; did you mean '--epochs'?"),
        ("epohcs=1", "unknown setting 'epohcs'; did you mean 'epochs'?"),
        ("dp.epsilom=1", "unknown setting 'dp.epsilom'; did you mean 'dp.epsilon'?"),
        ("--adapter lorra", "expected one of blocks, bitfit, lora, rslora, dora; did you mean 'lora'?"),
        ("--precision pf32", "--precision: expected auto, bf16 or fp32, found 'pf32'; did you mean 'fp32'?"),
        ("--steps 0", "--steps: expected at least 1, found 0"),
        ("--steps many", "--steps: expected a whole number, found 'many'"),
        ("--validation 1", "--validation: expected less than 1, found 1.0"),
        ("--learning-rate fast", "--learning-rate: expected a number, found 'fast'"),
    ],
)  # fmt: skip
def test_one_line_with_the_right_spelling(parties, monkeypatch, words, told):
    monkeypatch.setattr(module, "open_package", lambda _: pytest.fail("work had begun"))
    parties.run("client", f"{TUNE} {words}", code=2)
    line, *rest = parties.told.splitlines()
    assert line.startswith("offsite: error: ")
    assert told in line
    assert all(part.startswith("offsite: hint: ") for part in rest)


def test_a_typo_in_a_file_is_told_with_the_right_key(parties):
    (parties.client / "settings.yaml").write_text("learning_rat: 1e-3\ndp:\n  epsilom: 8\n")
    parties.run("client", f"{TUNE} --config settings.yaml", code=2)
    assert "'learning_rat'; did you mean 'learning_rate'?" in parties.told
    assert "'dp.epsilom'; did you mean 'dp.epsilon'?" in parties.told


def test_an_output_that_cannot_be_written_is_found_before_anything_is_read(parties, monkeypatch):
    monkeypatch.setattr(module, "open_package", lambda _: pytest.fail("work had begun"))
    (parties.client / "file").write_text("x")
    parties.run("client", "tune package --data private.jsonl -o file/out", code=2)
    assert "is not a folder" in parties.told
    parties.run("client", "tune package --data private.jsonl -o /proc/nowhere/out", code=2)
    assert "output 'out' cannot be written there" in parties.told
    assert "choose another place with -o" in parties.told


def test_a_name_too_long_for_what_is_written_beside_it_is_told_before_the_work(parties, monkeypatch):
    monkeypatch.setattr(module, "open_package", lambda _: pytest.fail("work had begun"))
    parties.run("client", f"tune package --data private.jsonl -o {'b' * 240}", code=2)
    assert "cannot be written there: file name too long" in parties.told


@pytest.mark.parametrize("words", ["inspect {0}", "tune {0} --data {0} -o {0}", "audit bundle p b --data {0} -o out"])
def test_a_path_that_cannot_be_looked_for_is_one_line(parties, words):
    parties.run("client", words.format("a" * 300), code=2)
    assert "cannot be looked for: file name too long" in parties.told


def test_asking_for_a_place_leaves_nothing_there(parties):
    before = sorted(path.name for path in parties.client.iterdir())
    parties.run("client", "tune nothing --data private.jsonl -o deep/er/out", code=3)
    assert sorted(path.name for path in parties.client.iterdir()) == before


def test_a_wrong_passphrase_says_where_it_came_from(parties, monkeypatch):
    monkeypatch.setenv("OFFSITE_PASSPHRASE", "not this one")
    parties.run("client", "open job.sealed --keys keys -o again", code=3)
    assert "wrong passphrase" in parties.told
    assert "--passphrase-file, else OFFSITE_PASSPHRASE" in parties.told


def test_every_flag_is_also_a_key(tmp_path):
    """Each flag of each verb, as a key of a file: none is unknown."""
    for verb in VERBS.values():
        settings = cli._resolve(verb.settings)
        keys = list(settings.model_fields)
        (tmp_path / "all.yaml").write_text("".join(f"{key}: [[[]]]\n" for key in keys))
        with pytest.raises(ConfigError) as caught:
            build(settings, file=tmp_path / "all.yaml")
        assert "unknown setting" not in str(caught.value)


def refused(settings, file):
    """Return what is told of a file of settings; nothing when they are taken."""
    try:
        build(settings, file=file)
    except ConfigError as error:
        return str(error)
    return ""


def test_nobody_reads_a_validators_words(tmp_path):
    """A wrong value for each setting of each verb: none of the answers is in the words of a library."""
    theirs = re.compile(r"[Ii]nput should|valid (integer|number|string|boolean)|unable to parse|instance of")
    for verb in VERBS.values():
        settings = cli._resolve(verb.settings)
        for wrong in ("-1", "what?", "''", "[1, [2]]", "{a: {b: 1}}", "1.5"):
            lines = "".join(f"{name}: {wrong}\n" for name in settings.model_fields)
            (tmp_path / "all.yaml").write_text(lines)
            told = refused(settings, tmp_path / "all.yaml")
            assert not theirs.search(told), told


@pytest.mark.parametrize(
    ("word", "meant"),
    [("lr", "learning_rate"), ("bs", "batch_size"), ("learnig-rate", "learning_rate"), ("batch", "batch_size"),
     ("zzz", None), ("x", None)],
)  # fmt: skip
def test_what_is_near(word, meant):
    assert near(word, ["learning_rate", "batch_size", "steps"]) == meant


def test_flags_and_words_have_one_spelling():
    for verb in VERBS.values():
        for name, field in cli._resolve(verb.settings).model_fields.items():
            assert is_positional(field) or flag_name(name) == "--" + name.replace("_", "-")
