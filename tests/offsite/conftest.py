"""Tiny random models of every architecture that is tested, and what to feed them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tiny_architectures
import torch
import transformers
from speakers import bytes_tokenizer, parrot, spread_llama  # noqa: F401 - fixtures
from transformers import AutoConfig, PreTrainedModel

NUM_BLOCKS = 6
COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": NUM_BLOCKS, "n_head": 4, "n_positions": 64, "n_inner": 48}
GPT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4, "first_k_dense_replace": 2}
DEEPSEEK |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
SMALL_T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": NUM_BLOCKS, "num_heads": 4}
VISION = {**COMMON, "image_size": 16, "patch_size": 8}

# architecture: (class, settings)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", GROUPED),
    "mistral": ("MistralForCausalLM", {**GROUPED, "sliding_window": 4}),
    "qwen2": (
        "Qwen2ForCausalLM",
        {**GROUPED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3ForCausalLM", GROUPED),
    "gemma2": ("Gemma2ForCausalLM", {**GROUPED, "sliding_window": 4}),
    "gemma3_text": ("Gemma3ForCausalLM", {**GROUPED, "sliding_window": 4, "sliding_window_pattern": 3}),
    "phi": ("PhiForCausalLM", COMMON),
    "phi3": ("Phi3ForCausalLM", GROUPED),
    "gpt2": ("GPT2LMHeadModel", GPT),
    "gpt_neox": ("GPTNeoXForCausalLM", COMMON),
    "gptj": ("GPTJForCausalLM", {**GPT, "rotary_dim": 4}),
    "opt": ("OPTForCausalLM", {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 96, "hidden_size": 32, "n_layer": NUM_BLOCKS, "n_head": 4}),
    "falcon": ("FalconForCausalLM", {**COMMON, "alibi": False}),
    "olmo2": ("Olmo2ForCausalLM", GROUPED),
    "smollm3": ("SmolLM3ForCausalLM", {**GROUPED, "no_rope_layer_interval": 3}),
    "granite": ("GraniteForCausalLM", GROUPED),
    "mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**GROUPED, **EXPERTS, "num_experts": 4, "mlp_only_layers": [3]}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {**COMMON, **EXPERTS, **DEEPSEEK}),
    "t5": ("T5ForConditionalGeneration", {**SMALL_T5, "decoder_start_token_id": 0}),
    "bert": ("BertForMaskedLM", COMMON),
    "vit": ("ViTForImageClassification", VISION),
    "clip": ("CLIPModel", {"text_config": COMMON, "vision_config": VISION, "projection_dim": 16}),
    # beyond the promised ones: rules that others share
    "bart": (
        "BartForConditionalGeneration",
        {"vocab_size": 96, "d_model": 32, "encoder_layers": 6, "decoder_layers": 5, "encoder_ffn_dim": 48}
        | {"decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4},
    ),
    "cohere2": ("Cohere2ForCausalLM", {**GROUPED, "sliding_window": 4, "sliding_window_pattern": 3}),
    "exaone4": ("Exaone4ForCausalLM", {**GROUPED, "sliding_window": 4, "sliding_window_pattern": 3}),
    "glm4_moe": (
        "Glm4MoeForCausalLM",
        {**GROUPED, **EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1},
    ),
    "gpt_oss": ("GptOssForCausalLM", {**GROUPED, **EXPERTS, "num_local_experts": 4, "sliding_window": 4}),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {"vocab_size": 96, "hidden_size": 32, "num_layers": 6, "num_heads": 4, "max_position_embeddings": 64}
        | {"attention_types": [[["global", "local"], 3]], "window_size": 4},
    ),
    "llama4_text": (
        "Llama4ForCausalLM",
        {**GROUPED, "num_local_experts": 4, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2}
        | {"attention_chunk_size": 4, "no_rope_layer_interval": 3},
    ),
    "gemma3n_text": (
        "Gemma3nForCausalLM",
        {**GROUPED, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 96, "hidden_size_per_layer_input": 8}
        | {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 6, "sliding_window": 4}
        | {"layer_types": ["sliding_attention", "full_attention"] * 3},
    ),
    "jamba": (
        "JambaForCausalLM",
        {**COMMON, "num_key_value_heads": 2, "num_experts": 2, "attn_layer_period": 3, "attn_layer_offset": 1}
        | {"mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    ),
    "modernbert": ("ModernBertForMaskedLM", COMMON),
}


def _tiny_model(name: str, **changes: Any) -> PreTrainedModel:
    if name not in MODELS:
        return tiny_architectures.tiny(name, **changes)
    kind, settings = MODELS[name]
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, kind)(AutoConfig.for_model(name, **{**settings, **changes}))
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1:  # larger than the usual start, so that every block matters
            parameter.data.normal_(0, 0.2)
        elif key.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    return model.eval()


def _feed(model: PreTrainedModel) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 90, (2, 10), generator=generator)
    pixels = torch.randn(2, 3, 16, 16, generator=generator)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    kind = model.config.model_type
    if kind == "vit":
        return {"pixel_values": pixels}
    if kind == "clip":
        return {**text, "pixel_values": pixels}
    if model.config.is_encoder_decoder:
        return {**text, "decoder_input_ids": ids[:, :6], "use_cache": False}
    return {**text, "use_cache": False} if model.can_generate() else text


@torch.no_grad()
def _logits(model: PreTrainedModel) -> torch.Tensor:
    output = model(**_feed(model))
    return output.logits_per_image if model.config.model_type == "clip" else output.logits


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """Build a tiny random model of an architecture, here or in the labs; keywords change its configuration."""
    return _tiny_model


@pytest.fixture(scope="session")
def feed() -> Callable[[PreTrainedModel], dict[str, Any]]:
    """The inputs whose logits are compared."""
    return _feed


@pytest.fixture(scope="session")
def logits() -> Callable[[PreTrainedModel], torch.Tensor]:
    """Logits on the fixed inputs, without a cache."""
    return _logits
