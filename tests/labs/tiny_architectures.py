"""Tiny random models of many architectures, six blocks each, which the letters' tokenizer goes with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

NUM_BLOCKS = 6
SIZES: dict[str, Any] = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PLAIN: dict[str, Any] = {
    **SIZES,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GROUPED = {**PLAIN, "head_dim": 8}
SLIDING = {**GROUPED, "sliding_window": 4}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
ROUTED |= {"first_k_dense_replace": 3, "n_shared_experts": 1}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
LATENT |= {"v_head_dim": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
MIXED = ["linear_attention", "full_attention"] * 3

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "stablelm": PLAIN,
    "starcoder2": {**PLAIN, "sliding_window": 4},
    "cohere2": {**SLIDING, "sliding_window_pattern": 3},
    "glm4": GROUPED,
    "ernie4_5": GROUPED,
    "hunyuan_v1_dense": GROUPED,
    "exaone4": {**SLIDING, "sliding_window_pattern": 3},
    "helium": GROUPED,
    "olmo3": SLIDING,
    "gpt_oss": {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {**PLAIN, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**PLAIN, **EXPERTS, "shared_expert_intermediate_size": 24, "mlp_only_layers": [2]},
    "phimoe": {**PLAIN, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {
        **GROUPED,
        "num_local_experts": 4,
        "intermediate_size_mlp": 48,
        "moe_layers": [1, 3, 4],
        "attention_chunk_size": 4,
        "no_rope_layer_interval": 3,
    },
    "granitemoehybrid": {
        **PLAIN,
        **MAMBA,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 24,
        "layer_types": ["mamba", "attention"] * 3,
    },
    "bamba": {**PLAIN, **MAMBA, "attn_layer_indices": [1, 4]},
    "lfm2": {**PLAIN, "block_multiple_of": 8, "layer_types": ["conv", "full_attention"] * 3},
    "qwen3_next": {
        **GROUPED,
        **EXPERTS,
        "shared_expert_intermediate_size": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": MIXED,
    },
    "nemotron": PLAIN,
    "apertus": PLAIN,
    "bitnet": PLAIN,
    "seed_oss": GROUPED,
    # more that stand for a kind
    "mpt": {**SIZES, "d_model": 32, "n_layers": NUM_BLOCKS, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 4},
    "mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {**GROUPED, **ROUTED},
    "deepseek_v2": {**PLAIN, **ROUTED, **LATENT},
    "deepseek_v3": {**PLAIN, **ROUTED, **LATENT},
    "dots1": {**GROUPED, **ROUTED},
    "hunyuan_v1_moe": {**GROUPED, "num_experts": 4, "moe_topk": 2},
    "ernie4_5_moe": {
        **GROUPED,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 16,
        "moe_layer_start_index": 3,
        "moe_num_shared_experts": 1,
    },
}


def tiny(architecture: str, **changes: Any) -> PreTrainedModel:
    """Return a random model whose every block matters."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **{**ARCHITECTURES[architecture], **changes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.eval()
