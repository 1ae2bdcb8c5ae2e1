"""Channels of the emulator's MLPs that are left out at random while tuning: another narrower emulator at every step.

What an adapter learns of one emulator's faults should be of less use with the next one's; what it learns of the text
should stay. A mask follows from the seed, the step and the block, and from nothing else: a resumed run draws the same,
and so does every part that a step's batch is cut into. What is kept is scaled by 1 / (1 - P). In evaluation nothing is
left out.

Shapes: B rows, T tokens, C channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from adapters.kinds import Attached
from offsite.artefacts.package import Package
from offsite.errors import ConfigError, UnsupportedModel
from offsite.modelling.mlps import find_mlp


class ChannelDropout:
    """Masks on the MLPs of the middle's blocks, one for each block and step."""

    def __init__(self, attached: Attached, package: Package, *, probability: float, seed: int) -> None:
        """Every mask is on its MLP; none leaves anything out before a step is begun.

        Args:
            probability: of each channel to be left out, from 0 up to 1, excluded.

        Raises:
            ConfigError: when an MLP of the middle is a mixture of experts, or none that is known.
        """
        self._probability, self._seed = probability, seed
        self._sizes: dict[str, int] = {}
        self._masks: dict[str, Tensor] = {}
        empty, step_model = package.empty_model(), _base(attached)
        for canonical, site in package.layout.blocks.items():
            if not canonical.startswith("middle."):
                continue
            try:
                mlp = find_mlp(empty.get_submodule(site))
            except UnsupportedModel as error:
                raise ConfigError(f"--channel-dropout: {error}") from None
            self._sizes[canonical] = mlp.num_channels
            step_model.get_submodule(f"{site}.{mlp.output}").register_forward_pre_hook(self._hook(canonical))

    def begin(self, step: int) -> None:
        """The masks are those of this step, counted from 0, until the next one is begun."""
        self._masks = {name: self.mask(step, name) for name in self._sizes}

    def mask(self, step: int, block: str) -> Tensor:
        """Return what the channels of a block are multiplied by at a step, (C,) float32: 0, or 1 / (1 - P)."""
        digest = hashlib.blake2b(f"offsite/v1/channels/{self._seed}/{step}/{block}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
        kept = torch.rand(self._sizes[block], generator=generator) >= self._probability
        return kept.float() / (1 - self._probability)

    def _hook(self, block: str) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]:
        def masked(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not module.training or block not in self._masks:
                return None
            mask_C = self._masks[block].to(device=args[0].device, dtype=args[0].dtype)
            return (args[0] * mask_C, *args[1:])

        return masked


def _base(attached: Attached) -> nn.Module:
    """Return the package's own model, below what peft wraps around it."""
    model: Any = attached.model
    base: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base
