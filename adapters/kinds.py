"""Kinds of adapter by name: which tensors a bundle of that kind holds, and how they attach to a model.

A kind is two functions. ``declare`` is pure: from the package's layout and declared tensors it derives the exact
names, shapes and dtypes that a bundle must hold, so that an intake needs no model. ``attach`` puts the adapter on a
model at given *sites* (canonical block -> module name): the emulator's on the client's side, the full model's on the
owner's. New kinds register by name (`register_kind`); for the verbs, ``_BUILT_IN`` says which module to import.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from adapters.heads import attach_head, head_tensors, without_head
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.layout import Layout
from offsite.errors import ConfigError
from offsite.tensors import TensorSpec, check_exact, spec_of

Declare = Callable[[AdapterSpec, Layout, Mapping[str, TensorSpec]], dict[str, TensorSpec]]
Attach = Callable[[nn.Module, AdapterSpec, Mapping[str, str], tuple[str, ...]], "Attached"]

_KINDS: dict[str, tuple[Declare, Attach]] = {}
_BUILT_IN = {"blocks": "adapters.whole", "bitfit": "adapters.whole", "lora": "adapters.lowrank"}
_BUILT_IN.update({"rslora": "adapters.lowrank", "dora": "adapters.lowrank"})


@dataclass
class Attached:
    """A model that carries an adapter: call ``model``; ``trainable`` maps canonical tensor names to parameters.

    The parameters are the model's own: training them trains the adapter, everything else is frozen.
    """

    model: nn.Module
    trainable: dict[str, nn.Parameter]
    sites: dict[str, str] = field(default_factory=dict)

    @property
    def blocks(self) -> list[nn.Module]:
        """The model's blocks at the sites, in order: what sharding gathers one at a time."""
        base: Any = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model  # type: ignore[operator]
        return [base.get_submodule(site) for site in self.sites.values()]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the adapter's tensors by canonical name: detached copies on the CPU, in their dtype in memory."""
        return {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.trainable.items()}

    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the tensors into the adapter, all of them, by name.

        Raises:
            WrongNames, WrongShape: when names or shapes are not exactly the adapter's; dtypes are cast.
        """
        own = {name: spec_of(parameter, dtype="any") for name, parameter in self.trainable.items()}
        check_exact("the adapter", {name: spec_of(tensor, dtype="any") for name, tensor in tensors.items()}, own)
        with torch.no_grad():
            for name, parameter in self.trainable.items():
                parameter.copy_(tensors[name])


def register_kind(name: str, declare: Declare, attach: Attach) -> None:
    """Make a kind of adapter known under `name`, replacing an earlier one."""
    _KINDS[name] = (declare, attach)


def kinds() -> tuple[str, ...]:
    """Return the names of all kinds known."""
    return tuple(sorted({*_BUILT_IN, *_KINDS}))


def declared(spec: AdapterSpec, layout: Layout, block_tensors: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return the exact tensors of a bundle with this adapter, in the bundle's dtype; no model is needed.

    Args:
        block_tensors: the package's declared tensors under canonical names (`Package.block_tensors`).

    Raises:
        ConfigError: when the kind is not known or the package cannot carry it in that place.
    """
    return _kind(spec)[0](spec, layout, block_tensors) | head_tensors(spec)


def attach(model: nn.Module, spec: AdapterSpec, sites: Mapping[str, str], names: Mapping[str, TensorSpec]) -> Attached:
    """Put an untrained adapter on `model`, in place, and freeze everything else; a head begins at zero.

    Args:
        sites: module name in `model` of every canonical block.
        names: the tensors the adapter must have, as `declared` returns; shapes are taken from the model.

    Raises:
        UnsupportedModel: when exactly these tensors cannot be attached to the model, or it takes no head.
        WrongShape: when a head reads states of another size than the model's.
    """
    model.requires_grad_(False)
    attached = _kind(spec)[1](model, spec, sites, tuple(without_head(names)))
    attached.sites = dict(sites)
    if spec.head is not None:
        attached.trainable |= attach_head(model, spec.head)
    return attached


def _kind(spec: AdapterSpec) -> tuple[Declare, Attach]:
    if spec.kind not in _KINDS and spec.kind in _BUILT_IN:
        importlib.import_module(_BUILT_IN[spec.kind])
    if spec.kind not in _KINDS:
        raise ConfigError(f"--adapter: no kind {spec.kind!r}", hint=f"known: {', '.join(kinds())}")
    return _KINDS[spec.kind]
