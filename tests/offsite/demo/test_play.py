"""The demo: what crosses is checked, nothing stale is shown, and the whole of it on a tiny model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from offsite import cli
from offsite.artefacts.bundle import AdapterSpec
from offsite.config import build
from offsite.demo import described, handover
from offsite.demo import play as module
from offsite.demo import scene as at
from offsite.demo.config import DemoConfig
from offsite.demo.play import KEYS, run
from offsite.digests import sha256_bytes
from offsite.errors import ConfigError, RunFailed
from offsite.evaluation.results import Answer, Crossing, Data, Parameters, Results, Row, Summary, write_results
from offsite.text.records import bundled, read_records

DIGEST = sha256_bytes(b"")
FINGERPRINT = "-".join(["aaaa"] * 13)
PROMISED = ("zero_shot", "emulator_zero_shot", "emulator_tuned", "plugged_in", "lora_full", "recovery_vs_lora", "gap")


# The folder


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine" / "owner" / "package").mkdir(parents=True)
    (tmp_path / "file").write_text("x")
    for name in ("mine", "file"):
        with pytest.raises(ConfigError, match="is not an earlier demo's folder"):
            run(DemoConfig(output=tmp_path / name))
    with pytest.raises(ConfigError, match="cannot make folder 'below': not a directory"):
        run(DemoConfig(output=tmp_path / "file" / "below"))
    assert sorted(path.name for path in (tmp_path / "mine").rglob("*")) == ["owner", "package"]


def test_folders_of_both_parties(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty", "new"):
        folders = at.folders_of(tmp_path / name)
        assert [folder.name for folder in folders] == ["owner", "client", "stages"]
        assert all(folder.is_dir() for folder in folders)


def test_a_models_identity_follows_its_files(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    first = at.identity(str(folder))
    assert at.identity(str(folder)) == first
    (folder / "model.safetensors").write_bytes(b"weights")
    second = at.identity(str(folder))
    (folder / "model.safetensors").write_bytes(b"Weights")
    assert len({first, second, at.identity(str(folder))}) == 3
    assert at.identity("some/hub-id") == "some/hub-id"


def test_the_question_is_of_the_held_out_text():
    asked = module._question().strip()
    assert asked.endswith("?")
    prompts = {
        name: [record.segments[0][0] for record in read_records(bundled(name))] for name in ("heldout", "private")
    }
    assert asked in prompts["heldout"][0]
    assert not any(asked in prompt for prompt in prompts["private"])


# What it does, with verbs that only write down their settings


@pytest.fixture
def noted(monkeypatch, tmp_path, dropped_package):
    """Play every stage in this process: words go through the verb's own settings, the verb's work does not happen."""
    seen = {}
    figures = {"package_digest": dropped_package.digest, "bundle_digest": dropped_package.digest}
    figures |= {"fingerprint": FINGERPRINT, "job_id": "0" * 32, "sealed_digest": DIGEST, "id": "0123456789abcdef"}

    def play(stages, notes):
        for stage in stages:
            name = " ".join(stage.words[:2])
            name = name if name in cli.VERBS else stage.words[0]
            verb = cli.VERBS[name]
            monkeypatch.chdir(stage.party)
            monkeypatch.setitem(cli.VERBS, name, cli.Verb("", verb.settings, "noted_verb:note"))
            assert cli.run(list(stage.words)) == 0, stage.words
            monkeypatch.setitem(cli.VERBS, name, verb)
            noted_by = NOTED.pop()
            seen[stage.name] = (stage, noted_by)
            stage.outcome = dict(figures)
            if stage.name in {"distill", "keep-all"}:
                shutil.copytree(dropped_package.path, stage.leaves)
            if stage.name in {"tune", "reference"}:
                shutil.copytree(dropped_package.path, stage.leaves)
                (stage.leaves.parent / f"{stage.leaves.name}.log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
            if stage.words[0] in {"keygen", "seal", "open"}:
                stage.leaves.mkdir()
                (stage.leaves / "card.json").write_text("{}")
            if stage.name == "baseline":
                stage.leaves.write_text('{"measure": "accuracy"}')
            if stage.name == "evaluate":
                stage.leaves.mkdir()
                write_results(stage.leaves, made_results(measured=noted_by.task_file is not None))

    monkeypatch.setattr(module, "play", play)
    monkeypatch.setattr(handover, "play", play)
    monkeypatch.setattr(described, "play", play)
    monkeypatch.setattr(at, "play", play)
    monkeypatch.setitem(sys.modules, "noted_verb", sys.modules[__name__])
    return seen


NOTED = []


def note(config):
    NOTED.append(config)
    return {}


def made_results(plugged_in=8.0, *, measured=False):
    def row(value):
        accuracy = Summary(mean=1 / value, values={"once": 1 / value})
        tasks = {"intents": {"accuracy": accuracy}} if measured else {}
        return Row(perplexity=Summary(mean=value, values={"once": value}), tasks=tasks)

    crossing = {"digest": DIGEST, "num_parameters": 7}
    return Results(
        model="tiny",
        base_digest=DIGEST,
        method={"name": "width"},
        adapter=AdapterSpec(),
        data=Data(name="heldout.jsonl.gz", sha256=DIGEST, num_records=1, num_examples=1, num_tokens=9, num_truncated=0),
        rows={
            "zero_shot": row(20.0),
            "emulator_zero_shot": row(60.0),
            "emulator_tuned": row(12.0),
            "plugged_in": row(plugged_in),
            "lora_full": row(7.0),
        },
        metrics={"recovery_vs_lora": Summary(mean=0.9, values={"once": 0.9}), "gap": None, "capability": None},
        tasks={"intents": 16} if measured else {},
        parameters=Parameters(full=4, middle=2, emulator=1, adapter=1),
        package=Crossing(name="package", files={"m": {"bytes": 30, "sha256": DIGEST}}, **crossing),
        bundles={"bundle": Crossing(name="bundle", files={"a": {"bytes": 20, "sha256": DIGEST}}, **crossing)},
        answers=(Answer(prompt="Who?", before="Nobody.", after="You."),),
        config={},
        command="offsite evaluate",
        versions={},
        device="cpu",
        seconds=1.0,
    )


@pytest.mark.parametrize("short", [True, False])
def test_every_stage_is_a_verb_with_words_it_takes(noted, tmp_path, monkeypatch, llama_like, short):
    monkeypatch.chdir(llama_like.parent)
    told = run(DemoConfig(output=tmp_path / "out", short=short, seed=5, model=llama_like.name))
    assert list(noted) == [
        *("owner-keys", "client-keys", "owner-trust", "client-trust", "keep-all", "distill", "reference"),
        *("job", "seal-job", "seal-package", "open-job", "open-package", "tune", "seal-bundle", "intake", "accept"),
        *("plug-in", "evaluate", "report"),
    ]
    settings = {name: config for name, (_, config) in noted.items()}
    of_client = {name for name, (stage, _) in noted.items() if stage.party.name == "client"}
    assert of_client == {"client-keys", "client-trust", "open-job", "open-package", "tune", "seal-bundle"}
    for name in ("keep-all", "distill", "plug-in", "evaluate"):  # found from within a party's folder
        assert settings[name].model == str(llama_like)
    for name in ("distill", "reference", "tune"):
        assert settings[name].seed == 5
    assert settings["tune"].data == (Path("private.jsonl.gz"),)
    assert settings["tune"].disclose == ()
    assert [prompt.strip() for prompt in settings["evaluate"].prompt] == [module._question().strip()]
    assert settings["evaluate"].reference == ("lora_full=lora-full",)
    assert settings["report"].output == tmp_path / "out" / "report.html"
    assert str(settings["tune"].steps) in (module.SHORT if short else module.FULL)["tune"]
    client = {path.name for path in (tmp_path / "out" / "client").iterdir()}
    assert client == {
        *("keys", "passphrase", "owner.card.json", "job.sealed", "package.sealed", "job", "package"),
        *("private.jsonl.gz", "bundle", "bundle.log.jsonl", "bundle.sealed"),
    }
    assert settings["tune"].job == Path("job")
    assert settings["plug-in"].id == "0123456789abcdef"
    assert {key: told[key] for key in KEYS} == dict(zip(KEYS, (20.0, 60.0, 12.0, 8.0, 7.0), strict=True))
    assert (told["recovery_vs_lora"], told["gap"]) == (0.9, None)
    assert (told["package_bytes"], told["adapter_bytes"]) == (30, 20)


def test_every_stage_is_bound_to_what_it_reads(noted, tmp_path, llama_like):
    run(DemoConfig(output=tmp_path / "out", model=str(llama_like)))
    inputs = {name: set(stage.inputs) for name, (stage, _) in noted.items()}
    of_handover = {name: found for name, found in inputs.items() if noted[name][0].leaves and "keys" not in name}
    assert all(found for found in of_handover.values())
    assert {
        name: inputs[name] for name in ("keep-all", "distill", "reference", "tune", "plug-in", "evaluate", "report")
    } == {
        "keep-all": {"model"},
        "distill": {"model", "public"},
        "reference": {"package", "private"},
        "tune": {"package", "job", "private"},
        "plug-in": {"model", "package", "bundle"},
        "evaluate": {"model", "package", "bundle", "reference", "heldout"},
        "report": {"results"},
    }


TASKS = Path(__file__).parents[3] / "examples" / "tasks"


def test_a_task_is_played_by_verbs_with_words_they_take(noted, tmp_path, llama_like):
    told = run(DemoConfig(output=tmp_path / "out", short=True, model=str(llama_like), task=TASKS / "intents"))
    assert list(noted) == [
        *("task-check", "owner-keys", "client-keys", "owner-trust", "client-trust", "keep-all", "distill", "baseline"),
        *("reference", "job", "seal-job", "open-job", "seal-package", "open-package", "tune", "seal-bundle"),
        *("intake", "accept", "plug-in", "evaluate", "report"),
    ]
    settings = {name: config for name, (_, config) in noted.items()}
    assert settings["job"].task == settings["reference"].task == Path("task.yaml")
    assert (settings["tune"].job, settings["tune"].task) == (Path("job"), None)
    assert settings["baseline"].rows == settings["evaluate"].task_limit == int(described.SHORT["baseline"][1])
    assert settings["baseline"].data == settings["evaluate"].data == (Path("heldout.jsonl.gz"),)
    client = {path.name for path in (tmp_path / "out" / "client").iterdir()}
    assert "rows.jsonl.gz" in client
    assert not client & {"heldout.jsonl.gz", "task.yaml", "only-for-the-reference.jsonl.gz"}
    assert (told["task"], told["measure"], told["num_rows"], told["plugged_in"]) == ("intents", "accuracy", 16, 0.125)


def test_a_tasks_folder_lacks_a_file_or_is_played_privately(tmp_path):
    shutil.copyfile(TASKS / "intents" / "task.yaml", tmp_path / "task.yaml")
    with pytest.raises(ConfigError, match=r"no rows\.jsonl\.gz in it"):
        run(DemoConfig(output=tmp_path / "out", task=tmp_path))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="without differential privacy"):
        DemoConfig(task=tmp_path, dp=8.0)


def test_a_fetched_model_is_fetched_first(noted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(at, "fetched_folder", lambda _name: None)
    run(DemoConfig(output=tmp_path / "out"))
    stage, config = noted["fetch"]
    assert (config.name, stage.leaves) == ("smollm2-135m", None)
    assert next(iter(noted)) == "fetch"


def test_the_answer_is_shown_before_and_after(capsys):
    module._conclude(made_results(), Path("report.html"), 0.0)
    err = capsys.readouterr().err
    assert "Who?\n  before: Nobody.\n  after:  You.\n" in err
    assert "report: report.html" in err
    assert "NOT differentially private" in err


@pytest.mark.parametrize("plugged_in", [20.0, 25.0])
def test_no_gain_is_a_failure(plugged_in):
    with pytest.raises(RunFailed, match=r"plugged in \(2\d\.00\) is not better than zero-shot \(20\.00\)"):
        module._conclude(made_results(plugged_in), Path("report.html"), 0.0)


def test_settings():
    config = build(DemoConfig, flags={})
    assert (config.output, config.short, config.model) == (Path("demo-out"), False, "smollm2-135m")


# The whole of it


@pytest.mark.slow
def test_the_short_demo_on_a_tiny_model(tmp_path, llama_like):
    words = [
        sys.executable,
        "-P",
        "-m",
        "offsite",
        "demo",
        "--short",
        "--model",
        "tiny-llama",
        "-o",
        str(tmp_path / "out"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def demo(*more):
        done = subprocess.run(
            [*words, *more], cwd=llama_like.parent, env=environment, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout, done.stderr

    code, out, err = demo()
    assert code == 0, err
    told = json.loads(out.splitlines()[-1])
    assert all(isinstance(told[name], float) for name in PROMISED)
    assert all(told[name] > 0 for name in ("adapter_bytes", "package_bytes", "seconds"))
    assert told["plugged_in"] < told["zero_shot"]
    assert "done before" not in err
    assert "before:" in err
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "plugged in" in page.lower()
    client = {path.name for path in (tmp_path / "out" / "client").rglob("*")}
    assert not any(
        name.endswith(".owner.json") or name.startswith(("public", "heldout", "keep-all")) for name in client
    )

    code, out, err = demo()
    assert code == 0, err
    again = json.loads(out.splitlines()[-1])
    assert {**again, "seconds": 0} == {**told, "seconds": 0}
    assert err.count("done before") == 17  # all but intake and accept, which answer the same again
    assert again["seconds"] < told["seconds"] / 2

    payload = max((tmp_path / "out" / "owner" / "package.sealed" / "payload").iterdir(), key=lambda p: p.stat().st_size)
    raw = bytearray(payload.read_bytes())
    raw[-1] ^= 1
    payload.write_bytes(bytes(raw))
    shutil.rmtree(tmp_path / "out" / "client" / "package")
    code, out, err = demo()
    assert (code, out) == (5, "")
    assert "offsite: error: step 'open-package' ended with exit code 3" in err
    assert not (tmp_path / "out" / "client" / "package").exists()


@pytest.mark.slow
def test_a_task_on_a_tiny_model_from_its_file_to_its_measure(tmp_path, llama_like):
    words = ["demo", "--task", str(TASKS / "intents"), "--short", "--model", "tiny-llama", "-o", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "offsite", *words], cwd=llama_like.parent, env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["task"], told["measure"], told["num_rows"]) == ("intents", "accuracy", 16)
    assert all(0 <= told[row] <= 1 for row in described.ROWS)
    assert "intents" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_private_demo_ends_with_reports_that_verify(tmp_path, llama_like):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def offsite(*words, cwd):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "offsite", *words], cwd=cwd, env=environment, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    out_folder = tmp_path / "out"
    words = ("demo", "--short", "--dp", "8", "--model", "tiny-llama", "-o", str(out_folder))
    code, out, err = offsite(*words, cwd=llama_like.parent)
    assert code == 0, err
    told = json.loads(out.splitlines()[-1])
    assert 0 < told["epsilon"] <= 8
    assert "differentially private per row: epsilon" in err
    assert "NOT differentially private" not in err
    owner = out_folder / "owner"
    code, out, err = offsite("report", "verify", "privacy", "--keys", "keys", cwd=owner)
    assert (code, json.loads(out)["accepted_leakage"]) == (0, False), err
    code, _, err = offsite("report", "verify", "own", "--keys", "../client/keys", cwd=owner)  # by the client's trust
    assert code == 0, err
    report = owner / "privacy" / "report.json"
    raw = report.read_bytes()
    report.write_bytes(raw.replace(b'"steps": 4', b'"steps": 3', 1))
    assert report.read_bytes() != raw
    code, out, err = offsite("report", "verify", "privacy", "--keys", "keys", cwd=owner)
    assert (code, out) == (3, ""), err
    assert "signature" in err


@pytest.mark.slow
def test_a_verb_that_fails_fails_the_demo(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    words = [sys.executable, "-P", "-m", "offsite", "demo", "--short", "--model", "broken"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (5, "")
    lines = [line for line in done.stderr.splitlines() if line.startswith("offsite: error:")]
    assert len(lines) == 2  # the verb's own, then the demo's
    assert lines[1] == "offsite: error: step 'keep-all' ended with exit code 2"
