"""Heads: read as transformers' sequence classifiers read them, declared, attached, capped; how right they are."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from adapters.heads import HEAD, as_classifier, attach_head, check_head, detach_head, put_head, read_size
from adapters.kinds import attach, declared
from offsite.artefacts.bundle import AdapterSpec, Head
from offsite.errors import NormTooLarge, UnsupportedModel, WrongShape
from offsite.evaluation.heads import accuracy, head_scores, label_losses, macro_f1, pair_losses, scores_of
from offsite.text.batches import Example, collate

LABELS = ("cold", "hot", "wet")


def small_opt():
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 8, "ffn_dim": 16, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(vocab_size=64, num_attention_heads=2, max_position_embeddings=32, **sizes))


def small_gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32))


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("pad", [0, 2])  # 2 ends texts, too: eos as the padding token
def test_a_head_reads_what_transformers_classifier_reads(name, pad, full_llama):
    torch.manual_seed(1)
    lm = (copy.deepcopy(full_llama) if name == "llama" else {"gpt2": small_gpt2, "opt": small_opt}[name]()).eval()
    config = copy.deepcopy(lm.config)
    config.num_labels, config.pad_token_id = 3, pad
    other = AutoModelForSequenceClassification.from_config(config).eval()
    other.base_model.load_state_dict(lm.base_model.state_dict())
    head = Head(task="classify", labels=LABELS, hidden=read_size(lm))
    put_head(lm, head, {HEAD: other.score.weight})
    rows = [[5, 6, 7, 8, 9], [5, 6, 2], [9, 8, 7, 2, 2], [30], [11, 2, 12]]
    batch = collate([Example(row, row) for row in rows], pad)
    with torch.no_grad():
        expected = other(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        torch.testing.assert_close(head_scores(lm, batch, pad_id=pad), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(head_scores(other, batch, pad_id=pad), expected, rtol=1e-5, atol=1e-6)
        made = as_classifier(lm, head, pad_id=pad)
        assert type(made) is type(other)
        found = made(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        assert torch.equal(found, expected)
    assert (made.config.num_labels, made.config.pad_token_id) == (3, pad)
    assert made.config.id2label == dict(enumerate(LABELS))
    assert made.config.problem_type == "single_label_classification"
    one_by_one = scores_of(lm, [Example(row, row) for row in rows], batch_size=2, pad_id=pad)
    torch.testing.assert_close(one_by_one.float(), expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_with_a_head_is_declared_and_attached(narrow_package):
    head = Head(task="reward", hidden=32)
    spec = AdapterSpec(kind="lora", rank=2, placement="all", head=head)
    names = declared(spec, narrow_package.layout, narrow_package.block_tensors())
    assert (names[HEAD].shape, names[HEAD].dtype) == ((1, 32), "float32")
    attached = attach(narrow_package.load_model(), spec, narrow_package.layout.blocks, names)
    assert attached.trainable.keys() == names.keys()
    assert not attached.trainable[HEAD].any()
    assert attached.trainable[HEAD].requires_grad
    detach_head(attached.model)
    assert "score" not in dict(attached.model.get_base_model().named_children())


def test_what_takes_no_head_says_so(full_llama):
    lm = copy.deepcopy(full_llama)
    with pytest.raises(WrongShape, match="reads states of 31 numbers, the model's have 32"):
        attach_head(lm, Head(task="reward", hidden=31))
    lm.score = torch.nn.Linear(2, 2)
    with pytest.raises(UnsupportedModel, match="a module named 'score' of its own"):
        attach_head(lm, Head(task="reward", hidden=32))
    lm = copy.deepcopy(full_llama)
    lm.config.__class__ = type("Unheard", (type(lm.config),), {"model_type": "unheard"})
    with pytest.raises(UnsupportedModel, match="no sequence classifier for unheard"):
        attach_head(lm, Head(task="reward", hidden=32))
    check_head({HEAD: torch.full((1, 4), 2.0)}, max_head_norm=4.0)
    with pytest.raises(NormTooLarge, match=r"norm is 4, at most 3\.9"):
        check_head({HEAD: torch.full((1, 4), 2.0)}, max_head_norm=3.9)


def test_ties_are_shared_and_figures_are_those_of_their_definitions():
    scores = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 2.0, 0.0], [0.0, 0.0, 5.0]]).double()
    targets = [0, 1, 0, 1]
    assert accuracy(scores, targets) == 0.5
    # label 0: hit 1 of 2, said once: F1 2/3; label 1: hit 1 of 2, said twice: 1/2; label 2: said once, never true: 0
    assert macro_f1(scores, targets) == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    untrained = torch.zeros(6, 3).double()
    assert accuracy(untrained, [0, 0, 0, 0, 1, 2]) == pytest.approx(1 / 3)
    assert label_losses(untrained, [0] * 6) == pytest.approx([math.log(3)] * 6)
    pairs = torch.tensor([[1.0], [-1.0], [0.0], [0.0], [-800.0], [0.0]]).double()
    assert pair_losses(pairs) == pytest.approx([math.log(1 + math.exp(-2)), math.log(2), 800.0])
