"""The effective update: what an adapter changes in the package's own weights, however it is factored.

Only updates may be compared, bounded or averaged. The factors of a low-rank adapter may not: (k A, B / k) is the same
update, and the mean of factors is not the factors of the mean. The exact weighted sum of low-rank updates is low rank
again, with its factors side by side; a part becomes dense as soon as that is smaller.

An update maps the canonical name of a tensor of the package (``top.0.self_attn.q_proj.weight``) to its part, in the
orientation in which the tensor is stored. What it does not name stays as it is. Parts are float32; whatever is computed
of them is computed in float64.

Shape letters: K rank, R rows and C columns of a weight as stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adapters.lift import spread
from adapters.norms import factors_of, is_turned, modules_of, scale_of
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.layout import Layout
from offsite.artefacts.owner import OwnerRecord
from offsite.errors import ConfigError, NotFinite, UnsupportedModel, WrongNames, WrongShape
from offsite.tensors import TensorSpec, check_finite, check_subnormal

FACTORS = (".lora_A", ".lora_B")


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix ``b @ a``; WrongShape where the two are no float32 matrices of one rank."""

    a: Tensor = field(repr=False)  # (K, C)
    b: Tensor = field(repr=False)  # (R, K)

    def __post_init__(self) -> None:
        if self.a.dim() != 2 or self.b.dim() != 2 or self.a.shape[0] != self.b.shape[1] or not self.a.shape[0]:
            raise WrongShape(f"factors {tuple(self.b.shape)} and {tuple(self.a.shape)} cannot be multiplied")
        if self.a.dtype != torch.float32 or self.b.dtype != torch.float32:
            raise WrongShape(f"factors are {self.b.dtype} and {self.a.dtype}, expected float32")

    @property
    def rank(self) -> int:
        """K, whether or not a smaller one would do."""
        return self.a.shape[0]


Part = LowRank | Tensor
Update = Mapping[str, Part]


def turned(layout: Layout, block_tensors: Mapping[str, TensorSpec]) -> bool:
    """Say whether the package's linears store their weights (in, out), as GPT-2's do.

    Square weights do not tell; a model has linears of one orientation, so what any of them tells holds for all.
    """
    stored = ((block_tensors.get(f"{name}.weight"), dims) for name, dims in layout.linears.items())
    return any(spec is not None and spec.shape == dims != dims[::-1] for spec, dims in stored)


def update_of(
    spec: AdapterSpec, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor], *, is_conv1d: bool | None = None
) -> dict[str, Part]:
    """Return the adapter's update: factors for lora and rslora, with the scale in `b`; dense for blocks and bitfit.

    Factors of a higher rank than the weight can have become dense. Storage is not shared.

    Args:
        tensors: the adapter's, by canonical name, as the bundle holds them.
        base: the package's tensors of the modules it changes, by canonical name (`adapters.norms.base_tensors`).
        is_conv1d: what `turned` says of the package; None to let the adapter's own weights tell, which is enough
            unless all of them are square.

    Raises:
        ConfigError: when the kind has no update of its own: DoRA's depends on the weight that it is put on.
        WrongNames, WrongShape: when `tensors` and `base` do not fit each other.
        NotFinite: when a tensor or the update is not finite.
    """
    check_finite("the adapter", tensors)
    if spec.kind in {"lora", "rslora"}:
        found = _low_rank_of(spec, tensors, base, is_conv1d)
    elif spec.kind in {"blocks", "bitfit"}:
        found = {name: _difference(name, tensor, base) for name, tensor in tensors.items()}
    else:
        reason = "depends on the weight it is put on" if spec.kind == "dora" else "is not known"
        raise ConfigError(f"adapter kind {spec.kind!r}: its update {reason}, so updates cannot be combined")
    require_finite("the adapter", found)
    return found


def dense(part: Part) -> Tensor:
    """Return the part as one tensor, float32, with storage of its own; the product is rounded once."""
    return _exact(part).float() if isinstance(part, LowRank) else part.clone()


def shape_of(part: Part) -> tuple[int, ...]:
    """Return the shape of the weight that the part is added to."""
    return (part.b.shape[0], part.a.shape[1]) if isinstance(part, LowRank) else tuple(part.shape)


def combined(updates: Sequence[Update], weights: Sequence[float]) -> dict[str, Part]:
    """Return the weighted sum of the updates, each part exact to the rounding of float32.

    Raises:
        ConfigError: when there is no update, or not one finite weight for each.
        WrongNames, WrongShape: when the updates do not change the same tensors.
    """
    if not updates or len(updates) != len(weights) or not all(map(math.isfinite, weights)):
        raise ConfigError(f"{len(updates)} updates and {len(weights)} weights: expected one finite weight for each")
    return {name: _summed(name, [update[name] for update in updates], weights) for name in _same_names(*updates)}


def scaled(update: Update, factor: float) -> dict[str, Part]:
    """Return the update times a number. Raises ConfigError when that is not finite."""
    return combined([update], [factor])


def truncated(update: Update, rank: int) -> tuple[dict[str, Part], float]:
    """Return the nearest update whose matrices have at most this rank, in factors, and how far off it is.

    Vectors and stacks of matrices stay as they are, and so do factors of no higher rank.

    Returns:
        The update, and its distance from the given one over that one's norm (0 where that is 0); Frobenius over all
        parts, before the factors are rounded to float32.

    Raises:
        ConfigError: when the rank is not positive.
        NotFinite: when a part is not finite.

    Source: Eckart and Young, Psychometrika 1 (1936).
    """
    if rank < 1:
        raise ConfigError(f"an update of rank {rank} changes nothing, expected at least 1")
    require_finite("the update", update)
    found, lost, whole = dict(update), 0.0, norm(update)
    for name, part in update.items():
        if isinstance(part, LowRank) and part.rank > rank:
            (q_b, r_b), (q_a, r_a) = torch.linalg.qr(part.b.double()), torch.linalg.qr(part.a.double().T)
            left, sizes, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
            left, right = q_b @ left[:, :rank], right[:rank] @ q_a.T
        elif isinstance(part, Tensor) and part.dim() == 2:
            left, sizes, right = torch.linalg.svd(part.double(), full_matrices=False)
        else:
            continue
        roots_K = sizes[:rank].sqrt()
        found[name] = LowRank((roots_K[:, None] * right[:rank]).float(), (left[:, :rank] * roots_K).float())
        lost += float(sizes[rank:].square().sum())
    return found, math.sqrt(lost) / whole if whole else 0.0


def norm(update: Update) -> float:
    """Return the Frobenius norm over all parts, float64; NaN or infinity where a part is not finite."""
    return math.sqrt(sum(_square(part) for part in update.values()))


def squared_distance(first: Update, second: Update) -> float:
    """Return the squared Frobenius norm of the difference, float64; no dense matrix is made where both have factors.

    Raises:
        WrongNames, WrongShape: when the updates do not change the same tensors.
    """
    total = 0.0
    for name in _same_names(first, second):
        one, other = first[name], second[name]
        _require_shape(name, other, shape_of(one))
        if isinstance(one, LowRank) and isinstance(other, LowRank):
            total += _square(LowRank(torch.cat([one.a, other.a]), torch.cat([one.b, -other.b], dim=1)))
        else:
            total += float((_exact(one) - _exact(other)).square().sum())
    return total


def to_tensors(update: Update) -> dict[str, Tensor]:
    """Return the update as a safetensors file holds it: ``NAME``, or ``NAME.lora_A`` (K, C) and ``NAME.lora_B`` (R, K).

    Float32, contiguous; storage is shared where it can be.
    """
    found: dict[str, Tensor] = {}
    for name, part in update.items():
        parts = dict(zip(FACTORS, (part.a, part.b), strict=True)) if isinstance(part, LowRank) else {"": part}
        found.update({name + end: tensor.detach().float().contiguous() for end, tensor in parts.items()})
    return found


def from_tensors(what: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, TensorSpec]) -> dict[str, Part]:
    """Return the update that the tensors hold, once nothing is left to check; a name that is missing is unchanged.

    Args:
        what: names the tensors in messages.
        shapes: the tensors that may change, by canonical name; their dtypes do not matter.

    Raises:
        WrongNames: when a tensor is not one of `shapes` or its factors, or when one factor or the choice is missing.
        WrongShape: when a shape, rank or dtype is not what it must be.
        NotFinite: when a value, or a product of factors, is not finite in float32.
        BadSchema: when a tensor is flooded with subnormal numbers.
    """
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or tensor.layout != torch.strided:
            raise WrongShape(f"{what}: tensor {name[:80]!r} is {tensor.dtype}, expected dense float32")
    check_finite(what, tensors)
    check_subnormal(what, tensors)
    names = dict.fromkeys(name[: -len(FACTORS[0])] if name.endswith(FACTORS) else name for name in tensors)
    found = {name: _part(what, name, tensors, shapes) for name in names}
    require_finite(what, found)
    return found


def require_finite(what: str, update: Update) -> None:
    """Return only if the update's values are finite, and so are products of factors once they are float32.

    Raises:
        NotFinite: naming the tensor.
    """
    check_finite(what, to_tensors(update))
    for name, part in update.items():
        if not _square(part) <= torch.finfo(torch.float32).max ** 2:
            raise NotFinite(f"{what}: the update of {name!r} is larger than float32 holds")


@torch.no_grad()
def fold(model: nn.Module, update: Update, blocks: Mapping[str, str]) -> None:
    """Add the update to the model's parameters, which keep their dtypes and get storage of their own.

    Everything but the size of the sums is checked before anything is changed.

    Args:
        blocks: canonical block -> module name of `model` (``package.layout.blocks``, or the owner's sites).

    Raises:
        WrongNames: when a name has no parameter in the model.
        WrongShape: when a part does not have its parameter's shape.
        UnsupportedModel: when a parameter is used in a second place as well, where the update does not belong.
        NotFinite: when the update, or a sum in the parameter's dtype, is not finite; after a sum, discard the model.
    """
    require_finite("the update", update)
    places = list(model.named_parameters(remove_duplicate=False))
    own, known = dict(places), [id(parameter) for _, parameter in places]
    targets = {}
    for name, part in update.items():
        path = placed(name, blocks)
        if path not in own:
            raise WrongNames(f"the update changes {name!r}, the model has no parameter {path!r}")
        _require_shape(name, part, tuple(own[path].shape))
        if known.count(id(own[path])) > 1:
            raise UnsupportedModel(f"parameter {path!r} is tied to another one, which the update would change too")
        targets[name] = own[path]
    for name, parameter in targets.items():
        total = (parameter.detach().cpu().double() + _exact(update[name]).cpu()).to(parameter.dtype)
        check_finite("the folded model", {name: total})
        parameter.data = total.to(parameter.device)


def placed(name: str, blocks: Mapping[str, str]) -> str:
    """Return a canonical tensor's name in a model: ``top.0.mlp.up_proj.weight`` under its block's module.

    Raises:
        WrongNames: when its block has no module.
    """
    role, number, inner = (*name.split(".", 2), "", "")[:3]
    block = blocks.get(f"{role}.{number}")
    if block is None or not inner:
        raise WrongNames(f"{name!r} is in no block of the model")
    return f"{block}.{inner}"


def lift_update(
    update: Update, channels: Mapping[str, Sequence[int]], full_shapes: Mapping[str, Sequence[int]]
) -> dict[str, Part]:
    """Return the update in the full model's shapes; the channels that the package did not keep get zeros.

    Args:
        channels: canonical block -> ascending numbers of its kept MLP channels, for blocks that were shrunk.
        full_shapes: canonical tensor -> its shape as stored in the full model.

    Raises:
        WrongNames: when the full model's shape of a tensor is not given.
        WrongShape: when a size is neither the full model's nor that of the kept channels.
    """
    lifted: dict[str, Part] = {}
    for name, part in update.items():
        if name not in full_shapes:
            raise WrongNames(f"the full model has no tensor {name!r}, which the update changes")
        kept = channels.get(".".join(name.split(".")[:2]))
        full = tuple(full_shapes[name])
        if kept is None or len(full) != len(shape_of(part)):
            _require_shape(name, part, full)
        lifted[name] = part if kept is None else _lifted(name, part, full, kept)
    return lifted


def _lifted(name: str, part: Part, full: tuple[int, ...], kept: Sequence[int]) -> Part:
    axes = [axis for axis, size in enumerate(shape_of(part)) if size != full[axis]]
    if isinstance(part, LowRank):
        a = spread(name, part.a, 1, full[1], kept) if 1 in axes else part.a
        return LowRank(a, spread(name, part.b, 0, full[0], kept) if 0 in axes else part.b)
    for axis in axes:
        part = spread(name, part, axis, full[axis], kept)
    return part


def lifted(model: nn.Module, update: Update, record: OwnerRecord) -> dict[str, Part]:
    """Return the update in the shapes of the full model, which the owner's record is of.

    Raises:
        WrongNames, WrongShape: when it does not fit the full model.
    """
    own = dict(model.named_parameters())
    paths = {name: placed(name, record.sites) for name in update}
    if missing := sorted(path for path in paths.values() if path not in own):
        raise WrongNames(f"the full model has no parameter {missing[0]!r}, which the update changes")
    return lift_update(update, record.channels, {name: tuple(own[path].shape) for name, path in paths.items()})


def _low_rank_of(
    spec: AdapterSpec, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor], is_conv1d: bool | None
) -> dict[str, Part]:
    pairs = {f"{module}.weight": factors_of(module, tensors) for module in modules_of(tensors)}
    if missing := pairs.keys() - base.keys():
        raise WrongNames(f"the base weight {min(missing)!r} of an adapter's tensor is missing")
    swap = any(is_turned(base[name], *pair) for name, pair in pairs.items()) if is_conv1d is None else is_conv1d
    found: dict[str, Part] = {}
    for name, (a, b) in pairs.items():
        rows, columns = (a.T, b.T) if swap else (b, a)
        part: Part = LowRank(columns.float().clone(), (scale_of(spec) * rows).float())
        _require_shape(name, part, tuple(base[name].shape))
        found[name] = dense(part) if spec.rank > min(shape_of(part)) else part
    return found


def _difference(name: str, tensor: Tensor, base: Mapping[str, Tensor]) -> Tensor:
    if name not in base:
        raise WrongNames(f"the base weight {name!r} of an adapter's tensor is missing")
    _require_shape(name, tensor, tuple(base[name].shape))
    return (tensor.double() - base[name].double()).float()


def _summed(name: str, parts: Sequence[Part], weights: Sequence[float]) -> Part:
    shape = shape_of(parts[0])
    for part in parts:
        _require_shape(name, part, shape)
    factored = [part for part in parts if isinstance(part, LowRank)]
    if len(factored) == len(parts) and sum(part.rank for part in factored) * sum(shape) <= math.prod(shape):
        scaled_RK = [weight * part.b.double() for weight, part in zip(weights, factored, strict=True)]
        return LowRank(torch.cat([part.a for part in factored]), torch.cat(scaled_RK, dim=1).float())
    total = torch.zeros(shape, dtype=torch.float64)
    for weight, part in zip(weights, parts, strict=True):
        total += weight * _exact(part)
    return total.float()


def _part(what: str, name: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, TensorSpec]) -> Part:
    if name not in shapes:
        raise WrongNames(f"{what}: tensor {name[:80]!r} is not one that may change")
    whole, a, b = tensors.get(name), *(tensors.get(name + end) for end in FACTORS)
    part: Part | None = whole
    if a is not None and b is not None:
        try:
            part = LowRank(a, b)
        except WrongShape as error:
            raise WrongShape(f"{what}: {name!r}: {error}") from None
        if part.rank > min(shape_of(part)):
            raise WrongShape(f"{what}: {name!r} has factors of rank {part.rank}, more than {shape_of(part)} can have")
    if part is None or (whole is None) == (a is None) or (a is None) != (b is None):
        raise WrongNames(f"{what}: {name!r} is neither one tensor nor two factors")
    if shape_of(part) != shapes[name].shape:
        raise WrongShape(f"{what}: {name!r} has shape {shape_of(part)}, expected {shapes[name].shape}")
    return part


def _same_names(first: Update, *others: Update) -> Iterable[str]:
    for other in others:
        if differing := first.keys() ^ other.keys():
            raise WrongNames(f"only one of two updates changes {min(differing)!r}")
    return first.keys()


def _require_shape(name: str, part: Part, shape: tuple[int, ...]) -> None:
    if shape_of(part) != tuple(shape):
        raise WrongShape(f"{name!r}: the update has shape {shape_of(part)}, expected {tuple(shape)}")


def _exact(part: Part) -> Tensor:
    return part.b.double() @ part.a.double() if isinstance(part, LowRank) else part.double()


def _square(part: Part) -> float:
    """Return the squared Frobenius norm, of factors through their QR decompositions."""
    if isinstance(part, LowRank):
        r_b, r_a = (torch.linalg.qr(one.double(), mode="r").R for one in (part.b, part.a.T))
        return float((r_b @ r_a.T).square().sum())
    return float(part.double().square().sum())
