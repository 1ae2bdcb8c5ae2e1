"""The loss's gradients inside a model, seen by hooks that are taken off again; no weight's gradient is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from emulator.compression.activations import Batch, real_tokens
from offsite.errors import UnsupportedModel
from offsite.modelling.head import CrossEntropy, values_at
from offsite.modelling.mlps import find_mlp

TOKENS_TOGETHER = 2048
"""Tokens whose logits a backward pass holds at once, at most; a row is never cut. It does not change the result."""

See = Callable[[Tensor, Tensor, Tensor], None]
"""What is done with a linear's input (N, inputs), its output (N, outputs) and the loss's gradient there (N, outputs).

All are float32, all tokens of some rows in their order; of padding the gradient is zero.
"""


def require_dense(blocks: Sequence[nn.Module]) -> None:
    """Return only if every block has one MLP that is no mixture of experts.

    Raises:
        UnsupportedModel: naming the block that has another.
    """
    for block in blocks:
        try:
            find_mlp(block)
        except UnsupportedModel as error:
            raise UnsupportedModel(
                f"what gradients say of channels is known for blocks with one MLP: {error}",
                hint="leave --refit-jacobian at 0 and --channels at obs",
            ) from None


def push_back(model: nn.Module, batch: Batch, watched: Sequence[tuple[nn.Module, See]]) -> None:
    """One backward pass of the next-token loss, summed over the text: every watched linear has seen its gradients.

    Args:
        batch: ``input_ids`` and ``attention_mask`` of (batch, tokens) int64, where `model` is.
        watched: linears of `model` and what is done with what each saw.
    """
    num_rows, num_tokens = batch["input_ids"].shape
    rows = max(1, TOKENS_TOGETHER // num_tokens)
    for first in range(0, num_rows, rows):
        _push_rows_back(model, {name: tensor[first : first + rows] for name, tensor in batch.items()}, watched)


def _push_rows_back(model: nn.Module, batch: Batch, watched: Sequence[tuple[nn.Module, See]]) -> None:
    real_BT = real_tokens(batch)

    def watch(see: See) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            read, given = _rows(args[0]), _rows(output)
            output.register_hook(lambda gradient: see(read, given, _rows(gradient) * real_BT.reshape(-1)[:, None]))

        return hook

    with ExitStack() as stack, torch.enable_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                stack.callback(parameter.requires_grad_, True)
                parameter.requires_grad_(False)
        embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        first = embedding.register_forward_hook(lambda _module, _args, output: output.detach().requires_grad_())
        stack.callback(first.remove)
        for module, see in watched:
            stack.callback(module.register_forward_hook(watch(see)).remove)
        counts_BT = torch.zeros_like(real_BT)
        counts_BT[:, :-1] = real_BT[:, 1:] & real_BT[:, :-1]
        wanted_N = batch["input_ids"].roll(-1, 1)[counts_BT]
        values_at(model, batch, counts_BT, CrossEntropy(wanted_N)).sum().backward()


def _rows(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1, tensor.shape[-1]).float()
