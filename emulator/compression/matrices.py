"""The weights of a block that an encoding may stand for, and what reaches each of them on public text.

They are the weights of its linears and of its experts; routers, norms, biases and convolutions stay as they are.

Shapes: B rows, T tokens, N tokens in a row, I inputs, O outputs, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from emulator.compression.activations import Batch, real_tokens
from emulator.compression.passage import Passage
from offsite.console import progress
from offsite.errors import ConfigError, UnsupportedModel
from offsite.modelling.blocks import hidden_of, is_conv1d, linear_names
from offsite.modelling.experts import require_understood, routed
from offsite.modelling.mlps import Experts, Mlp, find_mlps


@dataclass(frozen=True)
class Matrix:
    """One weight of a block.

    Attributes:
        name: of the tensor inside the block.
        turned: it is (inputs, outputs), or (E, inputs, outputs); otherwise the outputs come first.
        experts: the mixture whose experts it holds, all in one tensor of three dimensions; None for a linear's.
    """

    name: str
    turned: bool
    experts: Experts | None = None

    def weight(self, block: nn.Module) -> Tensor:
        """Return it as (E, O, I), E being 1 for a linear's; storage is shared."""
        found = block.get_parameter(self.name).detach()
        found = found.mT if self.turned else found
        return found[None] if found.dim() == 2 else found


def matrices(block: nn.Module) -> tuple[Matrix, ...]:
    """Return every weight of `block` that an encoding may stand for, in the order of its modules.

    Raises:
        UnsupportedModel: when it has experts in a form that is not known here.
    """
    linears = set(linear_names(block))
    stacks: list[Matrix] = []
    if any("expert" in name for name, _ in block.named_modules()):
        for part in find_mlps(block):
            for mlp in (part,) if isinstance(part, Mlp) else part.members:
                linears.update((*mlp.inputs, mlp.output))
            if isinstance(part, Experts) and not part.members:
                names = (part.inputs, part.output)
                stacks += [Matrix(f"{part.place}.{name}", part.turned, part) for name in names]
    plain = [Matrix(f"{name}.weight", is_conv1d(module)) for name, module in block.named_modules() if name in linears]
    return (*plain, *stacks)


def moments(
    model: PreTrainedModel, blocks: Sequence[nn.Module], batches: Sequence[Batch], *, passage: Passage | None = None
) -> Iterator[dict[str, Tensor]]:
    """Yield, block by block, the sums of x x^T over the inputs of its matrices when `model` reads `batches`.

    By name, (E, I, I) float32; matrices that are given the same input have the same tensor. Padding does not count. An
    expert's inputs are those the router sent to it; of experts in a list of modules padding counts too, as nothing
    shows which tokens they read. What nothing reached has zeros.

    Args:
        passage: of these batches through `model`; default: one in memory.

    Raises:
        UnsupportedModel: from `matrices`, or when experts compute something that is not known here.
        ConfigError: when there is no text.
    """
    if not batches:
        raise ConfigError("factoring linears needs public text, found none")
    total = len(blocks) * len(batches)
    with (
        closing(passage or Passage(model, batches)) as way,
        progress(total, f"reading calibration text for {len(blocks)} blocks, batches") as bar,
    ):
        read = 0
        for block in blocks:
            watched = _Watched(block)

            @contextmanager
            def watching(batch: Batch, watched: _Watched = watched) -> Iterator[None]:
                nonlocal read
                with _watching(watched, real_tokens(batch).reshape(-1)):
                    yield
                read += 1
                bar.update(read)

            way.run(block, watching)
            yield watched.found()


@contextmanager
def _watching(watched: _Watched, real_N: Tensor) -> Iterator[None]:
    handles = list(watched.hooks(real_N))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        watched.forget()


class _Watched:
    """One block's sums, and which of its matrices share theirs."""

    def __init__(self, block: nn.Module) -> None:
        self._block = block
        self._matrices = matrices(block)
        self._sums: dict[str, Tensor] = {}
        self._leader: dict[str, str] = {}
        self._seen: dict[str, Tensor] = {}  # inputs of this forward pass: alive, so that no other takes their place
        self._understood: set[str] = set()

    def hooks(self, real_N: Tensor) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Yield hooks that count every input of a forward pass; `real_N` says which tokens are text."""
        for one in self._matrices:
            if one.experts is None:
                module = self._block.get_submodule(one.name.rpartition(".")[0])
                yield module.register_forward_hook(self._of_linear(one.name, real_N))
        for part in dict.fromkeys(one.experts for one in self._matrices if one.experts is not None):
            module = self._block.get_submodule(part.place)
            yield module.register_forward_hook(self._of_experts(part, real_N), with_kwargs=True)

    def forget(self) -> None:
        """What was seen in this forward pass is let go."""
        self._seen.clear()

    def found(self) -> dict[str, Tensor]:
        """Return the sums of every matrix, zeros where nothing reached it."""
        found = {}
        for one in self._matrices:
            weight = one.weight(self._block)
            sums = self._sums.get(self._leader.get(one.name, one.name))
            size = weight.shape[2]
            found[one.name] = torch.zeros(len(weight), size, size, device=weight.device) if sums is None else sums
        return found

    def _of_linear(self, name: str, real_N: Tensor) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
            given = args[0]
            if name not in self._leader:
                alike = (other for other, tensor in self._seen.items() if tensor is given)
                self._leader[name] = next(alike, name)
            self._seen.setdefault(name, given)
            if self._leader[name] == name:
                found_NI = given.reshape(-1, given.shape[-1])
                self._add(name, 0, 1, found_NI[real_N] if len(found_NI) == len(real_N) else found_NI)

        return hook

    def _of_experts(self, part: Experts, real_N: Tensor) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs = [*args, *kwargs.values()]
            if part.place not in self._understood:
                require_understood(self._block, part, inputs, hidden_of(output))
                self._understood.add(part.place)
            first = next(one for one in inputs if isinstance(one, Tensor))
            hidden_ND = first.reshape(-1, first.shape[-1])
            for number, one in enumerate(routed(self._block, part, inputs)):
                is_text = real_N[one.rows % len(real_N)]
                place, num = f"{part.place}.", part.num_experts
                self._add(f"{place}{part.inputs}", number, num, hidden_ND[one.rows][is_text])
                self._add(f"{place}{part.output}", number, num, one.active[is_text])

        return hook

    def _add(self, name: str, number: int, num: int, found_NI: Tensor) -> None:
        size = found_NI.shape[-1]
        if name not in self._sums:
            self._sums[name] = torch.zeros(num, size, size, device=found_NI.device)
        found_NI = found_NI.float()
        self._sums[name][number].addmm_(found_NI.T, found_NI)


def require_known(blocks: Sequence[nn.Module], what: str) -> None:
    """Return only if every block's weights can be told apart: what a method `what` that treats them all needs.

    Raises:
        UnsupportedModel: saying which experts cannot.
    """
    for block in blocks:
        try:
            found = matrices(block)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"method {what}: {error}", hint="use --method drop") from None
        if not found:
            raise UnsupportedModel(f"method {what}: {type(block).__name__} has no linear", hint="use --method drop")
