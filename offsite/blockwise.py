"""Computing with a model that is mapped from its files, in the memory of one block of it at a time.

A block lets go of its mapped weights once it has run (`offsite.mapped`). Where the model is to compute in another dtype
than its file has, a block's weights are brought to that as it begins and are the file's again when it ends: the whole
model in that dtype, of twice the bytes and no file's, never stands in memory, and computes the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from offsite.mapped import let_go

if TYPE_CHECKING:
    import torch
    from torch import nn


@contextmanager
def block_by_block(model: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Inside, a forward pass holds of the blocks' weights those of one block, and computes in `dtype`.

    No gradient may be asked for inside.

    Args:
        dtype: of floating parameters and buffers while they are used; None: the one that each has.
    """
    with ExitStack() as outer:
        running: dict[int, ExitStack] = {}

        def enter(module: nn.Module, _args: Any) -> None:
            running[id(module)] = outer.enter_context(ExitStack())
            running[id(module)].enter_context(widened(module.modules(), dtype))

        def leave(module: nn.Module, _args: Any, _output: Any) -> None:
            running.pop(id(module)).close()
            let_go(module.parameters())

        outer.enter_context(widened(outside_blocks(model), dtype))
        for module in _blocks(model):
            outer.callback(module.register_forward_pre_hook(enter).remove)
            outer.callback(module.register_forward_hook(leave).remove)
        yield
    let_go(model.parameters())


def outside_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the modules of `model` that lie in none of its lists of modules: embeddings, norms, heads."""
    inside = {id(module) for block in _blocks(model) for module in block.modules()}
    return [module for module in model.modules() if id(module) not in inside]


@contextmanager
def widened(modules: Iterable[nn.Module], dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, what these modules hold themselves, floating parameters and buffers, is in `dtype`; None: as it is.

    Afterwards they hold what they held, the same memory.
    """
    if dtype is None:
        yield
        return
    with ExitStack() as stack:
        for module in modules:
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point() and parameter.dtype != dtype:  # tied ones are met again as they are
                    stack.callback(_put_back, parameter, parameter.data)
                    wide = parameter.data.to(dtype)
                    let_go([parameter.data])
                    parameter.data = wide
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.is_floating_point() and buffer.dtype != dtype:
                    stack.callback(module._buffers.__setitem__, name, buffer)
                    module._buffers[name] = buffer.to(dtype)
        yield


def _put_back(parameter: nn.Parameter, data: torch.Tensor) -> None:
    parameter.data = data


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the members of every list of modules that lies in no other one."""
    from torch import nn

    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and id(module) not in inside:
            inside.update(map(id, module.modules()))
            yield from module
