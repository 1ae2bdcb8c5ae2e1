"""Small random encoder-decoders of every family that is taken, and their checkpoints as people have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from offsite.seq2seq.models import empty_seq2seq

T5 = {"vocab_size": 259, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 5, "num_decoder_layers": 4}
T5 |= {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "dropout_rate": 0.0}
BART = {"vocab_size": 259, "d_model": 32, "encoder_layers": 5, "decoder_layers": 4, "max_position_embeddings": 96}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
BART |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "dropout": 0.0}
BART |= {"forced_eos_token_id": None}
GATED = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 1}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", T5),
    "gated-t5": ("t5", GATED),
    "bart": ("bart", BART),
}


def seq2seq(name: str, **changes: Any) -> PreTrainedModel:
    """Return a random model of that shape, in evaluation mode and float32; gated T5 with a head of its own."""
    model_type, sizes = SHAPES[name]
    torch.manual_seed(0)
    model = empty_seq2seq(AutoConfig.for_model(model_type, **{**sizes, **changes}))
    if name == "gated-t5":  # as in the checkpoints of T5 v1.1 and Flan
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
        del model.all_tied_weights_keys["lm_head.weight"]
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
        elif key.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    return model.eval()


def saved(folder: Path, name: str, **changes: Any) -> Path:
    """Write a random checkpoint of that shape and its tokenizer; return its folder."""
    seq2seq(name, **changes).save_pretrained(folder)
    closing_tokenizer().save_pretrained(folder)
    return folder


def closing_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes with T5's habit: it closes every text by an end-of-sequence token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    core.add_special_tokens(["<pad>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def rows(num: int = 2, *, padded: bool = True) -> dict[str, torch.Tensor]:
    """Return prompts of 12 tokens and answers of 7, the last row's shorter; all as transformers names them."""
    generator = torch.Generator().manual_seed(1)
    batch = {}
    for prefix, length, short in (("", 12, 7), ("decoder_", 7, 4)):
        ids = torch.randint(3, 259, (num, length), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[-1, short:] = 0
        batch |= {f"{prefix}input_ids": ids * mask, f"{prefix}attention_mask": mask}
    return batch


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return what the model says of every answer's position, as transformers calls it."""
    with torch.no_grad():
        return model(**batch, use_cache=False).logits
