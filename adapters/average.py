"""The mean of several runs' adapters: an adapter whose effective update is the mean of theirs.

The mean of low-rank updates has the sum of their ranks: the factors A stacked, the factors B side by side. LoRA's scale
of that rank is the mean's own weight, so that no number is touched. Cut back to a smaller rank it is the nearest
update of that rank, and how far off that is comes with it. Parameters that an adapter replaces are the base plus the
mean of what the runs added to it.

Shape letters: K rank, O outputs and I inputs of a linear module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from adapters.norms import factors_of, modules_of, scale_of
from adapters.updates import FACTORS, LowRank, Part, combined, norm, truncated
from offsite.artefacts.bundle import AdapterSpec
from offsite.errors import ConfigError, WrongNames, WrongShape
from offsite.tensors import check_exact, check_finite, spec_of

LOW_RANK: Final = ("lora", "rslora")
"""Kinds whose mean has a rank of its own."""
AVERAGED: Final = ("bitfit", "blocks", *LOW_RANK)
"""Kinds that have a mean: DoRA's update depends on the weight that it is put on."""

_MAX_RANK = 4096


def mean_spec(spec: AdapterSpec, num_runs: int, *, rank: int | None = None) -> AdapterSpec:
    """Return what the mean of so many runs of this adapter is: of their summed rank, or of `rank`.

    rsLoRA divides by the root of the rank, so its alpha is divided by the root of the number of runs; LoRA's stays.

    Raises:
        ConfigError: when the kind has no mean, or one of a rank that no bundle may have.
    """
    if spec.kind not in AVERAGED:
        raise ConfigError(
            f"adapter kind {spec.kind!r}: several runs have no mean, their updates cannot be combined",
            hint=f"use one of {', '.join(AVERAGED)}, or one run",
        )
    if spec.kind not in LOW_RANK:
        return spec
    wanted = num_runs * spec.rank if rank is None else rank
    if not 1 <= wanted <= _MAX_RANK:
        raise ConfigError(
            f"the mean of {num_runs} run(s) of rank {spec.rank} would have rank {wanted}, expected 1 to {_MAX_RANK}",
            hint="cut the mean back to the runs' rank, or take fewer runs",
        )
    root = math.sqrt(num_runs) if rank is None and spec.kind == "rslora" else 1.0
    return AdapterSpec.model_validate({**spec.model_dump(), "rank": wanted, "alpha": spec.alpha / root})


def mean_of(
    spec: AdapterSpec, runs: Sequence[Mapping[str, Tensor]], base: Mapping[str, Tensor], *, rank: int | None = None
) -> tuple[AdapterSpec, dict[str, Tensor], float]:
    """Return the adapter whose effective update is the mean of the runs', its tensors, and what the cut lost.

    Of one run that is the run itself, bit for bit. Factors A that all runs share stay as they are, and so does the
    rank, where the mean is cut.

    Args:
        spec: what every run trained.
        runs: their tensors, by canonical name, all of one shape.
        base: the tensors that the adapter replaces, by canonical name, as the runs began with them
            (`adapters.norms.base_tensors`); not needed for lora and rslora.
        rank: that of the mean; None for the one that holds it exactly. Without meaning for blocks and bitfit.

    Returns:
        What the mean is (`mean_spec`); its tensors, new ones: joined factors in the runs' dtype, all else float32 and
        worked out in float64; the distance from the exact mean over that one's Frobenius norm, 0 where nothing was cut.

    Raises:
        ConfigError: when there is no run, or the kind has no mean.
        WrongNames, WrongShape: when runs and base do not fit each other.
        NotFinite: when a value, or the mean, is not finite.

    Source: Eckart and Young, Psychometrika 1 (1936), for the cut.
    """
    if not runs:
        raise ConfigError("there is no run to take the mean of")
    found = mean_spec(spec, len(runs), rank=rank)
    first = {name: spec_of(tensor) for name, tensor in runs[0].items()}
    for number, run in enumerate(runs, 1):
        check_exact(f"run {number}", {name: spec_of(tensor) for name, tensor in run.items()}, first)
        check_finite(f"run {number}", run)
    lost = 0.0
    if len(runs) == 1 and found == spec:
        tensors = {name: tensor.clone() for name, tensor in runs[0].items()}
    elif spec.kind not in LOW_RANK:
        tensors = {name: _moved(name, [run[name] for run in runs], base) for name in first}
    elif rank is None:
        tensors = {name: torch.cat([run[name] for run in runs], dim=_joined_axis(name)) for name in first}
    else:
        tensors, lost = _cut(spec, found, runs)
    check_finite("the mean", tensors)
    return found, tensors, lost


def _joined_axis(name: str) -> int:
    """Return along which axis a factor holds the rank: A (K, I) the first, B (O, K) the last."""
    if not name.endswith(FACTORS):
        raise WrongNames(f"{name!r} is no factor of a low-rank adapter")
    return 0 if name.endswith(FACTORS[0]) else 1


def _moved(name: str, tensors: Sequence[Tensor], base: Mapping[str, Tensor]) -> Tensor:
    """Return the base with the mean of what was added to it."""
    if name not in base:
        raise WrongNames(f"the base weight {name!r} of an adapter's tensor is missing")
    start = base[name].double()
    if start.shape != tensors[0].shape:
        raise WrongShape(f"{name!r} has shape {tuple(tensors[0].shape)}, its base {tuple(start.shape)}")
    total = torch.zeros_like(start)
    for tensor in tensors:
        total += tensor.double() - start
    return (start + total / len(tensors)).float()


def _cut(
    spec: AdapterSpec, wanted: AdapterSpec, runs: Sequence[Mapping[str, Tensor]]
) -> tuple[dict[str, Tensor], float]:
    """Return the mean's factors at the wanted rank, and its distance from the exact one over that one's norm."""
    tensors: dict[str, Tensor] = {}
    exact: dict[str, Part] = {}
    share = 1 / len(runs)
    for module in modules_of(runs[0]):
        pairs = [factors_of(module, run) for run in runs]
        a_KI = runs[0][f"{module}.lora_A"]
        if wanted == spec and all(torch.equal(run[f"{module}.lora_A"], a_KI) for run in runs):
            b_OK = share * torch.stack([b for _, b in pairs]).sum(0)
            tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"] = a_KI.clone(), b_OK.float()
            exact[module] = LowRank(a_KI.float(), (scale_of(spec) * b_OK).float())
            continue
        parts = [{module: LowRank(a.float(), (scale_of(spec) * b).float())} for a, b in pairs]
        exact |= combined(parts, [share] * len(parts))
    to_cut = {module: part for module, part in exact.items() if f"{module}.lora_A" not in tensors}
    nearest, lost = truncated(to_cut, wanted.rank)
    root = math.sqrt(scale_of(wanted))
    for module, part in nearest.items():
        if not isinstance(part, LowRank):
            raise WrongShape(f"{module!r} has no factors of rank {wanted.rank}")
        tensors[f"{module}.lora_A"] = _filled(part.a.double() / root, wanted.rank, 0)
        tensors[f"{module}.lora_B"] = _filled(part.b.double() / root, wanted.rank, 1)
    whole = norm(exact)
    return {name: tensors[name] for name in runs[0]}, lost * norm(to_cut) / whole if whole else 0.0


def _filled(factor: Tensor, rank: int, axis: int) -> Tensor:
    """Return the factor in float32 with zeros up to the rank, where a module is smaller than that."""
    shape = list(factor.shape)
    shape[axis] = rank - shape[axis]
    return torch.cat([factor, factor.new_zeros(shape)], dim=axis).float().contiguous()
