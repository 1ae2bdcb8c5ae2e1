"""Heads from end to end: tuned by the client, taken in, measured, plugged in, opened by others, served, audited."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from adapters.lowrank import quiet_peft
from client.audit.audit import run as audit_bundle
from client.audit.config import AuditBundleConfig
from client.tuning.config import TuneConfig
from client.tuning.verb import run as tune
from offsite.artefacts.bundle import open_bundle
from offsite.artefacts.job import Policy
from offsite.audits.record import read_audit
from offsite.errors import ConfigError, NormTooLarge, WrongBinding, WrongNames, WrongShape
from server.evaluation.config import EvaluateConfig
from server.evaluation.evaluate import run as evaluate
from server.plugging.adapted import load_adapted, open_adapted
from server.plugging.config import PlugConfig
from server.plugging.plug import run as plug_in
from server.serving.classify import build_head_app

LORA = {"adapter": "lora", "rank": 2, "placement": "1+1", "learning_rate": 0.03, "adapter_dtype": "float32"}
LABELS = ("cold", "hot", "wet")
WORDS = {"cold": ("ice", "snow", "frost"), "hot": ("sun", "fire", "heat"), "wet": ("rain", "sea", "pond")}


def labelled(first, num):
    rows = []
    for n in range(first, first + num):
        label = LABELS[n % 3]
        rows.append({"text": f"{n}: {WORDS[label][n % 2]} {WORDS[label][n % 3]}", "label": label})
    return rows


def pairs(first, num):
    return [{"prompt": f"{n}?", "chosen": f" stay in bed {n % 7}", "rejected": f" run home {n % 5}"}
            for n in range(first, first + num)]  # fmt: skip


def valued(first, num):
    """Ratings: cold, hot and wet have their own, give or take a quarter."""
    stars = {"cold": 1, "hot": 5, "wet": 3}
    return [
        {"text": row["text"], "value": stars[row["label"]] + n % 2 / 4} for n, row in enumerate(labelled(first, num))
    ]


ROWS = {"classify": labelled, "reward": pairs, "regress": valued}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory, dropped_package, whole_package):
    """Per task a bundle tuned on the package; of labels one tuned likewise on the whole model; read only."""
    found = {}
    for task, rows in ROWS.items():
        folder = tmp_path_factory.mktemp(task)
        data = write(folder / "private.jsonl", rows(0, 90))
        common = {"data": data, "objective": task, "labels": LABELS if task == "classify" else (), "block_tokens": 32}
        common |= {
            "steps": 60 if task == "regress" else 30,
            "device": "cpu",
            "precision": "fp32",
            "audit_share": 0.2,
            "evaluate_every": 30,
        }
        tune(TuneConfig(package=dropped_package.path, output=folder / "bundle", **common, **LORA))
        if task == "classify":
            whole = {**LORA, "placement": "all"}
            tune(TuneConfig(package=whole_package.path, output=folder / "whole", **common, **whole))
        heldout = write(folder / "heldout.jsonl", rows(100, 30))
        found[task] = SimpleNamespace(folder=folder, data=data, heldout=heldout, bundle=open_bundle(folder / "bundle"))
    return found


def vanilla(folder, base, task):
    """The adapted folder's model as whoever has no offsite opens it."""
    if open_adapted(folder).form == "merged":
        return AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=3 if task == "classify" else 1,
        pad_token_id=tokenizer.pad_token_id,
        problem_type="regression" if task == "regress" else None,
    )
    with quiet_peft():
        return PeftModel.from_pretrained(plain, folder).eval()


@pytest.mark.proves(
    "rows", "texts with a label; with a value; pairs of answers, for a number each", "classify, regress, reward"
)
@pytest.mark.parametrize("task", ROWS)
def test_what_was_tuned_is_taken_in_measured_and_opened_by_others(
    task, made, exchange, llama_folder, dropped_package, whole_package, tmp_path, capsys
):
    given = made[task]
    caps = Policy(max_relative_frobenius=20.0, max_relative_spectral=40.0, max_head_norm=1e4)  # fast, random weights
    job = exchange.job(adapter=given.bundle.manifest.adapter, policy=caps)
    verdict = exchange.take_in(exchange.seal(given.bundle.path, job, tmp_path / "sealed"))
    assert (verdict.state, verdict.error) == ("verified", None)
    exchange.registry.advance(verdict.id, "accepted")
    named = {"registry": exchange.registry_folder, "keys": exchange.keys}
    references = (f"lora_full={given.folder / 'whole'}",) if task == "classify" else ()
    told = evaluate(
        EvaluateConfig(
            model=str(llama_folder), package=dropped_package.path, bundle=(f"s={verdict.id}",), data=given.heldout,
            reference=references, reference_package=(whole_package.path,),
            block_tokens=32, output=tmp_path / "results", **named,
        )
    )[task]  # fmt: skip
    for merge in (False, True):
        out = tmp_path / ("merged" if merge else "adapted")
        scale = 0.5 if merge else 1.0
        plug_in(PlugConfig(model=str(llama_folder), output=out, id=verdict.id, merge=merge, scale=scale, **named))
    own = load_adapted(tmp_path / "adapted", str(llama_folder))[0]
    opened, half = (vanilla(tmp_path / name, llama_folder, task) for name in ("adapted", "merged"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapted")
    rows = ROWS[task](100, 30)
    texts = [row["text"] for row in rows] if task != "reward" else []
    texts += [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected") if task == "reward"]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        scores = opened(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        halved = half(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    if task == "classify":
        right = [LABELS[n] == row["label"] for n, row in zip(scores.argmax(1).tolist(), rows, strict=True)]
        chance = 1 / 3
        assert half.config.id2label == dict(enumerate(LABELS))
    elif task == "reward":
        right = (scores[::2, 0] > scores[1::2, 0]).tolist()
        chance = 0.5
    else:
        values_are_right(told, scores, half, [row["value"] for row in rows])
        served(task, own, tokenizer, given, texts[:3], scores[:3])
        return
    assert told["rows"]["plugged_in"]["accuracy"] == pytest.approx(sum(right) / 30)
    assert told["rows"]["zero_shot"]["accuracy"] == told["rows"]["emulator_zero_shot"]["accuracy"]
    assert told["rows"]["zero_shot"]["accuracy"] == pytest.approx(chance)
    assert told["rows"]["emulator_tuned"]["accuracy"] > 0.8
    if task == "classify":
        ceiling = told["rows"]["lora_full"]["accuracy"]
        recovered = told["recovered"]["accuracy"]["recovery_vs_lora"]
        assert recovered == pytest.approx((sum(right) / 30 - chance) / (ceiling - chance))
    # half of the update, with the same head
    head = given.bundle.load_tensors(given.bundle.manifest.tensors)["head.weight"]
    torch.testing.assert_close(half.score.weight, head)
    assert not torch.allclose(halved, scores, atol=1e-3)
    assert "0.5 of the update, its head whole" in capsys.readouterr().err
    post = served(task, own, tokenizer, given, texts[:3], scores[:3])
    reranked(task, opened, tokenizer, post)


def values_are_right(told, scores, half, values):
    """The values are transformers', in their own units; a model that knows nothing says the mean of those measured."""
    own = told["rows"]["plugged_in"]
    errors = scores[:, 0].double() - torch.tensor(values).double()
    assert own["rmse"] == pytest.approx(float(errors.square().mean().sqrt()), rel=1e-4)
    assert own["rmse_interval"][0] < own["rmse"] < own["rmse_interval"][1]
    wanted = torch.corrcoef(torch.stack([scores[:, 0].double(), torch.tensor(values).double()]))[0, 1]
    assert own["pearson"] == pytest.approx(float(wanted), abs=1e-5)
    spread = float(torch.tensor(values).double().std(correction=0))
    assert told["rows"]["zero_shot"]["rmse"] == told["rows"]["emulator_zero_shot"]["rmse"] == pytest.approx(spread)
    assert told["rows"]["zero_shot"]["spearman"] == 0
    assert told["rows"]["emulator_tuned"]["rmse"] < spread / 2
    assert (half.config.problem_type, half.config.num_labels) == ("regression", 1)


def served(task, model, tokenizer, given, texts, expected):
    """What /v1/classify says is what others compute, and what it does not take is refused in words."""
    head = given.bundle.manifest.adapter.head
    app = build_head_app(model, tokenizer, head, model_id="adapted", key="k", context=40)

    def post(body, path="/v1/classify", key="k"):
        async def ask():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://here") as client:
                return await client.post(path, json=body, headers={"Authorization": f"Bearer {key}"})

        return asyncio.run(ask())

    found = post({"model": "adapted", "input": texts}).json()
    assert [one["index"] for one in found["data"]] == [0, 1, 2]
    for one, scores in zip(found["data"], expected, strict=True):
        if task == "classify":
            assert one["label"] == LABELS[int(scores.argmax())]
            assert one["probs"] == pytest.approx(scores.softmax(0).tolist(), abs=1e-5)
        else:
            assert one["score" if task == "reward" else "value"] == pytest.approx(float(scores[0]), rel=1e-5, abs=1e-5)
    assert found["usage"]["prompt_tokens"] == sum(len(tokenizer(text)["input_ids"]) for text in texts)
    for body, status, words in [
        ({"model": "adapted", "input": []}, 400, "holds 0 texts"),
        ({"model": "adapted", "input": "x" * 41}, 400, "input 0 has 41 tokens"),
        ({"model": "other", "input": "x"}, 404, "no model of this name"),
        ({"model": "adapted", "input": "x", "truncate": 3}, 400, "truncate is not supported"),
    ]:
        answer = post(body)
        assert answer.status_code == status
        assert words in answer.json()["error"]["message"]
    assert post({"model": "adapted", "prompt": "x"}, "/v1/completions").status_code == 404
    assert post({}, key="l").status_code == 401
    return post


def reranked(task, model, tokenizer, post):
    """What /v1/rerank says is transformers' number of the query with each document behind it, most first."""
    documents = [" run home", {"text": " stay in bed 3"}, " stay", {"text": " go"}]
    ask = {"model": "adapted", "query": "4?", "documents": documents}
    answer = post(ask, "/v1/rerank")
    if task == "classify":
        assert answer.status_code == 400
        assert "'adapted' tells 3 labels apart and orders nothing" in answer.json()["error"]["message"]
        return
    texts = [one["text"] if isinstance(one, dict) else one for one in documents]

    def numbers(wholes):
        rows = [torch.tensor([tokenizer(whole, add_special_tokens=False)["input_ids"]]) for whole in wholes]
        with torch.no_grad():
            return [float(model(input_ids=row).logits[0, 0].double().sigmoid()) for row in rows], sum(
                row.shape[1] for row in rows
            )

    wanted, num_tokens = numbers([f"4?{text}" for text in texts])
    found = answer.json()
    assert [one["index"] for one in found["results"]] == sorted(range(4), key=lambda number: -wanted[number])
    for one in found["results"]:
        assert one == {"index": one["index"], "relevance_score": pytest.approx(wanted[one["index"]], abs=1e-5)}
    assert found["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0}
    best = post({**ask, "top_n": 2, "return_documents": True}, "/v1/rerank").json()["results"]
    assert best == [{**one, "document": {"text": texts[one["index"]]}} for one in found["results"][:2]]

    asked = [{"role": "user", "content": "4?"}]
    chats, _ = numbers([f"<s>user:4?</s><s>assistant:{text}</s>" for text in texts])
    for one in post({**ask, "query": asked}, "/v1/rerank").json()["results"]:
        assert one["relevance_score"] == pytest.approx(chats[one["index"]], abs=1e-5)
    for changes, status, words in [
        ({"documents": []}, 400, "holds 0 texts"),
        ({"documents": [" "]}, 400, "none of them empty"),
        ({"documents": [{"text": "x", "title": "y"}]}, 400, "objects with a text alone"),
        ({"query": ""}, 400, "a text or a list of messages"),
        ({"query": [{"role": "robot", "content": "x"}]}, 400, "query"),
        ({"documents": ["x" * 41]}, 400, "documents 0 has 43 tokens"),
        ({"top_n": 0}, 400, "top_n"),
        ({"model": "other"}, 404, "no model of this name"),
        ({"rank_fields": ["text"]}, 400, "rank_fields is not supported"),
    ]:
        answer = post({**ask, **changes}, "/v1/rerank")
        assert answer.status_code == status
        assert words in answer.json()["error"]["message"]


def test_what_does_not_fit_the_jobs_head_is_turned_back(made, exchange, tmp_path):
    """A head of another size, of another task, other labels, and one beyond the cap; each sealed as a client seals."""
    spec = made["classify"].bundle.manifest.adapter
    reward = made["reward"].bundle.manifest.adapter
    other = spec.model_copy(update={"head": spec.head.model_copy(update={"labels": LABELS[::-1]})})
    wide = spec.model_copy(update={"head": spec.head.model_copy(update={"hidden": 64})})
    text = spec.model_copy(update={"head": None})
    cap = exchange.job(register=False).policy.model_copy(update={"max_head_norm": 1e-3})
    for number, (task, changes, refused, words) in enumerate([
        ("classify", {"adapter": other}, WrongBinding, "head differ"),
        ("classify", {"adapter": wide}, WrongBinding, "head differ"),
        ("classify", {"adapter": text}, WrongBinding, "head differ"),
        ("classify", {"adapter": reward}, WrongBinding, "head differ"),
        ("regress", {"adapter": reward}, WrongBinding, "head differ"),
        ("regress", {"adapter": spec}, WrongBinding, "head differ"),
        ("reward", {"adapter": spec}, WrongBinding, "head differ"),
        ("classify", {"adapter": spec, "policy": cap}, NormTooLarge, "the head's Frobenius norm"),
    ]):  # fmt: skip
        job = exchange.job(**changes)
        verdict = exchange.take_in(exchange.seal(made[task].bundle.path, job, tmp_path / f"sealed{number}"))
        assert verdict.state == "refused"
        assert isinstance(verdict.error, refused)
        assert words in str(verdict.error)


@pytest.mark.parametrize(("change", "refused"), [("size", WrongShape), ("missing", WrongNames), ("dtype", WrongShape)])
def test_a_head_is_the_declared_tensor(change, refused, made, exchange, tamper, tmp_path):
    """The manifest states the job's adapter, and declares a file that holds another head."""
    bundle = made["classify"].bundle

    def other_head(folder):
        tensors = load_file(folder / "adapter.safetensors")
        head = tensors.pop("head.weight")
        if change != "missing":
            tensors["head.weight"] = head[:2].contiguous() if change == "size" else head.double()
        save_file(tensors, folder / "adapter.safetensors")

    folder = tamper(bundle.path, change=other_head, redeclare=True)
    job = exchange.job(adapter=bundle.manifest.adapter)
    verdict = exchange.take_in(exchange.seal(folder, job, tmp_path / "sealed"))
    assert verdict.state == "refused"
    assert isinstance(verdict.error, refused)


@pytest.mark.parametrize("task", ROWS)
def test_an_audit_goes_by_what_the_head_learnt(task, made, dropped_package, tmp_path, capsys):
    pytest.importorskip("scipy")
    given = made[task]
    told = audit_bundle(
        AuditBundleConfig(package=dropped_package.path, bundle=given.bundle.path, data=given.data,
                          output=tmp_path / "audit", device="cpu")
    )  # fmt: skip
    audit, _ = read_audit(tmp_path / "audit")
    assert audit.run.adapter.head == given.bundle.manifest.adapter.head
    assert audit.objective.loss == task
    assert {one.signal for one in audit.membership} == {"loss", "reference", "min-k", "min-k++"}
    if task != "regress":  # of which the untuned head's loss is each value's own
        assert told["auc"]["loss"] == pytest.approx(told["auc"]["reference"])
    assert told["auc_before"] != 0.5  # of the text, of which an untrained head says nothing
    assert "loss and reference are" in capsys.readouterr().err


def test_another_tasks_data_and_mixtures_are_refused(made, llama_folder, dropped_package, tmp_path):
    given = made["classify"]
    common = {"model": str(llama_folder), "package": dropped_package.path, "bundle": (str(given.bundle.path),)}
    common |= {"output": tmp_path / "results"}
    with pytest.raises(ConfigError, match="--mix: it is of a next token's probabilities"):
        evaluate(EvaluateConfig(data=given.heldout, mix=0.5, **common))
    with pytest.raises(ConfigError, match="--pack: --data holds labelled rows"):
        evaluate(EvaluateConfig(data=given.heldout, pack=True, **common))
    reference, other = f"lora_full={given.folder / 'whole'}", made["reward"]
    common["bundle"] = (str(other.bundle.path),)
    with pytest.raises(ConfigError, match="for another task than the bundles"):
        evaluate(EvaluateConfig(data=other.heldout, reference=(reference,), **common))
