"""Packages of encoder-decoders: made without training, opened by clients, right to the bit where nothing is dropped."""

from __future__ import annotations

import json

import pytest
import torch
from seq2seq_lab import closing_tokenizer, logits, rows, saved, seq2seq
from transformers import AutoModelForSeq2SeqLM

import emulator.distillation.imitation as module
from emulator.distillation.config import DistillConfig
from emulator.distillation.distill import run
from emulator.distillation.objective import Pair
from emulator.marking.mark import carriers
from offsite import cli
from offsite.artefacts.owner import owner_record_path, read_owner_record
from offsite.artefacts.package import open_package
from offsite.artefacts.rebuild import empty_model
from offsite.errors import BadSchema, ConfigError, RunFailed, UnsupportedModel
from offsite.modelling.blocks import text_stacks
from offsite.modelling.split import extract, make_plan
from offsite.seq2seq.inputs import inputs_of
from offsite.seq2seq.models import start_token
from offsite.text.batches import collate
from offsite.text.forms import encode_answers
from offsite.text.records import Record


@pytest.fixture
def public(tmp_path):
    """Questions and answers that are alike."""
    organs, beings = ("heart", "liver", "lung", "eye"), ("cats", "dogs", "people")
    pairs = [(f"What is the {a} of {b} like, by {c}?", f"The {a} {b} has, {c}.") for a in organs for b in beings
             for c in "abcd"]  # fmt: skip
    path = tmp_path / "public.jsonl"
    path.write_text("".join(json.dumps({"prompt": one, "completion": two}) + "\n" for one, two in pairs))
    return path


def distil(checkpoint, out, public, *words):
    stated = ["--public", str(public), "--block-tokens", "48", "--batch-size", "8", "--device", "cpu"]
    stated += ["--calibration-tokens", "1024", *([] if "--steps" in words else ["--steps", "0"])]
    return cli.run(["distill", str(checkpoint), "-o", str(out), "--bottom", "1", "--top", "1", *stated, *words])


@pytest.mark.proves("models", "encoder-decoders")
@pytest.mark.parametrize("name", ["t5", "bart", pytest.param("gated-t5", marks=pytest.mark.slow)])
def test_what_a_client_opens_is_what_was_made(name, tmp_path, public, capsys):
    """Nothing dropped: equal to the bit. Blocks dropped: to the bit what is cut by hand."""
    checkpoint, model = saved(tmp_path / name, name), seq2seq(name)
    full = logits(model, rows())
    ways = {"whole": ("--method", "keep-all"), "few": ("--method", "drop", "--blocks", "2")}
    found = {}
    for way, words in ways.items():
        assert distil(checkpoint, tmp_path / way, public, *words) == 0, capsys.readouterr().err
        found[way] = logits(open_package(tmp_path / way).load_model(seq2seq=True), rows())
    assert torch.equal(found["whole"], full)
    encoder, decoder = (stack.name for stack in text_stacks(model))
    cut = extract(model, {encoder: [0, 1, 3, 4], decoder: range(4)})
    assert torch.equal(found["few"], logits(cut, rows()))
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "few")
    torch.testing.assert_close(logits(theirs, rows()), found["few"])
    record = read_owner_record(owner_record_path(tmp_path / "few"))
    assert record.kept == (0, 1, 3, 4, 0, 1, 2, 3)
    assert record.sites["top.1"] == f"{decoder}.3"
    assert record.full_middle() == [f"{encoder}.{n}" for n in (1, 2, 3)] + [f"{decoder}.{n}" for n in (1, 2)]
    marked = carriers(open_package(tmp_path / "few"))
    middle = {f"{encoder}.{n}." for n in (1, 2)} | {f"{decoder}.{n}." for n in (1, 2)}
    assert all(any(name.startswith(block) for block in middle) for name in marked)
    assert all(any(name.startswith(block) for name in marked) for block in middle)
    with pytest.raises(UnsupportedModel, match="'few' is an encoder-decoder, which this cannot be done with"):
        open_package(tmp_path / "few").load_model()


@pytest.mark.parametrize("name", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_half_the_channels_refitted_are_nearer_than_half_of_them_as_they_were(name, tmp_path, public, capsys):
    checkpoint, model = saved(tmp_path / name, name), seq2seq(name)
    asked = [json.loads(line) for line in public.read_text().splitlines()[::5]]
    examples = encode_answers(
        [Record(((one["prompt"], False), (one["completion"], True)), "", 0) for one in asked],
        closing_tokenizer(),
        start=start_token(model.config),
        context=48,
    ).examples
    batch = inputs_of(collate(examples, 0))
    full = logits(model, batch)
    ways = {"narrow": ("--width", "0.5"), "plain": ("--width", "0.5", "--channels", "activation", "--no-refit")}
    found = {}
    for way, words in ways.items():
        assert distil(checkpoint, tmp_path / way, public, *words) == 0, capsys.readouterr().err
        away = logits(open_package(tmp_path / way).load_model(seq2seq=True), batch) - full
        found[way] = float(away[batch["decoder_attention_mask"].bool()].norm())
    assert 0 < found["narrow"] < found["plain"]


def test_one_stack_may_be_cut_alone_and_running_text_is_read_half_by_half(tmp_path, capsys):
    checkpoint, model = saved(tmp_path / "t5", "t5"), seq2seq("t5")
    text = tmp_path / "public.txt"
    text.write_text("\n\n".join(f"The {a} of {b} is known by its name." for a in "abcdef" for b in "uvwxyz"))
    words = ("--width", "0.5", "--stacks", "decoder")
    assert distil(checkpoint, tmp_path / "package", text, *words) == 0, capsys.readouterr().err
    package = open_package(tmp_path / "package")
    opened = package.load_model(seq2seq=True)
    batch = {key: one for key, one in rows().items() if not key.startswith("decoder")}
    with torch.no_grad():
        states = [one.get_encoder()(**batch).last_hidden_state for one in (opened, model)]
    assert torch.equal(*states)
    assert not torch.allclose(logits(opened, rows()), logits(model, rows()), atol=1e-3)
    layout = package.layout
    assert (layout.encoder.num_bottom, layout.encoder.num_middle, layout.encoder.num_top) == (1, 0, 4)
    assert (layout.num_bottom, layout.num_middle, layout.num_top) == (1, 2, 1)
    assert list(layout.blocks)[:7] == ["bottom.0", "top.0", "top.1", "top.2", "top.3", "bottom.1", "middle.0"]


def test_a_layout_of_other_stacks_is_no_package(tmp_path, public, capsys):
    """Both stacks under one name, the encoder left out, an encoder too many blocks deep."""
    checkpoint = saved(tmp_path / "bart", "bart")
    assert distil(checkpoint, tmp_path / "package", public, "--method", "keep-all") == 0, capsys.readouterr().err
    package = open_package(tmp_path / "package")
    own = package.layout.encoder
    for changed, kind in {
        own.model_copy(update={"stack": package.layout.stack}): "stacks of other names than the layout",
        own.model_copy(update={"num_middle": 9}): "describes .* blocks, the layout counts 11",
        None: "differ in whether there is an encoder beside the decoder",
    }.items():
        if changed is not None and changed.num_middle != 9:  # as deep as the decoder, which it claims to be
            changed = changed.model_copy(update={"num_middle": 2})
            (package.path / "config.json").write_text(
                (package.path / "config.json").read_text().replace('"encoder_layers": 5', '"encoder_layers": 4')
            )
        layout = package.layout.model_copy(update={"encoder": changed})
        with pytest.raises(BadSchema, match=kind):
            empty_model(package.path, layout, package.manifest.tensors)


def test_answers_are_learnt_behind_the_token_they_are_written_behind(tmp_path, public, capsys):
    checkpoint = saved(tmp_path / "gated", "gated-t5")
    settings = json.loads((checkpoint / "config.json").read_text())
    assert settings.pop("decoder_start_token_id") == 1
    (checkpoint / "config.json").write_text(json.dumps(settings))
    assert distil(checkpoint, tmp_path / "package", public, "--method", "keep-all") == 2
    assert "writes answers behind token 1 by its generation_config.json and learns them behind token 0" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--steps", "5", "--refit-jacobian", "1"), "--refit-jacobian"),
        (("--steps", "5", "--elevate", "0.1"), "--elevate"),
        (("--method", "low-rank"), "--method low-rank"),
        (("--method", "drop", "--blocks", "2", "--choice", "crash", "--pack", "int8"), "--pack and --choice crash"),
    ],
)
def test_what_does_not_work_yet_is_refused_before_a_weight_is_read(tmp_path, public, capsys, words, told):
    checkpoint = saved(tmp_path / "t5", "t5")
    (checkpoint / "model.safetensors").write_bytes(b"no weights")
    assert distil(checkpoint, tmp_path / "package", public, *words) == 2
    said = capsys.readouterr().err
    assert f"model 't5' is an encoder-decoder: {told} cannot be had with it" in said
    assert "--method width, drop or keep-all" in said
    assert not (tmp_path / "package").exists()


def test_the_loss_is_that_of_two_whole_passes():
    """Hidden states of both middles, the encoder's at its prompts' tokens; KL of the answers' next tokens."""
    full = seq2seq("bart")
    plan = make_plan(full, num_bottom=1, num_top=1)
    encoder, decoder = (side.stack.name for side in plan.sides)
    emulator = extract(full, {encoder: (0, 1, 3, 4), decoder: (0, 2, 3)})
    source, target = torch.randint(3, 259, (2, 7)), torch.randint(3, 259, (2, 5))
    masks = torch.ones_like(source), torch.ones_like(target)
    masks[0][1, 4:], masks[1][0, 3:] = 0, 0
    batch = {"input_ids": target, "attention_mask": masks[1], "source_ids": source, "source_mask": masks[0]}
    terms = Pair(full, emulator, plan, (0, 1, 3, 4, 0, 2, 3))(batch, 1.0)
    given = {**inputs_of(batch), "output_hidden_states": True}
    with torch.no_grad():
        theirs, mine = full(**given), emulator(**given)
    states = [("encoder_hidden_states", masks[0], [(2, 3), (3, 4)]), ("decoder_hidden_states", masks[1], [(2, 3)])]
    errors = []
    for name, mask, aligned in states:  # counted from the embeddings on; the last one has a block behind it
        for one, other in aligned:
            found, wanted = getattr(mine, name)[one], getattr(theirs, name)[other]
            errors.append(((found - wanted).square().sum(-1) / wanted.square().sum(-1))[mask.bool()].mean())
    real = masks[1].bool()
    logs = [one.logits.log_softmax(-1)[real] for one in (theirs, mine)]
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).sum()
    torch.testing.assert_close(terms.hidden, torch.stack(errors).mean() * real.sum(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms.kl, kl, rtol=1e-4, atol=1e-5)


def test_several_processes_are_refused_before_they_start(tmp_path, public):
    checkpoint = saved(tmp_path / "t5", "t5")
    config = DistillConfig(model=str(checkpoint), output=tmp_path / "out", public=(public,), steps=5, launch=2)
    with pytest.raises(ConfigError, match="'t5' is an encoder-decoder: --launch cannot be had with it"):
        run(config)


DISTILLED = "--method drop --blocks 2 --holdout 0.25 --learning-rate 3e-3 --warmup-steps 2 --precision fp32".split()


@pytest.mark.parametrize(("name", "stacks"), [("t5", "both"), ("bart", "encoder")])
def test_an_emulator_learns_in_both_stacks_or_the_one_that_is_cut(name, stacks, tmp_path, public, capsys):
    checkpoint = saved(tmp_path / name, name)
    words = (*DISTILLED, "--stacks", stacks, "--evaluate-every", "8")
    assert distil(checkpoint, tmp_path / "cut", public, *DISTILLED[:4], "--stacks", stacks) == 0
    assert distil(checkpoint, tmp_path / "learnt", public, *words, "--steps", "24") == 0, capsys.readouterr().err
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["best_loss"] == told["held_out_kl"] < 0.8 * told["evaluations"][0][1]
    cut, learnt = (open_package(tmp_path / one).load_model(seq2seq=True).state_dict() for one in ("cut", "learnt"))
    moved = {key.rpartition(".block.")[0] or key.partition(".layers.")[0] for key in cut
             if not torch.equal(cut[key], learnt[key])}  # fmt: skip
    assert moved == {"encoder", "decoder"} if stacks == "both" else {"model.encoder"}


def test_a_run_goes_on_as_it_was(tmp_path, public, monkeypatch, capsys):
    """Also where states could be kept: a prompt with two answers has two, which the answer alone would not tell."""
    checkpoint = saved(tmp_path / "t5", "t5")
    words = (*DISTILLED, "--checkpoint-every", "8", "--cache-bytes", "100000000", "--steps", "20")
    assert distil(checkpoint, tmp_path / "whole", public, *words) == 0, capsys.readouterr().err
    train, calls = module.train, []

    def killed(pair, trainable, batches, loss, loop, **given):
        def counted(pair, batch):
            calls.append(1)
            if len(calls) == 13:
                raise RunFailed("killed")
            return loss(pair, batch)

        return train(pair, trainable, batches, counted, loop, **given)

    monkeypatch.setattr(module, "train", killed)
    assert distil(checkpoint, tmp_path / "again", public, *words) == 5
    monkeypatch.setattr(module, "train", train)
    assert distil(checkpoint, tmp_path / "again", public, *words, "--resume") == 0, capsys.readouterr().err
    assert open_package(tmp_path / "whole").digest == open_package(tmp_path / "again").digest
