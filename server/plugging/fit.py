"""A verified adapter fitted to the full model: widened to its shapes, put on its own blocks.

Only what ``server/registry/verify.py`` has let through is fitted, to the full model that the package was made of. Only
what was fitted can be plugged in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adapters.heads import detach_head, only_head, without_head
from adapters.kinds import Attached, attach
from adapters.lift import lift
from adapters.lowrank import quiet_peft
from adapters.norms import factors_of, modules_of, scale_of
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.owner import OwnerRecord
from offsite.artefacts.package import Package
from offsite.digests import model_digest
from offsite.errors import BadSchema, ConfigError, WrongBinding, WrongNames, WrongShape
from offsite.mapped import let_go
from offsite.modelling.blocks import is_conv1d, linear_dims
from offsite.tensors import spec_of
from server.plugging.mixing import Replaced, mixed, stay_mixed
from server.registry.verify import Verified

if TYPE_CHECKING:
    from transformers import PreTrainedModel


CORRECTION_LIMIT = 3.0
"""A direction is corrected by at most so many times the mean absolute size of its update. Source: arXiv:2506.12015."""

CORRECTABLE = ("low-rank", "packed")
"""Methods whose middle has a weight for every one of the full model's, of its shape, that makes up for no other."""


@dataclass(frozen=True)
class Fitted:
    """An adapter in the full model's shapes, and where it goes.

    Attributes:
        tensors: by canonical name (``top.0.mlp.up_proj.lora_A``), on the CPU, in the bundle's dtype, or as `scaled`.
        sites: canonical block -> module name of the full model, for the blocks that carry the adapter.
        head: tensors by canonical name, float32, of an adapter with one. It is no update, so it stays whole whatever is
            done to the tensors of blocks.
    """

    spec: AdapterSpec
    tensors: Mapping[str, Tensor] = field(repr=False)
    sites: Mapping[str, str]
    head: Mapping[str, Tensor] = field(default_factory=dict, repr=False)


def fit(
    model: PreTrainedModel,
    verified: Verified,
    record: OwnerRecord,
    *,
    base_digest: str | None = None,
    scale: float = 1.0,
    emulator: Package | None = None,
) -> Fitted:
    """Return the adapter fitted to the full model, which is not changed.

    Args:
        model: the full model in the dtypes of its checkpoint.
        record: the owner's, of the package that the adapter was tuned on.
        base_digest: ``offsite.digests.model_digest(model)`` as loaded, if it is known; computed otherwise.
        scale: of the update, in (0, 1]; see `scaled`.
        emulator: the package that the adapter was tuned on, where it is to be `corrected`, before it is scaled.

    Raises:
        ConfigError: when this kind of adapter cannot be scaled, or not be corrected.
        WrongBinding: when model, adapter and record do not belong together.
        BadSchema: when the record does not describe the model.
    """
    if verified.package_digest != record.package_digest:
        raise WrongBinding(f"{verified.what} and the owner's record belong to different packages")
    require_base(model, base_digest or model_digest(model), record.base_digest, verified.what)
    tensors = without_head(verified.tensors)
    blocks = dict.fromkeys(_block(name) for name in tensors)
    sites = {block: record.sites[block] for block in blocks}
    dims = {name: _dims(model, f"{sites[_block(name)]}.{_inner(name)}") for name in _linears(record, sites)}
    fitted = Fitted(verified.spec, lift(tensors, record.channels, dims), sites, only_head(verified.tensors))
    if emulator is not None:
        fitted = replace(fitted, tensors=corrected_against(emulator, model, fitted))
    return fitted if scale == 1 else scaled(model, fitted, scale)


def scaled(model: nn.Module, adapter: Fitted, scale: float) -> Fitted:
    """Return the adapter with `scale` times its update: W + scale (W' - W) for every weight W that it makes W'.

    LoRA and rsLoRA say it in their ``alpha``, and their tensors stay as they came. Of whole blocks and biases the
    tensors change, and are float32 from then on: a part of a small update is less than bfloat16 can tell. A model in
    bfloat16 rounds them when they are put on it. No more than 1 is taken: what was verified
    (``server/registry/verify.py``) holds of a part of the update, not of more than all.

    Args:
        model: the full model without the adapter; not changed.

    Raises:
        ConfigError: from `require_scalable`.
    """
    require_scalable(adapter.spec, scale)
    if adapter.spec.kind in ("lora", "rslora"):
        return replace(adapter, spec=adapter.spec.model_copy(update={"alpha": adapter.spec.alpha * scale}))
    tensors = {}
    for name, tensor in adapter.tensors.items():
        before = model.get_parameter(full_name(name, adapter.sites)).detach().to("cpu", torch.float32)
        tensors[name] = torch.lerp(before, tensor.float(), scale)
    return replace(adapter, tensors=tensors)


def corrected(
    tensors: Mapping[str, Tensor],
    full: Mapping[str, Tensor],
    emulator: Mapping[str, Tensor],
    *,
    scale: float,
    limit: float = CORRECTION_LIMIT,
) -> dict[str, Tensor]:
    """Return a low-rank adapter's tensors with the emulator's fault taken out along the adapter's own directions.

    The client tuned What + s B A; with s B A alone the full model W computes something else wherever W differs from
    What. With A^T = U S V^T and b = s B V S, column i of b is what the update does to direction i of U, and
    c = (W - What) U is what the two models differ by there. Each c_i, shortened to at most `limit` times the mean
    absolute size of b_i, is taken from b_i: where none was shortened, (W + update) x = What x + s B A x for every x in
    the span of U. The rank stays.

    Source: EMLoC, arXiv:2506.12015.

    Args:
        tensors: by canonical name, ``lora_A`` (rank, in) and ``lora_B`` (out, rank) of each module.
        full: weights W (out, in) by canonical module; modules that are not here stay as they are.
        emulator: What likewise.
        scale: s, what B A is multiplied by in the forward pass.

    Returns:
        float32 where corrected, otherwise the same objects.

    Raises:
        WrongShape: when weights and factors do not fit each other.
    """
    found = dict(tensors)
    for module in modules_of(tensors):
        if module not in full:
            continue
        a, b = factors_of(module, tensors)
        difference = full[module].double() - emulator[module].double()
        if difference.shape != (b.shape[0], a.shape[1]):
            raise WrongShape(f"{module!r}: weights {tuple(difference.shape)} do not fit its adapter")
        u, size, vt = torch.linalg.svd(a.T, full_matrices=False)
        update = scale * b @ vt.T * size
        fault = difference @ u
        means = [one.abs().mean(0) for one in (update, fault)]
        share = torch.where(means[1] > 0, limit * means[0] / means[1], 0.0).clamp(max=1.0)
        found[f"{module}.lora_A"] = u.T.float().contiguous()
        found[f"{module}.lora_B"] = ((update - fault * share) / scale).float().contiguous()
    return found


def corrected_against(emulator: Package, model: nn.Module, adapter: Fitted) -> dict[str, Tensor]:
    """Return the adapter's tensors `corrected` for what this package's weights differ by from the full model's.

    Args:
        model: the full model without the adapter; not changed.
        adapter: as it was tuned on the package, fitted, not `scaled` yet.

    Raises:
        ConfigError: from `require_correctable`.
    """
    require_correctable(adapter.spec, emulator)
    stored = {}
    for module in modules_of(adapter.tensors):
        name = f"{emulator.layout.blocks[_block(module)]}.{_inner(module)}.weight"
        if name in emulator.manifest.encodings:  # any other is the full model's own
            stored[module] = name
    found, scale = dict(adapter.tensors), scale_of(adapter.spec)
    for module, name in stored.items():  # one at a time: what is decoded is as large as the full model's
        linear = model.get_submodule(full_name(module, adapter.sites))
        weight = linear.get_parameter("weight").detach()
        full, theirs = (
            one.T if is_conv1d(linear) else one for one in (weight.cpu(), emulator.load_tensors([name])[name])
        )
        factors = {part: one for part, one in adapter.tensors.items() if part.rpartition(".")[0] == module}
        found |= corrected(factors, {module: full}, {module: theirs}, scale=scale)
        let_go([weight])
    return found


def require_correctable(spec: AdapterSpec, emulator: Package) -> None:
    """Return only if an adapter of that kind, tuned on that package, can be corrected.

    Raises:
        ConfigError: saying why not.
    """
    method = emulator.manifest.method.name
    if method not in CORRECTABLE:
        reason = {
            "width": "what its refit made up for would count twice",
            "drop": "it has no weight in place of those left out",
        }.get(method, "its weights do not stand for the full model's one by one")
        raise ConfigError(f"--correct: not with a package of method {method}: {reason}", hint="plug in without it")
    if spec.kind not in ("lora", "rslora"):
        raise ConfigError(f"--correct: a {spec.kind} adapter has no directions to correct", hint="plug in without it")


def require_scalable(spec: AdapterSpec, scale: float) -> None:
    """Return only if such an adapter can be plugged in at that scale.

    Raises:
        ConfigError: for a scale outside (0, 1], and for DoRA at any but 1: its magnitudes are not a part of an update.
    """
    if not 0 < scale <= 1:
        raise ConfigError(f"--scale: found {scale:g}, expected more than 0 and at most 1")
    if scale != 1 and spec.kind == "dora":
        raise ConfigError("--scale: a dora adapter is plugged in whole or not", hint="ask the client for lora")


def require_base(model: nn.Module, found: str, expected: str, what: str) -> None:
    """Return only if the full model's digest is the expected one.

    Raises:
        WrongBinding: naming both digests.
    """
    if found != expected:
        name = Path(str(getattr(getattr(model, "config", None), "_name_or_path", "") or "given")).name
        raise WrongBinding(
            f"model {name!r} has digest {found[:19]}, {what} belongs to {expected[:19]}",
            hint="give the model that the package was made of, in the same dtype",
        )


def plug(model: PreTrainedModel, adapter: Fitted) -> Attached:
    """Put the adapter on the full model, in place and in evaluation mode; the model keeps its dtypes.

    Tensors that the adapter replaces get storage of their own, so that nothing that shares theirs changes. A head is
    put beside the model's own over the vocabulary.

    Raises:
        WrongNames, WrongShape, UnsupportedModel: when exactly these tensors do not fit the model.
    """
    _require_modules(model, adapter)
    before = {id(parameter): parameter.dtype for parameter in model.parameters()}
    names = {name: spec_of(tensor) for name, tensor in adapter.tensors.items()}
    attached = attach(model, adapter.spec, adapter.sites, names)
    replaced = [parameter for parameter in attached.trainable.values() if id(parameter) in before]
    for parameter in replaced:
        parameter.data = parameter.data.clone()
    attached.load({**adapter.tensors, **adapter.head})
    for parameter in replaced:
        parameter.data = parameter.data.to(before[id(parameter)])
    attached.model.requires_grad_(False)
    attached.model.eval()
    if adapter.spec.kind == "dora":  # its start was computed from the weights
        let_go(model.parameters())
    return attached


@contextmanager
def plugged(model: PreTrainedModel, adapter: Fitted, *, mix: float = 1.0) -> Iterator[PreTrainedModel]:
    """Yield the model with the adapter on it; afterwards it is as it was.

    Args:
        mix: share of its probabilities in (0, 1], the rest being the model's own (``server/plugging/mixing.py``).

    Raises:
        ConfigError: when an adapter with a head is to be mixed.
        WrongNames, WrongShape, UnsupportedModel: as `plug`.
    """
    _require_unmixed(adapter, mix)
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    attached = plug(model, adapter)
    try:
        if mix == 1:
            yield plain_model(attached)
        else:
            with mixed(plain_model(attached), replaced_of(before), mix) as both:
                yield both
    finally:
        unplug(attached)
        detach_head(model)
        for parameter, data in before:
            parameter.data = data


def plug_mixed(model: PreTrainedModel, adapter: Fitted, mix: float) -> PreTrainedModel:
    """Put the adapter on the model for good, and return the model as a mixture of itself with and without it.

    Raises:
        ConfigError: when `mix` is not in (0, 1), or the adapter has a head.
        WrongNames, WrongShape, UnsupportedModel: as `plug`.
    """
    _require_unmixed(adapter, mix)
    before = [(parameter, parameter.data) for parameter in model.parameters()]
    found = plain_model(plug(model, adapter))
    stay_mixed(found, replaced_of(before), mix)
    return found


def _require_unmixed(adapter: Fitted, mix: float) -> None:
    if mix != 1 and adapter.spec.head is not None:
        raise ConfigError(f"--mix: it is of a next token's probabilities, this adapter is for {adapter.spec.task}")


def replaced_of(before: Sequence[tuple[nn.Parameter, Tensor]]) -> Replaced:
    """Return those parameters, with the data that they had before, whose data are others now."""
    return [(parameter, data) for parameter, data in before if parameter.data_ptr() != data.data_ptr()]


def unplug(attached: Attached) -> None:
    """Take peft's layers off the model again; parameters that the adapter replaced stay replaced."""
    if hasattr(attached.model, "unload"):
        with quiet_peft():
            attached.model.unload()  # type: ignore[operator]


def plain_model(attached: Attached) -> PreTrainedModel:
    """Return the transformers model that carries the adapter, without peft's wrapper around it."""
    inner = attached.model
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # type: ignore[operator,return-value]


def full_name(name: str, sites: Mapping[str, str]) -> str:
    """Return a canonical tensor's name in the full model: ``top.0.mlp.up_proj.lora_A`` under its block's module.

    Raises:
        BadSchema: when its block has no site.
    """
    site = sites.get(_block(name))
    if site is None or not _inner(name):
        raise BadSchema(f"tensor {name!r} has no place in the full model")
    return f"{site}.{_inner(name)}"


def module_names(names: Iterable[str], sites: Mapping[str, str]) -> list[str]:
    """Return the full model's names of the modules that hold the named tensors, each once, in order."""
    return list(dict.fromkeys(full_name(name, sites).rpartition(".")[0] for name in names))


def _block(name: str) -> str:
    return ".".join(name.split(".")[:2])


def _inner(name: str) -> str:
    return ".".join(name.split(".")[2:])


def _linears(record: OwnerRecord, sites: Mapping[str, str]) -> list[str]:
    return [name for name in record.layout.linears if _block(name) in sites]


def _dims(model: nn.Module, path: str) -> tuple[int, int]:
    try:
        return linear_dims(model.get_submodule(path))
    except (AttributeError, ConfigError):
        raise BadSchema(f"the owner's record names {path!r}, which is no linear of the full model") from None


def _require_modules(model: nn.Module, adapter: Fitted) -> None:
    present = {name for name, _ in model.named_modules()}
    for path in module_names(adapter.tensors, adapter.sites):
        if path not in present:
            raise WrongNames(f"the adapter has tensors for {path!r}, which is no module of the full model")
