"""Adapters that are the model's own parameters: whole blocks, and BitFit (their vectors alone).

Source: whole end blocks, arXiv:2302.04870; BitFit, arXiv:2106.10199. As in the offsite-tuning reference, BitFit here
means every one-dimensional parameter, so that architectures without biases still have their norms to train.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from adapters.kinds import Attached, register_kind
from adapters.place import in_middle, placed_blocks
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.layout import Layout
from offsite.errors import ConfigError, UnsupportedModel
from offsite.tensors import TensorSpec

_FLOATS = {"bfloat16", "float16", "float32", "float64"}


def declare(spec: AdapterSpec, layout: Layout, block_tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return every floating parameter of the placed blocks; for BitFit only those of one dimension."""
    blocks = placed_blocks(spec, layout)
    if in_middle(blocks) and not layout.middle_whole:
        raise ConfigError(
            f"--adapter {spec.kind} --placement {spec.placement} needs a package whose middle blocks are whole",
            hint=f"use --placement {layout.num_bottom}+{layout.num_top}, or --adapter lora",
        )
    found = {
        name: TensorSpec(shape=stated.shape, dtype=spec.dtype)
        for name, stated in block_tensors.items()
        if ".".join(name.split(".")[:2]) in blocks and name not in layout.buffers
        if stated.dtype in _FLOATS and (spec.kind == "blocks" or len(stated.shape) == 1)
    }
    if not found:
        raise ConfigError(f"--adapter {spec.kind}: the placed blocks hold no such parameter")
    return found


def attach(model: nn.Module, spec: AdapterSpec, sites: Mapping[str, str], names: tuple[str, ...]) -> Attached:
    """Unfreeze the named parameters and turn them into float32 masters."""
    trainable: dict[str, nn.Parameter] = {}
    for name in names:
        role, number, inner = name.split(".", 2)
        path = f"{sites[f'{role}.{number}']}.{inner}"
        owner, _, last = path.rpartition(".")
        found = getattr(model.get_submodule(owner), last, None)
        if not isinstance(found, nn.Parameter):
            raise UnsupportedModel(f"{name!r} is not a parameter of the model at {path!r}")
        if found.dtype != torch.float32:
            found.data = found.data.float()
        found.requires_grad_(True)
        trainable[name] = found
    return Attached(model, trainable)


register_kind("blocks", declare, attach)
register_kind("bitfit", declare, attach)
