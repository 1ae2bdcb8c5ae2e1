"""The share of an adapter's update that is plugged in: one of all modules, or by kind of module and part of the model.

W + share (W' - W) for every weight W that the adapter makes W'. A share of all modules alike stands in LoRA's ``alpha``
(`server.plugging.fit.scaled`), and tensors stay as they came. One ``alpha`` cannot hold several shares, so shares by
module go into LoRA's factors B, which are float32 then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from adapters.updates import Update, combined
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.layout import Layout
from offsite.artefacts.owner import OwnerRecord
from offsite.console import say
from offsite.errors import ConfigError
from offsite.modelling.mlps import find_mlps
from offsite.text.batches import Example
from server.plugging.config import ScaleSettings
from server.plugging.fit import Fitted, full_name, require_scalable, scaled
from server.plugging.sparing import require_sparable, spare_adapters
from server.plugging.ways import KINDS, Way

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scaled = TypeVar("Scaled", bound=ScaleSettings)


def rehearsed_share(spec: AdapterSpec, record: OwnerRecord) -> float:
    """Return the share that did best when a client was rehearsed on that package as it was made; 1 where none was.

    Of DoRA, which is plugged in whole or not, 1.
    """
    return 1.0 if record.dial is None or spec.kind == "dora" else record.dial.scale


def as_rehearsed(config: Scaled, spec: AdapterSpec, record: OwnerRecord) -> Scaled:
    """Return the settings with the share that was rehearsed, which is said; those that name a share as they are."""
    share = rehearsed_share(spec, record)
    if "scale" in config.model_fields_set or share == 1:
        return config
    say(f"{share:g} of the update, as was rehearsed when the package was made; --scale takes another share")
    return config.model_copy(update={"scale": share})


def require_way(spec: AdapterSpec, way: Way) -> None:
    """Return only if such an adapter can be plugged in that way, as far as can be told without its tensors.

    Raises:
        ConfigError: for DoRA any share but all of it; and where a part of the way has nothing to work on.
    """
    require_scalable(spec, way.scale)
    if way.by_module and spec.kind == "dora":
        raise ConfigError("--scale: a dora adapter is plugged in whole or not", hint="ask the client for lora")
    if way.spare is not None:
        require_sparable(spec.kind)


def require_parts(spec: AdapterSpec, names: Iterable[str], layout: Layout, way: Way) -> None:
    """Return only if every share by module names something that the adapter changes, by the package's layout.

    Args:
        names: canonical tensors that the adapter changes (``top.0.mlp.up_proj.weight``).

    Raises:
        ConfigError: naming the share that has nothing to work on.
    """
    feed_forward, used = set(layout.mlp_linears), set[str](KINDS if spec.kind == "blocks" else ())
    for name in names:
        used |= {name.partition(".")[0], KINDS[name.rpartition(".")[0] in feed_forward]}
    for part, _ in way.by_module:
        if part not in used:
            raise ConfigError(f"--scale: {part}: the adapter changes nothing there")


def taken(model: PreTrainedModel, adapter: Fitted, way: Way, public: Sequence[Example] = ()) -> Fitted:
    """Return the adapter as the way plugs it in: spared first, then a share of it. Mixing is `plugged`'s.

    Args:
        model: the full model without the adapter; not changed.
        adapter: fitted to it, with all of its update.
        public: text that a way with ``spare`` needs (`server.plugging.sparing.public_text`).

    Raises:
        ConfigError, DataError, RunFailed, UnsupportedModel: as `require_way`, `shared` and `spare_adapters`.
    """
    require_way(adapter.spec, way)
    if way.spare is not None:
        (found,) = spare_adapters(model, [adapter], public, [way.spare])
        adapter = found[way.spare]
    return shared(model, adapter, way)


def shared(model: nn.Module, adapter: Fitted, way: Way) -> Fitted:
    """Return the adapter with the shares of its update that the way names; what else it names is not looked at.

    Args:
        model: the full model without the adapter; not changed.

    Raises:
        ConfigError: from `require_way`, or when shares by module name nothing that the adapter changes.
        UnsupportedModel: when the feed-forward part of a block is not found.
    """
    require_way(adapter.spec, replace(way, spare=None))
    if not way.by_module:
        return adapter if way.scale == 1 else scaled(model, adapter, way.scale)
    share_of = shares(model, adapter.sites, list(adapter.tensors), way)
    tensors: dict[str, Tensor] = {}
    for name, tensor in adapter.tensors.items():
        share, part = share_of[name], name.rpartition(".")[2]
        if share == 1 or part == "lora_A":
            tensors[name] = tensor
        elif part == "lora_B":
            tensors[name] = tensor.float() * share
        else:
            before = model.get_parameter(full_name(name, adapter.sites)).detach().to("cpu", torch.float32)
            tensors[name] = torch.lerp(before, tensor.float(), share)
    return replace(adapter, tensors=tensors)


def shared_update(model: nn.Module, update: Update, sites: Mapping[str, str], way: Way) -> Update:
    """Return the effective update with the way's shares of it: what `shared` does, of a sum of many adapters.

    Raises:
        ConfigError, UnsupportedModel: as `shared`.
    """
    if not way.by_module:
        return update if way.scale == 1 else combined([update], [way.scale])
    share_of = shares(model, sites, list(update), way)
    return {name: combined([{name: part}], [share_of[name]])[name] for name, part in update.items()}


def shares(model: nn.Module, sites: Mapping[str, str], names: Sequence[str], way: Way) -> dict[str, float]:
    """Return the share that the way takes of each canonical tensor (``top.0.mlp.up_proj.lora_A``).

    Args:
        model: the full model, to see which modules are a block's feed-forward part.
        sites: canonical block -> module name of the full model.

    Raises:
        ConfigError: when a share by module names nothing of all this.
        UnsupportedModel: when the feed-forward part of a block is not found.
    """
    blocks = dict.fromkeys(".".join(name.split(".")[:2]) for name in names) if way.names_kinds else ()
    inside = {block: _feed_forward(model.get_submodule(sites[block])) for block in blocks}
    found, used = {}, set[str]()
    for name in names:
        role, number, inner = name.split(".", 2)
        is_mlp = any(f"{inner}.".startswith(place) for place in inside.get(f"{role}.{number}", ()))
        found[name] = way.share_of(name, is_mlp=is_mlp)
        used |= {role, KINDS[is_mlp]}
    for part, _ in way.by_module:
        if part not in used:
            raise ConfigError(f"--scale: {part}: the adapter changes nothing there")
    return found


def _feed_forward(block: nn.Module) -> list[str]:
    """Return how names inside the block begin that belong to its feed-forward part, its experts and their router."""
    found = []
    for part in find_mlps(block):
        if part.place:
            found.append(part.place.partition(".")[0] + ".")
        else:
            found += [f"{name}." for name in (*part.inputs, part.output)]
    return found
