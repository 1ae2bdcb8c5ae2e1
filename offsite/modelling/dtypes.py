"""Which tensors a model keeps finer than its own dtype, and how it is brought to another one.

Some parts of a model go wrong when they are rounded: of a router's correction in bfloat16, other experts are chosen.
Architectures name such parts, and checkpoints store them in float32 beside weights in bfloat16.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import nn

_HALVES = (torch.float16, torch.bfloat16)


def main_dtype(tensors: Iterable[tuple[torch.dtype, int]]) -> torch.dtype:
    """Return the floating dtype of most numbers, float32 where there are none.

    Args:
        tensors: dtype and number of elements of each.
    """
    counts: Counter[torch.dtype] = Counter()
    for dtype, num in tensors:
        if dtype.is_floating_point:
            counts[dtype] += num
    return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32


def kept_in_float32(model: nn.Module, names: Iterable[str], dtype: torch.dtype) -> set[str]:
    """Return those of `names` that the architecture keeps in float32 when the rest is `dtype`.

    Transformers reads these attributes of a class in the same way when it loads a checkpoint.
    """
    patterns: set[str] = set()
    if dtype in _HALVES:
        patterns |= set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype is torch.float16:
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if not patterns:
        return set()
    matches = re.compile("|".join(pattern.replace("*", ".*") for pattern in sorted(patterns)))
    return {name for name in names if matches.search(name)}


def finer(
    model: nn.Module, stored: Mapping[str, tuple[torch.dtype, int]], dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """Return the floating tensors that stay finer than `dtype` when `model` is brought to it, with what they are then.

    They are those that the architecture keeps in float32, and those that are stored finer than most of the model.

    Args:
        stored: dtype and number of elements of the model's tensors, by name.
    """
    main = main_dtype(stored.values())
    floating = {name: own for name, (own, _) in stored.items() if own.is_floating_point}
    found = {name: torch.promote_types(own, dtype) for name, own in floating.items() if own.itemsize > main.itemsize}
    for name in kept_in_float32(model, floating, dtype):
        found[name] = torch.promote_types(found.get(name, dtype), torch.float32)
    return {name: one for name, one in found.items() if one != dtype}


def stored_in(model: nn.Module) -> dict[str, tuple[torch.dtype, int]]:
    """Return dtype and number of elements of every parameter and saved buffer, by name."""
    return {name: (tensor.dtype, tensor.numel()) for name, tensor in model.state_dict().items()}


def cast_model(model: nn.Module, dtype: torch.dtype, *, stay: Mapping[str, torch.dtype] | None = None) -> None:
    """Give floating parameters and saved buffers `dtype`, in place; ties between parameters stay.

    What a model derives for itself and never saves (rotary frequencies) keeps its precision.

    Args:
        stay: what stays finer, as `finer` says; by default it is asked. For a model that carries an adapter by now, it
            is what was said of the model without it.
    """
    finer_ones = finer(model, stored_in(model), dtype) if stay is None else stay
    wanted = {_without_adapter(name): one for name, one in finer_ones.items()}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(wanted.get(_without_adapter(name), dtype))
    for place, module in model.named_modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_floating_point() and key not in module._non_persistent_buffers_set:
                name = _without_adapter(f"{place}.{key}")
                setattr(module, key, buffer.to(wanted.get(name, dtype)))


def _without_adapter(name: str) -> str:
    """Return the name that a tensor has when peft has put no layer around its module, nor a model around the model."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
