"""Forward passes: what goes into and out of a model's blocks, seen by hooks that are taken off again, and logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from offsite.encoders.outputs import outputs_of
from offsite.encoders.trunk import is_encoder
from offsite.modelling.blocks import Stack, hidden_of
from offsite.seq2seq.inputs import SOURCE, inputs_of

Batch = Mapping[str, Tensor]


@contextmanager
def hidden_after(blocks: Mapping[int, nn.Module]) -> Iterator[dict[int, Tensor]]:
    """Yield a mapping that every forward pass inside fills with the hidden state after each block.

    Values are (batch, tokens, hidden) in the dtype of the pass, part of its autograd graph if there is one.
    """
    found: dict[int, Tensor] = {}

    def keep(number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            found[number] = hidden_of(output)

        return hook

    handles = [block.register_forward_hook(keep(number)) for number, block in blocks.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def seen_by(modules: Sequence[nn.Module], see: Callable[[int, Tensor, Any], None]) -> Iterator[None]:
    """Inside, every forward pass of ``modules[i]`` calls ``see(i, first input, output)``."""

    def keep(number: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            see(number, args[0] if args else kwargs["hidden_states"], output)

        return hook

    handles = [module.register_forward_hook(keep(i), with_kwargs=True) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def real_tokens(batch: Batch) -> Tensor:
    """Return (batch, tokens) bool, true where the token is text and not padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def read_by(stack: Stack, batch: Batch) -> Batch:
    """Return what the blocks of the stack read of the batch: an encoder-decoder's encoder what stands beside."""
    if SOURCE[0] in batch and "encoder" in stack.name.split("."):
        return {"input_ids": batch[SOURCE[0]], "attention_mask": batch[SOURCE[1]]}
    return batch


def forward(model: nn.Module, batch: Batch, positions: Tensor | int = 1) -> Tensor:
    """Run a causal LM and return its logits (batch, positions, vocabulary) at those token positions.

    An encoder has no logits: its last hidden states (batch, tokens, hidden) are returned, at all positions.

    Args:
        positions: 1-D tensor of token positions, or how many of the last ones. The vocabulary projection is
            paid for these alone; the model's own code does it, so soft-capping and scaling stay right.
    """
    if is_encoder(model):
        return outputs_of(model, batch)
    given = inputs_of(batch)
    if SOURCE[0] not in batch:  # of encoder-decoders the head is not asked for some positions
        given["logits_to_keep"] = positions
    logits: Tensor = model(**given, use_cache=False).logits
    return logits


def on_device(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Return the batch's tensors on `device`."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
