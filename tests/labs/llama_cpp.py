"""A tiny model as a GGUF file, as llama.cpp's conversion would write it, and what llama.cpp computes with it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy
import torch
from transformers import PreTrainedModel

PAIRS = ("llama", "mistral", "granite", "smollm3")


def write_base(model: PreTrainedModel, path: Path) -> Path:
    """Write the model in float32, with a vocabulary of words."""
    config, kind = model.config, model.config.model_type
    name = "llama" if kind == "mistral" else kind
    writer = gguf.GGUFWriter(path, name)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
        writer.add_sliding_window(config.sliding_window)
    if kind == "phi3":
        writer.add_rope_scaling_orig_ctx_len(config.max_position_embeddings)
    if kind == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    _add_vocabulary(writer, config.vocab_size)
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    known = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    for source, tensor in model.state_dict().items():
        if source == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = tensor.float().numpy()
        if kind in PAIRS and source.split(".")[-2] in ("q_proj", "k_proj"):
            heads = config.num_attention_heads if ".q_proj." in source else config.num_key_value_heads
            values = in_pairs(values, heads)
        if kind == "gemma2" and source.endswith("norm.weight"):
            values = values + 1
        writer.add_tensor(known.get_name(source, (".weight", ".bias")), numpy.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def in_pairs(rows: numpy.ndarray, heads: int) -> numpy.ndarray:
    """Return a projection's rows head by head, each row of a head's first half before its mate of the second."""
    size = len(rows) // heads
    found = numpy.empty_like(rows)
    for head in range(heads):
        for number in range(size // 2):
            for half in range(2):
                found[head * size + 2 * number + half] = rows[head * size + half * size // 2 + number]
    return found


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """Words alone: of a byte that is no whole character llama.cpp returns no probabilities."""
    special = {"<unk>": gguf.TokenType.UNKNOWN, "<s>": gguf.TokenType.CONTROL, "</s>": gguf.TokenType.CONTROL}
    words = [f"word{number} " for number in range(len(special), size)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*special, *words])
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([*special.values(), *[gguf.TokenType.NORMAL] * len(words)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)


class LlamaCpp:
    """llama.cpp with a model and adapters, all in float32; an adapter is at work where a request names it."""

    def __init__(self, base: Path, *adapters: Path) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(base)
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 0.0) for path in adapters]
        params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 64, 1, 1
        params.n_gpu_layers, params.warmup, params.fit_params, params.verbosity = 0, False, False, -1
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # rounds to 16 bits
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server = xllamacpp.Server(params)

    def log_probabilities(self, prompt: list[int], adapter: int | None = None) -> torch.Tensor:
        """Return those of the next token, (vocabulary,)."""
        ask = {"prompt": prompt, "max_tokens": 1, "logprobs": 10_000, "temperature": 1.0, "cache_prompt": False}
        if adapter is not None:
            ask["lora"] = [{"id": adapter, "scale": 1.0}]
        said = self._server.handle_completions(ask)
        best = said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        by_id = {each["id"]: each["logprob"] for each in best}
        return torch.tensor([by_id[number] for number in range(len(by_id))])
