"""Heads of encoders, for values and tags: tuned, taken in, measured, plugged in, served, audited; opened by others."""

from __future__ import annotations

import asyncio
import json
import math
from types import SimpleNamespace

import httpx
import pytest
import torch
from checkpoints_lab import distill
from encoders_lab import saved, separating_tokenizer
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from adapters.lowrank import quiet_peft
from client.audit.audit import run as audit_bundle
from client.audit.config import AuditBundleConfig
from client.objectives.heads import HeadLoss
from client.tuning.config import TuneConfig
from client.tuning.verb import run as tune
from offsite.artefacts.bundle import Head, open_bundle
from offsite.artefacts.job import Policy
from offsite.artefacts.package import open_package
from offsite.errors import RunFailed
from offsite.evaluation.results import read_results
from offsite.report.page import page
from server.evaluation.config import EvaluateConfig
from server.evaluation.evaluate import run as evaluate
from server.plugging.adapted import load_adapted
from server.plugging.config import PlugConfig
from server.plugging.plug import run as plug_in
from server.serving.classify import build_head_app

TAGS = ("O", "B-WHO", "B-AT", "I-AT")
PLACES, PEOPLE = ("new york", "old bay", "low hill"), ("ann", "bob", "eve", "sam")
CASES = [("tag", "bert"), ("regress", "roberta"), pytest.param(("tag", "modernbert"), marks=pytest.mark.slow)]
AUTO = {"tag": AutoModelForTokenClassification, "regress": AutoModelForSequenceClassification}


def tagged(first, num):
    rows = []
    for n in range(first, first + num):
        words = [PEOPLE[n % 4], "is", "in", *PLACES[n % 3].split()]
        tags = ["B-WHO", "O", "O", "B-AT", "I-AT"]
        rows.append({"tokens": [str(n), *words], "tags": ["O", *tags]})
    return rows


def valued(first, num):
    """Years, so far from 0 that a head without a bias could not tell them apart."""
    return [
        {"text": f"{n % 100:02}: {PEOPLE[n % 4]} came", "value": 1980 + 10 * (n % 4)} for n in range(first, first + num)
    ]


ROWS = {"tag": tagged, "regress": valued}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def made(request, tmp_path_factory):
    """A bundle tuned on an encoder's package, for values or for tags; read only."""
    task, family = request.param
    folder = tmp_path_factory.mktemp(task)
    checkpoint = saved(folder / "full", family, separating_tokenizer())
    assert distill(checkpoint, folder / "package") == 0
    data = write(folder / "private.jsonl", ROWS[task](0, 72))
    heldout = write(folder / "heldout.jsonl", ROWS[task](100, 24))
    settings = {"adapter": "lora", "rank": 4, "placement": "all", "adapter_dtype": "float32"}
    settings |= {
        "learning_rate": 0.01 if task == "tag" else 0.003,
        "steps": 60,
        "batch_size": 16,
        "block_tokens": 40,
        "device": "cpu",
        "precision": "fp32",
        "audit_share": 0.2,
    }
    labels = TAGS if task == "tag" else ()
    told = tune(TuneConfig(package=folder / "package", data=data, output=folder / "bundle", objective=task,
                           labels=labels, evaluate_every=30, **settings))  # fmt: skip
    return SimpleNamespace(task=task, family=family,
                           folder=folder, checkpoint=checkpoint, data=data, heldout=heldout, told=told,
                           package=open_package(folder / "package"), bundle=open_bundle(folder / "bundle"))  # fmt: skip


def batch_of(task, tokenizer, rows):
    """The rows as transformers reads them, and the places of the words' first tokens."""
    texts = [" ".join(row["tokens"]) if task == "tag" else row["text"] for row in rows]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    firsts = []
    for text in texts:
        places, place = [], 1  # behind [CLS]; a token is a byte
        for word in text.split():
            places.append(place + (place > 1))
            place = places[-1] + len(word)
        firsts.append(places)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}, firsts, texts


@pytest.mark.proves("rows", "words with a tag each; texts with a value, on an encoder", "tag, regress")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_was_tuned_is_taken_in_measured_and_opened_by_others(made, exchange, tmp_path, capsys):
    task, head = made.task, made.bundle.manifest.adapter.head
    assert head == Head(task=task, labels=TAGS if task == "tag" else (), hidden=32, encoder=made.family)
    exchange.package = made.package
    caps = Policy(max_relative_frobenius=50.0, max_relative_spectral=90.0, max_head_norm=1e4)
    job = exchange.job(adapter=made.bundle.manifest.adapter, policy=caps)
    verdict = exchange.take_in(exchange.seal(made.bundle.path, job, tmp_path / "sealed"))
    assert (verdict.state, verdict.error) == ("verified", None)
    exchange.registry.advance(verdict.id, "accepted")
    named = {"registry": exchange.registry_folder, "keys": exchange.keys}
    measured = evaluate(
        EvaluateConfig(model=str(made.checkpoint), package=made.package.path, bundle=(f"s={verdict.id}",),
                       data=made.heldout, block_tokens=40, output=tmp_path / "results", **named)
    )  # fmt: skip
    for merge in (False, True):
        out = tmp_path / ("merged" if merge else "adapted")
        plug_in(PlugConfig(model=str(made.checkpoint), output=out, id=verdict.id, merge=merge, **named))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    rows = ROWS[task](100, 24)
    batch, firsts, texts = batch_of(task, tokenizer, rows)
    merged = AUTO[task].from_pretrained(tmp_path / "merged").eval()
    bare = AUTO[task].from_pretrained(made.checkpoint, num_labels=head.num_labels)
    with quiet_peft():
        opened = PeftModel.from_pretrained(bare, tmp_path / "adapted").eval()
    with torch.no_grad():
        scores = merged(**batch).logits
        torch.testing.assert_close(opened(**batch).logits, scores, rtol=1e-4, atol=1e-3)
    found = measured[task]["rows"]
    if task == "tag":
        said = [[TAGS[n] for n in row[places].argmax(1).tolist()] for row, places in zip(scores, firsts, strict=True)]
        right = [a == b for one, row in zip(said, rows, strict=True) for a, b in zip(one, row["tags"], strict=True)]
        assert found["plugged_in"]["accuracy"] == pytest.approx(sum(right) / len(right))
        assert (found["zero_shot"]["accuracy"], found["zero_shot"]["f1"]) == (pytest.approx(0.25), 0)
        assert measured["zero_shot"] == pytest.approx(4.0)  # perplexity of the tag, where none is preferred
        assert found["plugged_in"]["f1"] > 0.2
        assert merged.config.id2label == dict(enumerate(TAGS))
    else:
        values = torch.tensor([row["value"] for row in rows]).double()
        errors = scores[:, 0].double() - values
        assert found["plugged_in"]["rmse"] == pytest.approx(float(errors.square().mean().sqrt()), rel=1e-3)
        assert found["zero_shot"]["rmse"] == pytest.approx(float(values.std(correction=0)))
        assert found["plugged_in"]["rmse"] < 0.7 * found["zero_shot"]["rmse"]
        assert measured["zero_shot"] == found["zero_shot"]["rmse"]  # stands in a perplexity's place
        assert (merged.config.problem_type, merged.config.num_labels) == ("regression", 1)
    assert page(read_results(tmp_path / "results"), {})
    assert AUTO[task].__name__ in (tmp_path / "merged" / "README.md").read_text()
    for name in ("adapted", "merged"):
        own = load_adapted(tmp_path / name, str(made.checkpoint))[0]
        served(made, own, tokenizer, texts[:3], [row[places] if task == "tag" else row
                                                 for row, places in zip(scores[:3], firsts, strict=False)])  # fmt: skip


def served(made, model, tokenizer, texts, expected):
    """What /v1/classify says is what others compute; an order of documents is refused."""
    app = build_head_app(model, tokenizer, made.bundle.manifest.adapter.head, model_id="adapted", key="k", context=40)

    def post(path, body):
        async def ask():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
                return await client.post(path, json=body, headers={"Authorization": "Bearer k"})

        return asyncio.run(ask())

    found = post("/v1/classify", {"model": "adapted", "input": texts}).json()
    for one, text, scores in zip(found["data"], texts, expected, strict=True):
        if made.task == "tag":
            wanted = [TAGS[number] for number in scores.argmax(1).tolist()]
            assert (one["words"], one["tags"]) == (text.split(), wanted)
        else:
            assert one["value"] == pytest.approx(float(scores[0]), abs=1e-2)
    assert found["usage"]["prompt_tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in texts)
    refused = post("/v1/classify", {"model": "adapted", "input": "x" * 41})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
    refused = post("/v1/rerank", {"model": "adapted", "query": "a", "documents": ["b"]})
    assert "orders nothing" in refused.json()["error"]["message"]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_audit_goes_by_what_the_head_learnt(made, tmp_path, capsys):
    pytest.importorskip("scipy")
    told = audit_bundle(
        AuditBundleConfig(package=made.package.path, bundle=made.bundle.path, data=made.data,
                          output=tmp_path / "audit", device="cpu")
    )  # fmt: skip
    assert set(told["auc"]) == {"loss", "reference"}
    if made.task == "tag":  # before tuning each tag is as likely as any
        assert told["auc"]["loss"] == pytest.approx(told["auc"]["reference"])
        assert made.told["before_loss"] == pytest.approx(math.log(4))
    else:
        assert made.told["before_loss"] == pytest.approx(1.0, abs=0.7)  # in units of the values' variance
        assert made.told["rmse"] < 9
    assert {"tag": "mean loss of a row's tags", "regress": "squared error of a row's value"}[made.task] in (
        capsys.readouterr().err
    )


def test_a_run_goes_on_as_it_was(made, tmp_path, monkeypatch):
    common = {"package": made.package.path, "data": made.data, "objective": made.task, "steps": 4, "device": "cpu"}
    common |= {"labels": TAGS if made.task == "tag" else (), "adapter": "lora", "rank": 2, "placement": "0+1"}
    common |= {"block_tokens": 40, "adapter_dtype": "float32", "learning_rate": 0.01, "checkpoint_every": 1}
    unbroken = tune(TuneConfig(output=tmp_path / "unbroken", **common))
    calls, plain = iter(range(1, 100)), HeadLoss.__call__

    def loss(self, model, batch):
        total, count = plain(self, model, batch)
        return (total * math.nan if next(calls) == 3 else total), count

    with monkeypatch.context() as broken:
        broken.setattr(HeadLoss, "__call__", loss)
        with pytest.raises(RunFailed):
            tune(TuneConfig(output=tmp_path / "resumed", **common))
    resumed = tune(TuneConfig(output=tmp_path / "resumed", resume=True, **common))
    assert resumed["bundle_digest"] == unbroken["bundle_digest"]
