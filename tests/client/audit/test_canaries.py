"""The verb makes up rows that its model reads as it said them, throws coins, and tells nobody what it made up."""

from __future__ import annotations

import json
import stat

import pytest

from client.audit.canaries import coins, made_up, made_up_secrets, run
from client.audit.canaryconfig import CanaryConfig
from client.tuning.config import TuneConfig
from client.tuning.verb import run as tune
from offsite.artefacts.job import write_job
from offsite.audits.canaries import open_reveal, read_canaries, read_commitment, records_of, synthetic_records
from offsite.audits.canaryaudit import audit_canaries, canary_examples, score_canaries
from offsite.cli import run as offsite
from offsite.errors import ConfigError, DataError, RunFailed, WrongBinding
from offsite.exchange.verbs import read_content
from offsite.text.batches import encode


@pytest.fixture
def small(dropped_package, tmp_path):
    """Make settings of a set of a dozen texts of sixteen tokens."""

    def make(**changes):
        stated = {"count": 12, "secrets": 6, "tokens": 16, "candidates": 16, "device": "cpu"}
        return CanaryConfig(package=dropped_package.path, **{"output": tmp_path / "canaries", **stated, **changes})

    return make


def test_the_folder_holds_a_set_and_what_is_sent_of_it(small, dropped_package, letters_tokenizer, tmp_path):
    told = run(small(repeats=3))
    folder = tmp_path / "canaries"
    canaries, digest = read_canaries(folder)
    commitment = read_commitment(folder / "commitment")
    assert open_reveal(folder / "reveal", commitment) == canaries
    assert told == {
        "canaries": "canaries",
        "commitment": digest,
        "num": 12,
        "num_secrets": 6,
        "repeats": 3,
        "tokens": 16,
        "temperature": 1.0,
        "package_digest": dropped_package.digest,
        "job_id": None,
    }
    assert (canaries.repeats, canaries.num_candidates, canaries.temperature) == (3, 16, 1.0)
    assert stat.S_IMODE((folder / "canaries.json").stat().st_mode) == 0o600
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(("canaries", ".canaries"))} == {"canaries"}
    for name in ("commitment", "reveal"):
        assert read_content(folder / name).kind == "report"
    rows = encode(synthetic_records(canaries), letters_tokenizer, context=128).examples
    for canary, row in zip(canaries.synthetic, rows, strict=True):
        assert letters_tokenizer.decode(row.input_ids[:-1]) == canary.text
        assert 4 <= len(row.input_ids) - 1 <= 16
        assert not {0, 1, 2} & set(row.input_ids[:-1])


def test_nothing_repeats_but_by_chance(small, tmp_path):
    run(small())
    run(small(output=tmp_path / "others"))
    one, other = read_canaries(tmp_path / "canaries")[0], read_canaries(tmp_path / "others")[0]
    assert one.nonce != other.nonce
    assert not {canary.text for canary in one.synthetic} & {canary.text for canary in other.synthetic}
    assert not {secret.secret for secret in one.secrets} & {secret.secret for secret in other.secrets}


def test_coins_are_fair_and_secrets_have_prefixes_of_their_own():
    thrown = coins(10_000)
    assert 4_700 < sum(thrown) < 5_300  # six deviations
    made = made_up_secrets(200)
    assert len({secret.prefix for secret in made}) == 200
    assert 40 < sum(secret.included for secret in made) < 160


def test_the_command_line_tells_neither_texts_nor_coins(dropped_package, make_job, tmp_path, capfd):
    write_job(tmp_path / "job", make_job(job_id="c" * 32))
    words = ["--count", "12", "--secrets", "6", "--tokens", "16", "--device", "cpu", "-o", str(tmp_path / "canaries")]
    assert offsite(["canaries", str(dropped_package.path), "--job", str(tmp_path / "job"), *words]) == 0
    out, err = capfd.readouterr()
    told = json.loads(out.splitlines()[-1])
    canaries, digest = read_canaries(tmp_path / "canaries")
    assert (told["commitment"], told["job_id"], canaries.job_id) == (digest, "c" * 32, "c" * 32)
    assert "canaries  12/12" in err
    assert "too few to refute any epsilon" in err
    assert "--round 0" in err
    assert "included" not in out + err
    private = [*(ascii(canary.text)[1:-1] for canary in canaries.synthetic), *(one.secret for one in canaries.secrets)]
    assert not any(text in out + err for text in private)
    assert canaries.nonce not in out + err


def test_what_is_made_up_can_be_tuned_on_and_audited(small, dropped_package, settings, letters_tokenizer, tmp_path):
    run(small())
    canaries, digest = read_canaries(tmp_path / "canaries")
    config: TuneConfig = settings(dropped_package.path, canaries=tmp_path / "canaries", block_tokens=96)
    tune(config)
    assert len(records_of(canaries)) == canaries.num_included + len(canaries.planted)
    model = dropped_package.load_model()
    scores = score_canaries(model, letters_tokenizer, canaries, label="emulator", extract=True, num_samples=2)
    found = audit_canaries(canaries, digest, tuned=scores, untuned=scores, delta=1e-5)
    assert (found.commitment, found.num) == (digest, 12)
    assert len(canary_examples(model, letters_tokenizer, canaries)) == 12


def test_a_job_of_another_package_is_refused(small, make_job, tmp_path):
    write_job(tmp_path / "job", make_job(package_digest="sha256:" + "f" * 64))
    with pytest.raises(WrongBinding, match="is for package"):
        run(small(job=tmp_path / "job"))
    assert not (tmp_path / "canaries").exists()


def test_an_output_that_stands_is_kept(small, tmp_path):
    (tmp_path / "canaries").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        run(small())
    assert not list((tmp_path / "canaries").iterdir())


def test_texts_longer_than_the_context_are_refused(small, tmp_path):
    with pytest.raises(DataError, match="a canary takes 201 tokens, the model's context is 128"):
        run(small(tokens=200))
    assert not (tmp_path / "canaries").exists()


def test_a_model_that_repeats_itself_is_refused(dropped_package, letters_tokenizer):
    model = dropped_package.load_model()

    def insist(_module, _args, output):
        output.logits[..., 70] += 1e4

    model.register_forward_hook(insist)
    with pytest.raises(RunFailed, match="made up 1 of 3 different texts"):
        made_up(model, letters_tokenizer, count=3, tokens=8, temperature=1.0, batch_size=4)


@pytest.mark.parametrize("words", [["--temperature", "0.5"], ["--count", "0"], ["--secrets", "300"], ["--tokens", "4"]])
def test_settings_out_of_range_are_one_line(dropped_package, words, tmp_path, capfd):
    assert offsite(["canaries", str(dropped_package.path), "-o", str(tmp_path / "canaries"), *words]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"offsite: error: {words[0]}")
    assert not (tmp_path / "canaries").exists()
