"""Frobenius and spectral norms of what an adapter changes in each module, beside those of the base weight.

For a low-rank adapter that is scale * B @ A, through QR of both factors: (k A, B / k) is the same update and gets the
same verdict, and no dense matrix is formed. DoRA also rescales the weight, so its update is dense. For whole blocks
and BitFit it is the new tensor less the old one. All of it in float64.

The Frobenius norm bounds what is changed altogether, the spectral norm what any one input can feel: a spike of rank
one hides from the first and not from the second. Both are held against the package's own weight. Where that is next
to nothing (fresh biases, zeroed matrices), it counts as if its values had a root mean square of `VECTOR_FLOOR` or
`MATRIX_FLOOR`.

Source: merged updates as in peft (LoRA arXiv:2106.09685, rsLoRA arXiv:2312.03732, DoRA arXiv:2402.09353).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.heads import without_head
from adapters.kinds import declared
from offsite.artefacts.bundle import AdapterSpec
from offsite.artefacts.layout import Layout
from offsite.artefacts.package import Package
from offsite.errors import ConfigError, NormTooLarge, NotFinite, WrongNames, WrongShape
from offsite.tensors import TensorSpec, check_finite, check_subnormal

VECTOR_FLOOR = 0.1
MATRIX_FLOOR = 1e-3

_EXACT_SIZE = 512
_LANCZOS_STEPS = 64


@dataclass(frozen=True)
class UpdateNorms:
    """Frobenius and spectral norm of one module's effective update and of its base weight.

    The floors are what the base's norms count as when they are smaller.
    """

    frobenius: float
    spectral: float
    base_frobenius: float
    base_spectral: float
    frobenius_floor: float = 0.0
    spectral_floor: float = 0.0

    @property
    def relative_frobenius(self) -> float:
        """The update's Frobenius norm in units of the base's."""
        return _ratio(self.frobenius, max(self.base_frobenius, self.frobenius_floor))

    @property
    def relative_spectral(self) -> float:
        """The update's spectral norm in units of the base's."""
        return _ratio(self.spectral, max(self.base_spectral, self.spectral_floor))


def adapted_names(spec: AdapterSpec, layout: Layout, block_tensors: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """Return the canonical names of the package's tensors that the adapter changes: what `update_norms` needs.

    Raises:
        ConfigError: when the package cannot carry such an adapter, or what it changes is not known.
    """
    _require_kind(spec)
    names = without_head(declared(spec, layout, block_tensors))
    return tuple(dict.fromkeys(_base_name(spec, name) for name in names))


def base_tensors(package: Package, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the package's tensors of these canonical names, and read no other.

    Raises:
        WrongNames: when the package declares no such tensor.
        WrongShape, NotFinite, BadSchema: when a file does not hold what the package declares.
    """
    stored = {_stored_name(package.layout, name): name for name in names}
    if missing := stored.keys() - package.manifest.tensors.keys():
        raise WrongNames(f"package {package.path.name!r} holds no tensor {stored[min(missing)]!r}")
    found = package.load_tensors(stored)
    return {canonical: found[name] for name, canonical in stored.items()}


def update_norms(
    spec: AdapterSpec, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> dict[str, UpdateNorms]:
    """Return the norms of the adapter's effective update, by canonical module (low rank) or tensor name.

    Args:
        tensors: the adapter's, by canonical name, as the bundle holds them; a head changes no module of the model.
        base: the package's tensors of the modules it changes, by canonical name (`base_tensors`).

    Raises:
        ConfigError: when what this kind of adapter changes is not known.
        WrongNames, WrongShape: when `tensors` and `base` do not fit each other.
        NotFinite: when a tensor or a norm is not finite.
        BadSchema: when a tensor is flooded with subnormal numbers.
    """
    check_finite("the adapter", tensors)
    check_subnormal("the adapter", tensors)
    _require_kind(spec)
    tensors = without_head(tensors)
    if missing := {_base_name(spec, name) for name in tensors} - base.keys():
        raise WrongNames(f"the base weight {min(missing)!r} of an adapter's tensor is missing")
    found = _UPDATES[spec.kind](spec, tensors, base)
    for name, norms in found.items():
        if not all(map(math.isfinite, (norms.frobenius, norms.spectral, norms.base_frobenius, norms.base_spectral))):
            raise NotFinite(f"the update of {name!r} or its base weight has no finite norm")
    return found


def check_norms(
    norms: Mapping[str, UpdateNorms], *, max_relative_frobenius: float, max_relative_spectral: float
) -> None:
    """Return only if no update is larger than these multiples of its base weight's norms.

    Raises:
        NormTooLarge: naming the module that is furthest beyond, with its figures.
    """
    worst, excess, message = "", 1.0, ""
    for name, found in norms.items():
        for kind, value, limit in (
            ("Frobenius", found.relative_frobenius, max_relative_frobenius),
            ("spectral", found.relative_spectral, max_relative_spectral),
        ):
            if not value <= limit and not _ratio(value, limit) <= excess:
                worst, excess = name, _ratio(value, limit)
                message = (
                    f"the update's {kind} norm is {value:.4g} times the base weight's, at most {limit:g} is allowed"
                )
    if worst:
        raise NormTooLarge(
            f"{worst!r}: {message}",
            hint="tune for fewer steps or at a lower rate, or agree on a job with other limits",
        )


def _low_rank(spec: AdapterSpec, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, UpdateNorms]:
    found = {}
    for module in modules_of(tensors):
        weight, a, b = base[f"{module}.weight"], *factors_of(module, tensors)
        _oriented(module, weight, a, b, conv1d=False)
        core = torch.linalg.qr(b, mode="r").R @ torch.linalg.qr(a.T, mode="r").R.T
        found[module] = _norms(core * scale_of(spec), weight)
    return found


def _dora(spec: AdapterSpec, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, UpdateNorms]:
    found = {}
    modules = modules_of(tensors)
    conv1d = any(is_turned(base[f"{module}.weight"], *factors_of(module, tensors)) for module in modules)
    for module in modules:
        a, b = factors_of(module, tensors)
        stored = base[f"{module}.weight"]
        weight = _oriented(module, stored, a, b, conv1d=conv1d).double()
        direction = weight + scale_of(spec) * (b @ a)
        magnitude = tensors[f"{module}.magnitude"].double()
        if magnitude.shape != direction.shape[:1]:
            raise WrongShape(
                f"'{module}.magnitude' has shape {tuple(magnitude.shape)}, its weight {direction.shape[0]}"
            )
        merged = direction * (magnitude / direction.norm(dim=1))[:, None]
        found[module] = _norms(merged - weight, stored)
    return found


def _replaced(spec: AdapterSpec, tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, UpdateNorms]:
    found = {}
    for name, tensor in tensors.items():
        if tensor.shape != base[name].shape:
            raise WrongShape(f"{name!r} has shape {tuple(tensor.shape)}, its base {tuple(base[name].shape)}")
        found[name] = _norms(tensor.double() - base[name].double(), base[name])
    return found


_UPDATES: dict[str, Callable[..., dict[str, UpdateNorms]]] = {
    "lora": _low_rank,
    "rslora": _low_rank,
    "dora": _dora,
    "blocks": _replaced,
    "bitfit": _replaced,
}


def _norms(update: Tensor, base: Tensor) -> UpdateNorms:
    dense = base.double()
    rows, columns = (1, 1, *base.shape)[-2:]
    floor = VECTOR_FLOOR if base.dim() < 2 else MATRIX_FLOOR
    floors = floor * math.sqrt(base.numel()), floor * (math.sqrt(rows) + math.sqrt(columns))
    if base.dim() < 2:  # a vector's two norms are one
        floors = floors[0], floors[0]
    return UpdateNorms(float(update.norm()), spectral(update), float(dense.norm()), spectral(dense), *floors)


def spectral(tensor: Tensor) -> float:
    """Return the largest singular value of the matrix, or of any in a stack of them; of a vector, its length."""
    if tensor.dim() < 2 or not bool(torch.isfinite(tensor).all()):
        return float(tensor.norm())
    matrices = tensor.reshape(-1, *tensor.shape[-2:])
    measure = _largest_exact if min(matrices.shape[-2:]) <= _EXACT_SIZE else _largest_lanczos
    return max(measure(matrix) for matrix in matrices)


def _largest_exact(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def _largest_lanczos(matrix: Tensor) -> float:
    """Return the largest singular value from a Krylov space of `_LANCZOS_STEPS` steps, never more than it is.

    The start is drawn afresh, so that no update can be built around it: whatever the matrix, with 16,384 columns the
    chance to miss more than 2.5 percent is below 1e-9, and ordinary ones converge to rounding.
    Source: Kuczynski and Wozniakowski, SIAM J. Matrix Anal. Appl. 13 (1992), the Lanczos bound for a random start.
    """
    generator = torch.Generator().manual_seed(secrets.randbits(63))
    vector = torch.randn(matrix.shape[1], generator=generator, dtype=matrix.dtype)
    basis, images = matrix.new_zeros(0, matrix.shape[1]), []
    for _ in range(_LANCZOS_STEPS):
        basis = torch.cat([basis, vector[None] / vector.norm()])
        images.append(matrix @ basis[-1])
        vector = matrix.T @ images[-1]
        before = float(vector.norm())
        for _ in range(2):  # once is not enough to stay orthogonal to rounding
            vector = vector - basis.T @ (basis @ vector)
        if float(vector.norm()) <= 1e-13 * before:
            break
    return _largest_exact(torch.stack(images))


def _require_kind(spec: AdapterSpec) -> None:
    if spec.kind not in _UPDATES:
        raise ConfigError(f"adapter kind {spec.kind!r}: what it changes in the model is not known")


def factors_of(module: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the module's A (rank, in) and B (out, rank) in float64.

    Raises:
        WrongShape: when it has no two that can be multiplied.
    """
    a, b = tensors.get(f"{module}.lora_A"), tensors.get(f"{module}.lora_B")
    if a is None or b is None or a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise WrongShape(f"{module!r} has no lora_A and lora_B that can be multiplied")
    return a.double(), b.double()


def is_turned(weight: Tensor, a: Tensor, b: Tensor) -> bool:
    """Say whether the weight is stored (in, out) as GPT-2 does; a square one does not tell."""
    return tuple(weight.shape) == (a.shape[1], b.shape[0]) != (b.shape[0], a.shape[1])


def _oriented(module: str, weight: Tensor, a: Tensor, b: Tensor, *, conv1d: bool) -> Tensor:
    """Return the weight as (out, in). A model has linears of one orientation: what any of them tells holds for all."""
    turned = weight.T if weight.dim() == 2 and (conv1d or is_turned(weight, a, b)) else weight
    if turned.shape != (b.shape[0], a.shape[1]):
        raise WrongShape(f"{module!r}: B @ A is {b.shape[0]} x {a.shape[1]}, its weight {tuple(weight.shape)}")
    return turned


def scale_of(spec: AdapterSpec) -> float:
    """Return what B @ A is multiplied by in the forward pass."""
    return spec.alpha / (math.sqrt(spec.rank) if spec.kind == "rslora" else spec.rank)


def modules_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the canonical modules that the tensors of a low-rank adapter belong to, each once, in order."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))


def _base_name(spec: AdapterSpec, name: str) -> str:
    return name if _UPDATES[spec.kind] is _replaced else f"{name.rpartition('.')[0]}.weight"


def _stored_name(layout: Layout, name: str) -> str:
    role, number, inner = (*name.split(".", 2), "", "")[:3]
    block = layout.blocks.get(f"{role}.{number}")
    if block is None:
        raise WrongNames(f"{name!r} is in no block of the package")
    return f"{block}.{inner}"


def _ratio(value: float, unit: float) -> float:
    return value / unit if unit > 0 else (math.inf if value > 0 else 0.0)
