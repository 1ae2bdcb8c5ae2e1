"""Small random checkpoints as people have them on disk, and the verb that makes a package of one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_model(model_type: str, *, std: float = 0.2, **changes: Any) -> PreTrainedModel:
    """Return a random model of that architecture whose every matrix matters, in evaluation mode and float32."""
    cls = CONFIG_MAPPING[model_type]
    known = cls().to_dict().keys() | cls.attribute_map.keys()
    sizes = {key: value for key, value in SIZES.items() if key in known and cls.attribute_map.get(key) not in changes}
    config = cls(**{**sizes, **changes})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, std)
    return model.eval()


def save(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write a checkpoint with its tokenizer and return its folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Set keys of ``config.json`` by hand, as people do."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the checkpoint's tensors in its file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def distill(checkpoint: Path, package: Path, *words: str) -> int:
    """Run ``offsite distill`` without training, middle whole unless told otherwise; return its exit code."""
    from offsite import cli

    stated = [] if "--method" in words else ["--method", "keep-all"]
    return cli.run(["distill", str(checkpoint), "-o", str(package), "--steps", "0", "--device", "cpu", *stated, *words])
