"""Preferences from end to end: tuned by the client, taken in, measured beside the full model, plugged in; audited."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from client.audit.audit import run as audit_bundle
from client.audit.config import AuditBundleConfig
from client.tuning.config import TuneConfig
from client.tuning.verb import run as tune
from offsite.artefacts.bundle import open_bundle
from offsite.audits.record import read_audit
from offsite.errors import ConfigError, DataError
from offsite.evaluation.preferences import preferred, wilson
from offsite.evaluation.results import read_results
from server.evaluation.config import EvaluateConfig
from server.evaluation.evaluate import run as evaluate
from server.plugging.adapted import load_adapted
from server.plugging.config import PlugConfig
from server.plugging.plug import run as plug_in

LORA = {"adapter": "lora", "rank": 2, "placement": "1+1", "learning_rate": 0.02, "adapter_dtype": "float32"}


def pairs(first, num):
    answers = ("stay in bed and drink a lot", "run home now and do not rest")
    return [{"prompt": f"case {n}:", "chosen": f" {answers[0]} {n % 7}", "rejected": f" {answers[1]} {n % 5}"}
            for n in range(first, first + num)]  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory, dropped_package, whole_package):
    """A bundle tuned on pairs, and one tuned likewise on the whole model; read only."""
    folder = tmp_path_factory.mktemp("preferences")
    data = write(folder / "private.jsonl", pairs(0, 80))
    common = {"data": data, "objective": "dpo", "block_tokens": 64, "steps": 8, "device": "cpu", "precision": "fp32"}
    common |= {"audit_share": 0.2, "evaluate_every": 8}
    tune(TuneConfig(package=dropped_package.path, output=folder / "bundle", **common, **LORA))
    whole = {**LORA, "placement": "all"}
    tune(TuneConfig(package=whole_package.path, output=folder / "whole", **common, **whole))
    return SimpleNamespace(folder=folder, data=data, heldout=write(folder / "heldout.jsonl", pairs(100, 20)))


def margins(model, tokenizer, rows):
    """By how much the model prefers each chosen answer, a row at a time."""
    found = []
    for row in rows:
        logs = []
        for name in ("chosen", "rejected"):
            ids = tokenizer(row["prompt"] + row[name])["input_ids"] + [tokenizer.eos_token_id]
            num = len(tokenizer(row["prompt"])["input_ids"])
            with torch.no_grad():
                scores = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            logs.append(sum(float(scores[place - 1, ids[place]]) for place in range(num, len(ids))))
        found.append(logs[0] - logs[1])
    return found


@pytest.mark.proves("rows", "pairs of a chosen and a rejected answer", "dpo")
def test_the_owner_takes_in_measures_and_serves_what_was_tuned_on_pairs(
    made, exchange, llama_folder, full_llama, letters_tokenizer, dropped_package, whole_package, tmp_path, capsys
):
    verdict = exchange.take_in(exchange.seal(made.folder / "bundle", exchange.job(), tmp_path / "sealed"))
    assert (verdict.state, verdict.error) == ("verified", None)
    exchange.registry.advance(verdict.id, "accepted")
    named = {"registry": exchange.registry_folder, "keys": exchange.keys}
    told = evaluate(
        EvaluateConfig(
            model=str(llama_folder), package=dropped_package.path, bundle=("s=latest",), data=made.heldout,
            reference=(f"lora_full={made.folder / 'whole'}",), reference_package=(whole_package.path,),
            block_tokens=64, output=tmp_path / "results", **named,
        )
    )  # fmt: skip
    plug_in(PlugConfig(model=str(llama_folder), output=tmp_path / "adapted", id=verdict.id, **named))
    adapted, _ = load_adapted(tmp_path / "adapted", str(llama_folder))
    before = margins(full_llama, letters_tokenizer, pairs(100, 20))
    after = margins(adapted, letters_tokenizer, pairs(100, 20))
    rows = told["preferences"]["rows"]
    assert told["preferences"]["num_pairs"] == 20
    assert rows["zero_shot"]["accuracy"] == preferred(before)
    assert rows["zero_shot"]["reward_accuracy"] == rows["emulator_zero_shot"]["reward_accuracy"] == 0.5
    assert rows["plugged_in"]["accuracy"] == preferred(after)
    gains = [one - two for one, two in zip(after, before, strict=True)]
    assert rows["plugged_in"]["reward_accuracy"] == preferred(gains)
    assert rows["emulator_tuned"]["reward_accuracy"] > 0.9
    assert rows["lora_full"]["reward_accuracy"] > 0.9
    assert rows["plugged_in"]["accuracy_interval"] == list(wilson(preferred(after), 20))
    recovered = told["preferences"]["recovered"]["reward_accuracy"]["recovery_vs_lora"]
    assert recovered == pytest.approx((preferred(gains) - 0.5) / (rows["lora_full"]["reward_accuracy"] - 0.5))
    results = read_results(tmp_path / "results")
    assert results.tasks == {"preferences": 20}
    assert results.config["bundle"] == [f"s={verdict.id}"]  # not the word that was typed, which will name another
    assert results.rows["plugged_in"].perplexity.mean == told["plugged_in"]
    err = capsys.readouterr().err
    assert "20 pairs: plugged in prefers the chosen answer in" in err
    assert "reward accuracy, recovery vs lora" in err


def test_pairs_are_not_packed_and_not_mixed_with_text(made, llama_folder, dropped_package, tmp_path):
    text = write(tmp_path / "text.jsonl", [{"text": "a b c"}] * 3)
    given = {"model": str(llama_folder), "package": dropped_package.path, "bundle": (str(made.folder / "bundle"),)}
    given |= {"output": tmp_path / "results"}
    with pytest.raises(ConfigError, match="--pack: --data holds pairs of answers"):
        evaluate(EvaluateConfig(data=made.heldout, pack=True, **given))
    with pytest.raises(DataError, match=r"text\.jsonl: line 1: holds no preferences where earlier files do"):
        evaluate(EvaluateConfig(data=(made.heldout, text), **given))
    assert not (tmp_path / "results").exists()


def test_an_audit_of_a_run_on_pairs_scores_pairs_and_says_so(made, dropped_package, tmp_path, capsys):
    audit_bundle(
        AuditBundleConfig(
            package=dropped_package.path, bundle=made.folder / "bundle", data=made.data, output=tmp_path / "audit",
            tokens_per_row=200, device="cpu",
        )
    )  # fmt: skip
    audit, _ = read_audit(tmp_path / "audit")
    assert (audit.objective.loss, audit.objective.dpo_beta) == ("dpo", 0.1)
    assert audit.nonmembers == "set aside"
    assert {one.signal for one in audit.membership} == {"loss", "reference", "min-k", "min-k++"}
    assert audit.verbatim.num_rows == 2 * max(one.num_members for one in audit.membership)
    assert sum(audit.scan.found.values()) == 0
    err = capsys.readouterr().err
    assert "the run's objective: dpo" in err
    assert "a row is a pair of answers" in err
    assert "bed" not in err
    assert open_bundle(made.folder / "bundle").digest == audit.run.bundle_digest


def test_a_share_and_its_interval():
    assert preferred([1.0, -1.0, 0.0, 2.0]) == 0.625
    assert wilson(0.5, 100) == pytest.approx((0.4038315, 0.5961685))  # R: prop.test(50, 100, correct = FALSE)
    assert wilson(0, 10) == pytest.approx((0, 0.2775328))
    assert wilson(1, 10) == pytest.approx((0.7224672, 1))
