"""T5 and BART could be cut by hand, and then nothing: no package, no tuning, no way back.

An adapter on both stacks goes the whole way now, over the sealed exchange, and what comes out is opened by transformers
and peft alone.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
from peft import PeftModel
from seq2seq_lab import closing_tokenizer, logits, saved
from transformers import AutoModelForSeq2SeqLM
from two_parties import TwoParties

from client.tuning.tune import attach_to_package
from offsite.artefacts.bundle import open_bundle
from offsite.artefacts.package import open_package
from offsite.errors import ConfigError, UnsupportedModel
from offsite.keys.identity import read_card
from offsite.modelling.load import refuse_encoder
from offsite.seq2seq.inputs import inputs_of
from offsite.seq2seq.models import start_token
from offsite.tensors import read_tensors
from offsite.text.batches import collate
from offsite.text.forms import encode_answers
from offsite.text.records import read_files
from server.plugging.adapted import load_adapted
from server.serving.config import ServeConfig
from server.serving.serve import load_served

CUT = "--steps 0 --bottom 1 --top 1 --block-tokens 40 --batch-size 4 --device cpu"
RUN = "--steps 16 --batch-size 8 --learning-rate 3e-3 --block-tokens 40 --device cpu --precision fp32"


def write_rows(path, begin, end):
    """Write questions whose answer is a word of theirs."""
    words = ("sea", "sky", "wood", "sand")
    rows = [
        {"prompt": f"{number}: which of all? {word}", "completion": word}
        for number in range(begin, end)
        for word in (words[number % 4],)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def batch_of(path, model):
    """Return what transformers reads of the rows, and the loss in nats that it gives of them itself."""
    tokenizer = closing_tokenizer()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    source = tokenizer([row["prompt"] for row in rows], padding=True, return_tensors="pt")
    labels = tokenizer([row["completion"] for row in rows], padding=True, return_tensors="pt").input_ids
    labels = labels.masked_fill(labels == tokenizer.pad_token_id, -100)
    given = {"input_ids": source.input_ids, "attention_mask": source.attention_mask}
    with torch.no_grad():
        theirs = float(model(**given, labels=labels).loss)
    examples = encode_answers(read_files([path]), tokenizer, start=start_token(model.config), context=40).examples
    return inputs_of(collate(examples, 0)), theirs


@pytest.mark.proves("rows", "prompts with answers, on an encoder-decoder", "next-token")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's own call
def test_an_adapter_is_tuned_sealed_taken_in_plugged_in_and_measured(tmp_path, monkeypatch, capsys):
    both = TwoParties(tmp_path, monkeypatch, capsys)
    saved(both.owner / "t5", "gated-t5")
    write_rows(both.client / "private.jsonl", 0, 90)
    write_rows(both.owner / "heldout.jsonl", 200, 216)
    both.run("owner", f"distill t5 {CUT} --method keep-all -o whole")
    client = read_card((both.client / "keys" / "card.json").read_bytes()).fingerprint
    made = "--registry registry --keys keys --adapter lora --placement all --rank 4 --adapter-dtype float32"
    made += " --max-relative-frobenius 9 --max-relative-spectral 9"
    both.run("owner", f"job create whole --client {client} {made} --head reward -o refused", code=2)
    assert "package 'whole' is an encoder-decoder: --head reward cannot be had with it" in both.told
    both.run("owner", f"job create whole --client {client} {made} -o t5-job")
    both.run("owner", "seal t5-job --keys keys -o t5-job.sealed")
    both.run("owner", "seal whole --job t5-job --keys keys -o whole.sealed")
    both.run("client", "open ../owner/t5-job.sealed --keys keys -o t5-job")
    both.run("client", "open ../owner/whole.sealed --keys keys -o whole")
    tuned = both.run("client", f"tune whole --job t5-job --data private.jsonl {RUN} -o adapter")
    assert tuned["best_loss"] < tuned["before_loss"] - 0.5
    bundle = open_bundle(both.client / "adapter")
    modules = {name.rpartition(".")[0] for name in bundle.manifest.tensors}
    assert modules == set(open_package(both.client / "whole").layout.linears)
    assert {"bottom.0.layer.1.DenseReluDense.wi_0", "middle.4.layer.1.EncDecAttention.k"} <= modules
    audited = both.run("client", "audit bundle whole adapter --data private.jsonl --device cpu -o adapter-audit")
    assert set(audited["auc"]) == {"loss", "reference", "min-k", "min-k++"}
    leak = "--audit adapter-audit --accept-leakage"
    both.run("client", f"seal adapter --job t5-job --round 1 {leak} --keys keys -o adapter.sealed")
    taken = both.run("owner", "intake ../client/adapter.sealed --registry registry --keys keys")
    both.run("owner", f"registry accept {taken['id']} --registry registry --keys keys")
    both.run("owner", f"plug-in t5 {taken['id']} --registry registry --keys keys -o plugged")
    both.run("owner", f"plug-in t5 {taken['id']} --registry registry --keys keys --merge -o joined")

    base = AutoModelForSeq2SeqLM.from_pretrained(both.owner / "t5")
    theirs = [AutoModelForSeq2SeqLM.from_pretrained(both.owner / "joined")]
    theirs.append(PeftModel.from_pretrained(base, both.owner / "plugged").eval())
    batch, loss = batch_of(both.owner / "heldout.jsonl", theirs[1])
    package = open_package(both.client / "whole")
    attached = attach_to_package(package, bundle.manifest.adapter, device=torch.device("cpu"))
    attached.load(read_tensors(bundle.path / "adapter.safetensors", bundle.manifest.tensors))
    emulator = logits(attached.model.eval(), batch)
    ours = load_adapted(both.owner / "plugged", str(both.owner / "t5"), seq2seq=True)[0]
    assert torch.equal(logits(ours, batch), emulator)  # nothing of the middle was dropped
    for model in theirs:
        torch.testing.assert_close(logits(model, batch), emulator, atol=2e-3, rtol=1e-3)

    settings = ServeConfig(adapted=both.owner / "plugged", base=str(both.owner / "t5"), device="cpu")
    assert torch.equal(logits(load_served(settings)[0], batch), emulator)
    with pytest.raises(ConfigError, match="'plugged' is for an encoder-decoder, which is not mixed"):
        load_served(settings.model_copy(update={"mix": 0.5}))

    asked = "--prompt '7: which of all? sand' --max-tokens 8 --device cpu"
    (answer,) = both.run("client", f"generate whole --bundle adapter {asked}")["answers"]
    assert both.run("owner", f"generate plugged --base t5 {asked}")["answers"] == [answer]
    prompt = closing_tokenizer()("7: which of all? sand", return_tensors="pt")
    written = theirs[0].generate(**prompt, do_sample=False, max_new_tokens=8)[0, 1:]
    assert answer["text"] == closing_tokenizer().decode(written, skip_special_tokens=True)
    assert both.run("owner", f"generate t5 {asked}")["answers"] != [answer]

    data = "--registry registry --keys keys --data heldout.jsonl --block-tokens 40 --device cpu --precision fp32"
    measured = f"evaluate t5 --package whole --bundle {taken['id']} {data}"
    both.run("owner", f"{measured} --prompt which -o refused", code=2)
    assert "package 'whole' is an encoder-decoder: --prompt cannot be had with it" in both.told
    found = both.run("owner", f"{measured} -o measured")
    assert found["plugged_in"] == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-3)
    assert found["emulator_tuned"] == pytest.approx(found["plugged_in"], rel=1e-6)
    assert found["plugged_in"] < found["zero_shot"]


@pytest.mark.parametrize(("name", "adapter"), [("t5", "blocks"), ("bart", "lora")])
def test_on_a_smaller_package_the_ends_of_both_stacks_learn(name, adapter, tmp_path, monkeypatch, capsys):
    """Tuned on an emulator without two of its blocks, measured in the full model; an owner's own trial."""
    both = TwoParties(tmp_path, monkeypatch, capsys)
    saved(both.owner / "full", name)
    write_rows(both.owner / "private.jsonl", 0, 90)
    write_rows(both.owner / "heldout.jsonl", 200, 216)
    both.run("owner", f"distill full {CUT} --method drop --blocks 2 -o fewer")
    run = RUN.replace("3e-3", "1e-3") if adapter == "blocks" else RUN
    how = f"--adapter {adapter} --placement 1+1 --adapter-dtype float32 --data private.jsonl {run}"
    tuned = both.run("owner", f"tune fewer {how} -o adapter")
    assert tuned["best_loss"] < tuned["before_loss"] - 0.3
    blocks = {".".join(key.split(".")[:2]) for key in open_bundle(both.owner / "adapter").manifest.tensors}
    assert blocks == {"bottom.0", "top.0", "bottom.1", "top.1"}
    data = "--data heldout.jsonl --block-tokens 40 --device cpu --precision fp32 -o measured"
    found = both.run("owner", f"evaluate full --package fewer --bundle adapter {data}")
    assert found["emulator_tuned"] < found["emulator_zero_shot"]


def test_what_an_encoder_decoder_does_not_learn_yet_is_refused(tmp_path, monkeypatch, capsys):
    both = TwoParties(tmp_path, monkeypatch, capsys)
    saved(both.owner / "full", "t5")
    both.run("owner", f"distill full {CUT} --method keep-all -o whole")
    write_rows(both.owner / "private.jsonl", 0, 30)
    (both.owner / "running.txt").write_text("one text\n\nanother text\n\na third one")
    for words, told in {
        "--objective classify --labels a,b": "--objective classify cannot be had with it",
        "--objective dft --dp epsilon=8": "--dp cannot be had with it",
        "--channel-dropout 0.1": "--channel-dropout cannot be had with it",
    }.items():
        both.run("owner", f"tune whole --data private.jsonl {words} -o refused", code=2)
        assert f"package 'whole' is an encoder-decoder: {told}" in both.told
    both.run("owner", "tune whole --data running.txt --placement 1+1 -o refused", code=2)
    assert re.search(r"running.txt: line \d: running text, expected a prompt and its answer", both.told)
    both.run("owner", "canaries whole -o made", code=2)
    assert "package 'whole' is an encoder-decoder, which this cannot be done with" in both.told
    with pytest.raises(UnsupportedModel, match="'full' is an encoder-decoder"):
        refuse_encoder(str(both.owner / "full"))
