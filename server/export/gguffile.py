"""The GGUF file of a LoRA adapter: what llama.cpp loads beside a GGUF file of the full model.

llama.cpp multiplies B A by ``adapter.lora.alpha`` over the rank and knows no other scale, so alpha is the rank here and
the factors hold the whole update. Tensors have the names that llama.cpp's conversion gives to the full model's. For
some architectures that conversion also reorders the rows of the query and key projections, from the two halves of a
head that rotate against each other to pairs that stand together; the rows of their factors B are reordered alike.
Architectures are those in `ARCHITECTURES`, each held against llama.cpp by a test; others are refused.

Source: the GGUF specification and llama.cpp's conversion of the architectures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adapters.norms import modules_of
from offsite.errors import ConfigError, RunFailed, UnsupportedModel, WrongNames, WrongShape
from offsite.modelling.blocks import linear_dims
from server.plugging.fit import Fitted, full_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Architecture:
    """An architecture as llama.cpp calls it, and whether its query and key rows are in pairs there."""

    name: str
    pairs: bool = False


ARCHITECTURES = {
    "gemma2": Architecture("gemma2"),
    "granite": Architecture("granite", pairs=True),
    "llama": Architecture("llama", pairs=True),
    "mistral": Architecture("llama", pairs=True),
    "phi3": Architecture("phi3"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "smollm3": Architecture("smollm3", pairs=True),
}
"""By transformers' ``model_type``."""

_HEADS = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Return what llama.cpp calls the model.

    Raises:
        UnsupportedModel: when it is not among `ARCHITECTURES`.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise UnsupportedModel(
            f"no GGUF adapters of {config.model_type!r}, only of {', '.join(ARCHITECTURES)}",
            hint="plug in with --merge, and convert the checkpoint",
        )
    return found


def gguf_tensors(model: PreTrainedModel, architecture: Architecture, adapter: Fitted) -> dict[str, Tensor]:
    """Return the adapter's tensors under llama.cpp's names, float32, with rows in llama.cpp's order.

    Args:
        model: the full model without the adapter; not changed.
        adapter: LoRA whose update is B A, without a scale.

    Returns:
        ``blk.0.attn_q.weight.lora_a`` (rank, in), ``blk.0.attn_q.weight.lora_b`` (out, rank) of each module.

    Raises:
        UnsupportedModel: when llama.cpp has no tensor for a module.
        WrongNames, WrongShape: when the adapter does not fit the model.
    """
    import gguf

    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    known = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    found: dict[str, Tensor] = {}
    for module in modules_of(adapter.tensors):
        path = full_name(f"{module}.weight", adapter.sites).removesuffix(".weight")
        a, b = (adapter.tensors[f"{module}.{part}"].float() for part in ("lora_A", "lora_B"))
        _require_fitting(model, path, a, b)
        name = known.get_name(path)
        if name is None or f"{name}.weight.lora_a" in found:
            raise UnsupportedModel(
                f"llama.cpp has no tensor of its own for {path!r}", hint="plug in with --merge, and convert it"
            )
        heads = _HEADS.get(path.rpartition(".")[2]) if architecture.pairs else None
        order = slice(None) if heads is None else rows_in_pairs(len(b), getattr(model.config, heads))
        found[f"{name}.weight.lora_a"], found[f"{name}.weight.lora_b"] = a.contiguous(), b[order].contiguous()
    return found


def rows_in_pairs(num_rows: int, num_heads: int) -> Tensor:
    """Return which row of a query or key projection comes where in llama.cpp: int64 (num_rows,).

    Row i of the first half of a head, then row i of its second half, and so on.

    Raises:
        WrongShape: when the rows are not heads of an even size.
    """
    if num_rows % (2 * num_heads):
        raise WrongShape(f"{num_rows} rows are not {num_heads} heads of an even size")
    return torch.arange(num_rows).reshape(num_heads, 2, -1).transpose(1, 2).reshape(-1)


def write_gguf(path: Path, tensors: Mapping[str, Tensor], *, architecture: Architecture, rank: int, base: str) -> None:
    """Write the file at `path`, and read it again.

    Args:
        tensors: from `gguf_tensors`.
        base: what the full model is called.

    Raises:
        RunFailed: when it reads back as something else.
        OSError: when it cannot be written.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture.name)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32)
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    found = {each.name: torch.from_numpy(each.data.copy()) for each in gguf.GGUFReader(path).tensors}
    if found.keys() != tensors.keys() or any(not found[name].equal(tensor) for name, tensor in tensors.items()):
        raise RunFailed("the exported adapter reads back as other tensors than were written")


def _require_fitting(model: PreTrainedModel, path: str, a: Tensor, b: Tensor) -> None:
    try:
        inputs, outputs = linear_dims(model.get_submodule(path))
    except (AttributeError, ConfigError):
        raise WrongNames(f"the adapter has tensors for {path!r}, which is no linear of the full model") from None
    if (b.shape[0], a.shape[1], a.shape[0]) != (outputs, inputs, b.shape[1]):
        raise WrongShape(f"{path!r}: B {tuple(b.shape)} and A {tuple(a.shape)}, its linear is {outputs} x {inputs}")
