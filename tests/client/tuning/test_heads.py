"""Whole runs that train a head: what they learn, resuming, the record, the bundle's head, refusals."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional

import client.tuning.learning as module
from client.objectives.heads import HeadBatches, HeadLoss, Units
from client.tuning.data import prepare
from client.tuning.ready import work_folder
from client.tuning.tune import attach_to_package
from client.tuning.verb import run
from offsite.artefacts.bundle import AdapterSpec, Head, open_bundle
from offsite.artefacts.job import Job, write_job
from offsite.audits.runs import Objective, read_run, run_path
from offsite.errors import ConfigError, DataError, RunFailed, UnsupportedModel
from offsite.evaluation.byhead import measure_head
from offsite.text.batches import Example
from offsite.text.records import read_records

LORA = {"adapter": "lora", "rank": 2, "learning_rate": 0.02, "adapter_dtype": "float32", "placement": "0+1"}
LABELS = ("fever", "cough", "ache", "rash", "chill")


@pytest.fixture
def labelled(tmp_path, notes):
    path = tmp_path / "labelled.jsonl"
    rows = [{"text": note, "label": next(one for one in LABELS if one in note)} for note in notes]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def rated(tmp_path, notes):
    """Each note with 50 and the number of its illness."""
    path = tmp_path / "rated.jsonl"
    values = (50 + next(n for n, one in enumerate(LABELS) if one in note) for note in notes)
    rows = [{"text": note, "value": value} for note, value in zip(notes, values, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def heading(settings, labelled, rated, pairs_file):
    """Make settings of a run with a head; keywords change them."""

    def make(package, objective="classify", **changes):
        data, labels = (labelled, LABELS) if objective in ("classify", "tag") else (pairs_file, ())
        data = rated if objective == "regress" else data
        given = {**LORA, "objective": objective, "data": data, "labels": labels, "block_tokens": 64, **changes}
        return settings(package.path, **given)

    return make


def test_a_classifier_learns_and_says_how_well(heading, narrow_package, tmp_path, capsys):
    told = run(heading(narrow_package, steps=20, evaluate_every=10))
    assert told["before_loss"] == pytest.approx(math.log(5), abs=1e-6)
    assert told["best_loss"] < 1.5
    assert told["accuracy"] >= 0.2
    assert 0 <= told["macro_f1"] <= 1
    assert "held-out rows: loss 1.6094, 20.0% right" in capsys.readouterr().err
    assert read_run(run_path(tmp_path / "bundle")).objective == Objective(loss="classify")
    bundle = open_bundle(tmp_path / "bundle")
    assert bundle.manifest.adapter.head == Head(task="classify", labels=LABELS, hidden=32)
    assert (bundle.manifest.tensors["head.weight"].shape, bundle.manifest.tensors["head.weight"].dtype) == (
        (5, 32),
        "float32",
    )
    assert told["scan"]["found"] == {}


@pytest.mark.parametrize(  # with and without hidden states that are kept
    ("placement", "objective"), [("all", "reward"), ("0+1", "reward"), ("0+1", "regress")]
)
def test_a_run_goes_on_as_it_was(heading, narrow_package, tmp_path, monkeypatch, placement, objective):
    changes = {"steps": 4, "placement": placement, "objective": objective}
    unbroken = run(heading(narrow_package, output=tmp_path / "unbroken", **changes))
    config = heading(narrow_package, **changes)
    calls, plain = iter(range(1, 100)), module.HeadLoss.__call__

    def loss(self, model, batch):
        total, count = plain(self, model, batch)
        return (total * math.nan if next(calls) == 4 else total), count

    with monkeypatch.context() as broken:
        broken.setattr(module.HeadLoss, "__call__", loss)
        with pytest.raises(RunFailed):
            run(config)
    assert work_folder(config.output).is_dir()
    resumed = run(config.model_copy(update={"resume": True}))
    assert resumed["bundle_digest"] == unbroken["bundle_digest"]
    assert resumed["before_loss"] == unbroken["before_loss"]
    if objective == "reward":
        assert unbroken["before_loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert resumed["accuracy"] == unbroken["accuracy"]
    else:
        assert (resumed["rmse"], resumed["spearman"]) == (unbroken["rmse"], unbroken["spearman"])


def test_the_loss_of_pairs_is_that_of_two_rows_read_by_themselves(pairs_file, letters_tokenizer, narrow_package):
    """-log sigmoid(r(chosen) - r(rejected)), and its gradient, with each row in a pass of its own."""
    from adapters.kinds import attach, declared

    spec = AdapterSpec(kind="lora", rank=2, placement="1+1", head=Head(task="reward", hidden=32))
    names = declared(spec, narrow_package.layout, narrow_package.block_tensors())
    attached = attach(narrow_package.load_model(), spec, narrow_package.layout.blocks, names)
    torch.manual_seed(0)
    for parameter in attached.trainable.values():
        parameter.data.normal_(0, 0.1)
    records = read_records(pairs_file, pairs=True)
    text = prepare(records, letters_tokenizer, block_tokens=64, batch_size=4, packed=False, ended=False)
    total, count = HeadLoss(0)(attached.model, HeadBatches(text).batch(0))
    found = torch.autograd.grad(total, list(attached.trainable.values()))
    model, weight, losses = attached.model.get_base_model(), attached.trainable["head.weight"], []
    for example in text.batches.chosen(0):
        rewards = [
            model.model(input_ids=torch.tensor([side.input_ids])).last_hidden_state[0, -1] @ weight[0]
            for side in example.sides
        ]
        losses.append(-functional.logsigmoid(rewards[0] - rewards[1]))
        assert letters_tokenizer.eos_token_id not in example.input_ids
    expected = torch.autograd.grad(sum(losses), list(attached.trainable.values()))
    assert int(count) == 4
    torch.testing.assert_close(total, sum(losses), rtol=1e-5, atol=1e-6)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_what_a_head_does_not_go_with_is_refused(heading, narrow_package, labelled, tmp_path):
    for changes, message in [
        ({"labels": ()}, "--labels: 0 given, a classifier has two or more"),
        ({"labels": ("a", "a")}, "--labels: one is named twice"),
        ({"labels": ("a", "b\n")}, "label 2 is not one line"),
        ({"objective": "reward", "labels": ("a", "b")}, "--labels: are of --objective classify and tag"),
        ({"objective": "regress", "labels": ("a", "b")}, "--labels: are of --objective classify and tag"),
        ({"objective": "tag", "labels": ()}, "--labels: 0 given, a classifier has two or more"),
        ({"objective": "regress", "dp": {"epsilon": 8.0}}, "--dp has no clipped gradient of a head"),
        ({"runs": 2}, "--runs: several runs of --objective classify have no mean"),
        ({"dp": {"epsilon": 8.0}}, "--dp has no clipped gradient of a head"),
        ({"launch": 2}, "--objective classify is tuned in one process"),
        ({"canaries": tmp_path}, "trains a head, a canary is running text"),
        ({"anchor": labelled}, "trains a head, an anchor is of next tokens"),
        ({"pack": True}, "reads texts, each in a row of its own"),
    ]:
        with pytest.raises(ValueError, match=message):
            heading(narrow_package, **changes)
    with pytest.raises(DataError, match=r"labelled.jsonl: line 4: its label is none of the 3 given"):
        run(heading(narrow_package, labels=LABELS[:3]))
    with pytest.raises(UnsupportedModel, match="tags are learnt on an encoder, llama reads a text from left to right"):
        run(heading(narrow_package, "tag"))
    with pytest.raises(DataError, match=r"preferences.jsonl: line 1: a text or its label is missing"):
        run(heading(narrow_package, data=tmp_path / "preferences.jsonl"))


def test_the_head_is_the_jobs(heading, narrow_package, tmp_path):
    def job(head):
        stated = {"owner": "-".join(["aaaa"] * 13), "client": "-".join(["bbbb"] * 13), "created": 1, "expires": 2**39}
        stated |= {"package_digest": narrow_package.digest, "base_digest": narrow_package.manifest.base_digest}
        spec = AdapterSpec(kind="lora", rank=2, placement="0+1", dtype="float32", head=head)
        folder = tmp_path / f"job{len(list(tmp_path.glob('job*')))}"
        write_job(folder, Job(job_id="0" * 32, adapter=spec, **stated))
        return folder

    classify = job(Head(task="classify", labels=LABELS, hidden=32))
    for folder, changes, message in [
        (job(None), {}, "the job asks for an adapter for text, without a head"),
        (classify, {"objective": "next-token", "labels": ()}, "--objective next-token: the job asks for --objective"),
        (classify, {"objective": "reward"}, "--objective reward: the job asks for --objective classify"),
        (classify, {"labels": LABELS[::-1]}, "they are not the job's, or in another order"),
        (job(Head(task="classify", labels=LABELS, hidden=16)), {}, "a head on other states than those of package"),
        (classify, {"objective": "regress"}, "--objective regress: the job asks for --objective classify"),
        (job(Head(task="regress", hidden=32)), {}, "--objective classify: the job asks for --objective regress"),
    ]:
        with pytest.raises(ConfigError if "states" not in message else Exception, match=message):
            run(heading(narrow_package, job=folder, **changes))
    run(heading(narrow_package, job=classify, labels=(), steps=2))
    assert open_bundle(tmp_path / "bundle").manifest.adapter.head.labels == LABELS


def test_what_is_released_gives_values_in_their_own_units(
    rated, letters_tokenizer, heading, narrow_package, tmp_path, capsys
):
    """Units are the values' own figures, folding is exact, and the bundle's head says what its run said of itself."""
    text = prepare(
        read_records(rated, of_head="regress"),
        letters_tokenizer,
        block_tokens=64,
        batch_size=4,
        packed=False,
        ended=False,
    )
    values = torch.tensor([row.value for row in text.rows]).double()
    with_bias, without = (Units.of(text.rows, has_bias=has_bias) for has_bias in (True, False))
    assert (with_bias.centre, with_bias.scale) == pytest.approx((float(values.mean()), float(values.std(correction=0))))
    assert (without.centre, without.scale, without.start) == pytest.approx(
        (0.0, with_bias.scale, with_bias.centre / with_bias.scale)
    )
    weight, bias, states = torch.randn(1, 8), torch.randn(1), torch.randn(5, 8)
    found = with_bias.folded({"head.weight": weight, "head.bias": bias, "top.0": weight})
    torch.testing.assert_close(
        functional.linear(states, found["head.weight"], found["head.bias"]),
        functional.linear(states, weight, bias) * with_bias.scale + with_bias.centre,
    )
    assert found["top.0"] is weight
    assert Units().folded({"head.weight": weight})["head.weight"] is weight
    with pytest.raises(DataError, match="all rows to train on have one value"):
        Units.of([Example([1], [1], value=2.0)] * 3, has_bias=True)

    told = run(heading(narrow_package, "regress", steps=12, placement="all"))
    assert "the mean of the values is over 10 times their deviation" in capsys.readouterr().err
    assert told["before_loss"] != told["best_loss"]
    bundle = open_bundle(tmp_path / "bundle")
    attached = attach_to_package(narrow_package, bundle.manifest.adapter, device=torch.device("cpu"))
    attached.load(bundle.load_tensors(bundle.manifest.tensors))
    said = measure_head(attached.model, text.validation, (), batch_size=8, pad_id=text.pad_id)
    assert said.figures["rmse"] == pytest.approx(told["rmse"], rel=1e-3)
    assert said.loss == pytest.approx(told["best_loss"] * with_bias.scale**2, rel=1e-3)
