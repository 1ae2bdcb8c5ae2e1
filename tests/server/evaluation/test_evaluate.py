"""Evaluating: oracles on a package that keeps everything, the folder it writes, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.errors import ConfigError, DataError, PolicyError, RunFailed, WrongBinding
from offsite.evaluation.measure import perplexity
from offsite.evaluation.results import read_logs, read_results
from offsite.report.page import page
from offsite.text.batches import encode, pack
from offsite.text.records import read_records
from server.evaluation.candidates import read_own
from server.evaluation.config import EvaluateConfig
from server.evaluation.evaluate import held_out, run
from server.plugging.fit import fit, plugged
from server.plugging.offset import Offset, offset_by, on_emulator

TEXTS = [f"the patient number {number} has a fever of {37 + number / 10} degrees and a cough" for number in range(12)]


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "heldout.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


@pytest.fixture
def evaluate(llama_folder, text_file, tmp_path):
    def call(package, bundles, **settings):
        given = {"model": str(llama_folder), "data": text_file, "output": tmp_path / "results", "block_tokens": 64}
        words = tuple(bundle if isinstance(bundle, str) else str(bundle.path) for bundle in bundles)
        return run(EvaluateConfig(**{**given, "package": package.path, "bundle": words, **settings}))

    return call


@pytest.fixture(scope="module")
def seeds(tmp_path_factory, dropped_package, make_bundle):
    folder = tmp_path_factory.mktemp("seeds")
    return [make_bundle(folder / f"seed{n}", dropped_package, kind="lora", seed=n) for n in range(3)]


def by_hand(model, text_file, tokenizer):
    encoded = encode(read_records(text_file), tokenizer, context=64, whole_text=True)
    return perplexity(model, pack(encoded.examples, block_tokens=64), batch_size=3, pad_id=0).perplexity


def test_every_row_is_what_the_models_compute(
    evaluate, seeds, dropped_package, whole_package, full_llama, make_bundle, text_file, letters_tokenizer, tmp_path
):
    ceiling = make_bundle(tmp_path / "ceiling", whole_package, kind="lora", seed=9)
    lora = make_bundle(tmp_path / "lora", whole_package, kind="lora", placement="all")
    full = make_bundle(tmp_path / "full", whole_package, kind="blocks", placement="all", shake=0.01)
    found = evaluate(
        dropped_package,
        [f"s{number}={bundle.path}" for number, bundle in enumerate(seeds)],
        reference=(f"ceiling={ceiling.path}", f"lora_full={lora.path}", f"full={full.path}"),
        reference_package=(whole_package.path,),
    )
    assert found["zero_shot"] == pytest.approx(by_hand(full_llama, text_file, letters_tokenizer))
    assert found["emulator_zero_shot"] == pytest.approx(
        by_hand(dropped_package.load_model(), text_file, letters_tokenizer)
    )
    record, whole = (read_owner_record(owner_record_path(p.path)) for p in (dropped_package, whole_package))
    expected = []
    for bundle in seeds:
        with plugged(full_llama, fit(full_llama, read_own(bundle, record), record)) as adapted:
            expected.append(by_hand(adapted, text_file, letters_tokenizer))
    results = read_results(tmp_path / "results")
    assert list(results.rows["plugged_in"].perplexity.values) == ["s0", "s1", "s2"]
    assert list(results.rows["plugged_in"].perplexity.values.values()) == pytest.approx(expected)
    assert found["plugged_in"] == pytest.approx(sum(expected) / 3)
    for name, bundle in {"ceiling": ceiling, "lora_full": lora, "full": full}.items():
        with plugged(full_llama, fit(full_llama, read_own(bundle, whole), whole)) as adapted:
            assert found[name] == pytest.approx(by_hand(adapted, text_file, letters_tokenizer))
    assert found["recovery_vs_lora"] == pytest.approx(
        (found["plugged_in"] - found["zero_shot"]) / (found["lora_full"] - found["zero_shot"])
    )
    assert found["capability"] == pytest.approx(math.log(found["emulator_zero_shot"] / found["zero_shot"]))
    assert found["withheld_zero_shot"] == found["capability"]
    tuned = results.rows["emulator_tuned"].perplexity.values
    assert results.metrics["withheld_after_tuning"].values == pytest.approx(
        {seed: math.log(value / found["zero_shot"]) for seed, value in tuned.items()}
    )
    assert found["recovery_nats_vs_full"] == pytest.approx(
        sum(math.log(found["zero_shot"] / value) for value in expected)
        / 3
        / math.log(found["zero_shot"] / found["full"])
    )
    assert (found["num_seeds"], found["adapter_bytes"]) == (3, seeds[0].num_bytes)
    assert found["package_bytes"] == dropped_package.num_bytes


@pytest.mark.parametrize("kind", ["blocks", "lora", "dora"])
def test_on_a_package_that_keeps_everything_emulator_and_model_are_one(
    kind, evaluate, whole_package, make_bundle, tmp_path
):
    found = evaluate(whole_package, [make_bundle(tmp_path / "bundle", whole_package, kind=kind)])
    assert found["emulator_zero_shot"] == found["zero_shot"]
    assert found["emulator_tuned"] == found["plugged_in"] != found["zero_shot"]
    assert (found["gap"], found["capability"], found["recovery_vs_lora"]) == (1.0, 0.0, None)
    assert found["emulator_share"] == 1.0


def test_the_folder_holds_everything_but_paths_and_text(
    evaluate, seeds, dropped_package, llama_folder, text_file, tmp_path
):
    log = tmp_path / "bundle.log.jsonl"
    log.write_text('{"step": 1, "loss": 3.5, "evaluation_loss": null}\n{"step": 2, "loss": 3.25, "seconds": 1.5}\n')
    outcome = tmp_path / "tune.json"
    outcome.write_text('chatter\n{"peak_bytes": 1000, "seconds": 2.5, "bundle": "x", "tokens_per_second": 9.5}\n')
    found = evaluate(
        dropped_package,
        seeds[:1],
        prompt=("the patient",),
        answer_tokens=4,
        log=(f"tune={log}",),
        outcome=(f"tune={outcome}",),
    )
    folder = tmp_path / "results"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()) == [
        "logs/tune.jsonl",
        "results.json",
    ]
    assert read_logs(folder)["tune"][1] == {"step": 2, "loss": 3.25, "seconds": 1.5}
    results = read_results(folder)
    assert results.runs["tune"] == {"peak_bytes": 1000.0, "seconds": 2.5, "tokens_per_second": 9.5}
    assert results.data.num_records == 12
    assert results.data.num_truncated == 0
    answer = results.answers[0]
    assert answer.prompt == "the patient"
    assert answer.before != answer.after
    assert results.package.files.keys() == dropped_package.manifest.files.keys()
    assert results.parameters.emulator * 4 == results.parameters.middle * 3  # three middle blocks of four
    assert results.command.startswith(f"offsite evaluate {llama_folder.name} --output results --package package")
    assert f"--bundle seed0=seed0 --data {text_file.name} --prompt 'the patient'" in results.command
    raw = (folder / "results.json").read_text()
    assert str(tmp_path) not in raw
    assert "/" not in raw.replace("offsite/results/1", "").replace("tokens/s", "")
    assert not any(text in raw for text in TEXTS)
    assert json.loads(raw)["rows"]["zero_shot"]["perplexity"]["mean"] == found["zero_shot"]


def test_a_clients_bundle_is_named_by_its_id(evaluate, shelve, seeds, dropped_package, tmp_path):
    named = shelve(seeds[0].path, dropped_package.path, tmp_path / "shelf")
    where = {"registry": named["registry"], "keys": named["keys"]}
    by_path = evaluate(dropped_package, seeds[:1], output=tmp_path / "by-path")
    found = evaluate(dropped_package, [f"s0={named['id']}"], **where)
    assert found["plugged_in"] == by_path["plugged_in"]
    assert f"--bundle s0={named['id']} --registry registry" in read_results(tmp_path / "results").command
    other = shelve(seeds[0].path, dropped_package.path, tmp_path / "other", state="verified")
    with pytest.raises(PolicyError, match="not accepted"):
        evaluate(dropped_package, [other["id"]], output=tmp_path / "no", registry=other["registry"], keys=other["keys"])


def test_the_table_is_on_stderr(evaluate, seeds, dropped_package, capsys):
    evaluate(dropped_package, seeds[:2])
    captured = capsys.readouterr()
    assert captured.out == ""
    for words in (
        "zero shot",
        "emulator tuned",
        "plugged in",
        "±",
        "gap",
        "withheld after tuning",
        "withheld zero shot",
        "sent ",
    ):
        assert words in captured.err


def test_tasks_are_scored_in_every_row(evaluate, seeds, dropped_package, tmp_path):
    pytest.importorskip("lm_eval")
    task = tmp_path / "quiz.jsonl"
    rows = [{"question": f"number {n}?", "choices": ["one", "two"], "answer": n % 2} for n in range(4)]
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate(dropped_package, seeds[:2], task=(task,), task_limit=3)
    results = read_results(tmp_path / "results")
    assert results.tasks == {"quiz": 3}
    for row in results.rows.values():
        assert 0 <= row.tasks["quiz"]["acc"].mean <= 1
    assert set(results.task_metrics["quiz"]["acc"]) >= {"recovery_vs_lora", "gap"}


@pytest.mark.parametrize("packed", [True, False])
def test_the_limit_of_tokens_keeps_the_first_examples(packed, text_file, letters_tokenizer):
    needed = {"model": "m", "output": text_file, "package": text_file, "bundle": ("b",), "data": text_file}
    config = EvaluateConfig(**needed, block_tokens=32, limit_tokens=100, pack=packed)
    _, kept = held_out(read_records(text_file), letters_tokenizer, config)
    assert sum(len(example.input_ids) for example in kept) <= 100
    assert len(kept) == 3


def test_half_precision_runs_every_row(evaluate, seeds, dropped_package, make_bundle, tmp_path):
    blocks = make_bundle(tmp_path / "blocks", dropped_package)
    exact = evaluate(dropped_package, [blocks], output=tmp_path / "exact")
    found = evaluate(dropped_package, [blocks], precision="bf16")
    assert found["plugged_in"] != exact["plugged_in"]
    assert found["plugged_in"] == pytest.approx(exact["plugged_in"], rel=0.1)


def test_figures_go_into_the_readme_of_what_is_plugged_in_afterwards(
    evaluate, plug_in, seeds, dropped_package, llama_folder, tmp_path
):
    evaluate(dropped_package, [seeds[0]], output=tmp_path / "results")
    rows = read_results(tmp_path / "results").rows
    plug_in(llama_folder, seeds[0], tmp_path / "adapted", package=dropped_package.path, results=tmp_path / "results")
    text = (tmp_path / "adapted" / "README.md").read_text()
    assert f"| plugged in | {rows['plugged_in'].perplexity.mean:.2f} |" in text
    assert f"| zero-shot: the base model | {rows['zero_shot'].perplexity.mean:.2f} |" in text
    with pytest.raises(ConfigError, match="not of this bundle"):
        plug_in(llama_folder, seeds[1], tmp_path / "other", package=dropped_package.path, results=tmp_path / "results")
    assert not (tmp_path / "other").exists()


# --- refusals


def test_the_output_stays_absent_when_a_model_breaks(evaluate, make_bundle, dropped_package, tmp_path):
    """Finite weights, infinite loss: alpha is the client's to choose."""
    bundle = make_bundle(tmp_path / "bundle", dropped_package, kind="lora", alpha=1e38)
    with pytest.raises(RunFailed):
        evaluate(dropped_package, [bundle])
    assert not list(tmp_path.glob("*results*"))


def test_bundles_must_be_seeds_of_one_adapter(evaluate, seeds, dropped_package, make_bundle, tmp_path):
    other = make_bundle(tmp_path / "other", dropped_package, kind="lora", rank=4)
    with pytest.raises(ConfigError, match="hold different adapters"):
        evaluate(dropped_package, [seeds[0], other])


def test_bundles_must_be_of_the_package(evaluate, seeds, whole_package):
    with pytest.raises(WrongBinding, match="was tuned on package"):
        evaluate(whole_package, seeds[:1])


def test_another_model_is_refused(evaluate, seeds, dropped_package, full_llama, save_model, tmp_path):
    import copy

    other = copy.deepcopy(full_llama)
    other.model.norm.weight.data[0] += 1
    save_model(other, tmp_path / "other")
    with pytest.raises(WrongBinding, match="model 'other' has digest"):
        evaluate(dropped_package, seeds[:1], model=str(tmp_path / "other"))


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("ceiling", {"kind": "blocks"}, "expected the same adapter as the bundle"),
        ("lora_full", {"kind": "lora"}, "expected low-rank with placement all"),
        ("full", {"kind": "blocks"}, "expected whole blocks with placement all"),
    ],
)
def test_a_reference_is_what_its_name_says(
    name, spec, message, evaluate, seeds, dropped_package, whole_package, make_bundle, tmp_path
):
    reference = make_bundle(tmp_path / "reference", whole_package, **spec)
    with pytest.raises(ConfigError, match=f"--reference {name}: bundle 'reference' is .*{message}"):
        evaluate(
            dropped_package,
            seeds[:1],
            reference=(f"{name}={reference.path}",),
            reference_package=(whole_package.path,),
        )


def test_a_reference_tuned_on_an_emulator_is_none(evaluate, seeds, dropped_package):
    with pytest.raises(ConfigError, match="does not keep all of the model") as caught:
        evaluate(
            dropped_package,
            seeds[:1],
            reference=(f"ceiling={seeds[1].path}",),
            reference_package=(dropped_package.path,),
        )
    assert "--method keep-all" in caught.value.hint


def test_the_record_of_a_reference_is_found_near_it(
    evaluate, seeds, dropped_package, whole_package, make_bundle, tmp_path
):
    shutil.copy(owner_record_path(whole_package.path), tmp_path / "keep-all.owner.json")
    reference = make_bundle(tmp_path / "reference", whole_package, kind="lora")
    found = evaluate(dropped_package, seeds[:1], reference=(f"ceiling={reference.path}",))
    assert found["ceiling"] is not None
    assert found["recovery_vs_ceiling"] is not None


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, ConfigError, "cannot read log 'x': no such file"),
        ("", DataError, "log 'x' is empty"),
        ('{"step": 1}\nsecret words\n', DataError, "log 'x': line 2 is not a record"),
        ('{"loss": 1.0}\n', DataError, "line 1"),
        ('{"step": 1, "loss": NaN}\n', DataError, "line 1"),
        ('{"step": 1, "text": "secret words"}\n', DataError, "line 1"),
    ],
)
def test_a_log_that_is_none_is_one_line(content, error, message, evaluate, seeds, dropped_package, tmp_path):
    if content is not None:
        (tmp_path / "x").write_text(content)
    with pytest.raises(error, match=message) as caught:
        evaluate(dropped_package, seeds[:1], log=(f"tune={tmp_path / 'x'}",))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"outcome": ("tune=nowhere",)}, ConfigError, "cannot read outcome 'nowhere'"),
        ({"task": ("nowhere.jsonl",)}, ConfigError, "--task: no file 'nowhere.jsonl'"),
        ({"data": "nowhere.jsonl"}, DataError, "nowhere.jsonl"),
        ({"model": "./nowhere"}, ConfigError, "no model folder"),
    ],
)
def test_what_is_missing_is_one_line(settings, error, message, evaluate, seeds, dropped_package, tmp_path):
    typed = {
        key: Path(value) if key == "data" else tuple(map(Path, value)) if key == "task" else value
        for key, value in settings.items()
    }
    with pytest.raises(error, match=message) as caught:
        evaluate(dropped_package, seeds[:1], **typed)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "results").exists()


def test_an_outcome_that_is_none_is_one_line(evaluate, seeds, dropped_package, tmp_path):
    (tmp_path / "x").write_text("secret words")
    with pytest.raises(DataError, match="outcome 'x' does not end in the JSON object") as caught:
        evaluate(dropped_package, seeds[:1], outcome=(f"tune={tmp_path / 'x'}",))
    assert "secret" not in str(caught.value)


def test_an_existing_output_is_left_alone(evaluate, seeds, dropped_package, tmp_path):
    (tmp_path / "results").mkdir()
    with pytest.raises(ConfigError, match="already exists"):
        evaluate(dropped_package, seeds[:1])


def test_nothing_is_trained_and_the_artefacts_stay_as_they_are(evaluate, seeds, dropped_package, llama_folder):
    def state():
        files = [*llama_folder.iterdir(), *dropped_package.path.iterdir(), *seeds[0].path.iterdir()]
        return {str(path): path.read_bytes() for path in files}

    before = state()
    evaluate(dropped_package, seeds[:1])
    assert state() == before
    assert torch.is_grad_enabled()


def test_the_offset_is_a_row_with_recoveries_of_its_own(
    evaluate, seeds, dropped_package, whole_package, full_llama, make_bundle, text_file, letters_tokenizer, tmp_path
):
    lora = make_bundle(tmp_path / "lora", whole_package, kind="lora", placement="all")
    reference = {"reference": (f"lora_full={lora.path}",), "reference_package": (whole_package.path,)}
    found = evaluate(dropped_package, seeds[:2], offset=True, beta=0.75, **reference)
    results = read_results(tmp_path / "results")
    record = read_owner_record(owner_record_path(dropped_package.path))
    expected = []
    for bundle in seeds[:2]:
        emulator = dropped_package.load_model()
        adapter = on_emulator(dropped_package, read_own(bundle, record))
        with offset_by(copy.deepcopy(full_llama), Offset(emulator, adapter, 0.75)) as one:
            expected.append(by_hand(one, text_file, letters_tokenizer))
    assert list(results.rows["offset"].perplexity.values.values()) == pytest.approx(expected)
    assert len({found["offset"], found["plugged_in"], found["zero_shot"]}) == 3
    assert found["offset_recovery_vs_lora"] == pytest.approx(
        (found["offset"] - found["zero_shot"]) / (found["lora_full"] - found["zero_shot"])
    )
    assert found["offset_recovery_nats_vs_lora"] == pytest.approx(
        sum(math.log(value / found["zero_shot"]) for value in expected)
        / 2
        / math.log(found["lora_full"] / found["zero_shot"])
    )
    assert results.beta == 0.75
    assert "--offset " in results.command
    assert "--beta 0.75" in results.command
    shown = page(results, {})
    assert "offset recovery vs lora" in shown.replace("_", " ")
    without = evaluate(dropped_package, seeds[:2], output=tmp_path / "without", **reference)
    assert without["offset"] is None
    assert {name: without[name] for name in ("zero_shot", "plugged_in", "emulator_tuned")} == {
        name: found[name] for name in ("zero_shot", "plugged_in", "emulator_tuned")
    }
    assert "beta" not in json.loads((tmp_path / "without" / "results.json").read_text())
