"""Plans, roles, and what a smaller model shares with the full one."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from offsite.errors import ConfigError, UnsupportedModel
from offsite.modelling.blocks import Stack
from offsite.modelling.split import Plan, block_names, extract, join, largest_deviation, make_plan, own, split

KEEP = {"model.layers": [0, 2, 5]}


def test_a_plan_numbers_every_block_once(tiny_model):
    plan = make_plan(tiny_model("llama"), num_bottom=2, num_top=1)
    assert plan == Plan(Stack("model.layers", 6, (), "num_hidden_layers"), 2, 1)
    assert (plan.bottom, plan.middle, plan.top) == ((0, 1), (2, 3, 4), (5,))
    assert plan.num_middle == 3


def test_the_bottom_end_may_be_empty(tiny_model):
    plan = make_plan(tiny_model("llama"), num_bottom=0, num_top=2)
    assert plan.bottom == ()
    assert plan.middle == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("bottom", "top", "reason"),
    [
        (3, 3, r"ends of 3\+3 blocks leave no middle in model\.layers of 6 blocks"),
        (9, 1, "leave no middle"),
        (-1, 2, r"found ends of -1\+2 blocks; expected at least 0\+1"),
        (2, 0, r"found ends of 2\+0 blocks"),
    ],
)
def test_wrong_counts_are_refused(bottom, top, reason, tiny_model):
    with pytest.raises(ConfigError, match=reason):
        make_plan(tiny_model("llama"), num_bottom=bottom, num_top=top)


@pytest.mark.parametrize("counts", [(0, 2), (1, 1), (2, 3)])
def test_join_undoes_split(counts, tiny_model):
    model = tiny_model("llama")
    parts = split(model, make_plan(model, num_bottom=counts[0], num_top=counts[1]))
    assert (len(parts.bottom), len(parts.top)) == counts
    joined = join(parts)
    assert len(joined) == 6
    assert all(a is b for a, b in zip(joined, model.model.layers, strict=True))


def test_split_refuses_another_models_plan(tiny_model):
    plan = make_plan(tiny_model("llama", num_hidden_layers=4), num_bottom=1, num_top=1)
    with pytest.raises(ConfigError, match="does not have the 4 blocks planned"):
        split(tiny_model("llama"), plan)


def test_block_names_number_the_roles_in_order():
    assert block_names("model.layers", 1, 2, 1) == {
        "bottom.0": "model.layers.0",
        "middle.0": "model.layers.1",
        "middle.1": "model.layers.2",
        "top.0": "model.layers.3",
    }
    assert block_names("transformer.h", 0, 1, 1) == {"middle.0": "transformer.h.0", "top.0": "transformer.h.1"}


def has_tied_head(model):
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "t5", "bert", "falcon"])
def test_heads_stay_as_tied_as_they_were(name, tied, tiny_model, logits, tmp_path):
    model = tiny_model(name, tie_word_embeddings=tied)
    stack = {"gpt2": "transformer.h", "falcon": "transformer.h", "opt": "model.decoder.layers"}
    stack |= {"t5": "encoder.block", "bert": "bert.encoder.layer"}
    small = extract(model, {stack.get(name, "model.layers"): [0, 2, 5]})
    assert has_tied_head(small) == has_tied_head(model)
    assert has_tied_head(small) == tied or name == "t5"  # T5 ties its head whatever the configuration says
    expected = logits(small)
    small.save_pretrained(tmp_path)
    again, info = type(small).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert torch.equal(logits(again.eval()), expected)


def test_the_full_model_is_not_modified(tiny_model, logits):
    model = tiny_model("gemma3_text")
    before, config = logits(model), copy.deepcopy(model.config.to_dict())
    extract(model, KEEP)
    assert model.config.to_dict() == config
    assert len(model.model.layers) == 6
    assert torch.equal(logits(model), before)


def test_the_smaller_model_is_in_eval_mode_with_its_own_numbers(tiny_model):
    model = tiny_model("qwen3").train()
    model.config.name_or_path = "somewhere/private"
    small = extract(model, KEEP)
    assert not small.training
    assert [block.self_attn.layer_idx for block in small.model.layers] == [0, 1, 2]
    assert small.config.name_or_path == ""
    assert type(small) is type(model)


def test_dtype_attention_and_generation_settings_are_kept(tiny_model):
    model = tiny_model("llama").to(torch.bfloat16)
    model.set_attn_implementation("eager")
    model.generation_config.max_new_tokens = 3
    small = extract(model, KEEP)
    assert small.dtype == torch.bfloat16
    assert small.config._attn_implementation == "eager"
    assert small.generation_config.max_new_tokens == 3
    assert small.generation_config is not model.generation_config


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe", "gpt2"])
def test_a_model_read_from_files_is_cut_alike(name, tiny_model, logits, tmp_path):
    tiny_model(name).save_pretrained(tmp_path / "full")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "full").eval()
    small = extract(model, {"transformer.h" if name == "gpt2" else "model.layers": [0, 2, 5]})
    small.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small").eval()
    assert torch.equal(logits(again), logits(small))


def test_own_tensors_can_be_trained_without_touching_the_full_model(tiny_model, logits):
    model = tiny_model("llama", tie_word_embeddings=True)
    before = logits(model)
    small = extract(model, KEEP)
    own(small)
    assert small.lm_head.weight is small.model.embed_tokens.weight
    assert torch.equal(logits(extract(model, KEEP)), logits(small))
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(1)
    assert torch.equal(logits(model), before)


def test_only_the_named_stack_is_cut(tiny_model):
    small = extract(tiny_model("clip"), {"vision_model.encoder.layers": [0, 5]})
    assert small.config.vision_config.num_hidden_layers == 2
    assert small.config.text_config.num_hidden_layers == 6
    assert len(small.text_model.encoder.layers) == 6


@pytest.mark.parametrize(
    ("keep", "reason"),
    [
        ({"model.blocks": [0]}, r"no block stack model\.blocks; found model\.layers"),
        ({"model.layers": []}, "must increase from 0 to at most 5"),
        ({"model.layers": [0, 6]}, "must increase from 0 to at most 5"),
        ({"model.layers": [-1, 2]}, "must increase"),
        ({"model.layers": [2, 1]}, "must increase"),
        ({"model.layers": [1, 1]}, "must increase"),
    ],
)
def test_wrong_numbers_are_refused(keep, reason, tiny_model):
    with pytest.raises(ConfigError, match=reason):
        extract(tiny_model("llama"), keep)


def test_a_head_tied_only_in_the_configuration_is_refused(tiny_model):
    model = tiny_model("llama", tie_word_embeddings=False)
    model.config.tie_word_embeddings = True
    with pytest.raises(UnsupportedModel, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight by the"):
        extract(model, KEEP)


def test_a_model_without_memory_is_refused(tiny_model):
    with pytest.raises(UnsupportedModel, match="has no counterpart to share"):
        extract(tiny_model("llama").to("meta"), KEEP)


def test_deviation_sees_a_wrong_cut(tiny_model):
    model = tiny_model("llama")
    small = extract(model, KEEP)
    assert largest_deviation(model, small, KEEP) < 1e-6
    small.model.layers[1].self_attn.scaling *= 1.5
    assert largest_deviation(model, small, KEEP) > 1e-3
