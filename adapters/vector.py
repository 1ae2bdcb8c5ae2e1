"""The vector that secure aggregation sums: which numbers of an adapter may be added, and what their mean changes.

Of a LoRA whose factors A all clients share, that is the factors B: the mean of B A is the mean of B times A. Of whole
blocks and BitFit it is what the tensors differ from the weights they began with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from adapters.updates import Update, update_of
from offsite.artefacts.bundle import AdapterSpec
from offsite.errors import ConfigError
from offsite.secagg.fixedpoint import TensorShape
from offsite.tensors import TensorSpec, check_exact, spec_of

LOW_RANK = ("lora", "rslora")
WHOLE = ("blocks", "bitfit")


def require_summable(spec: AdapterSpec, *, share_a: bool) -> None:
    """Return only if adapters of this kind may be added up as they are.

    Raises:
        ConfigError: when they may not.
    """
    if spec.kind in LOW_RANK and not share_a:
        raise ConfigError(
            "secure aggregation adds up factors B, which only counts when all clients share A", hint="--share-a"
        )
    if spec.kind not in (*LOW_RANK, *WHOLE):
        raise ConfigError(f"an adapter of kind {spec.kind} cannot be added up")


def vector_shapes(expected: Mapping[str, TensorSpec]) -> tuple[TensorShape, ...]:
    """Return the tensors that are added up, in their order, of the adapter whose tensors these are."""
    return tuple(
        TensorShape(name=name, shape=expected[name].shape) for name in sorted(expected) if not name.endswith(".lora_A")
    )


def vector_of(spec: AdapterSpec, tensors: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what of an adapter is added up, float32, with storage of its own.

    Args:
        start: of whole blocks and BitFit, the weights that training began with, by the adapter's names.
    """
    if spec.kind in LOW_RANK:
        return {name: tensor.float().clone() for name, tensor in tensors.items() if not name.endswith(".lora_A")}
    return {name: (tensor.double() - start[name].double()).float() for name, tensor in tensors.items()}


def length(vector: Mapping[str, Tensor]) -> float:
    """Return the Frobenius norm over all tensors, float64."""
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in vector.values()))


def clipped(vector: Mapping[str, Tensor], clip: float) -> tuple[dict[str, Tensor], float]:
    """Return the vector scaled down to norm `clip` where it is longer, and its norm before."""
    found = length(vector)
    share = min(1.0, clip * (1 - 2.0**-20) / found) if found > 0 else 1.0
    return {name: tensor * share for name, tensor in vector.items()}, found


def update_from(
    spec: AdapterSpec,
    mean: Mapping[str, Tensor],
    shared_a: Mapping[str, Tensor],
    base: Mapping[str, Tensor],
    *,
    is_conv1d: bool,
) -> Update:
    """Return the update that the mean of the vectors makes, as `adapters.updates.update_of` has it.

    Args:
        base: the package's tensors that it changes, for their shapes.

    Raises:
        WrongNames, WrongShape: when it is not the mean of such vectors.
        NotFinite: when it is not finite.
    """
    if spec.kind in LOW_RANK:
        tensors = {**shared_a, **{name: tensor.float() for name, tensor in mean.items()}}
        return update_of(spec, tensors, base, is_conv1d=is_conv1d)
    check_exact(
        "the mean",
        {name: spec_of(tensor, dtype="any") for name, tensor in mean.items()},
        {name: spec_of(tensor, dtype="any") for name, tensor in base.items()},
    )
    return {name: tensor.float() for name, tensor in mean.items()}
