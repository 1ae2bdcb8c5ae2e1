"""Frozen weights held in bfloat16 where a run computes in it, instead of cast anew at every step.

Autocast casts the float32 weight of a linear layer whenever the layer is called, and keeps the cast copy until the
backward pass. Here the copy is made once and stands in the weight's place: the products, and so all results, are the
same bit for bit, and the weights take half the memory. An embedding's weight is held so, too, where no value of it
would be rounded; what is looked up in it is float32 as before. Everything trained stays float32.

A model that is held so must be called under autocast to bfloat16.

Shapes: B rows, T tokens, D width of the states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adapters.kinds import Attached
from offsite.encoders.outputs import outputs
from offsite.modelling.head import causal_lm
from offsite.vision.models import reads_images

_PROBE_LENGTHS = (5, 3)


def hold_frozen(attached: Attached) -> int:
    """The frozen weights of plain linear layers are bfloat16 from now on. Returns how many bytes fewer they take.

    A pass under autocast before and after says whether the model's scores are the same bits; where they are not, for
    a model may look at a weight's dtype, everything is as it was and 0 is returned.

    Args:
        attached: in one process, not sharded; its model in float32.
    """
    model: Any = attached.model
    expected = _scores(model)
    before = {id(one): one for one in model.parameters()}
    held = _held_modules(model)
    own = [(module, module.weight) for module in held]
    handles = []
    made: dict[int, nn.Parameter] = {}
    for module, weight in own:
        if id(weight) not in made:
            made[id(weight)] = nn.Parameter(weight.detach().to(torch.bfloat16), requires_grad=False)
        module.weight = made[id(weight)]
        if isinstance(module, nn.Embedding):
            handles.append(module.register_forward_hook(_widened))
    if not torch.equal(_scores(model), expected):
        for handle in handles:
            handle.remove()
        for module, weight in own:
            module.weight = weight
        return 0
    after = {id(one): one for one in model.parameters()}
    return _bytes(before) - _bytes(after)


def _held_modules(model: nn.Module) -> list[Any]:
    """Return the modules whose weight may be held: plain, frozen, and exact."""
    kept_whole = {id(layer) for module in model.modules() if _looks_at_weights(module) for layer in module.modules()}
    found: list[Any] = []
    for module in model.modules():
        if type(module) not in (nn.Linear, nn.Embedding) or id(module) in kept_whole:
            continue
        weight: Any = module.weight
        if weight.requires_grad or weight.dtype != torch.float32:
            continue
        if type(module) is nn.Linear or _is_exact(weight):
            found.append(module)
    return found


def _looks_at_weights(module: nn.Module) -> bool:
    """Tell whether it is a layer of peft's whose variant, as DoRA, computes with the frozen weight itself."""
    return bool(getattr(module, "lora_variant", None))


def _is_exact(weight: Tensor) -> bool:
    """Tell whether bfloat16 holds every value of it."""
    return all(torch.equal(part.to(torch.bfloat16).float(), part) for part in weight.detach().split(4096))


def _widened(_module: nn.Module, _args: object, found_BTD: Tensor) -> Tensor:
    return found_BTD.float()


def _scores(model: Any) -> Tensor:
    """Return the scores, or an encoder's states, of two made-up rows, one of them padded, under autocast."""
    lm = causal_lm(model)
    device = next(lm.parameters()).device
    lengths, width = torch.tensor(_PROBE_LENGTHS, device=device), max(_PROBE_LENGTHS)
    mask_BT = (torch.arange(width, device=device) < lengths[:, None]).long()
    known = 1 if reads_images(lm) else lm.config.vocab_size
    ids_BT = (torch.arange(mask_BT.numel(), device=device).view_as(mask_BT) + 2) % known
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, cache_enabled=False):
            scores = outputs(lm, ids_BT, mask_BT)
    finally:
        for module, mode in modes:
            module.training = mode
    return scores


def _bytes(parameters: dict[int, nn.Parameter]) -> int:
    return sum(one.numel() * one.element_size() for one in parameters.values())
