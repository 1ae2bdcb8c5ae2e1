"""Small random encoders of every family that is taken, and their checkpoints as people have them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from offsite.encoders.trunk import empty_encoder

SIZES = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 66, "pad_token_id": 0}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8, "share_att_key": True}
DEBERTA |= {"norm_rel_ebd": "layer_norm", "position_biased_input": False, "type_vocab_size": 0}
CHANGES: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"pad_token_id": 1},
    "xlm-roberta": {"pad_token_id": 1},
    "distilbert": {},
    "modernbert": {"local_attention": 8},
    "deberta-v2": DEBERTA,
}


def config(model_type: str, **changes: Any) -> Any:
    """Return a small configuration of that family."""
    sizes = {**SIZES, **CHANGES[model_type], **changes}
    if model_type == "distilbert":
        names = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
        names |= {"intermediate_size": "hidden_dim"}
        sizes = {names.get(key, key): value for key, value in sizes.items()}
    return AutoConfig.for_model(model_type, **sizes)


def shaken(model: PreTrainedModel) -> PreTrainedModel:
    """Every matrix and bias of the model matters."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
        elif name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    return model.eval()


def encoder(model_type: str, **changes: Any) -> PreTrainedModel:
    """Return a random trunk of that family, in evaluation mode and float32."""
    return shaken(empty_encoder(config(model_type, **changes)))


def saved(folder: Path, model_type: str, tokenizer: Any, *, head: str = "masked", **changes: Any) -> Path:
    """Write a random checkpoint with a masked-token head, or a classifier, and its tokenizer; return its folder."""
    auto = {"masked": AutoModelForMaskedLM, "classifier": AutoModelForSequenceClassification}[head]
    shaken(auto.from_config(config(model_type, **changes))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def separating_tokenizer(*, with_mask: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes with BERT's habits: a text stands between [CLS] and [SEP], which ends it.

    Args:
        with_mask: it has a mask as well, token 259.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["[PAD]", "[CLS]", "[SEP]", *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    core.add_special_tokens(["[PAD]", "[CLS]", "[SEP]"])
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    names |= {"mask_token": "[MASK]"} if with_mask else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def padded_batch(pad: int = 0) -> dict[str, torch.Tensor]:
    """Return two texts of 12 tokens, the second padded behind its seventh."""
    ids_BT = torch.randint(5, 259, (2, 12), generator=torch.Generator().manual_seed(1))
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 7:] = 0
    return {"input_ids": ids_BT.masked_fill(mask_BT == 0, pad), "attention_mask": mask_BT}
