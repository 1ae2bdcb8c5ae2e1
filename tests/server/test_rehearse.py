"""Rehearsing: every trial is what tune and evaluate give, killed runs go on, and wrong input leaves nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from offsite.cli import run as cli
from offsite.errors import RunFailed
from offsite.owner import owner_record_path, read_owner_record
from offsite.records import read_records, split_by_document
from server.rehearse import Rehearsal

ROWS = [f"patient {n} has a fever of {37 + n / 10} degrees, a cough and a cold for {n} days" for n in range(60)]
SETTINGS = ["--adapter", "lora", "--rank", "2", "--alpha", "4", "--steps", "3", "--block-tokens", "32"]
SETTINGS += ["--precision", "fp32"]


@pytest.fixture
def texts(tmp_path):
    for name, rows in (("public.jsonl", ROWS[:50]), ("more.jsonl", ROWS[50:])):
        (tmp_path / name).write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def in_this_process(monkeypatch):
    """Play stages here, not in processes of their own; return the words of those that ran, by stage."""
    played = {}

    def play(stages, notes):
        notes.mkdir(parents=True, exist_ok=True)
        for stage in stages:
            if stage.leaves.exists():
                continue
            with pytest.MonkeyPatch.context() as patched:
                patched.chdir(stage.party)
                if cli(list(stage.words)):
                    raise RunFailed(f"step {stage.name!r} failed")
            played[stage.name] = list(stage.words)

    monkeypatch.setattr("server.rehearse.play", play)
    return played


@pytest.fixture
def rehearse(dropped_package, llama_folder, texts, capsys):
    def call(*more, model=llama_folder, package=dropped_package.path, settings=SETTINGS, heldout=True):
        words = ["rehearse", str(model), "--package", str(package), "--data", str(texts / "public.jsonl")]
        words += ["--heldout", str(texts / "more.jsonl")] if heldout else []
        words += ["-o", str(texts / "found.json"), *settings, *more]
        code = cli(words)
        shown = capsys.readouterr()
        return code, json.loads(shown.out.splitlines()[-1]) if code == 0 else None, shown.err

    return call


def test_every_trial_is_what_tune_and_evaluate_give(
    rehearse, in_this_process, dropped_package, llama_folder, texts, capsys
):
    rates, scales = ["0.002", "0.03"], ["0.5", "1"]
    more = [word for rate in rates for word in ("--learning-rate", rate)]
    more += [word for scale in scales for word in ("--scale", scale)]
    code, best, err = rehearse(*more)
    assert code == 0, err
    found = Rehearsal.model_validate_json((texts / "found.json").read_bytes())
    assert [(one.learning_rate, one.scale) for one in found.trials] == [(r, s) for r in (0.002, 0.03) for s in (1, 0.5)]
    assert best["plugged_in"] == min(one.plugged_in for one in found.trials) == found.best.plugged_in
    assert (best["learning_rate"], best["scale"]) == (found.best.learning_rate, found.best.scale)
    assert not (texts / "found.json.work").exists()
    for rate in rates:
        words = ["tune", str(dropped_package.path), "--data", str(texts / "public.jsonl"), "-o", str(texts / rate)]
        assert cli([*words, *SETTINGS, "--learning-rate", rate]) == 0
        for scale in scales:
            words = ["evaluate", str(llama_folder), "--package", str(dropped_package.path), "--block-tokens", "32"]
            words += ["--bundle", str(texts / rate), "--data", str(texts / "more.jsonl"), "--scale", scale]
            assert cli([*words, "-o", str(texts / f"{rate}-{scale}")]) == 0
            by_hand = json.loads(capsys.readouterr().out.splitlines()[-1])
            (one,) = (t for t in found.trials if (t.learning_rate, t.scale) == (float(rate), float(scale)))
            assert one.plugged_in == pytest.approx(by_hand["plugged_in"], rel=1e-6)
            assert one.emulator_tuned == pytest.approx(by_hand["emulator_tuned"], rel=1e-6)
            assert found.zero_shot == pytest.approx(by_hand["zero_shot"], rel=1e-6)
            assert found.emulator_zero_shot == pytest.approx(by_hand["emulator_zero_shot"], rel=1e-6)


def test_without_more_text_a_share_of_the_documents_is_measured_on(rehearse, in_this_process, texts):
    words = ["--learning-rate", "0.01", "--scale", "1", "--heldout-share", "0.4"]
    code, _, err = rehearse(*words, heldout=False)
    assert code == 0, err
    found = Rehearsal.model_validate_json((texts / "found.json").read_bytes())
    assert found.heldout.name == "public.jsonl"
    train, held = split_by_document(read_records(texts / "public.jsonl"), fraction=0.4, seed=0)
    assert found.heldout.num_records == len(held) == 50 - len(train)


def test_one_document_cannot_be_shared_out(rehearse, in_this_process, texts):
    (texts / "one.jsonl").write_text('{"text": "patient"}\n')
    code, _, err = rehearse("--data", str(texts / "one.jsonl"), heldout=False)
    assert code == 2
    assert "1 document(s), expected at least two to hold one out" in err
    assert in_this_process == {}
    assert not (texts / "found.json.work").exists()


@pytest.mark.parametrize("row", [{"prompt": "how high", "completion": " 38 degrees"}, {"body": "fever"}])
def test_text_of_any_form_is_tuned_on_and_measured(row, rehearse, in_this_process, texts):
    rows = [{name: f"{value} {number}" for name, value in row.items()} for number in range(30)]
    (texts / "rows.jsonl").write_text("".join(json.dumps(own) + "\n" for own in rows))
    words = ["--data", str(texts / "rows.jsonl"), "--learning-rate", "0.01", "--scale", "1"]
    code, _, err = rehearse(*words, *(["--fields", "text=body"] if "body" in row else []), heldout=False)
    assert code == 0, err


def test_the_file_holds_no_path_and_no_text(rehearse, in_this_process, dropped_package, texts):
    code, _, err = rehearse("--learning-rate", "0.03", "--scale", "0.5")
    assert code == 0, err
    raw = (texts / "found.json").read_text()
    assert str(texts) not in raw
    assert not any(row in raw for row in ROWS)
    found = Rehearsal.model_validate_json(raw)
    record = read_owner_record(owner_record_path(dropped_package.path))
    assert (found.package_digest, found.base_digest) == (dropped_package.digest, record.base_digest)
    assert found.adapter.rank == 2
    assert "--learning-rate 0.03 --scale 0.5" in found.command
    assert found.command.startswith("offsite rehearse llama --output found.json --package package --data public.jsonl")


def test_it_says_what_to_do_with_the_best(rehearse, in_this_process, texts):
    code, best, err = rehearse("--learning-rate", "0.01")
    assert code == 0, err
    assert set(in_this_process) == {"tune-0.01"}
    found = Rehearsal.model_validate_json((texts / "found.json").read_bytes())
    assert {one.scale for one in found.trials} == {1.0, 0.75, 0.5}
    if best["plugged_in"] < best["zero_shot"]:
        share = "" if best["scale"] == 1 else f", then plug in with --scale {best['scale']:g}"
        assert f"job create ... --learning-rate 0.01{share}" in " ".join(err.split())
    else:
        assert "warning: no rate and share made the full model better" in err


def test_a_package_that_carries_nothing_over_is_said_to(rehearse, in_this_process, monkeypatch):
    monkeypatch.setattr("server.rehearse.fit", _spoilt)
    code, best, err = rehearse("--learning-rate", "0.01", "--scale", "1")
    assert code == 0, err
    assert best["plugged_in"] > best["zero_shot"]
    assert "warning: no rate and share made the full model better on this text" in " ".join(err.split())
    assert "next:" not in err


def _spoilt(model, verified, record, **settings):
    from dataclasses import replace

    from server.fit import fit

    adapter = fit(model, verified, record, **settings)
    return replace(adapter, tensors={name: tensor + 1 for name, tensor in adapter.tensors.items()})


def test_rates_are_half_once_and_twice_the_kinds_when_none_are_given(rehearse, in_this_process):
    assert rehearse("--scale", "1")[0] == 0
    assert set(in_this_process) == {"tune-0.001", "tune-0.002", "tune-0.004"}


def test_dora_is_tried_whole(rehearse, in_this_process, texts):
    code, best, err = rehearse("--learning-rate", "0.01", settings=["--adapter", "dora", *SETTINGS[2:]])
    assert code == 0, err
    assert best["scale"] == 1
    assert len(Rehearsal.model_validate_json((texts / "found.json").read_bytes()).trials) == 1


def test_what_ended_well_is_not_done_again(rehearse, in_this_process, texts, monkeypatch):
    rates = ["--learning-rate", "0.01", "--learning-rate", "0.02"]
    real = cli

    def fails_once(words):
        return 1 if words[words.index("-o") + 1] == "0.02" else real(words)

    with monkeypatch.context() as patched:
        patched.setitem(globals(), "cli", lambda words: real(words) if words[0] == "rehearse" else fails_once(words))
        code, _, err = rehearse(*rates)
    assert code == RunFailed.exit_code
    assert "step 'tune-0.02' failed" in err
    assert not (texts / "found.json").exists()
    assert (texts / "found.json.work" / "0.01").is_dir()
    in_this_process.clear()
    code, _, err = rehearse(*rates)
    assert code == 0, err
    assert set(in_this_process) == {"tune-0.02"}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--learning-rate", "0"], "--learning-rate: expected more than 0 and at most 1"),
        (["--learning-rate", "2"], "--learning-rate: expected more than 0 and at most 1"),
        (["--scale", "1.5"], "--scale: expected more than 0 and at most 1"),
        (["--scale", "0.5", "--scale", "0.5"], "--scale: one value is given twice"),
        (["--adapter", "lorra"], "--adapter: no kind 'lorra'"),
        (["--adapter", "dora", "--scale", "0.5"], "--scale: a dora adapter is plugged in whole or not"),
        (["--steps", "0"], "--steps"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--heldout-share", "1"], "--heldout-share"),
        (["--heldout", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--package", "nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(more, told, rehearse, in_this_process, texts):
    code, _, err = rehearse(settings=more)
    assert code in (2, 3)
    assert told in err
    assert err.count("\n") <= 2
    assert sorted(path.name for path in texts.iterdir()) == ["more.jsonl", "public.jsonl"]
    assert in_this_process == {}


def test_another_model_is_refused_before_anything_is_tuned(
    rehearse, in_this_process, whole_package, full_llama, save_model, texts
):
    import copy

    other = copy.deepcopy(full_llama)
    other.lm_head.weight.data += 0.5
    code, _, err = rehearse(model=save_model(other, texts / "other"))
    assert code == 3
    assert "has digest" in err
    assert in_this_process == {}
    assert not (texts / "found.json.work").exists()


def test_an_output_that_stands_is_left_alone(rehearse, in_this_process, texts):
    (texts / "found.json").write_text("mine")
    code, _, err = rehearse()
    assert code == 2
    assert "already exists" in err
    assert (texts / "found.json").read_text() == "mine"
    assert in_this_process == {}


@pytest.mark.slow
def test_the_clients_part_runs_in_a_process_of_its_own(rehearse, texts):
    code, best, err = rehearse("--learning-rate", "0.01", "--scale", "1")
    assert code == 0, err
    assert best["learning_rate"] == 0.01
    assert "$ offsite tune" in err
    assert Path(texts / "found.json").is_file()
    assert not (texts / "found.json.work").exists()
