"""Vision encoders could not be loaded at all: rows were text, and so was every package.

A classifier of images goes the whole way now, over the sealed exchange, with a head in its family's own form, and what
comes out is opened by transformers and peft alone, images and all.
"""

from __future__ import annotations

import asyncio
import base64
import json
from io import BytesIO

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification
from two_parties import TwoParties
from vision_lab import FAMILIES, LABELS, saved, write_rows

from offsite.artefacts.bundle import open_bundle
from offsite.evaluation.heads import head_scores
from offsite.keys.identity import read_card
from offsite.modelling.load import load_reader
from offsite.text.batches import collate
from offsite.text.forms import encode_images
from offsite.text.records import read_files
from server.plugging.adapted import load_adapted
from server.serving.config import ServeConfig
from server.serving.scoring import ImageScorer
from server.serving.serve import load_served


@pytest.mark.proves("rows", "images with a label, on a vision encoder", "classify")
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own call
@pytest.mark.parametrize("name", ["vit", *(pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES[1:])])
def test_a_classifier_is_tuned_sealed_taken_in_plugged_in_and_measured(name, tmp_path, monkeypatch, capsys):
    both = TwoParties(tmp_path, monkeypatch, capsys)
    saved(both.owner / "eye", name)
    write_rows(both.owner / "public.jsonl", 0, 24)
    write_rows(both.client / "private.jsonl", 100, 190)
    heldout = write_rows(both.owner / "heldout.jsonl", 200, 230)
    cut = "--public public.jsonl --steps 0 --bottom 1 --top 1 --batch-size 4 --device cpu"
    both.run("owner", f"distill eye {cut} --width 0.5 -o trunk")
    client = read_card((both.client / "keys" / "card.json").read_bytes()).fingerprint
    of_head = f"--head classify --labels {','.join(LABELS)}"
    made = "--registry registry --keys keys --adapter lora --placement all --rank 4 --adapter-dtype float32"
    both.run("owner", f"job create trunk --client {client} {made} {of_head} -o eye-job")
    both.run("owner", "seal eye-job --keys keys -o eye-job.sealed")
    both.run("owner", "seal trunk --job eye-job --keys keys -o trunk.sealed")
    both.run("client", "open ../owner/eye-job.sealed --keys keys -o eye-job")
    both.run("client", "open ../owner/trunk.sealed --keys keys -o trunk")

    run = "--data private.jsonl --steps 12 --batch-size 16 --learning-rate 3e-3 --device cpu"
    tuned = both.run("client", f"tune trunk --job eye-job --objective classify {run} --audit-share 0.3 -o head")
    assert tuned["accuracy"] > 0.9
    bundle = open_bundle(both.client / "head")
    assert bundle.manifest.adapter.head.encoder == name
    told = both.run("client", "audit bundle trunk head --data private.jsonl --device cpu -o head-audit")
    assert set(told["auc"]) == {"loss", "reference"}
    leak = "--audit head-audit --accept-leakage"
    both.run("client", f"seal head --job eye-job --round 1 {leak} --keys keys -o head.sealed")
    taken = both.run("owner", "intake ../client/head.sealed --registry registry --keys keys")
    both.run("owner", f"registry accept {taken['id']} --registry registry --keys keys")
    both.run("owner", f"plug-in eye {taken['id']} --registry registry --keys keys -o plugged")
    both.run("owner", f"plug-in eye {taken['id']} --registry registry --keys keys --merge -o joined")

    theirs = [AutoModelForImageClassification.from_pretrained(both.owner / "joined")]
    base = AutoModelForImageClassification.from_pretrained(
        both.owner / "eye", num_labels=3, ignore_mismatched_sizes=True
    )
    theirs.append(PeftModel.from_pretrained(base, both.owner / "plugged"))
    rows = [json.loads(line) for line in heldout.read_text().splitlines()]
    images = [Image.open(BytesIO(base64.b64decode(row["image"]))) for row in rows]
    batches = [
        AutoImageProcessor.from_pretrained(both.owner / folder)(images, return_tensors="pt")
        for folder in ("eye", "joined", "plugged")
    ]
    records = read_files([heldout], labels=LABELS, images=True)
    examples = encode_images(records, load_reader(str(both.owner / "joined"))).examples
    batch = collate(examples, 0)
    for one in batches:
        assert torch.equal(one["pixel_values"], batch["pixel_values"])
    ours = load_adapted(both.owner / "plugged", str(both.owner / "eye"))[0]
    with torch.no_grad():
        wanted = head_scores(ours, batch, pad_id=0)
        for model in (*theirs, load_adapted(both.owner / "joined")[0]):
            logits = model.eval()(pixel_values=batches[0]["pixel_values"]).logits
            torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    assert theirs[0].config.id2label == dict(enumerate(LABELS))

    for folder in ("plugged", "joined"):
        settings = ServeConfig(adapted=both.owner / folder, base=str(both.owner / "eye"), device="cpu")
        model, reader, _ = load_served(settings)
        scorer = ImageScorer(model, reader, limit_waiting=0)
        said = asyncio.run(scorer.scores([row["image"] for row in rows]))
        torch.testing.assert_close(torch.tensor(said, dtype=torch.float32), wanted, atol=1e-4, rtol=1e-4)

    data = "--registry registry --keys keys --data heldout.jsonl --device cpu -o measured"
    found = both.run("owner", f"evaluate eye --package trunk --bundle {taken['id']} {data}")
    right = float((wanted.argmax(1) == torch.tensor([one.target for one in examples])).float().mean())
    measured = found["classify"]["rows"]
    assert measured["plugged_in"]["accuracy"] == pytest.approx(right)
    assert measured["plugged_in"]["accuracy"] > 0.9
    assert measured["zero_shot"]["accuracy"] == pytest.approx(1 / 3)
    assert found["zero_shot"] == pytest.approx(3.0)  # of the label, where no label is preferred
