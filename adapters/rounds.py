"""The weights that a federation's round starts from: the package's, with what earlier rounds added."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from adapters.updates import FACTORS, dense, from_tensors
from offsite.artefacts.round import Round
from offsite.tensors import spec_of


def grown(base: Mapping[str, Tensor], asked: Round) -> dict[str, Tensor]:
    """Return the package's tensors with what earlier rounds added; what changed is float32, as clients have it.

    Args:
        base: some of the package's tensors, by canonical name (`adapters.norms.base_tensors`).

    Raises:
        WrongNames, WrongShape, NotFinite: when the round's tensors are not an update of a package.
    """
    shapes = {name: spec_of(tensor) for name, tensor in base.items()}
    found = dict(base)
    for what, tensors in (("update", asked.load_update()), ("emulator", asked.load_emulator())):
        own = {name: tensor for name, tensor in tensors.items() if _weight_of(name) in shapes}
        for name, part in from_tensors(f"the round's {what}", own, shapes).items():
            found[name] = (found[name].double() + dense(part).double()).float()
    return found


def _weight_of(name: str) -> str:
    """Return which of the package's tensors a tensor of an update changes."""
    for end in FACTORS:
        name = name.removesuffix(end)
    return name
