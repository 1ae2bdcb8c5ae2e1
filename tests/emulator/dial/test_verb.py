"""``distill --target`` and ``--explore`` on a made-up world whose law is known; and once with real processes."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from dial_law import recovery_of, tuned_of

from emulator.dial import verb as module
from emulator.dial.exploration import read_exploration
from emulator.dial.verb import run
from offsite.artefacts.owner import read_owner_record
from offsite.artefacts.package import open_package
from offsite.errors import ConfigError, RunFailed

SIZES = ["0.2", "0.33", "0.5", "0.67", "0.85"]
RUNGS = ["0.26", "0.42", "0.58", "0.76"]


def listing(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".jsonl"))


def test_exploring_ends_with_the_page_and_no_package(world, settings, tmp_path, capsys):
    told = run(settings(explore=True))
    assert listing(tmp_path) == ["package.explore.html", "package.explore.json", "package.work"]
    assert told["num_tried"] == 5
    found = read_exploration(tmp_path / "package.explore.json")
    assert [f"{one.size:g}" for one in found.tried] == SIZES
    assert [f"{one.size:g}" for one in found.ladder] == RUNGS
    (line,) = found.lines
    assert (line.a, line.b) == pytest.approx((0.82, 0.36))
    assert line.residual < 1e-9
    for one in found.tried:
        assert one.figures.recovery == pytest.approx(recovery_of(one.size))
    err = capsys.readouterr().err
    assert "recovery = 0.820 - 0.360 withheld" in err
    (following,) = re.findall(r"^next: (offsite distill .*)$", err, re.M)
    assert following.endswith("--target recovery=0.8")
    assert "--explore" not in following


def test_sizes_that_a_model_cannot_tell_apart_are_refused_before_any_stage(world, settings, tmp_path):
    with pytest.raises(ConfigError, match="width makes 2 different sizes of this model of those, expected at least 3"):
        run(settings(explore=True, explore_size=["0.2", "0.201", "0.5"]))
    assert world.ran == []


def test_what_each_stage_is_told(world, settings, tmp_path):
    run(settings(explore=True, client="steps=3,rank=2", channels="activation", seed="7", bottom="3"))
    words = world.words["width-0.33"]
    for pair in ("--width 0.33", "--steps 0", "--channels activation", "--seed 7", "--bottom 3"):
        assert pair in " ".join(words)
    assert words[words.index("--public") + 1] == "calibration.jsonl"
    assert words[words.index("--field-text") + 1] == "measured.jsonl"
    client = " ".join(world.words["client-width-0.33"])
    for pair in ("--steps 3", "--rank 2", "--learning-rate 0.004", "--placement all", "--data tuned.jsonl"):
        assert pair in client
    assert "--scale" not in client
    assert "--heldout measured.jsonl" in client
    assert "--scale 1" in " ".join(world.words["client-keep-all"])
    assert world.most_at_once == 1
    work = tmp_path / "package.work"
    rows = {name: (work / f"{name}.jsonl").read_text() for name in ("calibration", "tuned", "measured")}
    assert "field document" not in rows["calibration"]
    assert "public document" not in rows["tuned"] + rows["measured"]
    assert not set(rows["tuned"].splitlines()) & set(rows["measured"].splitlines())
    assert not any((work / f"rung-width-{size}").exists() for size in RUNGS)


def test_several_sizes_at_a_time(world, settings):
    run(settings(explore=True, parallel="3"))
    assert world.most_at_once == 3


def test_a_target_is_made_and_what_was_predicted_stands_beside_what_was_measured(world, settings, tmp_path, capsys):
    told = run(settings(target="recovery=0.7"))
    assert listing(tmp_path) == ["package", "package.explore.html", "package.explore.json", "package.owner.json"]
    wanted = 1 - math.sqrt(0.12 / 0.36 - 0.05)  # the law's own inverse
    assert told["size"] == pytest.approx(wanted, abs=0.011)
    assert told["recovery"] == pytest.approx(recovery_of(told["size"]))
    assert told["predicted_recovery"] >= 0.7
    record = read_owner_record(tmp_path / "package.owner.json")
    assert record.dial is not None
    assert (record.dial.target, record.dial.value, record.dial.size) == ("recovery", 0.7, told["size"])
    assert record.dial.measured.recovery == pytest.approx(recovery_of(told["size"]))
    assert record.dial.predicted.recovery == told["predicted_recovery"]
    assert record.dial.predicted.recovery == pytest.approx(record.dial.measured.recovery, abs=0.02)
    assert record.package_digest == told["package_digest"]
    assert read_exploration(tmp_path / "package.explore.json").made.package_digest == told["package_digest"]
    assert "dial" not in (tmp_path / "package").name
    err = capsys.readouterr().err
    assert "plug-in takes 0.5 of what comes back" in err
    assert "Asked for: recovery at least 0.7." in err


def test_going_on_from_an_exploration_runs_what_is_missing_alone(world, settings, tmp_path):
    run(settings(explore=True))
    world.ran.clear()
    told = run(settings(target="withheld=0.25"))
    assert world.ran == [f"width-{told['size']:g}", f"client-width-{told['size']:g}"]
    assert told["withheld"] >= 0.25
    assert math.log(tuned_of(told["size"] + 0.01) / 13.0) < 0.25


@pytest.mark.parametrize(
    "breaks", ["keep-all", "width-0.5", "client-width-0.67", "rung-width-0.58", "client-width-0.56"]
)
def test_an_exploration_that_was_interrupted_runs_nothing_twice(breaks, world, settings, tmp_path):
    whole = [f"width-{size}" for size in SIZES] + [f"rung-width-{size}" for size in RUNGS]
    whole += ["keep-all", "client-keep-all", *(f"client-width-{size}" for size in SIZES)]
    whole += ["width-0.56", "client-width-0.56"]
    world.breaks = breaks
    with pytest.raises(KeyboardInterrupt):
        run(settings(target="recovery=0.73"))
    assert listing(tmp_path) == ["package.work"]
    before = list(world.ran)
    assert breaks not in before
    world.breaks = ""
    run(settings(target="recovery=0.73"))
    assert sorted(world.ran) == sorted(whole)
    assert world.ran[: len(before)] == before
    assert "package" in listing(tmp_path)


def test_other_text_or_another_client_is_tried_again(world, settings, tmp_path):
    run(settings(explore=True))
    world.ran.clear()
    run(settings(explore=True, client="steps=5"))
    assert sorted(world.ran) == sorted(["client-keep-all", *(f"client-width-{size}" for size in SIZES)])
    world.ran.clear()
    with (tmp_path / "public.jsonl").open("a") as out:
        out.write('{"text": "one more public document"}\n')
    run(settings(explore=True, client="steps=5"))
    assert {f"width-{size}" for size in SIZES} <= set(world.ran)
    assert "keep-all" not in world.ran


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (
            "recovery=0.95",
            r"recovery at least 0.95 cannot be met within the sizes explored: the nearest is 0.794, width 0.85",
        ),
        ("withheld=5", r"withheld at least 5 cannot be met .*: the nearest is 0.69, width 0.2"),
        ("gap=9", r"gap at least 9 cannot be met .*, width 0.2"),
        ("bytes=10MB", r"bytes at most 10.MB cannot be met .*: the nearest is 90.MB, width 0.2"),
    ],
)
def test_what_cannot_be_met_is_said_with_the_nearest_and_leaves_the_page(target, told, world, settings, tmp_path):
    with pytest.raises(RunFailed, match=told) as caught:
        run(settings(target=target))
    assert "\n" not in str(caught.value)
    assert "package.explore.html shows every size" in str(caught.value.hint)
    assert listing(tmp_path) == ["package.explore.html", "package.explore.json", "package.work"]
    found = read_exploration(tmp_path / "package.explore.json")
    assert not found.wanted.is_met
    assert not any(name.startswith("width-0.9") for name in world.ran)
    assert "No size between those that were tried" in (tmp_path / "package.explore.html").read_text()
    run(settings(target="recovery=0.7"))
    assert "package" in listing(tmp_path)


def test_a_prediction_that_was_wrong_is_said(world, settings, tmp_path, capsys):
    world.bends = {0.47: -0.1}
    told = run(settings(target="recovery=0.7"))
    assert told["size"] == 0.47
    err = capsys.readouterr().err
    assert "warning: asked for recovery at least 0.7, predicted 0.7" in err
    assert "the line is rough" in err
    dial = read_owner_record(tmp_path / "package.owner.json").dial
    assert dial.predicted.recovery - dial.measured.recovery > 0.05


def test_a_reference_that_gains_nothing_is_no_reference(world, settings, monkeypatch):
    made = world._rehearse

    def worse(party, words):
        outcome = made(party, words)
        path = party / outcome["rehearsal"]
        stated = json.loads(path.read_text())
        for trial in stated["trials"]:
            trial["plugged_in"] = 14.0
        path.write_text(json.dumps(stated))
        return outcome

    monkeypatch.setattr(world, "_rehearse", worse)
    with pytest.raises(RunFailed, match="LoRA on the full model gained nothing"):
        run(settings(explore=True))


@pytest.mark.parametrize("name", ["package", "package.explore.json", "package.explore.html", "package.work/other"])
def test_what_stands_in_the_way_is_left_alone(name, world, settings, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(ConfigError):
        run(settings(target="recovery=0.7"))
    assert path.read_text() == "mine"
    assert world.ran == []


def test_a_package_that_was_changed_after_its_client_is_not_published(world, settings, tmp_path, monkeypatch):
    class Changed:
        digest = "sha256:" + "0" * 64

        def __init__(self, path):
            """Any."""

    monkeypatch.setattr(module, "open_package", Changed)
    with pytest.raises(Exception, match="not the one that was rehearsed"):
        run(settings(target="recovery=0.7"))
    assert not (tmp_path / "package").exists()
    assert not (tmp_path / "package.owner.json").exists()


def test_the_page_holds_no_path_and_every_size(world, settings, tmp_path):
    run(settings(explore=True))
    page = (tmp_path / "package.explore.html").read_text()
    assert str(tmp_path) not in page
    assert str(tmp_path) not in (tmp_path / "package.explore.json").read_text()
    for size in (*SIZES, *RUNGS):
        assert f"width {float(size):.3g}" in page
    assert "offsite distill m" in page
    assert "--target recovery=0.8" in page
    assert "<script" not in page


@pytest.mark.slow
@pytest.mark.timeout(1800)  # about twenty processes, which each load torch
def test_the_whole_of_it_with_real_processes(full_llama, letters_tokenizer, tmp_path):
    full_llama.save_pretrained(tmp_path / "model")
    letters_tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"text": f"case {n}: rest and water for {n % 9} days, then {n * 7 % 11} more"} for n in range(120)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["distill", "model", "--public", "text.jsonl", "-o", "package", "--block-tokens", "32"]
    words += ["--calibration-tokens", "512", "--precision", "fp32", "--device", "cpu", "--parallel", "2"]
    words += ["--client", "steps=12,rank=2,learning_rate=0.02", "--dtype", "float32"]
    words += [word for size in ("0.34", "0.5", "0.84") for word in ("--explore-size", size)]

    def play(*more):
        command = [sys.executable, "-P", "-m", "offsite", *words, *more]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    first = play("--explore")
    assert first.returncode == 0, first.stderr
    found = read_exploration(tmp_path / "package.explore.json")
    assert [one.size for one in found.tried] == pytest.approx([1 / 3, 1 / 2, 5 / 6])
    biggest = max(one.figures.num_bytes for one in found.tried)
    second = play("--target", f"bytes={biggest}")
    assert second.returncode == 0, second.stderr
    told = json.loads(second.stdout.splitlines()[-1])
    package = open_package(tmp_path / "package")
    assert package.digest == told["package_digest"]
    record = read_owner_record(Path(tmp_path / "package.owner.json"))
    assert record.dial.measured.num_bytes == package.num_bytes <= biggest
    assert "dial" not in (tmp_path / "package" / "offsite.json").read_text()
    assert [one.size for one in found.ladder] == pytest.approx([2 / 3])
    assert second.stderr.count("done before") == 11  # everything, and the size asked for, which had been tried
    assert not (tmp_path / "package.work").exists()
