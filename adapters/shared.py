"""LoRA on a CPU or GPU without autocast: adapters that read one input share a product, and nothing is added up twice.

peft computes every adapter by itself: two small products, a scaling and an addition, each a pass over a tensor of the
layer's output, with as many in the backward pass. Here the layers of one parent that are handed the very same tensor
one after another (q, k and v; gate and up) are one operation: their A are stacked into one product, the additions are
part of the products, and the gradient of the input is summed where it is made. The result is peft's but for the order
of float additions.

A layer is left to peft where that is not so: dropout, DoRA, several adapters, a merged or switched-off one, a layer
that is not an `nn.Linear`, autocast.

Shapes: N rows of the input (batch and tokens), I inputs, O outputs of a layer, R rank, S all ranks of a group.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from adapters.kinds import Attached
from offsite.encoders.outputs import outputs
from offsite.modelling.head import causal_lm

_ADAPTER = "default"
_PROBE_TOKENS = 2


class Weights(NamedTuple):
    """A frozen linear layer and its adapter: x W' + b + scale (x A') B'."""

    weight: Tensor
    """W, (O, I)."""

    bias: Tensor | None
    down: Tensor
    """A, (R, I)."""

    up: Tensor
    """B, (O, R)."""

    scale: float


def share_products(attached: Attached) -> int:
    """The adapter's layers compute together where they may, from now on. Returns how many are part of such a group.

    Which layers read one tensor is seen in a short pass without gradients. What peft's layers are asked for - names,
    parameters, merging - is theirs as before.
    """
    parents: dict[str, list[_Layer]] = {}
    for name, module in attached.model.named_modules():
        if _is_plain(module):
            parents.setdefault(name.rpartition(".")[0], []).append(_Layer(module))
    families = [_Siblings(layers) for layers in parents.values()]
    if families:
        lm = causal_lm(attached.model)
        modes = [(module, module.training) for module in lm.modules()]
        lm.eval()
        ids_BT = torch.zeros((1, _PROBE_TOKENS), dtype=torch.long, device=next(lm.parameters()).device)
        try:
            with torch.no_grad():
                outputs(lm, ids_BT)
        finally:
            for module, mode in modes:
                module.training = mode
    return sum(family.settle() for family in families)


def together(x: Tensor, layers: Sequence[Weights]) -> tuple[Tensor, ...]:
    """Return what each layer with its adapter makes of one input: (..., O) each, differentiable in x, A and B.

    Args:
        x: (..., I), of the weights' dtype.
    """
    frozen = [(layer.weight, layer.bias, layer.scale) for layer in layers]
    outputs: tuple[Tensor, ...] = _Together.apply(x, frozen, *(one for each in layers for one in (each.down, each.up)))
    return outputs


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, frozen: list[Any], *adapters: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        x_NI = x.reshape(-1, x.shape[-1])
        downs, ups = adapters[0::2], adapters[1::2]
        down_SI = downs[0] if len(downs) == 1 else torch.cat(downs)
        h_NS = x_NI @ down_SI.t()
        outputs, first = [], 0
        for (weight, bias, scale), up in zip(frozen, ups, strict=True):
            last = first + up.shape[1]
            y_NO = functional.linear(x_NI, weight, bias)
            y_NO.addmm_(h_NS[:, first:last], up.t(), alpha=scale)
            outputs.append(y_NO.view(*x.shape[:-1], -1))
            first = last
        ctx.save_for_backward(x_NI, h_NS, down_SI, *ups, *(weight for weight, _, _ in frozen))
        ctx.scales, ctx.shape = [scale for _, _, scale in frozen], x.shape
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x_NI, h_NS, down_SI, *others = ctx.saved_tensors
        num = len(slopes)
        ups, weights = others[:num], others[num:]
        toward_NI: Tensor | None = None
        inner_NS, raised, first = torch.zeros_like(h_NS), [], 0
        for slope, up, weight, scale in zip(slopes, ups, weights, ctx.scales, strict=True):
            last = first + up.shape[1]
            if slope is None:
                raised.append(torch.zeros_like(up))
            else:
                slope_NO = slope.reshape(-1, slope.shape[-1])
                inner_NS[:, first:last] = (slope_NO @ up).mul_(scale)
                raised.append((slope_NO.t() @ h_NS[:, first:last]).mul_(scale))
                if ctx.needs_input_grad[0]:
                    toward_NI = slope_NO @ weight if toward_NI is None else toward_NI.addmm_(slope_NO, weight)
            first = last
        if ctx.needs_input_grad[0]:
            toward_NI = inner_NS @ down_SI if toward_NI is None else toward_NI.addmm_(inner_NS, down_SI)
        lowered = (inner_NS.t() @ x_NI).split([up.shape[1] for up in ups])
        given = [one for pair in zip(lowered, raised, strict=True) for one in pair]
        return (None if toward_NI is None else toward_NI.view(ctx.shape), None, *given)


class _Layer:
    """One of peft's layers, and its own forward."""

    def __init__(self, module: Any) -> None:
        self.module, self.plain = module, module.forward

    @property
    def weights(self) -> Weights:
        """What it is made of."""
        base, module = self.module.base_layer, self.module
        adapter = module.lora_A[_ADAPTER].weight, module.lora_B[_ADAPTER].weight, module.scaling[_ADAPTER]
        return Weights(base.weight, base.bias, *adapter)

    def is_shared(self, x: Tensor) -> bool:
        """Tell whether this pass through the layer is the plain one."""
        module = self.module
        is_own = not module.disable_adapters and not module.merged and list(module.active_adapters) == [_ADAPTER]
        is_still = not module.training or isinstance(module.lora_dropout[_ADAPTER], nn.Identity)
        dtypes = {x.dtype, module.lora_A[_ADAPTER].weight.dtype, module.base_layer.weight.dtype}
        return is_own and is_still and len(dtypes) == 1 and not torch.is_autocast_enabled(x.device.type)


class _Siblings:
    """Layers of one parent. Until they are settled it is seen which are handed one tensor, one after another."""

    def __init__(self, layers: Sequence[_Layer]) -> None:
        """Their forwards are taken."""
        self._settled = False
        self._groups: dict[int, list[_Layer]] = {id(layer): [layer] for layer in layers}
        self._first: tuple[_Layer, weakref.ref[Tensor]] | None = None
        self._made: dict[int, tuple[Tensor, Tensor]] = {}  # outputs that wait for their layer, with their input
        for layer in layers:
            layer.module.forward = self._forward(layer)

    def settle(self) -> int:
        """From now on the groups are as they were seen. Returns how many layers share with another."""
        self._settled, self._first = True, None
        return sum(len(group) for group in self._groups.values() if len(group) > 1)

    def _forward(self, layer: _Layer) -> Callable[..., Tensor]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if args or kwargs or not layer.is_shared(x):
                self._made.clear()
                plain: Tensor = layer.plain(x, *args, **kwargs)
                return plain
            if not self._settled:
                self._see(layer, x)
            waiting = self._made.pop(id(layer), None)
            if waiting is not None and waiting[0] is x:
                return waiting[1]
            group = self._groups[id(layer)] if self._settled else [layer]
            outputs = together(x, [each.weights for each in group])
            self._made = {id(each): (x, one) for each, one in zip(group[1:], outputs[1:], strict=True)}
            return outputs[0]

        return forward

    def _see(self, layer: _Layer, x: Tensor) -> None:
        if self._first is not None and self._first[1]() is x and self._first[0] is not layer:
            group = self._groups[id(self._first[0])]
            if not any(each is layer for each in group):
                group.append(layer)
        else:
            self._first = (layer, weakref.ref(x))


def _is_plain(module: nn.Module) -> bool:
    """Tell whether it is peft's LoRA on an ordinary linear layer, and nothing besides."""
    from peft.tuners.lora.layer import Linear

    return (
        type(module) is Linear
        and type(module.base_layer) is nn.Linear
        and list(module.lora_A) == [_ADAPTER]
        and not module.lora_variant
        and module.lora_B[_ADAPTER].bias is None
        and not module.base_layer.weight.requires_grad
    )
