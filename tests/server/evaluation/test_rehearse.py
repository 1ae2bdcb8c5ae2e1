"""Rehearsing: every trial is what tune and evaluate give, killed runs go on, and wrong input leaves nothing."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import pytest

from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.cli import run as cli
from offsite.digests import sha256_file, sha256_files
from offsite.errors import RunFailed
from offsite.evaluation.rehearsal import Rehearsal, read_rehearsal
from offsite.text.records import read_records, split_by_document
from server.evaluation.rehearse import _settings
from server.evaluation.rehearseconfig import RehearseConfig

ROWS = [f"patient {n} has a fever of {37 + n / 10} degrees, a cough and a cold for {n} days" for n in range(60)]
SETTINGS = ["--adapter", "lora", "--rank", "2", "--alpha", "4", "--steps", "3", "--block-tokens", "32"]
SETTINGS += ["--precision", "fp32"]


@pytest.fixture
def texts(tmp_path):
    for name, rows in (("public.jsonl", ROWS[:50]), ("more.jsonl", ROWS[50:])):
        (tmp_path / name).write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return tmp_path


@pytest.mark.parametrize(
    ("adapter", "runs", "wanted"),
    [("lora", 1, ["--runs", "1"]), ("lora", 3, ["--runs", "3", "--mean", "cut"]), ("blocks", 3, ["--runs", "3"])],
)
def test_the_client_that_is_played_takes_as_many_runs_and_cuts_their_mean_as_a_job_does(adapter, runs, wanted):
    given = {"model": "m", "package": Path("p"), "data": Path("d"), "output": Path("o"), "learning_rate": (0.01,)}
    words = _settings(RehearseConfig(**given, adapter=adapter, runs=runs))
    at = words.index("--runs")
    assert words[at : at + len(wanted)] == wanted
    assert ("--mean" in words) is ("--mean" in wanted)


class Ended:
    """What stands in place of a process that has ended."""

    def __init__(self, code):
        self.returncode = code

    def poll(self):
        return self.returncode

    def terminate(self):
        """There is nothing to end."""

    def wait(self, timeout=None):
        return self.returncode


@pytest.fixture
def in_this_process(monkeypatch):
    """Run stages here, not in processes of their own; return the words of those that ran, by stage."""
    played = {}

    def start(stage, notes, num_running):
        played[stage.name] = list(stage.words)
        with pytest.MonkeyPatch.context() as patched, (notes / f"{stage.name}.out").open("w") as out:
            patched.chdir(stage.party)
            patched.setenv("OFFSITE_PLAYED", "1")
            with contextlib.redirect_stdout(out):
                return Ended(cli(list(stage.words)))

    monkeypatch.setattr("offsite.stages._start", start)
    return played


def last_of_each(words):
    """Return the words with the last value of every flag that takes one."""
    kept, skip = [], False
    for number, word in enumerate(words):
        is_repeated = word in ("--learning-rate", "--scale", "--way")
        if skip:
            skip = False  # the value of a flag that comes again
        elif word.startswith("--") and not is_repeated and word in words[number + 1 :]:
            skip = True
        else:
            kept.append(word)
    return kept


@pytest.fixture
def rehearse(dropped_package, llama_folder, texts, capsys):
    def call(
        *more, model=llama_folder, package=dropped_package.path, settings=SETTINGS, heldout=True, data=("public",)
    ):
        words = ["rehearse", str(model), "--package", str(package)]
        given = [] if "--data" in settings else [str(texts / f"{name}.jsonl") for name in data]
        words += ["--heldout", str(texts / "more.jsonl")] if heldout else []
        words += ["-o", str(texts / "found.json"), *settings, *more]
        code = cli([*last_of_each(words), *(word for path in given for word in ("--data", path))])
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


def test_what_is_withheld_stands_beside_every_trial(rehearse, in_this_process, texts):
    code, best, err = rehearse("--learning-rate", "0.01", "--scale", "1", "--scale", "0.5")
    assert code == 0, err
    found = read_rehearsal(texts / "found.json")
    for one in found.trials:
        assert one.withheld_after_tuning == pytest.approx(math.log(one.emulator_tuned / found.zero_shot))
        assert (one.recovery, one.recovery_nats) == (None, None)
    assert found.withheld_zero_shot == pytest.approx(math.log(found.emulator_zero_shot / found.zero_shot))
    assert best["withheld_after_tuning"] == found.best.withheld_after_tuning
    assert found.reference is None
    assert "reference" not in json.loads((texts / "found.json").read_text())


@pytest.mark.parametrize(("adapter", "named"), [("lora", True), ("blocks", False)])
def test_the_reference_is_lora_on_the_full_model(
    named, adapter, rehearse, in_this_process, whole_package, llama_folder, texts, capsys
):
    words = ["--reference-package", str(whole_package.path)] if named else ["--reference"]
    settings = [*SETTINGS[2:], "--adapter", adapter, "--learning-rate", "0.01", "--scale", "1", *words]
    code, best, err = rehearse(settings=settings)
    assert code == 0, err
    found = read_rehearsal(texts / "found.json")
    tried = ["0.01"] if adapter == "lora" else ["0.001", "0.002", "0.004"]
    assert [name for name in in_this_process if "reference" in name] == [f"tune-reference-{rate}" for rate in tried]
    assert ("keep-all" in in_this_process) is not named
    assert (found.reference.adapter.kind, found.reference.adapter.placement) == ("lora", "all")
    rate = f"{found.reference.learning_rate:g}"
    assert rate in tried
    kept = str(whole_package.path)
    low = [*SETTINGS, "--placement", "all", "--learning-rate", rate]
    capsys.readouterr()
    assert cli(["tune", kept, "--data", str(texts / "public.jsonl"), "-o", str(texts / "lora"), *low]) == 0
    words = ["evaluate", str(llama_folder), "--package", kept, "--block-tokens", "32", "-o", str(texts / "by-hand")]
    assert cli([*words, "--bundle", str(texts / "lora"), "--data", str(texts / "more.jsonl")]) == 0
    by_hand = json.loads(capsys.readouterr().out.splitlines()[-1])["plugged_in"]
    assert found.reference.perplexity == pytest.approx(by_hand, rel=1e-6)
    (one,) = found.trials
    full = found.zero_shot
    assert one.recovery == pytest.approx((one.plugged_in - full) / (by_hand - full), rel=1e-4)
    assert one.recovery_nats == pytest.approx(math.log(one.plugged_in / full) / math.log(by_hand / full), rel=1e-4)
    assert (best["recovery"], best["lora_full"]) == (one.recovery, found.reference.perplexity)
    assert "recovery" in err


def test_a_reference_that_was_tuned_is_not_tuned_again(rehearse, in_this_process, texts, monkeypatch):
    words = ["--learning-rate", "0.01", "--scale", "1", "--reference"]
    with monkeypatch.context() as patched:
        patched.setattr("server.evaluation.rehearse.open_candidates", _interrupted)
        assert rehearse(*words)[0] == 130
    assert set(in_this_process) == {"tune-0.01", "keep-all", "tune-reference-0.01"}
    in_this_process.clear()
    code, _, err = rehearse(*words)
    assert code == 0, err
    assert in_this_process == {}


def test_a_reference_that_does_not_keep_all_is_refused(rehearse, in_this_process, dropped_package, texts):
    code, _, err = rehearse("--learning-rate", "0.01", "--reference-package", str(dropped_package.path))
    assert code == 2
    assert "does not keep all of the model" in err
    assert not (texts / "found.json").exists()


@pytest.mark.parametrize("best", [1.0, 0.75, 0.5, 0.35])
def test_a_smaller_share_is_tried_where_the_smallest_did_best_and_no_smaller_one(
    best, rehearse, in_this_process, texts, monkeypatch
):
    def score(ruler, model, label):
        share = label.partition(" of rate ")[0] if " of rate " in label else "9"
        return {"perplexity": 10 + abs(float(share) - best)}

    monkeypatch.setattr("server.evaluation.evaluate.Ruler.score", score)
    code, told, err = rehearse("--learning-rate", "0.01", "--learning-rate", "0.02")
    assert code == 0, err
    tried = [(one.learning_rate, one.scale) for one in read_rehearsal(texts / "found.json").trials]
    assert told["scale"] == best
    usual = [(rate, share) for rate in (0.01, 0.02) for share in (1, 0.75, 0.5)]
    assert tried == [*usual, (0.01, 0.35)] if best <= 0.5 else tried == usual
    assert ("0.5 did best of the usual shares: 0.35 of rate 0.01 is tried, too" in err) is (best <= 0.5)
    assert ("the smallest share that was tried did best, 0.35" in err) is (best == 0.35)


def test_shares_that_were_named_are_those_that_are_tried(rehearse, in_this_process, texts):
    words = ["--scale", "1", "--scale", "0.75", "--scale", "0.5"]
    code, _, err = rehearse("--learning-rate", "0.01", *words)
    assert code == 0, err
    assert "is tried, too" not in err


def test_other_ways_to_plug_in_are_tried_and_read_as_evaluate_does(
    rehearse, in_this_process, dropped_package, llama_folder, texts, capsys
):
    ways = ["--way", "attention=0.5,mlp=0.75", "--way", "0.75,spare=1,mix=0.7", "--spare", str(texts / "more.jsonl")]
    code, told, err = rehearse("--learning-rate", "0.01", "--scale", "1", *ways)
    assert code == 0, err
    found = read_rehearsal(texts / "found.json")
    assert [(one.scale, one.way) for one in found.trials] == [
        (1.0, ""),
        (1.0, "attention=0.5,mlp=0.75"),
        (0.75, "0.75,spare=1,mix=0.7"),
    ]
    assert told["way"] in {"1", "attention=0.5,mlp=0.75", "0.75,spare=1,mix=0.7"}
    settings = [*SETTINGS, "--learning-rate", "0.01"]
    package = str(dropped_package.path)
    capsys.readouterr()
    assert cli(["tune", package, "--data", str(texts / "public.jsonl"), "-o", str(texts / "tuned"), *settings]) == 0
    words = ["evaluate", str(llama_folder), "--package", package, "--block-tokens", "32", "-o", str(texts / "by-hand")]
    words += ["--bundle", str(texts / "tuned"), "--data", str(texts / "more.jsonl"), "--scale", "0.75", "--mix", "0.7"]
    assert cli([*words, "--spare", str(texts / "more.jsonl")]) == 0
    by_hand = json.loads(capsys.readouterr().out.splitlines()[-1])["plugged_in"]
    assert found.trials[2].plugged_in == pytest.approx(by_hand, rel=1e-6)


def test_without_more_text_a_share_of_the_documents_is_measured_on(rehearse, in_this_process, texts):
    words = ["--learning-rate", "0.01", "--scale", "1", "--heldout-share", "0.4"]
    code, _, err = rehearse(*words, heldout=False)
    assert code == 0, err
    found = Rehearsal.model_validate_json((texts / "found.json").read_bytes())
    assert found.heldout.name == "public.jsonl"
    train, held = split_by_document(read_records(texts / "public.jsonl"), fraction=0.4, seed=0, purpose="rehearsal")
    assert found.heldout.num_records == len(held) == 50 - len(train)


def test_one_document_cannot_be_shared_out(rehearse, in_this_process, texts):
    (texts / "one.jsonl").write_text('{"text": "patient"}\n')
    code, _, err = rehearse(data=["one"], heldout=False)
    assert code == 2
    assert "1 document(s), expected at least two to hold one out" in err
    assert in_this_process == {}
    assert not (texts / "found.json.work").exists()


@pytest.mark.parametrize("row", [{"prompt": "how high", "completion": " 38 degrees"}, {"body": "fever"}])
def test_text_of_any_form_is_tuned_on_and_measured(row, rehearse, in_this_process, texts):
    rows = [{name: f"{value} {number}" for name, value in row.items()} for number in range(30)]
    (texts / "rows.jsonl").write_text("".join(json.dumps(own) + "\n" for own in rows))
    words = ["--learning-rate", "0.01", "--scale", "1"]
    more = ["--fields", "text=body"] if "body" in row else []
    code, _, err = rehearse(*words, *more, heldout=False, data=["rows"])
    assert code == 0, err


def test_files_of_different_forms_are_read_together_and_each_has_its_digest(rehearse, in_this_process, texts):
    rows = [{"prompt": f"how high {number}", "completion": f" {number} degrees"} for number in range(30)]
    (texts / "rows.jsonl").write_text("".join(json.dumps(own) + "\n" for own in rows))
    code, _, err = rehearse("--learning-rate", "0.01", "--scale", "1", heldout=False, data=["public", "rows"])
    assert code == 0, err
    found = Rehearsal.model_validate_json((texts / "found.json").read_bytes())
    files = [texts / "public.jsonl", texts / "rows.jsonl"]
    assert found.data_files == tuple(map(sha256_file, files))
    assert found.data_sha256 == found.heldout.sha256 == sha256_files(files)
    assert [(one.name, one.sha256) for one in found.heldout.files] == [(one.name, sha256_file(one)) for one in files]
    assert "--data public.jsonl --data rows.jsonl" in found.command
    (words,) = (words for name, words in in_this_process.items() if name.startswith("tune"))
    assert len([word for word in words if word == "--data"]) == 2


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
    code, best, err = rehearse("--learning-rate", "0.01", "--heldout", str(texts / "public.jsonl"), "--steps", "12")
    assert code == 0, err
    assert set(in_this_process) == {"tune-0.01"}
    found = Rehearsal.model_validate_json((texts / "found.json").read_bytes())
    assert {one.scale for one in found.trials} - {0.35} == {1.0, 0.75, 0.5}
    assert best["plugged_in"] < best["zero_shot"]  # of text it was tuned on, to be sure of it
    assert (f"--scale {best['scale']:g}" in err) is (best["scale"] != 1)
    (command,) = [line for line in err.splitlines() if line.startswith("next: offsite job create ")]
    assert "--client FINGERPRINT --registry registry" in command
    assert command.endswith(" --learning-rate 0.01 -o job")
    assert "--adapter lora" in command


def test_a_package_that_carries_nothing_over_is_said_to(rehearse, in_this_process, monkeypatch):
    monkeypatch.setattr("server.evaluation.rehearse.fit", _spoilt)
    code, best, err = rehearse("--learning-rate", "0.01", "--scale", "1")
    assert code == 0, err
    assert best["plugged_in"] > best["zero_shot"]
    assert "warning: no rate and share made the full model better on this text" in " ".join(err.split())
    assert "next:" not in err


def _spoilt(model, verified, record, **settings):
    from dataclasses import replace

    from server.plugging.fit import fit

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


def test_what_ended_well_is_not_done_again_and_what_changed_is(rehearse, in_this_process, texts, monkeypatch):
    rates = ["--learning-rate", "0.01", "--learning-rate", "0.02"]
    with monkeypatch.context() as patched:
        patched.setattr("server.evaluation.rehearse.open_candidates", _interrupted)
        assert rehearse(*rates)[0] == 130
    assert not (texts / "found.json").exists()
    assert set(in_this_process) == {"tune-0.01", "tune-0.02"}
    in_this_process.clear()
    with monkeypatch.context() as patched:
        patched.setattr("server.evaluation.rehearse.open_candidates", _interrupted)
        assert rehearse(*rates[:2], "--learning-rate", "0.03")[0] == 130
    assert set(in_this_process) == {"tune-0.03"}
    in_this_process.clear()
    assert rehearse(*rates, "--steps", "4")[0] == 0
    assert set(in_this_process) == {"tune-0.01", "tune-0.02"}


def test_other_text_is_tuned_on_again(rehearse, in_this_process, texts, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("server.evaluation.rehearse.open_candidates", _interrupted)
        assert rehearse("--learning-rate", "0.01")[0] == 130
    in_this_process.clear()
    with (texts / "public.jsonl").open("a") as out:
        out.write('{"text": "one row more of a patient"}\n')
    assert rehearse("--learning-rate", "0.01")[0] == 0
    assert set(in_this_process) == {"tune-0.01"}


def _interrupted(config):
    raise KeyboardInterrupt


def test_a_rate_that_fails_is_left_out_and_said(rehearse, in_this_process, texts, monkeypatch):
    from client.tuning.tune import tune

    def diverges(attached, text, settings, **more):
        return (_failed if settings.learning_rate == 1 else tune)(attached, text, settings, **more)

    monkeypatch.setattr("client.tuning.tune.tune", diverges)
    code, best, err = rehearse("--learning-rate", "0.01", "--learning-rate", "1", "--scale", "1")
    assert code == 0, err
    assert best["learning_rate"] == 0.01
    assert "warning: rate 1 is left out" in err
    assert len(Rehearsal.model_validate_json((texts / "found.json").read_bytes()).trials) == 1


def test_when_every_rate_fails_so_does_the_rehearsal(rehearse, in_this_process, texts, monkeypatch):
    monkeypatch.setattr("client.tuning.tune.tune", _failed)
    code, _, err = rehearse("--learning-rate", "0.01", "--learning-rate", "0.02")
    assert code == RunFailed.exit_code
    for rate in ("0.01", "0.02"):
        assert f"warning: rate {rate} is left out" in err
    assert "no rate could be tuned" in err
    assert not (texts / "found.json").exists()


def _failed(*given, **settings):
    raise RunFailed("loss is not finite at step 1")


def test_the_client_validates_on_its_usual_share(rehearse, in_this_process, texts):
    """The rows that are measured on are not drawn as those that `tune` validates on."""
    code, _, err = rehearse("--learning-rate", "0.01", "--scale", "1", "--validation", "0.4", heldout=False)
    assert code == 0, err
    known, _ = split_by_document(read_records(texts / "public.jsonl"), fraction=0.2, seed=0, purpose="rehearsal")
    _, validated = split_by_document(known, fraction=0.4, seed=0)
    assert len(validated) > 0.2 * len(known)
    train = len(known) - len(validated)
    assert f"\n{train} records, " in err


@pytest.mark.parametrize("name", ["found.json.work", "found.json.work/checkpoint"])
def test_work_of_another_run_is_left_alone(name, rehearse, in_this_process, texts):
    path = texts / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("hers")
    code, _, err = rehearse("--learning-rate", "0.01")
    assert code == 2
    assert "work folder 'found.json.work' is another run's" in err
    assert path.read_text() == "hers"
    assert in_this_process == {}


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--learning-rate", "0"], "--learning-rate: expected more than 0 and at most 1"),
        (["--learning-rate", "2"], "--learning-rate: expected more than 0 and at most 1"),
        (["--scale", "1.5"], "--scale: expected more than 0 and at most 1"),
        (["--scale", "0.5", "--scale", "0.5"], "--scale: one value is given twice"),
        (["--way", "attention=2"], "--way attention=2: attention: expected more than 0 and at most 1"),
        (["--way", "0.5"], "--way 0.5: tried already"),
        (["--way", "1,spare=1"], "--way 1,spare=1: --spare is missing, which names public text"),
        (["--spare", "public.jsonl"], "--spare: no --way spares anything"),
        (["--adapter", "dora", "--way", "mlp=0.5"], "--way mlp=0.5: a dora adapter is plugged in whole or not"),
        (["--adapter", "lorra"], "--adapter: no kind 'lorra'"),
        (["--adapter", "dora", "--scale", "0.5"], "--scale: a dora adapter is plugged in whole or not"),
        (["--steps", "0"], "--steps"),
        (["--placement", "foo"], "--placement foo: expected BOTTOM+TOP"),
        (["--placement", "3+2"], "blocks"),
        (["--adapter", "lora", "--placement", "all"], "--placement all"),
        (["--learning-rate", "0.001", "--learning-rate", "0.0010000001"], "--learning-rate: one value is given twice"),
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
