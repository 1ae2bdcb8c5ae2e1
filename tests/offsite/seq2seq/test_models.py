"""Encoder-decoders are cut, narrowed and loaded right: each oracle on every shape that is taken."""

from __future__ import annotations

import pytest
import torch
from seq2seq_lab import SHAPES, logits, rows, saved, seq2seq
from transformers import AutoModelForSeq2SeqLM

from offsite.digests import model_digest
from offsite.errors import ConfigError, UnsupportedModel
from offsite.modelling.blocks import find_stacks, text_stacks
from offsite.modelling.causal import reads_ahead
from offsite.modelling.head import before_head
from offsite.modelling.load import load_model
from offsite.modelling.mlps import find_mlp, slice_mlp, zero_mlp_channels
from offsite.modelling.split import extract, largest_deviation, make_plan, own
from offsite.seq2seq.models import MODEL_TYPES, is_seq2seq

NAMES = list(SHAPES)


def test_every_family_that_is_taken_is_tried_here():
    assert {family for family, _ in SHAPES.values()} == set(MODEL_TYPES)


@pytest.mark.parametrize("name", NAMES)
def test_a_cut_computes_what_the_full_model_does_without_the_other_blocks(name):
    """Also of one stack alone; rows that are padded say what they say alone; an untied head stays one."""
    model, batch = seq2seq(name), rows()
    plan = make_plan(model, num_bottom=1, num_top=1)
    encoder, decoder = (side.stack.name for side in plan.sides)
    assert [side.num_middle for side in plan.sides] == [3, 2]
    whole = extract(model, {encoder: range(5), decoder: range(4)})
    assert is_seq2seq(whole)
    assert torch.equal(logits(whole, batch), logits(model, batch))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == (name != "gated-t5")
    assert (whole.get_output_embeddings().weight is whole.get_input_embeddings().weight) == tied
    for kept in ({encoder: [0, 2, 4], decoder: [0, 1, 3]}, {encoder: [0, 3, 4]}, {decoder: [0, 3]}):
        small = extract(model, kept)
        assert largest_deviation(model, small, kept) < 1e-6
        assert not torch.allclose(logits(small, batch), logits(model, batch), atol=1e-3)
    alone = {key: tensor[-1:, : 4 if key.startswith("decoder") else 7] for key, tensor in batch.items()}
    torch.testing.assert_close(logits(small, batch)[-1:, :4], logits(small, alone), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_narrow_block_computes_what_zeroed_channels_do(name):
    model = seq2seq(name)
    for stack in find_stacks(model):
        narrow, zeroed = (extract(model, {}) for _ in range(2))
        own(zeroed)
        block = narrow.get_submodule(f"{stack.name}.2")
        part = find_mlp(block)
        assert part.num_channels == 48
        slice_mlp(block, part, torch.arange(0, 48, 3))
        gone = torch.tensor([i for i in range(48) if i % 3])
        zero_mlp_channels(zeroed.get_submodule(f"{stack.name}.2"), part, gone)
        found = logits(narrow, rows())
        torch.testing.assert_close(found, logits(zeroed, rows()), atol=1e-5, rtol=1e-4)
        assert not torch.allclose(found, logits(model, rows()), atol=1e-3)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_the_block_that_holds_what_others_share_is_kept(name):
    """T5's first block of each stack has the relative positions of all; BART has no such block."""
    model = seq2seq(name)
    for stack in text_stacks(model):
        if name == "bart":
            assert largest_deviation(model, extract(model, {stack.name: [1, 3]}), {stack.name: [1, 3]}) < 1e-6
            continue
        with pytest.raises(UnsupportedModel, match=r"block 1 of .* depends on its depth"):
            extract(model, {stack.name: [1, 3]})


@pytest.mark.parametrize("name", NAMES)
def test_scores_at_chosen_positions_are_those_of_transformers(name):
    model, batch = seq2seq(name), rows()
    assert not reads_ahead(model)
    given = {"source_ids": batch["input_ids"], "source_mask": batch["attention_mask"]}
    given |= {"input_ids": batch["decoder_input_ids"], "attention_mask": batch["decoder_attention_mask"]}
    chosen = given["attention_mask"].bool()
    chosen[:, 0] = False
    found = before_head(model, given, chosen)
    scores = found if isinstance(found, torch.Tensor) else found.project(found.hidden)
    torch.testing.assert_close(scores.detach(), logits(model, batch)[chosen], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_loaded_where_one_is_taken(name, tmp_path):
    folder = saved(tmp_path / name, name)
    model = load_model(str(folder), seq2seq=True)
    theirs = AutoModelForSeq2SeqLM.from_pretrained(folder)
    assert model_digest(model) == model_digest(seq2seq(name))
    assert torch.equal(logits(model, rows()), logits(theirs, rows()))
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UnsupportedModel, match=rf"'{name}' is an encoder-decoder, which this cannot be done with"):
        load_model(str(folder))


def test_a_stack_that_is_not_cut_has_no_middle():
    model = seq2seq("t5")
    plan = make_plan(model, num_bottom=1, num_top=1, stacks="decoder")
    assert [side.num_middle for side in plan.sides] == [0, 2]
    with pytest.raises(ConfigError, match=r"ends of 2\+2 blocks leave no middle in decoder.block of 4 blocks"):
        make_plan(model)
