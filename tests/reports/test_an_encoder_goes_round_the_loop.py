"""Encoders could be cut, and then nothing: they write no text, and every objective was one of text.

A classifier on one goes the whole way now, over the sealed exchange, with a head in its family's own form, and what
comes out is opened by transformers and peft alone.
"""

from __future__ import annotations

import asyncio
import json

import pytest
import torch
from encoders_lab import saved, separating_tokenizer
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from two_parties import TwoParties

from offsite.artefacts.bundle import open_bundle
from offsite.evaluation.embeddings import embeddings_of
from offsite.evaluation.heads import head_scores
from offsite.keys.identity import read_card
from offsite.text.batches import collate, encode
from offsite.text.records import read_files
from server.plugging.adapted import load_adapted
from server.serving.scoring import Scorer

LABELS = ("card", "transfer", "loan")


def write_rows(path, begin, end):
    """Write rows whose label is the word that stands in the text."""
    places = ("my", "the new", "an old", "your other", "that small")
    rows = [
        {"text": f"{number}: what of {places[number % 5]} {label} now", "label": label}
        for number in range(begin, end)
        for label in (LABELS[number % 3],)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fingerprint(party):
    return read_card((party / "keys" / "card.json").read_bytes()).fingerprint


@pytest.mark.proves("rows", "texts with a label, on an encoder", "classify")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own call
@pytest.mark.parametrize("name", ["bert", pytest.param("modernbert", marks=pytest.mark.slow)])
def test_a_classifier_is_tuned_sealed_taken_in_plugged_in_and_measured(name, tmp_path, monkeypatch, capsys):
    both = TwoParties(tmp_path, monkeypatch, capsys)
    saved(both.owner / "encoder", name, separating_tokenizer())
    write_rows(both.client / "private.jsonl", 0, 90)
    write_rows(both.owner / "heldout.jsonl", 200, 230)
    (both.owner / "public.txt").write_text(
        "\n\n".join(f"what of the {word} now" for word in ("sea", "sky", "wood") * 9)
    )
    cut = "--public public.txt --steps 0 --bottom 1 --top 1 --block-tokens 24 --batch-size 4 --device cpu"
    both.run("owner", f"distill encoder {cut} --width 0.5 -o trunk")
    both.run("owner", f"distill encoder {cut} --method keep-all -o whole")
    client = fingerprint(both.client)
    of_head = f"--head classify --labels {','.join(LABELS)}"
    made = "--registry registry --keys keys --adapter lora --placement all --rank 4 --adapter-dtype float32"
    both.run("owner", f"job create trunk --client {client} {made} -o refused", code=2)
    assert "'trunk' holds an encoder: no adapter for text goes on it" in both.told
    job = both.run("owner", f"job create trunk --client {client} {made} {of_head} -o encoder-job")
    both.run("owner", "seal encoder-job --keys keys -o encoder-job.sealed")
    both.run("owner", "seal trunk --job encoder-job --keys keys -o trunk.sealed")
    both.run("client", "open ../owner/encoder-job.sealed --keys keys -o encoder-job")
    both.run("client", "open ../owner/trunk.sealed --keys keys -o trunk")

    run = "--data private.jsonl --steps 12 --batch-size 16 --learning-rate 3e-3 --block-tokens 48 --device cpu"
    both.run("client", "tune trunk --data private.jsonl --steps 2 -o refused", code=2)
    assert "'trunk' holds an encoder, which has no next tokens" in both.told
    tuned = both.run("client", f"tune trunk --job encoder-job --objective classify {run} --audit-share 0.3 -o head")
    assert tuned["steps"] == 12
    bundle = open_bundle(both.client / "head")
    assert bundle.manifest.adapter.head.encoder == name
    assert {"head.weight", "head.bias", "head.dense.weight"} <= bundle.manifest.tensors.keys()
    told = both.run("client", "audit bundle trunk head --data private.jsonl --device cpu -o head-audit")
    assert set(told["auc"]) == {"loss", "reference"}
    leak = "--audit head-audit --accept-leakage"
    both.run("client", f"seal head --job encoder-job --round 1 {leak} --keys keys -o head.sealed")
    taken = both.run("owner", "intake ../client/head.sealed --registry registry --keys keys")
    both.run("owner", f"registry accept {taken['id']} --registry registry --keys keys")
    both.run("owner", f"plug-in encoder {taken['id']} --registry registry --keys keys -o plugged")
    both.run("owner", f"plug-in encoder {taken['id']} --registry registry --keys keys --merge -o joined")

    theirs = [AutoModelForSequenceClassification.from_pretrained(both.owner / "joined")]
    base = AutoModelForSequenceClassification.from_pretrained(both.owner / "encoder", num_labels=3)
    theirs.append(PeftModel.from_pretrained(base, both.owner / "plugged"))
    tokenizer = AutoTokenizer.from_pretrained(both.owner / "joined")
    records = read_files([both.owner / "heldout.jsonl"], labels=LABELS)
    examples = encode(records, tokenizer, context=48, ended=False).examples
    batch = collate(examples, tokenizer.pad_token_id)
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    ours = load_adapted(both.owner / "plugged", str(both.owner / "encoder"))[0]
    with torch.no_grad():
        wanted = head_scores(ours, batch, pad_id=tokenizer.pad_token_id)
        found = embeddings_of(ours, examples, batch_size=7, pad_id=tokenizer.pad_token_id)
        for model in theirs:
            torch.testing.assert_close(model.eval()(**batch).logits, wanted, atol=1e-4, rtol=1e-4)
            plain = model.get_base_model() if isinstance(model, PeftModel) else model
            states, mask = plain.base_model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
            means = (states * mask).sum(1) / mask.sum(1)
            torch.testing.assert_close(found, means / means.norm(dim=1, keepdim=True), atol=1e-4, rtol=1e-4)
    joined = load_adapted(both.owner / "joined")[0]
    again = embeddings_of(joined, examples, batch_size=30, pad_id=tokenizer.pad_token_id)
    torch.testing.assert_close(again, found, atol=1e-4, rtol=1e-4)
    assert theirs[0].config.id2label == dict(enumerate(LABELS))

    data = "--registry registry --keys keys --data heldout.jsonl --block-tokens 48 --device cpu -o measured"
    found = both.run("owner", f"evaluate encoder --package trunk --bundle {taken['id']} {data}")
    right = float((wanted.argmax(1) == torch.tensor([one.target for one in examples])).float().mean())
    rows = found["classify"]["rows"]
    assert rows["plugged_in"]["accuracy"] == pytest.approx(right)
    assert rows["zero_shot"]["accuracy"] == pytest.approx(1 / 3)
    assert found["zero_shot"] == pytest.approx(3.0)  # of the label, where no label is preferred
    assert job["package_digest"] == bundle.manifest.package_digest
    scorer = Scorer(ours, tokenizer, context=0, limit_waiting=1)
    answered = asyncio.run(scorer.scores(scorer.tokens(tuple(record.whole_text for record in records))))
    torch.testing.assert_close(torch.tensor(answered).float(), wanted, atol=1e-4, rtol=1e-4)
