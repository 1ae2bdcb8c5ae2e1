"""Tiny random models of architectures that keep more of the past than keys and values, or keep it in their own way."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

SMALL = {"vocab_size": 259, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "hidden_size": 32}
WIDE = {
    **SMALL,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
SSM = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 8}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2}
TURNS = ["linear_attention", "full_attention"] * 2
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "bamba": {**WIDE, **SSM, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**WIDE, **SSM, "mamba_d_ssm": 64},
    "falcon_mamba": {**SMALL, "num_hidden_layers": 4, "state_size": 8},
    "granitemoehybrid": {
        **WIDE,
        **SSM,
        "layer_types": ["mamba", "attention"] * 2,
        "shared_intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "position_embedding_type": "rope",
    },
    "jamba": {
        **WIDE,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 4,
        "use_mamba_kernels": False,
    },
    "lfm2": {**WIDE, "layer_types": ["conv", "full_attention"] * 2},
    "mamba": {**SMALL, "num_hidden_layers": 4, "state_size": 8},
    "mamba2": {
        **SMALL,
        "num_hidden_layers": 4,
        "state_size": 8,
        "num_heads": 4,
        "head_dim": 16,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "minimax": {**WIDE, "head_dim": 8, "num_local_experts": 2, "layer_types": TURNS, "block_size": 8},
    "nemotron_h": {
        **WIDE,
        "hybrid_override_pattern": "M*M*",
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "head_dim": 8,
    },
    "olmo_hybrid": {**WIDE, **LINEAR, "layer_types": TURNS},
    "qwen3_next": {
        **WIDE,
        **LINEAR,
        **EXPERTS,
        "layer_types": TURNS,
        "head_dim": 8,
        "shared_expert_intermediate_size": 16,
    },
    "recurrent_gemma": {**WIDE, "lru_width": 32, "attention_window_size": 8, "head_dim": 8},
    "rwkv": {
        **SMALL,
        "num_hidden_layers": 4,
        "attention_hidden_size": 32,
        "intermediate_size": 48,
        "context_length": 128,
    },
    "zamba": {
        **WIDE,
        "mamba_d_state": 8,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "use_mamba_kernels": False,
        "attention_hidden_size": 64,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        **WIDE,
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "chunk_size": 8,
        "num_key_value_heads": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "use_mem_rope": True,
        "adapter_rank": 4,
        "use_mamba_kernels": False,
    },
    "xlstm": {**SMALL, "num_hidden_layers": 4, "num_heads": 4, "chunk_size": 8},
}


def tiny(kind: str) -> PreTrainedModel:
    """A random model of this kind whose weights are large enough that it does not repeat one token."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPES[kind]))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "A_log" not in name:
            parameter.data.normal_(0, 0.3)
    return model.eval()


@torch.no_grad()
def uncached(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy tokens by whole forwards: no cache, no positions, nothing handed from step to step."""
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]
