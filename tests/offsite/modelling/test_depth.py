"""Configuration edits where depth shows, and the refusal of every rule that cannot be edited."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from offsite.errors import UnsupportedModel
from offsite.modelling.blocks import decoder_stack, find_stacks, refuse_uncuttable
from offsite.modelling.depth import refuse_depth_rules, smaller_config
from offsite.modelling.split import extract, largest_deviation, make_plan

FULL, SLIDING = "full_attention", "sliding_attention"
KEEP = [0, 1, 3, 5]


def edited(model, kept=KEEP):
    return smaller_config(model.config, {find_stacks(model)[0]: kept})


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {"num_hidden_layers": 4}),
        ("gpt2", {"n_layer": 4}),
        ("qwen2", {"layer_types": [FULL, FULL, SLIDING, SLIDING], "max_window_layers": 2}),
        ("gemma2", {"layer_types": [SLIDING, FULL, FULL, FULL]}),
        ("gemma3_text", {"layer_types": [SLIDING, SLIDING, SLIDING, FULL]}),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}),
        ("cohere2", {"layer_types": [SLIDING, SLIDING, SLIDING, FULL]}),
        ("qwen3_moe", {"mlp_only_layers": [2], "decoder_sparse_step": 1}),
        ("deepseek_v3", {"first_k_dense_replace": 2}),
        ("glm4_moe", {"first_k_dense_replace": 2}),
        ("llama4_text", {"moe_layers": [1, 2, 3], "no_rope_layers": [1, 1, 1, 0]}),
        ("t5", {"num_layers": 4, "num_decoder_layers": 6}),
        ("bart", {"encoder_layers": 4, "decoder_layers": 5}),
    ],
)
def test_fields_follow_the_kept_blocks(name, fields, tiny_model):
    config = edited(tiny_model(name))
    assert {key: getattr(config, key) for key in fields} == fields


def test_prefix_counters_are_recounted(tiny_model):
    model = tiny_model("deepseek_v3")
    assert edited(model, [1, 2, 3]).first_k_dense_replace == 1
    assert edited(model, [2, 3]).first_k_dense_replace == 0
    assert edited(tiny_model("qwen2", max_window_layers=28)).max_window_layers == 28  # above every block: says the same


def test_keeping_every_block_edits_nothing(tiny_model):
    for name in ("qwen2", "gemma3_text", "qwen3_moe", "llama4_text"):
        model = tiny_model(name)
        assert edited(model, range(6)).to_dict() == model.config.to_dict()


def test_a_periodic_rule_with_a_list_beside_it_is_made_explicit(tiny_model):
    model = tiny_model("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[3])
    config = edited(model)  # sparse by the rule: 1, 3, 5, without the 3 of the list
    assert config.decoder_sparse_step == 1
    assert config.mlp_only_layers == [0, 2]
    keep = {"model.layers": KEEP}
    assert largest_deviation(model, extract(model, keep), keep) < 1e-6


def test_overrides_of_single_blocks_are_renumbered(tiny_model):
    model = tiny_model("llama")
    model.config.per_layer_config = {3: {"attention_dropout": 0.5}, 4: {"attention_dropout": 0.25}}
    assert edited(model).to_dict()["per_layer_config"] == {"2": {"attention_dropout": 0.5}}


def test_gpt2_upcasting_does_not_depend_on_depth(tiny_model):
    model = tiny_model("gpt2", reorder_and_upcast_attn=True, attn_implementation="eager")
    keep = {"transformer.h": KEEP}
    assert largest_deviation(model, extract(model, keep), keep) < 1e-6


@pytest.mark.parametrize("settings", [{"alibi": True}, {"new_decoder_architecture": True}, {"parallel_attn": False}])
def test_falcons_variants_do_not_depend_on_depth(settings, tiny_model):
    model = tiny_model("falcon", **settings)
    keep = {"transformer.h": KEEP}
    assert largest_deviation(model, extract(model, keep), keep) < 1e-6


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("gemma3n_text", {}, "its last 2 blocks reuse keys and values of others"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scaled by the block's depth"),
        ("jamba", {}, r"one block in 3 is of another kind \(attn_layer_period\) and no list says which"),
        ("jamba", {"attn_layer_period": 1, "attn_layer_offset": 0}, "expert_layer_period"),
    ],
)
def test_rules_that_the_configuration_shows_are_refused(name, settings, reason, tiny_model):
    model = tiny_model(name, **settings)
    with pytest.raises(UnsupportedModel, match=reason):
        make_plan(model, num_bottom=1, num_top=1)
    stack = decoder_stack(model)
    with pytest.raises(UnsupportedModel, match=reason):
        extract(model, {stack.name: KEEP})


def tiny_causal(kind, **settings):
    small = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 6}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**small, **settings}))


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("diffllama", {}, "block 2 of model.layers depends on its depth: self_attn.lambda_init is"),
        ("big_bird", {"is_decoder": True, "attention_type": "block_sparse"}, r"attention\.seed is 1, not 2 as block 1"),
        (
            "ernie4_5_moe",
            {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 8, "moe_layer_interval": 2},
            "moe_layer_interval",
        ),
    ],
)
def test_rules_that_only_construction_shows_are_refused(kind, settings, reason):
    with pytest.raises(UnsupportedModel, match=reason):
        make_plan(tiny_causal(kind, **settings), num_bottom=1, num_top=1)


def test_tensors_that_follow_the_number_of_blocks_are_refused(tiny_model):
    model = tiny_model("gemma3n_text", num_kv_shared_layers=0)
    with pytest.raises(UnsupportedModel, match=r"embed_tokens_per_layer\.weight follows the number of blocks"):
        make_plan(model)


@pytest.mark.parametrize("stack", ["encoder.block", "decoder.block"])
def test_t5_without_its_first_block_is_refused(stack, tiny_model):
    with pytest.raises(UnsupportedModel, match=rf"block 1 of {stack} depends on its depth: .*relative_attention_bias"):
        extract(tiny_model("t5"), {stack: [1, 2, 3]})


def test_weights_shared_between_blocks_are_refused(tiny_model):
    model = tiny_model("llama")
    model.model.layers[4].mlp = model.model.layers[1].mlp
    with pytest.raises(UnsupportedModel, match=r"blocks 1 and 4 share the weight mlp\.gate_proj\.weight"):
        make_plan(model)


def test_quantised_weights_are_refused(tiny_model):
    model = tiny_model("llama")
    model.config.quantization_config = {"quant_method": "gguf"}
    with pytest.raises(UnsupportedModel, match="is quantised"):
        refuse_uncuttable(model, decoder_stack(model))


def test_a_block_that_was_changed_by_hand_is_refused(tiny_model):
    class Wrapped(nn.Linear):
        pass

    model = tiny_model("llama")
    model.model.layers[3].self_attn.q_proj = Wrapped(32, 32, bias=False)
    with pytest.raises(UnsupportedModel, match=r"self_attn\.q_proj is Linear, not Wrapped"):
        make_plan(model)


def test_a_narrowed_block_is_refused(tiny_model):
    model = tiny_model("llama")
    model.model.layers[3].mlp.up_proj.weight = nn.Parameter(torch.zeros(40, 32))
    with pytest.raises(UnsupportedModel, match=r"mlp\.up_proj\.weight has shape \(48, 32\), not \(40, 32\)"):
        make_plan(model)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("strengths", [1, 2, 3, 4, 5, 6], "cannot tell whether the field strengths has one entry per block"),
        ("special_layer_ids", [1, 4], r"cannot tell whether the field special_layer_ids lists numbers of blocks"),
    ],
)
def test_lists_of_unknown_meaning_are_refused(field, value, reason, tiny_model):
    model = tiny_model("llama", **{field: value})
    with pytest.raises(UnsupportedModel, match=reason):
        make_plan(model)


def test_lists_that_never_follow_blocks_are_left_alone(tiny_model):
    model = tiny_model("llama", eos_token_id=[1, 2, 3, 4, 5, 6])
    assert edited(model).eos_token_id == [1, 2, 3, 4, 5, 6]


def test_fields_that_change_when_read_back_are_refused(tiny_model, monkeypatch):
    model = tiny_model("llama")
    kind = type(model.config)
    monkeypatch.setattr(kind, "from_json_file", lambda _file: kind(**{**edited_fields, "rms_norm_eps": 0.5}))
    edited_fields = model.config.to_dict() | {"num_hidden_layers": 5}
    with pytest.raises(UnsupportedModel, match="the edited LlamaConfig reads back differently in rms_norm_eps"):
        make_plan(model)


def test_a_configuration_that_does_not_validate_is_refused(tiny_model):
    model = tiny_model("gpt2")
    model.config.layer_types = [FULL] * 4  # too short for 6 blocks and for 5
    with pytest.raises(UnsupportedModel, match="the edited GPT2Config does not validate"):
        make_plan(model)


def test_two_blocks_leave_nothing_to_try(tiny_model):
    model = tiny_model("llama", num_hidden_layers=2)
    refuse_depth_rules(model, decoder_stack(model))
