"""Tiny random models whose linears are laid out differently: Conv1D, experts, gate and up in one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

SIZES = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
USUAL = {**SIZES, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4}
USUAL |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
DEEPSEEK = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 2}
DEEPSEEK |= {"n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8}
DEEPSEEK |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MODELS = {
    "gpt2": ("GPT2LMHeadModel", {**SIZES, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64, "n_inner": 48}),
    "mixtral": ("MixtralForCausalLM", {**USUAL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "phi3": ("Phi3ForCausalLM", USUAL),
    "llama": ("LlamaForCausalLM", USUAL),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**USUAL, **DEEPSEEK}),
}


@pytest.fixture(scope="session")
def tiny() -> Callable[[str], PreTrainedModel]:
    """Build a random model of six blocks."""

    def build(name: str) -> PreTrainedModel:
        kind, settings = MODELS[name]
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, kind)(AutoConfig.for_model(name, **settings))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.2)
        return model.eval()

    return build
