"""Random adapters of every kind for a tiny model, as large as its weights, so that they show."""

from __future__ import annotations

import torch

from offsite.artefacts.bundle import AdapterSpec
from offsite.modelling.blocks import block_list, decoder_stack, linear_dims, linear_names
from server.plugging.fit import Fitted, scaled


def fitted(model, kind, seed, *, rank=4, at=(0, 7), size=0.1, **changes):
    """A random adapter of that kind on blocks of the model: as large as its weights, so that it shows."""
    generator = torch.Generator().manual_seed(seed)
    stack = decoder_stack(model)
    spec = AdapterSpec(**{"kind": kind, "placement": "1+1", "rank": rank, "alpha": 4.0, "dtype": "float32", **changes})
    sites, tensors = {}, {}
    for role, number in zip(("bottom.0", "top.0"), at, strict=True):
        sites[role] = f"{stack.name}.{number}"
        block = block_list(model, stack)[number]
        if kind in ("lora", "rslora", "dora"):
            for name in linear_names(block):
                inputs, outputs = linear_dims(block.get_submodule(name))
                tensors[f"{role}.{name}.lora_A"] = size * torch.randn(rank, inputs, generator=generator)
                tensors[f"{role}.{name}.lora_B"] = size * torch.randn(outputs, rank, generator=generator)
                if kind == "dora":
                    tensors[f"{role}.{name}.magnitude"] = 0.5 + torch.rand(outputs, generator=generator)
        else:
            for name, parameter in block.named_parameters():
                if kind == "blocks" or parameter.dim() == 1:
                    noise = size * torch.randn(parameter.shape, generator=generator)
                    tensors[f"{role}.{name}"] = parameter.detach() + noise
    return Fitted(spec, tensors, sites)


def adapters_of(model):
    last = model.config.num_hidden_layers - 1
    at = (0, last)
    return {
        "lora": fitted(model, "lora", 1, at=at),
        "lora again": fitted(model, "lora", 2, at=at),
        "lora elsewhere": fitted(model, "lora", 3, at=(1, last)),
        "lora of rank 7": fitted(model, "lora", 4, rank=7, at=at),
        "half of rslora": scaled(model, fitted(model, "rslora", 5, at=at), 0.5),
        "dora": fitted(model, "dora", 6, at=at),
        "bitfit": fitted(model, "bitfit", 7, at=at),
        "blocks": fitted(model, "blocks", 8, at=at),
        "none": None,
    }
