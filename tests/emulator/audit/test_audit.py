import json
import math
import os
import shutil
import subprocess
import sys
import time

import pytest
from pydantic import ValidationError

from emulator.audit import audit as module
from emulator.audit.audit import run
from emulator.audit.config import ATTACKS, AuditPackageConfig
from offsite import cli
from offsite.artefacts.owner import owner_record_path
from offsite.audits.record import PackageAudit, read_audit
from offsite.config import build
from offsite.errors import ConfigError, DataError, OffsiteError, RunFailed, WrongBinding

TOKENS = 41


@pytest.fixture
def settings(speaker_folder, heldout_speech, public_speech, tmp_path):
    """Make the verb's settings for a package of `speaker`."""

    def make(sent, **changes):
        flags = {
            "package": str(sent.path),
            "model": str(speaker_folder),
            "heldout": str(heldout_speech),
            "public": str(public_speech),
            "block_tokens": str(TOKENS),
            "similarity_tokens": "128",
            "recovery_tokens": "400,800",
            "attack": "as_is_all,refill_lora",
            "all_rates": "3e-3",
            "lora_rates": "1e-2",
            "client_steps": "4",
            "client_rates": "1e-2",
            "output": str(tmp_path / "audit"),
            "device": "cpu",
            **changes,
        }
        return build(AuditPackageConfig, flags={key: value for key, value in flags.items() if value is not None})

    return make


def test_it_measures_everything_and_prints_verdicts(settings, pack_speaker, tmp_path, capsys):
    package, other = pack_speaker("drop", blocks=2), pack_speaker("drop", blocks=3)
    limits = {"max_capability": "0.99", "max_recovery": "0.0001", "max_union": "0.6", "min_withheld": "0"}
    told = run(settings(package, earlier=[str(other.path)], **limits))
    audit, digest = read_audit(tmp_path / "audit")
    assert isinstance(audit, PackageAudit)
    assert told["audit_digest"] == digest
    assert (audit.package_digest, audit.method.name) == (package.digest, "drop")
    assert audit.middle_parameters == 2 * audit.emulator_parameters
    (kept,) = audit.capabilities
    assert kept.full < kept.emulator
    assert kept.full < kept.chance
    assert told["kept"] == kept.kept < 1
    assert told["gap"] is None
    assert audit.recovery[0].attack == "as_is_all"
    assert {one.attack for one in audit.recovery[1:]} & {"duplicate_lora", "interpolate_lora"}
    assert "knowing that the full model has 6 blocks" in audit.recovery_text
    assert audit.union is not None
    assert (audit.union.share_single, audit.union.share_union) == (0.5, 0.75)
    assert [(gate["name"], gate["verdict"]) for gate in told["gates"]] == [
        ("capability", "passed"),
        ("recovery", "failed"),
        ("union", "failed"),
        ("withheld", "passed"),
    ]
    assert json.loads(json.dumps(told, allow_nan=False))["union"] == 0.75
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit"]
    shown = capsys.readouterr()
    assert shown.out == ""
    for words in (
        "capability kept",
        "verbatim: ",
        "within rounding: ",
        "best likeness",
        "regained",
        "union: 2 packages",
        "withheld after tuning",
        "no measure of what a client is left with",
        "recovery: failed",
    ):
        assert words in shown.err


def test_a_package_that_keeps_all_gives_all_away(settings, pack_speaker, tmp_path):
    told = run(settings(pack_speaker("keep-all"), max_recovery="0.99", max_capability="0.99"))
    assert (told["kept"], told["verbatim"], told["verbatim_by_row"], told["regained"]) == (1, 1, 1, 1)
    assert told["within_rounding"] == 1
    assert [gate["verdict"] for gate in told["gates"]] == ["failed", "failed"]


def test_bfloat16_packages_of_float32_models_are_compared_as_they_stand(settings, pack_speaker):
    told = run(settings(pack_speaker("drop", blocks=3, dtype="bfloat16"), public=None, **NO_ATTACK))
    assert told["verbatim"] == told["verbatim_by_row"] > 0.8


NO_ATTACK = dict.fromkeys(("recovery_tokens", "attack", "all_rates", "lora_rates", "client_steps", "client_rates"))


def test_without_public_text_no_attack_is_tried_and_chance_comes_from_halves(settings, pack_speaker, tmp_path, capsys):
    told = run(settings(pack_speaker("width", width=0.5), public=None, max_recovery="0.5", **NO_ATTACK))
    audit, _ = read_audit(tmp_path / "audit")
    assert (audit.recovery, audit.recovery_text, audit.union) == ((), "", None)
    assert told["regained"] is None
    assert [gate["verdict"] for gate in told["gates"]] == ["not measurable"]
    assert "each half by the other half's" in capsys.readouterr().err
    with_public = run(settings(pack_speaker("width", width=0.5), recovery_tokens="0", output=str(tmp_path / "b")))
    assert with_public["chance"] == pytest.approx(told["chance"], abs=0.2)
    assert with_public["full"] == told["full"]


def by_way(audit):
    return {one.way: one for one in audit.withheld}


def test_what_is_withheld_after_tuning_is_measured_by_a_rehearsed_client_and_by_the_attack(
    settings, pack_speaker, public_speech, tmp_path
):
    package = pack_speaker("drop", blocks=2)
    flags = {"attack": "as_is_all", "recovery_tokens": "6000", "field_text": str(public_speech), "client_steps": "30"}
    told = run(settings(package, client_rates="1e-6,1e-2", min_withheld="0.01", **flags))
    audit, _ = read_audit(tmp_path / "audit")
    (text,) = audit.capabilities
    ways = by_way(audit)
    assert list(ways) == ["rehearsed client", "recovery attack"]
    for one in ways.values():
        assert one.nats == pytest.approx(math.log(one.perplexity) - text.full)
        assert 0 < one.nats < audit.withheld_zero_shot  # tuning heals, and not all of it
    assert audit.withheld_zero_shot == pytest.approx(text.emulator - text.full)
    assert ways["rehearsed client"].num_tokens == 30 * 4 * TOKENS
    assert "rate 0.01, the best of 2 on text held out" in ways["rehearsed client"].told
    best = min(point.perplexity for one in audit.recovery for point in one.points)
    assert ways["recovery attack"].perplexity == best
    least = min(one.nats for one in ways.values())
    assert (told["withheld_after_tuning"], told["withheld_zero_shot"]) == (least, audit.withheld_zero_shot)
    assert told["withheld"] == {way.replace(" ", "_"): one.nats for way, one in ways.items()}
    (gate,) = told["gates"]
    assert (gate["name"], gate["verdict"], gate["found"]) == ("withheld", "passed", least)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit"]


def test_a_client_can_be_played_where_no_attack_is_tried(settings, pack_speaker, public_speech, tmp_path, capsys):
    alone = {**NO_ATTACK, "client_steps": "2", "client_rates": "1e-2", "public": None, "field_text": str(public_speech)}
    run(settings(pack_speaker("drop", blocks=2), **alone))
    audit, _ = read_audit(tmp_path / "audit")
    assert list(by_way(audit)) == ["rehearsed client"]
    assert "on every linear, 2 step(s) on text of the field" in audit.withheld[0].told
    assert "no attack is tried" in capsys.readouterr().err


def test_a_client_is_left_out_where_all_public_text_is_measured_on(
    settings, pack_speaker, public_speech, tmp_path, capsys
):
    alone = {**NO_ATTACK, "client_steps": "2", "client_rates": "1e-2", "recovery_tokens": "32"}
    text = tmp_path / "same.jsonl"
    text.write_text("".join(public_speech.read_text(encoding="utf-8").splitlines(keepends=True)[:60]), encoding="utf-8")
    run(settings(pack_speaker("drop", blocks=2), **alone, public=str(text), heldout=str(text)))
    audit, _ = read_audit(tmp_path / "audit")
    assert "rehearsed client" not in by_way(audit)
    assert "no client is played, for too little of the public text is not measured on" in capsys.readouterr().err


def test_a_client_is_not_played_with_no_steps(settings, pack_speaker, tmp_path):
    off = {"client_steps": "0", "client_rates": None, "recovery_tokens": "0", "min_withheld": "0"}
    told = run(settings(pack_speaker("drop", blocks=2), **off))
    audit, _ = read_audit(tmp_path / "audit")
    assert audit.withheld == ()
    assert (told["withheld"], told["withheld_after_tuning"]) == ({}, None)
    assert [gate["verdict"] for gate in told["gates"]] == ["not measurable"]
    assert "withheld" not in json.loads((tmp_path / "audit" / "audit.json").read_text())


def test_of_field_text_nothing_is_left_where_all_of_it_is_measured_on(settings, pack_speaker, heldout_speech, tmp_path):
    with pytest.raises(DataError, match=r"0 document\(s\), expected at least two"):
        run(settings(pack_speaker("drop", blocks=2), field_text=str(heldout_speech)))
    assert list(tmp_path.iterdir()) == []


def test_results_of_evaluate_give_the_gap(
    settings, pack_speaker, speaker_folder, heldout_speech, tmp_path, make_bundle
):
    from server.evaluation.config import EvaluateConfig
    from server.evaluation.evaluate import run as evaluate

    package = pack_speaker("width", width=0.5)
    make_bundle(tmp_path / "bundle", package, kind="lora", rank=2, placement="1+1")
    given = {
        "model": str(speaker_folder),
        "package": str(package.path),
        "bundle": [str(tmp_path / "bundle")],
        "data": str(heldout_speech),
        "block_tokens": str(TOKENS),
        "device": "cpu",
    }
    evaluate(build(EvaluateConfig, flags={**given, "output": str(tmp_path / "results")}))
    told = run(settings(package, results=str(tmp_path / "results"), min_withheld="9", attack="as_is_all"))
    audit, _ = read_audit(tmp_path / "audit")
    assert list(by_way(audit)) == ["rehearsed client", "client", "recovery attack"]
    least = min(one.nats for one in audit.withheld)
    assert [(gate["verdict"], gate["found"]) for gate in told["gates"]] == [("failed", least)]
    (kept,) = audit.capabilities
    assert told["gap"] == pytest.approx(kept.emulator_tuned - kept.plugged_in)
    found = json.loads((tmp_path / "results" / "results.json").read_text())["rows"]
    assert math.exp(kept.plugged_in) == pytest.approx(found["plugged_in"]["perplexity"]["mean"])
    client = by_way(audit)["client"]
    assert client.perplexity == pytest.approx(found["emulator_tuned"]["perplexity"]["mean"])
    metrics = json.loads((tmp_path / "results" / "results.json").read_text())["metrics"]
    assert client.nats == pytest.approx(metrics["withheld_after_tuning"]["mean"], abs=1e-4)
    assert "lora that came back, 1+1, mean of 1 bundle(s)" in client.told
    assert math.exp(kept.full) == pytest.approx(found["zero_shot"]["perplexity"]["mean"], rel=1e-4)
    changes = {"public": None, "results": str(tmp_path / "results"), "output": str(tmp_path / "other"), **NO_ATTACK}
    with pytest.raises(ConfigError, match="measured with another package"):
        run(settings(pack_speaker("drop", blocks=2), **changes))
    with pytest.raises(ConfigError, match="another cut of the text"):
        run(settings(package, limit_tokens="200", **changes))
    assert not (tmp_path / "other").exists()


def test_tasks_are_in_the_audit(settings, pack_speaker, tmp_path):
    path = tmp_path / "riddles.jsonl"
    rows = [{"question": f"{n}", "choices": ["ab", "cd"], "answer": n % 2} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(settings(pack_speaker("drop", blocks=2), task=[str(path)], public=None, **NO_ATTACK))
    audit, _ = read_audit(tmp_path / "audit")
    assert [(one.name, one.metric) for one in audit.capabilities] == [
        ("perplexity", "nats_per_token"),
        ("riddles", "acc"),
        ("riddles", "acc_norm"),
    ]
    assert audit.capabilities[1].chance == 0.5


def test_broken_off_and_resumed_it_writes_the_same_audit(settings, pack_speaker, tmp_path, monkeypatch):
    package = pack_speaker("drop", blocks=2)
    run(settings(package))
    whole, _ = read_audit(tmp_path / "audit")
    shutil.rmtree(tmp_path / "audit")
    monkeypatch.setattr(module, "write_audit", _full_disk)
    with pytest.raises(RunFailed, match="disk is full"):
        run(settings(package))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["audit.work"]
    with pytest.raises(ConfigError, match="unfinished run"):
        run(settings(package))
    with pytest.raises(ConfigError, match="with other settings"):
        run(settings(package, seed="1", resume=True))
    run(settings(package, resume=True))
    assert read_audit(tmp_path / "audit")[0] == whole
    assert [path.name for path in tmp_path.iterdir()] == ["audit"]


@pytest.mark.slow
def test_killed_and_resumed_is_an_unbroken_audit(settings, pack_speaker, tmp_path):
    config = settings(pack_speaker("drop", blocks=2))
    words = ["audit", "package", str(config.package), "--model", config.model, "--heldout", str(config.heldout[0])]
    words += ["--public", str(config.public[0]), "--block-tokens", str(TOKENS), "--recovery-tokens", "2000,6000"]
    words += ["--attack", "as_is_all", "--all-rates", "1e-3,3e-3", "--checkpoint-every", "4", "--device", "cpu"]
    command = [sys.executable, "-m", "offsite", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "-o", str(tmp_path / "whole")], capture_output=True, env=environment, check=True)
    broken = [*command, "-o", str(tmp_path / "broken")]
    for place in ("as_is_all-2000-0.001/checkpoint-4", "as_is_all-6000-*/checkpoint-8"):
        process = subprocess.Popen(broken, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        while not list((tmp_path / "broken.work").glob(place)):
            assert process.poll() is None, "ended before it could be killed"
            time.sleep(0.005)
        process.kill()
        process.wait()
        assert not (tmp_path / "broken").exists()
        broken = [*command, "-o", str(tmp_path / "broken"), "--resume"]
    subprocess.run(broken, capture_output=True, env=environment, check=True)
    assert read_audit(tmp_path / "broken") == read_audit(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "whole"]


def _full_disk(*_):
    raise RunFailed("the disk is full")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"heldout": "nowhere.jsonl"}, DataError, "nowhere.jsonl"),
        ({"public": "nowhere.jsonl"}, DataError, "nowhere.jsonl"),
        ({"model": "./nowhere"}, ConfigError, "no model folder './nowhere'"),
        ({"task": ["nowhere.jsonl"]}, ConfigError, "--task: no file 'nowhere.jsonl'"),
        ({"results": "nowhere"}, OffsiteError, "no folder named 'nowhere'"),
        ({"earlier": ["nowhere"]}, OffsiteError, "no owner's record 'nowhere.owner.json'"),
        ({"attack": "regrow_all"}, ConfigError, "start 'regrow' has nothing to do"),
        ({"block_tokens": "1000"}, ConfigError, "blocks of 1000 tokens, the model's context is 64"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(settings, pack_speaker, tmp_path, changes, error, message):
    with pytest.raises(error, match=message) as caught:
        run(settings(pack_speaker("drop", blocks=2), **changes))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_another_model_record_or_package_is_refused(settings, pack_speaker, make_package, model_folder, tmp_path):
    package = pack_speaker("drop", blocks=2)
    with pytest.raises(WrongBinding, match="model 'tiny-llama' has digest"):
        run(settings(package, model=str(model_folder)))
    make_package(tmp_path / "stranger")
    with pytest.raises(WrongBinding, match="--earlier: 'stranger' is a package of another model"):
        run(settings(package, earlier=[str(tmp_path / "stranger")]))
    copy = tmp_path / "copy"
    shutil.copytree(package.path, copy)
    shutil.copy(owner_record_path(pack_speaker("drop", blocks=3).path), owner_record_path(copy))
    with pytest.raises(WrongBinding, match=r"'copy\.owner\.json' is the record of another package"):
        run(settings(package, package=str(copy)))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"recovery_tokens": "5,5"}, "--recovery-tokens: expected ascending numbers"),
        ({"attack": "melt_all"}, "--attack: found 'melt_all', expected one of as_is_lora"),
        ({"public": None}, "attacks need public text, and --public is missing"),
        (
            {"public": None, "recovery_tokens": None, "attack": None, "all_rates": None, "lora_rates": None},
            "--client-rates, --client-steps: a client is played on --field-text or --public, give one",
        ),
        ({"client_steps": "0", "field_text": "x"}, "--field-text: no client is played on it with --client-steps 0"),
        ({"client_steps": "-1"}, "--client-steps: expected at least 0"),
        ({"client_rates": "0"}, "--client-rates"),
        ({"min_withheld": "nan"}, "--min-withheld"),
        ({"max_union": "0.5"}, "--max-union: nothing to unite, --earlier is missing"),
        ({"max_union": "1.5", "earlier": ["x"]}, "--max-union: expected at most 1"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(settings, pack_speaker, flags, message):
    with pytest.raises(ConfigError, match=message):
        settings(pack_speaker("drop", blocks=2), **flags)


def test_attacks_are_named_as_an_audit_may_name_them():
    from offsite.audits.record import Recovery, RecoveryPoint

    point = RecoveryPoint(num_tokens=0, perplexity=1.0, regained=0.0)
    for name in ATTACKS:
        Recovery(attack=name, trained_parameters=0, points=(point,))
    with pytest.raises(ValidationError):
        Recovery(attack="as-is/lora", trained_parameters=0, points=(point,))


def test_the_command_line_ends_with_one_json_object(settings, pack_speaker, tmp_path, capsys):
    config = settings(pack_speaker("drop", blocks=2), public=None, **NO_ATTACK)
    words = [str(config.package), "--model", config.model, "--heldout", str(config.heldout[0]), "--device", "cpu"]
    words += ["--block-tokens", str(TOKENS), "-o", str(tmp_path / "audit"), "--max-capability", "0.5"]
    assert cli.run(["audit", "package", *words]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["audit"] == "audit"
    assert told["gates"][0]["name"] == "capability"
    assert cli.run(["audit", "package", *words]) == 2
    assert "offsite: error: output 'audit' already exists" in capsys.readouterr().err
